"""Cosines of many rows at all Matryoshka sizes at once, and their gradient, for about the cost of one size.

The dot product of two prefixes is a running sum over the blocks of coordinates between the sizes, so all
sizes together need each coordinate once. The gradient goes the other way: a coordinate takes part in every
size above it, so its slope is the sum of those sizes' slopes, and each coordinate is needed once again.

R rows, C candidates, D width, K sizes in ascending order. `slopes` are the derivatives of the loss.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

PANEL_ROWS = 256
"""How many anchors are multiplied with the candidates at a time: fewer are slow, more need memory."""
TILE_NUMBERS = 1 << 18
"""How many cosines over all sizes are worked on at a time on a CPU: 1 MB of float32 stays in its cache."""


class Rows:
    """Raw rows[R, D] with the inverse norms[K, R] of their prefixes, 0 for a prefix of zeros.

    While a loss goes over its blocks, `gradient`[R, D] gathers what pulls each row towards the others, and
    `along`[K, R] the sum of slope * cosine, the part of the pull that lies along the row; `finish` takes
    it off, because a cosine does not depend on the length.
    """

    def __init__(self, rows: Tensor, sizes: tuple[int, ...], *, with_gradient: bool) -> None:
        self.rows = rows
        self.within = _within(sizes, rows.shape[1], rows.dtype, rows.device)
        self.parts = _parts(rows, sizes)
        squares = (rows.square() @ self.within).T  # [K, R]
        self.inverse = squares.rsqrt().where(squares > 0, 0)
        self.gradient = torch.zeros_like(rows) if with_gradient else None
        self.gradient_parts = () if self.gradient is None else _parts(self.gradient, sizes)
        self.along = torch.zeros_like(squares)

    def finish(self) -> Tensor | None:
        """The gradient of the loss with respect to the rows; None if it was not asked for."""
        if self.gradient is not None:
            lengthwise = self.along.mul_(self.inverse).mul_(self.inverse)  # [K, R]
            self.gradient.addcmul_(self.rows, lengthwise.T @ self.within.T, value=-1)
        return self.gradient


def panel_memory(anchors: Rows, candidates: Rows) -> Tensor:
    """Room for what `dot_products` gives, one panel after the other."""
    return anchors.rows.new_empty(
        len(anchors.parts), min(PANEL_ROWS, len(anchors.rows)), len(candidates.rows)
    )


def dot_products(anchors: Rows, span: slice, candidates: Rows, memory: Tensor) -> Tensor:
    """Of each block of coordinates of the anchors in `span` and all candidates: [K, span, C], in `memory`."""
    products = memory[:, : span.stop - span.start]
    for product, x, y in zip(products, anchors.parts, candidates.parts, strict=True):
        torch.mm(x[span], y.T, out=product)
    return products


def to_cosines(products: Tensor, anchors: Rows, span: slice, candidates: Rows, scale: float) -> Tensor:
    """`scale` times the cosines[K, span, C] in the place of what `dot_products` gave for some anchors."""
    for smaller, larger in pairwise(products):
        larger.add_(smaller)
    return products.mul_((anchors.inverse[:, span] * scale)[:, :, None]).mul_(candidates.inverse[:, None])


def to_slopes(
    cosines: Tensor,
    slopes: Tensor,
    row_slopes: Tensor,
    matches: tuple[Tensor, Tensor] | None,
    anchors: Rows,
    span: slice,
    candidates: Rows,
    scale: float,
) -> None:
    """In the place of what `to_cosines` gave the slopes of the dot products of each block of coordinates.

    The slopes of the scaled cosines are slopes[K, span, C] * row_slopes[K, span]; matches: a column[span] for
    each row where instead the slope is the number[K, span] given. Overwrites `slopes`.
    """
    numbers = torch.arange(slopes.shape[1], device=slopes.device)
    along = anchors.along[:, span]
    lengths = anchors.inverse[:, span] * scale
    if matches is not None:
        columns, given = matches
        slopes[:, numbers, columns] = 0
        matched = cosines[:, numbers, columns] * given
        along += matched
        candidates.along[:, columns] += matched
    cosines.mul_(slopes)
    along += cosines.sum(2).mul_(row_slopes)
    candidates.along += torch.bmm(row_slopes[:, None], cosines)[:, 0]
    slopes.mul_((row_slopes * lengths)[:, :, None])  # now of the dot products of prefixes
    if matches is not None:
        slopes[:, numbers, columns] = given * lengths
    # A coordinate belongs to its own size and to all larger ones.
    torch.mul(slopes[-1], candidates.inverse[-1], out=cosines[-1])
    for k in range(len(slopes) - 2, -1, -1):
        torch.addcmul(cosines[k + 1], slopes[k], candidates.inverse[k], out=cosines[k])


def add_gradient(slopes: Tensor, anchors: Rows, span: slice, candidates: Rows) -> None:
    """Add to the gradients of both sides what the slopes[K, span, C] that `to_slopes` gave make."""
    for k, slope in enumerate(slopes):
        anchors.gradient_parts[k][span].addmm_(slope, candidates.parts[k])
        candidates.gradient_parts[k].addmm_(slope.T, anchors.parts[k][span])


def pair_cosines(anchors: Rows, rows: Tensor, candidates: Rows, columns: Tensor, scale: float) -> Tensor:
    """`scale` times the cosines of the M pairs of anchor rows[i] and candidate columns[i]: [K, M]."""
    products = (anchors.rows[rows] * candidates.rows[columns]) @ anchors.within  # [M, K]
    return products.T * (anchors.inverse[:, rows] * scale) * candidates.inverse[:, columns]


def add_pair_gradient(
    anchors: Rows,
    rows: Tensor,
    candidates: Rows,
    columns: Tensor,
    scale: float,
    values: Tensor,
    slopes: Tensor,
) -> None:
    """As `add_gradient` for slopes[K, M] of the values that `pair_cosines` gave; overwrites nothing."""
    if anchors.gradient is None or candidates.gradient is None:
        return
    anchors.along.index_add_(1, rows, values * slopes)
    candidates.along.index_add_(1, columns, values * slopes)
    slopes = slopes * scale * anchors.inverse[:, rows] * candidates.inverse[:, columns]
    weights = slopes.T @ anchors.within.T  # [M, D], of each coordinate
    anchors.gradient.index_add_(0, rows, weights * candidates.rows[columns])
    candidates.gradient.index_add_(0, columns, weights * anchors.rows[rows])


def panels(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Start and stop of the panels that `rows` are worked on in, and of the tiles of each, within the panel.

    columns: how many numbers a row has, over all sizes and candidates. On a GPU a panel is one tile.
    """
    for start in range(0, rows, PANEL_ROWS):
        height = min(PANEL_ROWS, rows - start)
        step = max(8, TILE_NUMBERS // max(1, columns)) if device.type == "cpu" else height
        yield start, start + height, [(low, min(low + step, height)) for low in range(0, height, step)]


class Context(Protocol):
    """What torch hands from the forward to the backward pass of a loss over all sizes."""

    needs_input_grad: Sequence[bool]
    saved_tensors: Sequence[Any]
    arguments: Any
    """What the loss is besides tensors."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep what the backward pass reads as `saved_tensors`."""


def common_factor(upstream: Tensor, weights: Sequence[float]) -> float | None:
    """By what all of upstream[K] is larger than weights[K], up to rounding; None: there is no such number.

    With it the gradient that a loss computed for its weights only needs to be multiplied.
    """
    wanted: list[float] = upstream.tolist()
    factor = wanted[-1] / weights[-1] if weights[-1] else 0.0
    rounding = 4 * torch.finfo(upstream.dtype).eps
    pairs = zip(wanted, weights, strict=True)
    return factor if all(math.isclose(u, factor * w, rel_tol=rounding) for u, w in pairs) else None


@cache
def _within(sizes: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 where a coordinate lies within a size, else 0: [D, K]; a product with it sums over prefixes."""
    coordinates = torch.arange(width, device=device)[:, None]
    return (coordinates < torch.tensor(sizes, device=device)).to(dtype)


def _parts(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of the coordinates between the sizes."""
    return tuple(rows[:, start:stop] for start, stop in zip((0, *sizes[:-1]), sizes, strict=True))
