"""Methods by name, on one tensor."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemb.merging.averages import model_stock, soup, task_arithmetic
from gemb.merging.catalogue import METHODS, MethodName, TensorSettings
from gemb.merging.merged import merged, seeded
from gemb.merging.thinning import Bounds, drop_at_random, drop_by_rank, keep_within

BASE, ONE, TWO = (torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
SETTINGS = TensorSettings(
    weights=(1.0, 3.0), densities=(1.0, 1.0), epsilons=(0.1, 0.1), outliers=(0.0, 0.0), normalise=False
)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].has_deltas])
def test_at_density_1_everything_but_the_election_is_task_arithmetic(name: MethodName, scale: float) -> None:
    generators = [seeded(0, "x", model) for model in range(2)]
    settings = replace(SETTINGS, scale=scale)
    found = merged(
        name, BASE, [ONE, BASE + 2 * (ONE - BASE)], settings, generators=generators, bounds=[Bounds()] * 2
    )
    deltas = [ONE - BASE, 2 * (ONE - BASE)]  # which agree in sign, so that an election changes nothing
    expected = task_arithmetic(BASE, deltas, [1, 3], scale=scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("dare_linear", lambda delta: drop_at_random(delta, 0.5, seeded(0, "x", 0))),
        ("dare_ties", lambda delta: drop_at_random(delta, 0.5, seeded(0, "x", 0))),
        ("della_linear", lambda delta: drop_by_rank(delta, 0.5, 0.2, seeded(0, "x", 0))),
        ("della", lambda delta: drop_by_rank(delta, 0.5, 0.2, seeded(0, "x", 0))),
        ("ties", lambda delta: keep_within(delta, Bounds(0.5, 2.0))),
        ("breadcrumbs", lambda delta: keep_within(delta, Bounds(0.5, 2.0))),
        ("breadcrumbs_ties", lambda delta: keep_within(delta, Bounds(0.5, 2.0))),
    ],
)
def test_of_one_model_comes_what_its_method_leaves_of_the_delta(
    name: MethodName, left: Callable[[Tensor], Tensor]
) -> None:
    settings = TensorSettings(weights=(1.0,), densities=(0.5,), epsilons=(0.2,), normalise=False)
    found = merged(name, BASE, [ONE], settings, generators=[seeded(0, "x", 0)], bounds=[Bounds(0.5, 2.0)])
    torch.testing.assert_close(found, BASE + left(ONE - BASE))


def test_model_stock_takes_rows_by_themselves_if_told() -> None:
    by_row = merged("model_stock", BASE, [ONE, TWO], replace(SETTINGS, by_row=True))
    assert torch.equal(by_row, model_stock(BASE, [ONE, TWO], by_row=True))
    assert not torch.equal(by_row, merged("model_stock", BASE, [ONE, TWO], SETTINGS))


def test_a_normalised_sum_of_deltas_is_the_soup_of_the_models() -> None:
    settings = TensorSettings(weights=(1.0, 3.0))
    found = merged("task_arithmetic", BASE, [ONE, TWO], settings)
    torch.testing.assert_close(found, soup([ONE, TWO], [1, 3]), atol=1e-6, rtol=1e-5)


def test_random_numbers_are_those_of_seed_tensor_and_model() -> None:
    first = torch.rand(4, generator=seeded(1, "norm.weight", 0))
    assert torch.equal(first, torch.rand(4, generator=seeded(1, "norm.weight", 0)))
    for other in (seeded(2, "norm.weight", 0), seeded(1, "norm.bias", 0), seeded(1, "norm.weight", 1)):
        assert not torch.equal(first, torch.rand(4, generator=other))


def test_a_missing_base_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^ties starts from a base, and there is none$"):
        merged("ties", None, [ONE, TWO], SETTINGS)
