"""Training through a grid: the forward pass sees the exported weights, the gradient passes straight through.

Fake quantisation with the straight-through estimator (Jacob et al., arXiv 1712.05877, section 3). The
optimizer keeps the weights in full precision; scales follow the current weights at every step and get no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemb.quantization.grids import Grid, Quantised


def fake_quantise(weight: Tensor, grid: Grid) -> Tensor:
    """[..., D] in the dtype of `weight`: its snapped values, equal to those of the exported file to the bit.

    The gradient of `weight` is that of the result, and 0 where the number lies past the highest code.
    In dtypes below float32 the snapped values are cut to that dtype once more.

    Raises ValueError if rows of that width cannot be stored on `grid`.
    """
    snapped: Tensor = _StraightThrough.apply(weight, grid)  # type: ignore[no-untyped-call]
    return snapped


class _StraightThrough(torch.autograd.Function):
    """Snapping, with the gradient of the identity inside of the grid and 0 outside."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:  # noqa: ANN401 - torch gives it no type
        """The snapped weight."""
        codes, scales = grid.round_unclamped(weight.float())
        ctx.clips = grid.clips
        if grid.clips:
            ctx.save_for_backward(codes <= grid.highest)
        return grid.dequantise(Quantised(codes.clamp_(max=grid.highest).to(torch.int8), scales)).to(
            weight.dtype
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch gives it no type
        """The gradient of the weight."""
        if not ctx.clips:
            return gradient, None
        (inside,) = ctx.saved_tensors
        return gradient * inside, None
