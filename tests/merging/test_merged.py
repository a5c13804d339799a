"""Methods by name, on one tensor."""

import pytest
import torch

from gemb.merging.averages import soup, task_arithmetic
from gemb.merging.catalogue import METHODS, MethodName, TensorSettings
from gemb.merging.merged import merged, seeded
from gemb.merging.thinning import Bounds

BASE, ONE, TWO = (torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
SETTINGS = TensorSettings(
    weights=(1.0, 3.0), densities=(1.0, 1.0), epsilons=(0.1, 0.1), outliers=(0.0, 0.0), normalise=False
)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].has_deltas])
def test_at_density_1_everything_but_the_election_is_task_arithmetic(name: MethodName) -> None:
    generators = [seeded(0, "x", model) for model in range(2)]
    found = merged(
        name, BASE, [ONE, BASE + 2 * (ONE - BASE)], SETTINGS, generators=generators, bounds=[Bounds()] * 2
    )
    deltas = [ONE - BASE, 2 * (ONE - BASE)]  # which agree in sign, so that an election changes nothing
    torch.testing.assert_close(found, task_arithmetic(BASE, deltas, [1, 3]), atol=1e-5, rtol=1e-5)


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
