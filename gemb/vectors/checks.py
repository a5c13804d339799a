"""Which rows are no vectors, and how a row is cut to its first dims.

B rows (texts), D model width, K kept dims.
"""

import numpy as np
from numpy.typing import NDArray

# Between these the sum of squares loses nothing to float32's range.
SAFE_SQUARES = (1e-30, 1e30)


def bad_rows(vectors: NDArray[np.floating]) -> NDArray[np.int64]:
    """The positions, ascending, of the rows of vectors[B, D] that hold NaN or infinity, or only zeros.

    One such row can ruin every ranking it takes part in, so none is written.
    """
    suspects = np.flatnonzero(~is_safe(squared_norms(vectors)))
    largest = np.abs(vectors[suspects]).max(axis=1, initial=0)  # NaN wins every maximum
    bad: NDArray[np.int64] = suspects[~np.isfinite(largest) | (largest == 0)]
    return bad


def cut(vectors: NDArray[np.floating], dims: int, *, normalise: bool) -> NDArray[np.float32]:
    """The first `dims` coordinates of vectors[B, D] as a new float32[B, dims] (Matryoshka, arXiv 2205.13147).

    With `normalise` each row is divided by its norm. A row of zeros stays zeros and NaN stays NaN,
    for `bad_rows` to find afterwards. A row's result does not depend on the other rows, to the bit.

    Raises ValueError where `dims` is not in 1..D.
    """
    if not 1 <= dims <= vectors.shape[1]:
        raise ValueError(f"dims is {dims} but the vectors are {vectors.shape[1]} wide")
    kept = np.array(vectors[:, :dims], dtype=np.float32, order="C")  # [B, dims]
    if not normalise:
        return kept
    squares = squared_norms(kept)
    odd = ~is_safe(squares)
    squares[odd] = 1
    kept /= np.sqrt(squares)[:, None]
    for row in np.flatnonzero(odd):
        exact = kept[row].astype(np.float64)
        norm = np.sqrt(np.square(exact).sum())
        if norm > 0 and np.isfinite(norm):
            kept[row] = exact / norm
    return kept


def squared_norms(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """The sum of squares[B] of each row, each from its own row alone."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        sums: NDArray[np.floating] = np.einsum("ij,ij->i", vectors, vectors)
    return sums


def is_safe(squares: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Where a sum of squares is exact enough; False for NaN, infinity and zero too."""
    return (squares > SAFE_SQUARES[0]) & (squares < SAFE_SQUARES[1])
