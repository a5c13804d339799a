"""Smaller forms of the same vectors: fewer dims (Matryoshka), smaller numbers; as they would be stored.

N texts, D width, K kept dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemb.vectors import (
    Int8Ranges,
    calibrate,
    cut,
    from_bfloat16,
    from_binary,
    from_int8,
    to_bfloat16,
    to_binary,
    to_float16,
    to_int8,
)

Dtype = Literal["f32", "f16", "bf16", "int8", "binary"]
DTYPES: tuple[Dtype, ...] = ("f32", "f16", "bf16", "int8", "binary")
BITS: dict[Dtype, int] = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "binary": 1}
_CALIBRATION_ROWS = 8192


@dataclass(frozen=True)
class View:
    """A size and a stored type."""

    dims: int
    dtype: Dtype = "f32"

    @property
    def bytes(self) -> int:
        """Of one vector."""
        return -(-self.dims * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        return f"{self.dims} {self.dtype}"


class Viewed:
    """Vectors [N, D] seen through a view: unit rows float32[N, K], rounded as stored rows are."""

    def __init__(self, vectors: NDArray[np.float32], view: View, ranges: Int8Ranges | None) -> None:
        self._vectors = vectors
        self._view = view
        self._ranges = ranges

    @property
    def rows(self) -> int:
        """N."""
        return len(self._vectors)

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """float32[stop - start, K] of these rows."""
        rows = _rounded(
            cut(self._vectors[start:stop], self._view.dims, normalise=True), self._view, self._ranges
        )
        return cut(rows, self._view.dims, normalise=True)

    def all(self) -> NDArray[np.float32]:
        """float32[N, K]."""
        return self.block(0, self.rows)


def ranges_for(vectors: NDArray[np.float32], view: View) -> Int8Ranges | None:
    """The int8 ranges of a view, found on the first rows of vectors[N, D]; None for other types."""
    if view.dtype != "int8":
        return None
    return calibrate(cut(vectors[:_CALIBRATION_ROWS], view.dims, normalise=True))


def _rounded(rows: NDArray[np.float32], view: View, ranges: Int8Ranges | None) -> NDArray[np.float32]:
    """What a reader gets back of rows[N, K] that were stored."""
    if view.dtype == "f16":
        return to_float16(rows).astype(np.float32)
    if view.dtype == "bf16":
        return from_bfloat16(to_bfloat16(rows))
    if view.dtype == "int8" and ranges is not None:
        return from_int8(to_int8(rows, ranges)[0], ranges)
    if view.dtype == "binary":
        return from_binary(to_binary(rows))[:, : view.dims]
    return rows
