"""How evenly the embeddings of one side of a batch lie on the sphere.

B rows of this process, P rows of all processes, D width, K Matryoshka sizes; m1 and m2 are the first and
the second moment of the cosines of rows with other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemb.losses.all_sizes import (
    Context,
    Rows,
    add_gradient,
    common_factor,
    dot_products,
    panel_memory,
    panels,
    to_cosines,
    to_slopes,
)
from gemb.losses.prefixes import check_sizes, full_precision, promoted, unit


def spread_out(
    rows: Tensor,
    *,
    others: Tensor | None = None,
    offset: int = 0,
    sizes: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The mean squared cosine of two different rows at each Matryoshka size, [K].

    The spread-out term of EmbeddingGemma (arXiv 2509.20354, eq. 4): the sum over i != j of (x_i . x_j)^2
    / (B (B - 1)) for unit rows x, once for the queries and once for the positives, to be added; hard
    negatives take no part. It lies in 0..1 and is 1/k for rows spread evenly over the sphere of k dims;
    there is no hinge at 1/k and no term for the mean, unlike `orthogonality`. A batch of one row has no
    two rows: 0.

    rows[B, D]: the rows of one side. others[P, D]: those of all processes, gathered with gradients, of which
    row i is others[i + offset]; the mean over equal processes is then the value of the whole batch.
    None: `rows` are all.
    weights[K]: what the terms will be multiplied with before they are added (None: all alike). It makes the
    backward pass faster and changes no result.

    Raises ValueError where a size, the offset or the weights do not fit.
    """
    return _second_moments(rows, others, offset, check_sizes(sizes, rows.shape[1]), weights)


def orthogonality(
    rows: Tensor, *, others: Tensor | None = None, offset: int = 0, sizes: Sequence[int] | None = None
) -> Tensor:
    """The global orthogonal regulariser m1^2 + max(0, m2 - 1/k) at each Matryoshka size k, [K].

    GOR (Zhang et al. 2017, arXiv 1708.06320): 0 where the cosines of different rows have the first two
    moments of the sphere. The moments are over the pairs (i, j) with i != j of `rows` and `others`: with the
    queries as rows and the positives as `others` they are the non-matching pairs of the paper; with the
    rows of one side alone (`others` None) they are sentence-transformers' choice.
    Arguments as those of `spread_out`; a single row gives 0.
    """
    sizes = check_sizes(sizes, rows.shape[1])
    second = _second_moments(rows, others, offset, sizes, None)
    columns = rows if others is None else others
    pairs = len(rows) * (len(columns) - 1)
    if not pairs:
        return second
    first = []
    for size in sizes:
        x, y = unit(rows, size), unit(columns, size)
        own = (x * y[offset : offset + len(x)]).sum()
        first.append(((x.sum(0) * y.sum(0)).sum() - own) / pairs)
    limits = torch.tensor([1 / size for size in sizes], dtype=second.dtype, device=second.device)
    return torch.stack(first).square() + torch.relu(second - limits)


def _second_moments(
    rows: Tensor, others: Tensor | None, offset: int, sizes: tuple[int, ...], weights: Sequence[float] | None
) -> Tensor:
    """The mean square[K] of the cosines of each row i with others j != i + offset."""
    columns = rows if others is None else others
    if not 0 <= offset <= len(columns) - len(rows):
        raise ValueError(f"{len(rows)} rows from offset {offset} are not among {len(columns)} others")
    weights = [1.0] * len(sizes) if weights is None else weights
    if len(weights) != len(sizes):
        raise ValueError(f"{len(weights)} weights stand against {len(sizes)} Matryoshka sizes")
    pairs = len(rows) * (len(columns) - 1)
    if not pairs:
        # A part of the graph, so that a backward pass finds its way.
        return 0 * unit(rows).sum().expand(len(sizes))
    multiplied = len(rows) if others is None else len(rows) + len(others)
    if multiplied * sum(size**2 for size in sizes) < len(rows) * len(columns) * rows.shape[1]:
        with full_precision(rows):
            return torch.stack([_square_sum(rows, others, offset, size) for size in sizes]) / pairs
    ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
    form = _Form(tuple(sizes[k] for k in ascending), tuple(weights[k] for k in ascending), offset)
    with full_precision(rows):
        moments: Tensor = _SecondMoments.apply(  # type: ignore[no-untyped-call]
            form, promoted(rows), None if others is None else promoted(others)
        )
    return moments[[ascending.index(k) for k in range(len(sizes))]]


def _square_sum(rows: Tensor, others: Tensor | None, offset: int, size: int) -> Tensor:
    """The sum of the squared cosines, from products of coordinates: the less work for many rows.

    The sum over all i, j of (x_i . y_j)^2 is the sum of the elements of (X^T X) * (Y^T Y).
    """
    x = unit(rows, size)
    if others is None:
        return (x.T @ x).square().sum() - x.detach().square().sum()  # each row with itself: 1, or 0 for zeros
    y = unit(others, size)
    own = (x * y[offset : offset + len(x)]).sum(1)
    return ((x.T @ x) * (y.T @ y)).sum() - own.square().sum()


@dataclass(frozen=True, slots=True)
class _Form:
    """Everything about a loss but its embeddings; sizes ascending."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    offset: int


class _SecondMoments(torch.autograd.Function):
    """The moments[K], and on the way the gradient of their sum with the form's weights."""

    @staticmethod
    def forward(ctx: Context, form: _Form, rows: Tensor, others: Tensor | None) -> Tensor:
        weights = rows.new_tensor(form.weights) if any(ctx.needs_input_grad) else None
        moments, gradients = _evaluate(form, rows, others, weights)
        ctx.arguments = form
        ctx.save_for_backward(rows, others, *gradients)
        return moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, others, *gradients = ctx.saved_tensors
        factor = common_factor(upstream, ctx.arguments.weights)
        if factor is not None:
            return None, *(None if gradient is None else gradient * factor for gradient in gradients)
        with full_precision(rows):
            return None, *_evaluate(ctx.arguments, rows, others, upstream)[1]


def _evaluate(
    form: _Form, rows: Tensor, others: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The moments[K] and, for weights[K] of them, the gradients of their sum for the rows and the others."""
    anchors = Rows(rows, form.sizes, with_gradient=weights is not None)
    candidates = anchors
    if others is not None:
        candidates = Rows(others, form.sizes, with_gradient=weights is not None)
    pairs = len(rows) * (len(candidates.rows) - 1)
    sums = rows.new_zeros(len(form.sizes))
    memory = panel_memory(anchors, candidates)
    for start, stop, tiles in panels(len(rows), len(form.sizes) * len(candidates.rows), rows.device):
        products = dot_products(anchors, slice(start, stop), candidates, memory)
        for low, high in tiles:
            span = slice(start + low, start + high)
            cosines = to_cosines(products[:, low:high], anchors, span, candidates, 1.0)
            numbers = torch.arange(high - low, device=rows.device)
            columns = numbers + (span.start + form.offset)
            cosines[:, numbers, columns] = 0
            slopes = cosines.clone()
            sums += torch.linalg.vecdot(slopes.flatten(1), slopes.flatten(1))
            if weights is not None:
                row_slopes = (2 / pairs * weights)[:, None].expand(-1, high - low)
                to_slopes(cosines, slopes, row_slopes, None, anchors, span, candidates, 1.0)
        if weights is not None:
            add_gradient(products, anchors, slice(start, stop), candidates)
    return sums / pairs, (anchors.finish(), None if others is None else candidates.finish())
