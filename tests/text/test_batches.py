"""Token-budget batches: every row once, the budget kept, no padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemb.text.batches import token_batches
from gemb.text.tokenisation import Encoded


def encoded(lengths: list[int], prompt_tokens: int = 0) -> Encoded:
    """Texts of these lengths; token k of row r is 1000 r + k."""
    ids = [1000 * row + token for row, length in enumerate(lengths) for token in range(length)]
    zeros = np.zeros(len(lengths), np.int32)
    return Encoded(
        np.array(ids, np.int32), np.array(lengths, np.int32), zeros, zeros.astype(bool), prompt_tokens
    )


LENGTHS = st.lists(st.integers(1, 40), max_size=60)
BUDGETS = st.integers(1, 100)


@given(LENGTHS, BUDGETS)
def test_every_row_is_in_one_batch_with_its_own_ids(lengths: list[int], budget: int) -> None:
    found = {}
    for batch in token_batches(encoded(lengths), budget):
        assert batch.ids.dtype == batch.lengths.dtype == np.int32
        assert batch.lengths.sum() == len(batch.ids)
        ends = np.cumsum(batch.lengths)
        for row, length, end in zip(batch.rows.tolist(), batch.lengths.tolist(), ends.tolist(), strict=True):
            assert row not in found
            found[row] = batch.ids[end - length : end].tolist()
    assert found == {
        row: [1000 * row + token for token in range(length)] for row, length in enumerate(lengths)
    }


@given(LENGTHS, BUDGETS)
def test_a_batch_keeps_the_budget_or_is_one_row(lengths: list[int], budget: int) -> None:
    for batch in token_batches(encoded(lengths), budget):
        assert len(batch.rows) == 1 or len(batch.ids) <= budget


@given(LENGTHS, BUDGETS)
def test_no_row_would_have_fitted_into_the_batch_before(lengths: list[int], budget: int) -> None:
    batches = token_batches(encoded(lengths), budget)
    for before, after in itertools.pairwise(batches):
        assert len(before.ids) + after.lengths[0] > budget


@given(LENGTHS, BUDGETS)
def test_rows_are_sorted_by_length_and_equal_ones_stay_in_input_order(
    lengths: list[int], budget: int
) -> None:
    rows = [row for batch in token_batches(encoded(lengths), budget) for row in batch.rows.tolist()]
    assert rows == sorted(range(len(lengths)), key=lambda row: -lengths[row])


def test_batches_worked_out_by_hand() -> None:
    batches = token_batches(encoded([3, 1, 5, 3, 2, 1], prompt_tokens=1), 6)
    assert [batch.rows.tolist() for batch in batches] == [[2], [0, 3], [4, 1, 5]]
    assert [batch.lengths.tolist() for batch in batches] == [[5], [3, 3], [2, 1, 1]]
    assert batches[1].ids.tolist() == [0, 1, 2, 3000, 3001, 3002]
    assert {batch.prompt_tokens for batch in batches} == {1}


def test_no_rows_are_no_batches() -> None:
    assert token_batches(encoded([]), 10) == []


def test_a_row_longer_than_the_budget_is_alone_and_first() -> None:
    assert [batch.rows.tolist() for batch in token_batches(encoded([1, 9, 1]), 4)] == [[1], [0, 2]]


def test_a_row_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="row 1 has no tokens; reject it before batching"):
        token_batches(encoded([2, 0]), 4)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="budget_tokens is 0, but must be at least 1"):
        token_batches(encoded([1]), 0)
