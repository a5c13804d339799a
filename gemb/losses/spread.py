"""How evenly the embeddings of one side of a batch lie on the sphere.

B rows of this process, P rows of all processes, D width, K Matryoshka sizes; m1 and m2 are the first and
the second moment of the cosines of rows with other rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemb.losses.prefixes import check_sizes, unit


def spread_out(
    rows: Tensor, *, others: Tensor | None = None, offset: int = 0, sizes: Sequence[int] | None = None
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

    Raises ValueError where a size or the offset does not fit.
    """
    return _moments(rows, rows if others is None else others, offset, check_sizes(sizes, rows.shape[1]))[1]


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
    first, second = _moments(rows, rows if others is None else others, offset, sizes)
    limits = torch.tensor([1 / size for size in sizes], dtype=second.dtype, device=second.device)
    return first.square() + torch.relu(second - limits)


def _moments(rows: Tensor, others: Tensor, offset: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The mean[K] and the mean square[K] of the cosines of row i with others j != i + offset."""
    if not 0 <= offset <= len(others) - len(rows):
        raise ValueError(f"{len(rows)} rows from offset {offset} are not among {len(others)} others")
    pairs = len(rows) * (len(others) - 1)
    if not pairs:
        nothing = 0 * unit(rows).sum().expand(len(sizes))  # a part of the graph, so that backward works
        return nothing, nothing
    first, second = [], []
    for size in sizes:
        x, y = unit(rows, size), unit(others, size)
        own = (x * y[offset : offset + len(x)]).sum(1)
        first.append((x.sum(0) @ y.sum(0) - own.sum()) / pairs)
        # The sum over all pairs of (x_i . y_j)^2 is that of the elements of (X^T X) * (Y^T Y).
        second.append(((x.T @ x).mul(y.T @ y).sum() - own.square().sum()) / pairs)
    return torch.stack(first), torch.stack(second)
