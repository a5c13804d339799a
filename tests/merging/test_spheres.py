"""SLERP, multi-SLERP and the Karcher mean."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gemb.merging.spheres import karcher, multislerp, slerp


def drawn(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def unit(tensor: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(tensor)
    return tensor / length


def test_karcher_of_two_is_the_mean_length_times_slerp_at_one_half() -> None:
    one, two = drawn(2, 5, 4)
    expected = (one.norm() + two.norm()) / 2 * slerp(unit(one), unit(two), 0.5)
    torch.testing.assert_close(karcher([one, two], [1, 1]), expected, atol=1e-14, rtol=0)


def test_karcher_of_many_is_where_the_arcs_cancel_out() -> None:
    models = [unit(one) for one in drawn(4, 30)]
    mean = karcher(models, [1, 2, 3, 4], steps=100, tolerance=1e-12)
    pull = torch.zeros(30, dtype=torch.float64)
    for model, weight in zip(models, [1, 2, 3, 4], strict=True):
        angle = torch.arccos(mean @ model)
        pull += weight * angle / torch.sin(angle) * (model - (mean @ model) * mean)
    assert pull.norm() < 1e-10
    assert mean.norm() == pytest.approx(1)


def test_the_mean_of_identical_tensors_is_that_tensor() -> None:
    (one,) = drawn(1, 6)
    torch.testing.assert_close(karcher([one, one, one], [1, 2, 1]), one)
    torch.testing.assert_close(multislerp([one, one, one], [1, 2, 1]), one, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slerp(one, one, 0.3), one)


@pytest.mark.parametrize("method", [karcher, multislerp])
def test_the_length_is_the_weighted_mean_of_the_lengths(
    method: Callable[[list[Tensor], list[float]], Tensor],
) -> None:
    one, two = (unit(each) for each in drawn(2, 7))
    torch.testing.assert_close(method([one, 5 * one], [3, 1]), 2 * one, atol=1e-7, rtol=0)
    assert method([one, 5 * two], [3, 1]).norm() == pytest.approx(2)


def test_multislerp_of_right_angles_is_the_weighted_mean_of_the_directions() -> None:
    east, north = torch.eye(2, dtype=torch.float64)
    expected = torch.tensor([1, 3], dtype=torch.float64) / 10**0.5 * 2.5  # lengths 1 and 3, weights 1 and 3
    torch.testing.assert_close(multislerp([east, 3 * north], [1, 3]), expected, atol=1e-7, rtol=0)


def test_multislerp_is_close_to_karcher_where_directions_are_near() -> None:
    (start, *steps) = drawn(4, 40)
    models = [start + 0.05 * step for step in steps]
    torch.testing.assert_close(multislerp(models, [1, 1, 1]), karcher(models, [1, 1, 1]), atol=1e-4, rtol=0)


def test_multislerp_with_a_base_is_multislerp_of_the_deltas() -> None:
    base, one, two = drawn(3, 8)
    expected = base + multislerp([one - base, two - base], [1, 3])
    torch.testing.assert_close(multislerp([one, two], [1, 3], base), expected)


def test_slerp_begins_and_ends_at_its_tensors() -> None:
    one, two = drawn(2, 5, 4)
    torch.testing.assert_close(slerp(one, two, 0.0), one)
    torch.testing.assert_close(slerp(one, two, 1.0), two)


def test_slerp_of_unit_tensors_keeps_unit_length_and_divides_the_angle() -> None:
    one, two = (unit(each) for each in drawn(2, 9))
    point = slerp(one, two, 0.25)
    assert point.norm() == pytest.approx(1)
    assert torch.arccos(one @ point) == pytest.approx(float(torch.arccos(one @ two)) / 4)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_of_collinear_tensors_is_a_line(factor: float) -> None:
    (one,) = drawn(1, 6)
    torch.testing.assert_close(slerp(one, factor * one, 0.25), 0.75 * one + 0.25 * factor * one)


def test_a_tensor_of_zeros_has_no_direction() -> None:
    (one,) = drawn(1, 6)
    nothing = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(karcher([one, nothing], [1, 1]), one / 2)
    assert not karcher([nothing, nothing], [1, 1]).any()
    torch.testing.assert_close(slerp(one, nothing, 0.5), one / 2)


def test_directions_that_cancel_out_fall_back_to_the_weighted_mean() -> None:
    (one,) = drawn(1, 6)
    torch.testing.assert_close(multislerp([one, -one], [1, 1]), torch.zeros_like(one), atol=1e-7, rtol=0)
    assert torch.isfinite(karcher([one, -one], [1, 1])).all()


@pytest.mark.parametrize("method", [karcher, multislerp])
def test_weights_that_sum_to_0_are_refused(method: object) -> None:
    one, two = drawn(2, 4)
    assert callable(method)
    with pytest.raises(ValueError, match=r"^the weights sum to 0, so they have no mean$"):
        method([one, two], [1, -1])
