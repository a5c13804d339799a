"""TIES on trimmed deltas."""

import torch

from gemb.merging.averages import soup
from gemb.merging.election import elected_mean, sign_balance
from gemb.merging.thinning import keep_largest

DELTAS = [
    torch.tensor([1, -2, 0.5, 3, -0.1, 0.2]),
    torch.tensor([2, 1, -0.4, -1, 0.3, 0.1]),
    torch.tensor([-0.5, -1, 0.6, 2, 0.2, -0.9]),
]


def test_ties_of_three_deltas_trimmed_to_half_is_worked_out_by_hand() -> None:
    trimmed = [keep_largest(delta, 0.5) for delta in DELTAS]
    expected = torch.tensor([1.5, -1.5, 0, 2.5, 0, -0.9])
    torch.testing.assert_close(elected_mean(trimmed, [1, 1, 1]), expected)
    torch.testing.assert_close(elected_mean(trimmed, [1, 1, 1], zero_sign=-1), expected)


def test_deltas_that_agree_in_sign_are_averaged() -> None:
    deltas = [delta.abs() for delta in DELTAS]
    torch.testing.assert_close(elected_mean(deltas, [1, 1, 1]), soup(deltas, [1, 1, 1]))
    torch.testing.assert_close(elected_mean(deltas, [1, 2, 1]), soup(deltas, [1, 2, 1]))


def test_the_order_of_models_does_not_matter() -> None:
    torch.testing.assert_close(elected_mean(DELTAS, [1, 2, 3]), elected_mean(DELTAS[::-1], [3, 2, 1]))


def test_without_normalising_the_deltas_that_agree_are_summed() -> None:
    deltas = [torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])]
    assert elected_mean(deltas, [1, 2], normalise=False).tolist() == [5, 6]
    torch.testing.assert_close(elected_mean(deltas, [1, 2]), torch.tensor([5 / 3, 3]))


def test_deltas_that_cancel_out_take_the_sign_asked_for() -> None:
    deltas = [torch.tensor([1.0, -2.0, -2.0]), torch.tensor([-1.0, 0.0, -2.0])]
    assert sign_balance(deltas, [1, 1]) == -2
    assert elected_mean(deltas, [1, 1], zero_sign=-1).tolist() == [-1, -2, -2]
    assert elected_mean(deltas, [1, 1]).tolist() == [1, -2, -2]


def test_an_entry_that_nobody_has_is_0() -> None:
    assert elected_mean([torch.zeros(3), torch.zeros(3)], [1, 1]).tolist() == [0, 0, 0]
