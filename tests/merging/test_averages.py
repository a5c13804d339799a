"""Soups, task arithmetic and model stock."""

import pytest
import torch
from torch import Tensor

from gemb.merging.averages import model_stock, soup, task_arithmetic


def drawn(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_task_arithmetic_with_scale_one_over_n_is_the_soup() -> None:
    base, *models = drawn(4, 5, 3)
    whole = task_arithmetic(base, [one - base for one in models], [1, 1, 1], scale=1 / 3)
    torch.testing.assert_close(whole, soup(models, [1, 1, 1]))


def test_a_soup_does_not_depend_on_the_order() -> None:
    one, two, three = drawn(3, 6)
    torch.testing.assert_close(soup([one, two, three], [1, 2, 3]), soup([three, one, two], [3, 1, 2]))


def test_a_soup_of_copies_is_the_model_and_a_soup_is_linear() -> None:
    one, two, three = drawn(3, 6)
    torch.testing.assert_close(soup([one, one, one], [1, 1, 1]), one)
    torch.testing.assert_close(soup([2 * one, 2 * two], [1, 3]), 2 * soup([one, two], [1, 3]))
    torch.testing.assert_close(
        soup([one + three, two + three], [1, 1]), soup([one, two], [1, 1]) + soup([three, three], [1, 1])
    )


def test_weights_that_are_not_normalised_are_taken_as_they_are() -> None:
    one, two = drawn(2, 4)
    torch.testing.assert_close(soup([one, two], [2, 3], normalise=False), 2 * one + 3 * two)
    torch.testing.assert_close(soup([one, two], [2, 3]), 0.4 * one + 0.6 * two)


def test_scale_0_is_the_base_and_one_model_with_scale_1_is_that_model() -> None:
    base, model = drawn(2, 4)
    torch.testing.assert_close(task_arithmetic(base, [model - base], [1], scale=0), base)
    torch.testing.assert_close(task_arithmetic(base, [model - base], [1]), model)


def test_model_stock_of_deltas_at_60_degrees_is_two_thirds_of_the_way() -> None:
    base = torch.zeros(2, dtype=torch.float64)
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    two = torch.tensor([0.5, 0.75**0.5], dtype=torch.float64)
    # cos = 1/2, N = 2: t = 2 * 0.5 / 1.5
    torch.testing.assert_close(model_stock(base, [one, two]), (one + two) / 2 * (2 / 3))


def test_model_stock_of_copies_is_the_model_and_of_right_angles_the_base() -> None:
    base, model = drawn(2, 4, 3)
    torch.testing.assert_close(model_stock(base, [model, model]), model)
    across = base.clone()
    across[0], across[1] = base[0] + 1, base[1]
    other = base.clone()
    other[1] = base[1] + 1
    torch.testing.assert_close(model_stock(base, [across, other]), base)


def test_model_stock_by_row_is_model_stock_of_each_row() -> None:
    base, one, two = drawn(3, 4, 6)
    rows = torch.stack([model_stock(base[row], [one[row], two[row]]) for row in range(4)])
    torch.testing.assert_close(model_stock(base, [one, two], by_row=True), rows)
    assert not torch.allclose(model_stock(base, [one, two]), rows)


def test_what_has_no_mean_and_what_has_no_angle_is_refused() -> None:
    one, two = drawn(2, 4)
    with pytest.raises(ValueError, match=r"^the weights sum to 0, so they have no mean$"):
        soup([one, two], [1, -1])
    with pytest.raises(ValueError, match=r"^model stock needs two models beside its base, not 1$"):
        model_stock(one, [two])
    with pytest.raises(ValueError, match=r"^2 tensors, but 1 weights$"):
        soup([one, two], [1])
