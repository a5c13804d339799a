"""Optimizers, clipping, averages and schedules."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemb.training.optimizers import (
    LastAverage,
    MovingAverage,
    Optimizer,
    clip_gradients,
    make_optimizer,
    orthogonalised,
)
from gemb.training.schedules import schedule

ROWS, WIDTH = 12, 6


def table(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype))


def sparse(gradient: Tensor, rows: Sequence[int]) -> Tensor:
    """The gradient with its `rows` only."""
    return torch.sparse_coo_tensor(
        torch.tensor([list(rows)]), gradient[list(rows)], gradient.shape, check_invariants=True
    )


def random_gradient(seed: int, shape: Sequence[int] = (ROWS, WIDTH)) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))


def adamw_of(parameter: nn.Parameter, **options: Any) -> Optimizer:  # noqa: ANN401
    group = {"params": [parameter], "weight_decay": 0.1}
    return Optimizer([group], learning_rate=0.05, **options)


# --- AdamW


def test_dense_adamw_equals_torch_to_the_bit() -> None:
    own, theirs = table(), table()
    optimizer = adamw_of(own)
    reference = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1, fused=True)
    for step in range(5):
        own.grad = random_gradient(step)
        theirs.grad = random_gradient(step)
        optimizer.step()
        reference.step()
    assert torch.equal(own, theirs)


def test_sparse_adamw_equals_the_dense_one_where_all_rows_are_used() -> None:
    own, theirs = table(torch.float64), table(torch.float64)
    optimizer, reference = adamw_of(own), adamw_of(theirs)
    for step in range(5):
        theirs.grad = random_gradient(step).double()
        own.grad = sparse(theirs.grad, range(ROWS))
        optimizer.step()
        reference.step()
    torch.testing.assert_close(own, theirs, atol=1e-14, rtol=0)


def test_rows_without_a_gradient_stay_and_their_moments_fade_as_with_a_gradient_of_zero() -> None:
    own, theirs = table(torch.float64), table(torch.float64)
    optimizer, reference = adamw_of(own), adamw_of(theirs)
    used = [range(ROWS), (1, 5), (5,), (2, 5), range(ROWS)]
    for step, rows in enumerate(used):
        before = own.detach().clone()
        gradient = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
        gradient[list(rows)] = random_gradient(step).double()[list(rows)]
        own.grad, theirs.grad = sparse(gradient, rows), gradient
        optimizer.step()
        reference.step()
        idle = [row for row in range(ROWS) if row not in rows]
        assert torch.equal(own[idle], before[idle])
        assert not torch.equal(own[list(rows)], before[list(rows)])
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            optimizer.state[own][moment], reference.state[theirs][moment], atol=1e-14, rtol=0
        )


def test_a_row_given_twice_counts_as_its_sum() -> None:
    own, theirs = table(), table()
    gradient = random_gradient(1)
    own.grad = torch.sparse_coo_tensor(
        torch.tensor([[3, 4, 3]]), gradient[[3, 4, 5]], gradient.shape, check_invariants=True
    )
    both = torch.zeros(ROWS, WIDTH)
    both[3], both[4] = gradient[3] + gradient[5], gradient[4]
    theirs.grad = sparse(both, (3, 4))
    adamw_of(own).step()
    adamw_of(theirs).step()
    assert torch.equal(own, theirs)


# --- Muon


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one_and_the_same_directions(
    shape: tuple[int, int, int],
) -> None:
    matrices = random_gradient(1, shape)
    found = orthogonalised(matrices)
    values = torch.linalg.svdvals(found)
    assert 0.65 < float(values.min())  # the quintic's own spread (Jordan 2024)
    assert float(values.max()) < 1.25
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = left.mT @ found.double() @ right.mT
    off_diagonal = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
    assert float(off_diagonal.abs().max()) < 1e-4


def test_orthogonalising_zeros_gives_zeros() -> None:
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_muon_moves_a_matrix_as_far_as_adamw_would() -> None:
    matrix = nn.Parameter(torch.zeros(40, 60))
    optimizer = make_optimizer([("layer.weight", matrix)], "muon", learning_rate=0.01, weight_decay=0.0)
    matrix.grad = random_gradient(1, (40, 60))
    optimizer.step()
    size = float(matrix.detach().square().mean().sqrt())
    # A random square part of 40 unit directions among 60: 0.2 sqrt(60) sqrt(40 / (40 * 60)) = 0.2.
    assert size == pytest.approx(0.2 * 0.01, rel=0.15)


def test_matrices_of_one_shape_are_moved_as_each_alone() -> None:
    together = [nn.Parameter(random_gradient(seed, (6, 9))) for seed in range(3)]
    alone = copy.deepcopy(together)
    for place, one in enumerate([*together, *alone]):
        one.grad = random_gradient(place % 3, (6, 9))
    make_optimizer([(str(i), one) for i, one in enumerate(together)], "muon", learning_rate=0.1).step()
    for one in alone:
        make_optimizer([("0", one)], "muon", learning_rate=0.1).step()
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_muon_takes_matrices_only_and_decay_spares_vectors_and_tables() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layer": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    model["norm"].weight.requires_grad_(False)
    optimizer = make_optimizer(
        model.named_parameters(), "muon", learning_rate=0.1, weight_decay=0.3, tables=["embed.weight"]
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (group["update"], group["weight_decay"], [names[id(one)] for one in group["params"]])
        for group in optimizer.param_groups
    ]
    assert found == [
        ("muon", 0.3, ["layer.weight"]),
        ("adamw", 0.0, ["embed.weight", "layer.bias", "norm.bias"]),
    ]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter is trained"):
        make_optimizer([], learning_rate=0.1)


# --- going on after a stop


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_to_the_bit(name: Any) -> None:  # noqa: ANN401
    def make() -> tuple[dict[str, nn.Parameter], Optimizer]:
        parameters = {
            "table": table(),
            "matrix": nn.Parameter(random_gradient(7, (5, 8))),
            "bias": nn.Parameter(random_gradient(8, (8,))),
        }
        return parameters, make_optimizer(
            parameters.items(), name, learning_rate=0.05, weight_decay=0.1, tables=["table"]
        )

    def run(parameters: dict[str, nn.Parameter], optimizer: Optimizer, steps: Sequence[int]) -> None:
        for step in steps:
            parameters["table"].grad = sparse(random_gradient(step), (step, step + 3))
            for key in ("matrix", "bias"):
                parameters[key].grad = random_gradient(step, parameters[key].shape)
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (1 + step)
            optimizer.step()

    whole, optimizer = make()
    run(whole, optimizer, range(6))

    first, optimizer = make()
    run(first, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    second, optimizer = make()
    with torch.no_grad():
        for key, value in first.items():
            second[key].copy_(value)
    optimizer.load_state_dict(state)
    run(second, optimizer, range(3, 6))

    assert all(torch.equal(second[key], whole[key]) for key in whole)


# --- clipping


def test_clipping_counts_sparse_gradients_as_the_dense_ones_they_stand_for() -> None:
    parameters = [table(), table(), nn.Parameter(torch.zeros(3))]
    dense = copy.deepcopy(parameters)
    gradient = random_gradient(1)
    parameters[0].grad = torch.sparse_coo_tensor(
        torch.tensor([[3, 4, 3]]), gradient[[3, 4, 5]], gradient.shape, check_invariants=True
    )
    dense[0].grad = parameters[0].grad.to_dense()
    for place in (1, 2):
        parameters[place].grad = random_gradient(place, parameters[place].shape)
        dense[place].grad = random_gradient(place, parameters[place].shape)

    norm = clip_gradients(parameters, 0.5)

    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(dense, 0.5)), rel=1e-6)
    for own, theirs in zip(parameters, dense, strict=True):
        assert own.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(own.grad.to_dense(), theirs.grad, atol=1e-6, rtol=1e-5)
    assert clip_gradients(parameters, None) == pytest.approx(0.5, rel=1e-6)


def test_short_and_broken_gradients_are_left_as_they_are() -> None:
    parameter = table()
    parameter.grad = random_gradient(1)
    before = parameter.grad.clone()
    assert clip_gradients([parameter], 1e3) == pytest.approx(float(before.norm()), rel=1e-6)
    assert torch.equal(parameter.grad, before)
    parameter.grad[0, 0] = math.nan
    assert math.isnan(clip_gradients([parameter], 1e-3))
    assert torch.equal(parameter.grad[1:], before[1:])
    assert clip_gradients([table()], 1.0) == 0.0


# --- averages


def test_moving_average_follows_its_formula_and_leaves_the_weights() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage([("w", weight)], decay=0.5)
    expected = 1.0
    for count, value in enumerate((3.0, 7.0, -2.0, 5.0), 1):
        weight.data.fill_(value)
        average.update()
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert weight.item() == pytest.approx(expected, rel=1e-6)
    assert weight.item() == 5.0


def test_average_of_the_last_updates_forgets_the_older_ones() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average = LastAverage([("w", weight)], count=2)
    assert float(average.average()["w"]) == 1.0
    for value in (3.0, 7.0, -2.0):
        weight.data.fill_(value)
        average.update()
    with average.applied():
        assert weight.item() == 2.5
    assert weight.item() == -2.0


@pytest.mark.parametrize("kind", ["moving", "last"])
def test_averages_are_restored_to_the_bit(kind: str) -> None:
    weight = nn.Parameter(random_gradient(1))

    def make() -> MovingAverage | LastAverage:
        weight.data.copy_(random_gradient(9))
        parameters = [("w", weight)]
        return MovingAverage(parameters, 0.9) if kind == "moving" else LastAverage(parameters, 3)

    def updated(average: MovingAverage | LastAverage, seeds: Sequence[int]) -> MovingAverage | LastAverage:
        for seed in seeds:
            weight.data.copy_(random_gradient(seed))
            average.update()
        return average

    whole = updated(make(), range(5))
    half, other = updated(make(), range(2)), make()
    other.load_state_dict({name: one.clone() for name, one in half.state_dict().items()})
    updated(other, range(2, 5))

    expected, found = whole.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- schedules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]),
        ("cosine", [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]),
    ],
)
def test_rate_rises_in_a_line_and_falls_to_the_floor(name: Any, expected: list[float]) -> None:  # noqa: ANN401
    rate = schedule(name, warmup=0.2, floor=0.1)
    assert [rate(done) for done in (0.0, 0.1, 0.2, 0.6, 1.0, 1.5)] == pytest.approx(expected)


def test_cosine_falls_slowly_at_first() -> None:
    assert schedule("cosine")(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule("linear")(0.25) == 0.75


@pytest.mark.parametrize(("warmup", "floor"), [(1.0, 0.0), (-0.1, 0.0), (0.0, 1.5)])
def test_shares_outside_of_a_run_are_refused(warmup: float, floor: float) -> None:
    with pytest.raises(ValueError, match="are shares: 0 <= warmup < 1, 0 <= floor <= 1"):
        schedule("cosine", warmup=warmup, floor=floor)
