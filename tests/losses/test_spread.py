"""Spread-out and global orthogonal regularisation."""

import re
from collections.abc import Callable

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from torch import Tensor, nn

from gemb.losses import all_sizes, orthogonality, spread_out
from tests.losses import plain
from tests.losses.goldens import POSITIVES, QUERIES, SIX_DIGITS

Loss = Callable[..., Tensor]


def normal(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def moments(rows: Tensor, others: Tensor, size: int) -> tuple[float, float]:
    """The mean and the mean square of the cosines of different rows, in loops."""
    pairs = [
        plain.cosine(rows[i, :size], others[j, :size])
        for i in range(len(rows))
        for j in range(len(others))
        if i != j
    ]
    return sum(pairs) / len(pairs), sum(value**2 for value in pairs) / len(pairs)


@pytest.mark.parametrize("rows", [2, 5, 20])
def test_spread_out_is_the_mean_squared_cosine_of_different_rows_at_every_size(rows: int) -> None:
    x = normal(rows, 6)
    expected = torch.tensor([moments(x, x, size)[1] for size in (6, 2, 4)], dtype=torch.float64)
    torch.testing.assert_close(spread_out(x, sizes=(6, 2, 4)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [3, 7, 40])
@pytest.mark.parametrize("loss", [spread_out, orthogonality])
def test_the_gradient_is_the_derivative_of_the_value(rows: int, loss: Loss) -> None:
    x, y = normal(rows, 6).requires_grad_(), normal(rows + 2, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, sizes=(2, 6)), (x,))
    assert torch.autograd.gradcheck(lambda x, y: loss(x, others=y, offset=1, sizes=(4, 6)), (x, y))


@pytest.mark.parametrize("sizes", [(8,), (8, 2, 4)])
@pytest.mark.parametrize("rows", [12, 120])
def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(rows: int, sizes: tuple[int, ...]) -> None:
    x = normal(rows, 8).requires_grad_()
    factors = torch.arange(1, len(sizes) + 1).double()
    whole = spread_out(x, sizes=sizes)
    third = rows // 3
    parts = [
        spread_out(x[start : start + third], others=x, offset=start, sizes=sizes)
        for start in (0, third, 2 * third)
    ]
    mean = torch.stack(parts).mean(0)
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    given, wanted = (torch.autograd.grad((value * factors).sum(), x)[0] for value in (mean, whole))
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [3, 40, 300])
def test_both_ways_to_the_sum_of_squares_are_the_plain_one_in_value_and_gradient(
    rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Few rows are compared with each other, many by the products of their coordinates."""
    x = (normal(rows, 16, dtype=dtype) + 1).requires_grad_()
    sizes = (4, 16, 9)
    factors = torch.tensor([1.0, 3.0, 2.0], dtype=dtype)
    plain_terms = []
    for size in sizes:
        unit = nn.functional.normalize(x[:, :size], dim=1)
        squares = (unit @ unit.T).square()
        plain_terms.append((squares.sum() - squares.diagonal().sum()) / (rows * (rows - 1)))
    wanted = torch.stack(plain_terms)
    found = spread_out(x, sizes=sizes)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    given, want = (torch.autograd.grad((value * factors).sum(), x)[0] for value in (found, wanted))
    assert float((given - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("weights", [None, (1, 2, 3)])
def test_panels_and_tiles_of_any_height_give_the_same(
    weights: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = normal(37, 24).requires_grad_(), normal(40, 24, seed=1).requires_grad_()
    factors = torch.tensor([1, 2, 3]).double()

    def moments_and_gradients() -> list[Tensor]:
        terms = spread_out(x, others=y, offset=2, sizes=(24, 3, 16), weights=weights)
        alone = spread_out(x, sizes=(24, 3, 16), weights=weights)
        gradients = torch.autograd.grad(((terms + alone) * factors).sum(), [x, y])
        return [terms, alone, *gradients]

    expected = moments_and_gradients()
    monkeypatch.setattr(all_sizes, "PANEL_ROWS", 20)
    monkeypatch.setattr(all_sizes, "TILE_NUMBERS", 1)
    for given, wanted in zip(moments_and_gradients(), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-14)


def test_orthogonality_is_the_regulariser_of_sentence_transformers() -> None:
    queries, positives = (normal(9, 4, seed).requires_grad_() for seed in (1, 2))
    loss = GlobalOrthogonalRegularizationLoss(nn.Identity(), aggregation="sum")  # type: ignore[arg-type]
    wanted = torch.stack(list(loss.compute_loss_from_embeddings([queries, positives]).values())).sum()
    found = orthogonality(queries)[0] + orthogonality(positives)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for given, want in zip(
        torch.autograd.grad(found, [queries, positives]),
        torch.autograd.grad(wanted, [queries, positives]),
        strict=True,
    ):
        torch.testing.assert_close(given, want, rtol=0, atol=1e-12)


def test_orthogonality_between_two_sides_takes_the_non_matching_pairs() -> None:
    queries, positives = normal(6, 4, 1), normal(6, 4, 2)
    expected = []
    for size in (2, 4):
        first, second = moments(queries, positives, size)
        expected.append(first**2 + max(0.0, second - 1 / size))
    found = orthogonality(queries, others=positives, sizes=(2, 4))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_signs_lengths_order_and_rotation_change_nothing() -> None:
    x = normal(9, 5)
    signs = torch.tensor([1, -1, 1, 1, -2, -1, 0.5, 1, -3], dtype=torch.float64)
    rotation = torch.linalg.qr(normal(5, 5, 4)).Q
    for same in (x * signs[:, None], x.flip(0), x @ rotation):
        torch.testing.assert_close(spread_out(same), spread_out(x), rtol=1e-12, atol=0)


def test_orthonormal_rows_give_zero_and_equal_rows_one() -> None:
    torch.testing.assert_close(spread_out(torch.eye(5)), torch.zeros(1))
    torch.testing.assert_close(spread_out(torch.ones(5, 3)), torch.ones(1))
    torch.testing.assert_close(spread_out(torch.ones(50, 3)), torch.ones(1))


def test_rows_spread_evenly_give_one_over_the_dims_and_no_rows_less_than_the_welch_bound() -> None:
    evenly = spread_out(normal(4000, 8), sizes=(8, 4))
    torch.testing.assert_close(evenly, torch.tensor([1 / 8, 1 / 4]).double(), rtol=0.01, atol=0)
    rows, width = 12, 8
    bound = (rows - width) / (width * (rows - 1))
    frame = torch.cat([torch.eye(8), torch.linalg.qr(normal(8, 8)).Q[:4].float()])
    assert bound <= spread_out(frame).item()
    assert orthogonality(normal(4000, 8)).item() < 1e-3 < spread_out(normal(4000, 8)).item()


def test_a_single_row_has_no_other_and_gives_zero_without_gradient() -> None:
    x = normal(1, 5).requires_grad_()
    for loss in (spread_out, orthogonality):
        value = loss(x, sizes=(5, 2))
        assert value.tolist() == [0, 0]
        assert torch.autograd.grad(value.sum(), x)[0].abs().max() == 0


@pytest.mark.parametrize("rows", [6, 60])
def test_rows_of_zeros_count_as_orthogonal_and_get_no_gradient(rows: int) -> None:
    x = normal(rows, 5)
    x[2] = 0
    x[3, :2] = 0
    x.requires_grad_()
    value = spread_out(x, sizes=(2, 5))
    expected = [moments(x.detach(), x.detach(), size)[1] for size in (2, 5)]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert gradient.isfinite().all()
    assert gradient[2].abs().max() == 0


def test_the_golden_values() -> None:
    def both(sizes: tuple[int, ...]) -> list[float]:
        return (spread_out(QUERIES, sizes=sizes) + spread_out(POSITIVES, sizes=sizes)).tolist()

    assert spread_out(QUERIES).item() == pytest.approx(0.119048, abs=SIX_DIGITS)
    assert spread_out(POSITIVES).item() == pytest.approx(0.157407, abs=SIX_DIGITS)
    assert both((4, 2)) == pytest.approx([0.276455, 0.666667], abs=SIX_DIGITS)


def test_an_offset_beyond_the_others_is_refused() -> None:
    message = "4 rows from offset 1 are not among 4 others"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spread_out(normal(4, 5), others=normal(4, 5), offset=1)
