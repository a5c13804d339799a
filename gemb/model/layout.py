"""How the texts of a batch lie in the packed row of tokens.

T tokens of B texts stand one after another, without padding. Texts of equal length are neighbours, so
attention handles a group of them in one call.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """`rows` texts of `length` tokens each, from token `start` on; the first is text `row`."""

    start: int
    row: int
    rows: int
    length: int

    @property
    def stop(self) -> int:
        """The first token after the group."""
        return self.start + self.rows * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each text of a packed batch begins and ends."""

    groups: tuple[Group, ...]
    tokens: int
    """T, without the filling tokens at the end."""
    filled: int
    """Rows computed: T, and what the kernels want filled up."""
    rows: int
    """B."""
    longest: int
    positions: Tensor
    """int64[filled], 0-based position of each token in its text."""
    starts: Tensor
    """int32[B + 1], first token of each text and T at the end (cu_seqlens)."""
    shared: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """What layers of this batch share, made at first use: turns, masks."""

    @classmethod
    def of(
        cls, lengths: NDArray[np.int32], *, least_rows: int = 1, row_step: int = 1, device: str = "cpu"
    ) -> "Layout":
        """The layout of texts with these token counts, in order; equal neighbours form a group.

        Filling rows at the end make the rows a multiple of `row_step`, and `least_rows` at least.
        """
        starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        tokens = int(starts[-1])
        edges = np.flatnonzero(np.diff(lengths)) + 1
        firsts = np.concatenate(([0], edges)) if len(lengths) else edges
        lasts = np.concatenate((edges, [len(lengths)])) if len(lengths) else edges
        groups = tuple(
            Group(int(starts[first]), int(first), int(last - first), int(lengths[first]))
            for first, last in zip(firsts, lasts, strict=True)
        )
        filled = max(-(-tokens // row_step) * row_step, least_rows)
        positions = np.zeros(filled, dtype=np.int64)
        positions[:tokens] = np.arange(tokens) - np.repeat(starts[:-1], lengths)
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(
            groups,
            tokens,
            filled,
            len(lengths),
            longest,
            torch.from_numpy(positions).to(device),
            torch.from_numpy(starts).to(device),
        )


def packed_places(lengths: NDArray[np.int32], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[T], the packed places of the tokens of the texts in `order`."""
    starts = (np.cumsum(lengths) - lengths)[order]
    sizes = lengths[order]
    shifts: NDArray[np.int64] = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return np.arange(len(shifts)) + shifts
