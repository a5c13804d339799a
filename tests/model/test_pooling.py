"""Pooling modes over packed texts, worked out by hand and in float64."""

import numpy as np
import pytest
import torch

from gemb.model.layout import Layout
from gemb.model.pooling import LINEAR_MODES, pool
from tests.models import MODES

# Two texts of 3 tokens and one of 1.
LAYOUT = Layout.of(np.array([3, 3, 1], dtype=np.int32))
STATES = torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, 8.0], [0.0, 0.0], [-1.0, 1.0], [4.0, -4.0], [7.0, 9.0]])


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("cls", [1.0, -2.0], [0.0, 0.0]),
        ("lasttoken", [5.0, 8.0], [4.0, -4.0]),
        ("max", [5.0, 8.0], [4.0, 1.0]),
        ("mean", [3.0, 2.0], [1.0, -1.0]),
        ("mean_sqrt_len_tokens", [9 / 3**0.5, 6 / 3**0.5], [3 / 3**0.5, -3 / 3**0.5]),
        ("weightedmean", [(1 + 6 + 15) / 6, (-2 + 0 + 24) / 6], [(-2 + 12) / 6, (2 - 12) / 6]),
    ],
)
def test_each_mode_gives_the_numbers_worked_out_by_hand(
    mode: str, first: list[float], second: list[float]
) -> None:
    expected = torch.tensor([first, second, [7.0, 9.0]])  # of one token every mode gives that token
    torch.testing.assert_close(pool(STATES, LAYOUT, [mode]), expected)


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("cls", [3.0, 0.0], [-1.0, 1.0]),
        ("lasttoken", [5.0, 8.0], [4.0, -4.0]),
        ("max", [5.0, 8.0], [4.0, 1.0]),
        ("mean", [4.0, 4.0], [1.5, -1.5]),
        ("mean_sqrt_len_tokens", [8 / 2**0.5, 8 / 2**0.5], [3 / 2**0.5, -3 / 2**0.5]),
        # The weights stay those of the whole text: 2 and 3.
        ("weightedmean", [(6 + 15) / 5, (0 + 24) / 5], [(-2 + 12) / 5, (2 - 12) / 5]),
    ],
)
def test_tokens_of_the_prompt_take_no_part(mode: str, first: list[float], second: list[float]) -> None:
    # The text of one token is all prompt, and keeps it.
    expected = torch.tensor([first, second, [7.0, 9.0]])
    torch.testing.assert_close(pool(STATES, LAYOUT, [mode], skip=1), expected)


def test_a_text_that_is_all_prompt_keeps_its_last_token() -> None:
    for mode in MODES:
        torch.testing.assert_close(pool(STATES, LAYOUT, [mode], skip=3), STATES[[2, 5, 6]])


def test_several_modes_stand_one_after_another() -> None:
    both = pool(STATES, LAYOUT, ["max", "cls", "mean"])
    parts = [pool(STATES, LAYOUT, [mode]) for mode in ("max", "cls", "mean")]
    assert torch.equal(both, torch.cat(parts, dim=1))


def test_filling_tokens_take_no_part() -> None:
    filled = Layout.of(np.array([3, 3, 1], dtype=np.int32), least_rows=20)
    states = torch.cat([STATES, torch.full((13, 2), 100.0)])
    assert torch.equal(pool(states, filled, MODES), pool(STATES, LAYOUT, MODES))


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_does_not_depend_on_its_neighbours(mode: str) -> None:
    random = torch.Generator().manual_seed(3)
    for length, width in ((1, 96), (2, 5), (7, 96), (64, 384), (129, 80), (513, 8)):
        states = torch.randn(9 * length, width, generator=random)
        together = pool(states, Layout.of(np.full(9, length, dtype=np.int32)), [mode])
        one = Layout.of(np.array([length], dtype=np.int32))
        alone = [pool(states[row * length : (row + 1) * length], one, [mode]) for row in range(9)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", sorted(LINEAR_MODES))
def test_a_linear_map_may_follow_the_linear_modes(mode: str) -> None:
    random = torch.Generator().manual_seed(4)
    matrix = torch.randn(5, 2, generator=random)
    after = pool(STATES, LAYOUT, [mode]) @ matrix.T
    torch.testing.assert_close(after, pool(STATES @ matrix.T, LAYOUT, [mode]))
    nonlinear = pool(STATES, LAYOUT, ["max"]) @ matrix.T
    assert not torch.allclose(nonlinear, pool(STATES @ matrix.T, LAYOUT, ["max"]))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'median' is no pooling mode$"):
        pool(STATES, LAYOUT, ["median"])
