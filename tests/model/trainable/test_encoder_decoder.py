"""The order in which rows of two towers are computed: equal lengths side by side, each with its source."""

import numpy as np
import pytest

from gemb.model.trainable.encoder_decoder import PairedRows


@pytest.mark.parametrize("seed", range(20))
def test_pairs_cover_every_row_once_with_its_own_source(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths, source_lengths = random.integers(1, 4, (2, 12), dtype=np.int32)
    found = PairedRows.of(lengths, source_lengths)
    starts = np.cumsum(lengths[found.order]) - lengths[found.order]
    source_starts = np.cumsum(source_lengths[found.source_order]) - source_lengths[found.source_order]

    seen = []
    for own, source in found.pairs:
        assert own.rows == source.rows
        for number in range(own.rows):
            row = found.order[own.row + number]
            assert row == found.source_order[source.row + number]
            assert (lengths[row], source_lengths[row]) == (own.length, source.length)
            assert starts[own.row + number] == own.start + number * own.length
            assert source_starts[source.row + number] == source.start + number * source.length
            seen.append(int(row))
    assert sorted(seen) == list(range(12))


def test_rows_of_the_same_lengths_are_one_pair_of_groups() -> None:
    lengths = np.array([2, 5, 2, 2, 5], dtype=np.int32)
    found = PairedRows.of(lengths, np.array([3, 1, 4, 3, 1], dtype=np.int32))
    assert [(own.rows, own.length, source.length) for own, source in found.pairs] == [
        (2, 5, 1),
        (1, 2, 4),
        (2, 2, 3),
    ]
    assert found.order.tolist() == [1, 4, 2, 0, 3]
    assert found.source_order.tolist() == [2, 0, 3, 1, 4]
