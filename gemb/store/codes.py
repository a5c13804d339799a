"""int8 codes of unit vectors: what the first stage of a search looks at instead of the vectors.

A code is the row's first C dims, brought to unit length, divided by one scale for the whole segment,
rounded and clipped to -127..127. One scale for all dims keeps the order of dot products between codes,
which a graph needs. B rows, D dims of a stored vector, C dims of a code, Q queries.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CODE_LIMIT = 127
CLIP_SHARES = (0.99, 0.999, 0.9999, 1.0)
"""Shares of all values that the scale may leave unclipped; the best one on the sample is taken."""
_SCALE_SAMPLE_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class CodeScale:
    """How codes become numbers again: value = code * `step`.

    `residual` is the largest Euclidean distance of a unit row (of C dims) from its code's value.
    """

    step: float
    residual: float

    def margin(self, query_residual: NDArray[np.floating]) -> NDArray[np.float64]:
        """By how much the dot product of codes can miss that of query and row, [Q].

        For unit rows x = x' + e and q = q' + f: |qx - q'x'| <= |q||e| + |f||x'|, and |x'| <= 1 + |e|.
        """
        bound: NDArray[np.float64] = self.residual + query_residual.astype(np.float64) * (1 + self.residual)
        return bound + 1e-5  # rounding of float32 in the exact score itself


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """vectors[B, C] divided by their norms; a row of zeros stays zeros. Each row from itself alone."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    norms[norms == 0] = 1
    scaled: NDArray[np.float32] = vectors / norms[:, None]
    return scaled


def choose_step(sample: NDArray[np.float32]) -> float:
    """The step of codes that loses least of the unit rows sample[B, C], in squared error."""
    values = np.abs(sample).ravel()
    if not values.size or not values.max():
        return 1.0 / CODE_LIMIT
    best, step = np.inf, 1.0
    for limit in np.quantile(values, CLIP_SHARES):
        candidate = float(limit) / CODE_LIMIT
        if not candidate:
            continue
        rebuilt = np.minimum(np.rint(values / candidate), CODE_LIMIT) * candidate
        lost = float(np.square(rebuilt - values).sum())
        if lost < best:
            best, step = lost, candidate
    return step


def sample_rows(rows: int, dims: int) -> NDArray[np.int64]:
    """Up to some thousand row numbers, evenly spread, that a scale is chosen from."""
    count = min(rows, max(1024, _SCALE_SAMPLE_VALUES // max(dims, 1)))
    return np.linspace(0, rows - 1, count).astype(np.int64) if rows else np.empty(0, np.int64)


def encode(rows: NDArray[np.float32], step: float) -> NDArray[np.int8]:
    """The codes[B, C] of unit rows[B, C]."""
    scaled = rows * np.float32(1 / step)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -CODE_LIMIT, CODE_LIMIT, out=scaled)
    return scaled.astype(np.int8)


def residuals(rows: NDArray[np.float32], codes: NDArray[np.int8], step: float) -> NDArray[np.float32]:
    """How far each unit row[B, C] is from its code's value."""
    difference = codes * np.float32(step)
    difference -= rows
    distance: NDArray[np.float32] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    return distance


@dataclass(frozen=True, slots=True)
class QueryCodes:
    """Queries as the first stage sees them: codes[Q, C], steps[Q] of each, and the unit rows[Q, C] coded."""

    codes: NDArray[np.int8]
    steps: NDArray[np.float32]
    rows: NDArray[np.float32]

    @property
    def residuals(self) -> NDArray[np.float32]:
        """How far each unit query is from its code's value, [Q]; only a proof asks for it."""
        difference = self.codes * self.steps[:, None] - self.rows
        distance: NDArray[np.float32] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
        return distance


def encode_queries(vectors: NDArray[np.float32], dims: int) -> QueryCodes:
    """Codes of the first `dims` coordinates of vectors[Q, D], each query with its own step."""
    rows = unit(np.ascontiguousarray(vectors[:, :dims], dtype=np.float32))
    steps = np.abs(rows).max(axis=1, initial=0) / np.float32(CODE_LIMIT)
    steps[steps == 0] = 1
    return QueryCodes(np.rint(rows / steps[:, None]).astype(np.int8), steps, rows)
