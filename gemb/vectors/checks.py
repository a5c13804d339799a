"""Which rows are no vectors, and how a row is cut to its first dims.

B rows (texts), D model width, K kept dims.
"""

import numpy as np
from numpy.typing import NDArray

# Outside this range the square of a coordinate loses bits (or all of them) in float32.
SAFE_NORM = (1e-15, 1e15)


def bad_rows(vectors: NDArray[np.floating]) -> NDArray[np.int64]:
    """The positions, ascending, of the rows of vectors[B, D] that hold NaN or infinity, or only zeros.

    One such row can ruin every ranking it takes part in, so none is written.
    """
    largest = np.abs(vectors).max(axis=1, initial=0)  # [B]; NaN wins every maximum
    return np.flatnonzero(~np.isfinite(largest) | (largest == 0))


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
    with np.errstate(over="ignore", under="ignore"):
        norms = np.sqrt(np.square(kept).sum(axis=1))  # [B]
    odd = ~((norms > SAFE_NORM[0]) & (norms < SAFE_NORM[1]))
    norms[odd] = 1
    kept /= norms[:, None]
    for row in np.flatnonzero(odd):
        exact = kept[row].astype(np.float64)
        norm = np.sqrt(np.square(exact).sum())
        if norm > 0 and np.isfinite(norm):
            kept[row] = exact / norm
    return kept
