"""Training through a grid: forward as exported, gradient straight through."""

import pytest
import torch

from gemb.quantization.fake import fake_quantise
from gemb.quantization.grids import GRIDS, Q4_0, Q8_0, BlockGrid, Grid

ALL_GRIDS = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
def test_the_forward_pass_has_the_numbers_read_back_from_the_exported_bytes(grid: BlockGrid) -> None:
    weight = drawn(256, 128)
    exported = grid.dequantise(grid.unpack(grid.pack(grid.quantise(weight))))
    assert float((fake_quantise(weight, grid) - exported).abs().max()) == 0
    assert not torch.equal(exported, weight)


@ALL_GRIDS
def test_the_forward_pass_is_the_snapped_weight_and_exporting_that_again_loses_nothing(grid: Grid) -> None:
    weight = drawn(256, 128)
    assert torch.equal(fake_quantise(weight, grid), grid.snap(weight))
    assert torch.equal(fake_quantise(grid.snap(weight), grid), grid.snap(weight))


@ALL_GRIDS
def test_the_gradient_is_the_upstream_gradient_inside_and_0_where_clipped(grid: Grid) -> None:
    weight, upstream = drawn(64, 96).requires_grad_(), drawn(64, 96, seed=1)
    fake_quantise(weight, grid).backward(upstream)  # type: ignore[no-untyped-call]
    clipped = torch.zeros_like(upstream, dtype=torch.bool)
    if grid is Q4_0:  # the opposite of the largest number, within half a scale of its size
        blocks = weight.detach().view(64, 3, 32)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        clipped = (blocks / largest <= -7.5 / 8).flatten(-2)
        assert int(clipped.sum()) > 10
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.where(clipped, 0, upstream))


def test_a_weight_in_bfloat16_stays_in_it() -> None:
    weight = drawn(4, 32).bfloat16().requires_grad_()
    snapped = fake_quantise(weight, Q4_0)
    assert snapped.dtype == torch.bfloat16
    assert torch.equal(snapped, Q4_0.snap(weight).bfloat16())
    snapped.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_training_through_the_grid_moves_codes() -> None:
    weight = drawn(1, 32).requires_grad_()
    goal = Q4_0.snap(drawn(1, 32, seed=9))
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = []
    for _ in range(100):
        loss = (fake_quantise(weight, Q4_0) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_the_error_names_the_width() -> None:
    with pytest.raises(ValueError, match=r"^q4_0 has blocks of 32, but the rows are 40 wide$"):
        fake_quantise(torch.zeros(2, 40), Q4_0)
