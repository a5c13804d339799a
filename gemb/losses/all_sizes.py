"""Cosines of many rows at all Matryoshka sizes at once, and their gradient, for about the cost of one size.

The dot product of two prefixes is a running sum over the blocks of coordinates between the sizes, so all
sizes together need each coordinate once. The gradient goes the other way: a coordinate takes part in every
size above it, so its slope is the sum of those sizes' slopes, and each coordinate is needed once again.

R rows, C candidates, D width, K sizes in ascending order. `slopes` are the derivatives of the loss.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 24}
"""How many numbers a block of cosines holds over all sizes: on a CPU what stays in its cache (1 MB)."""


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


def cosines(anchors: Rows, span: slice, candidates: Rows, scale: float, out: Tensor) -> Tensor:
    """`scale` times the cosines of the anchors in `span` with all candidates, in out[K, span, C]."""
    first, *others = zip(anchors.parts, candidates.parts, strict=True)
    torch.mm(first[0][span], first[1].T, out=out[0])
    for k, (x, y) in enumerate(others):
        torch.addmm(out[k], x[span], y.T, out=out[k + 1])
    return out.mul_((anchors.inverse[:, span] * scale)[:, :, None]).mul_(candidates.inverse[:, None])


def add_gradient(
    anchors: Rows,
    span: slice,
    candidates: Rows,
    scale: float,
    values: Tensor,
    slopes: Tensor,
    row_slopes: Tensor,
    matches: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add to the gradients of both sides what the values that `cosines` gave pull with slopes * row_slopes.

    values[K, span, C] and slopes[K, span, C], which are overwritten, and row_slopes[K, span].
    matches: a column[span] for each row where instead of that the slope is the number[K, span] given.
    """
    numbers = torch.arange(values.shape[1], device=values.device)
    matched = None if matches is None else values[:, numbers, matches[0]].mul_(matches[1])  # [K, span]
    values.mul_(slopes)
    if matches is not None:
        values[:, numbers, matches[0]] = 0
    anchors.along[:, span] += values.sum(2).mul_(row_slopes)
    candidates.along += torch.bmm(row_slopes[:, None], values)[:, 0]
    lengths = anchors.inverse[:, span] * scale
    slopes.mul_((row_slopes * lengths)[:, :, None])
    if matches is not None and matched is not None:
        anchors.along[:, span] += matched
        candidates.along[:, matches[0]] += matched
        slopes[:, numbers, matches[0]] = matches[1] * lengths
    # A coordinate belongs to its own size and to all larger ones: slopes become those of the coordinates.
    slopes[-1].mul_(candidates.inverse[-1])
    for k in range(len(slopes) - 2, -1, -1):
        torch.addcmul(slopes[k + 1], slopes[k], candidates.inverse[k], out=slopes[k])
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


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Start and stop of as many of `rows` at a time as a block of `columns` numbers each has room for."""
    room = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "other"]
    step = max(16, room // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


@cache
def _within(sizes: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 where a coordinate lies within a size, else 0: [D, K]; a product with it sums over prefixes."""
    coordinates = torch.arange(width, device=device)[:, None]
    return (coordinates < torch.tensor(sizes, device=device)).to(dtype)


def _parts(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of the coordinates between the sizes."""
    return tuple(rows[:, start:stop] for start, stop in zip((0, *sizes[:-1]), sizes, strict=True))
