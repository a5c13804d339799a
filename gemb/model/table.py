"""Tables of embeddings that are looked up row by row: plain ones, and ones that lie on an integer grid.

A table on a grid is never made whole: its rows are turned into floats as they are looked up, so that a
vocabulary of 262,144 tokens takes 113 MB in int4 and not 805. T ids, V rows, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Table(Protocol):
    """Rows by number."""

    width: int
    """D."""

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [T, D], the rows `ids`[T]."""
        ...

    def on(self, device: str, dtype: torch.dtype | None = None) -> Self:
        """The table on `device`; on a CPU it stays mapped, so that only rows that are used are read.

        Floats become `dtype` on another device, if it is given.
        """
        ...


class PlainTable:
    """A table of floats, `table`[V, D]."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self.width = table.shape[1]

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [T, D], the rows `ids`[T]."""
        return F.embedding(ids, self._table).float()

    def on(self, device: str, dtype: torch.dtype | None = None) -> PlainTable:
        """The table on `device`; see `Table`."""
        if device == "cpu":
            return self
        return PlainTable(self._table.to(device, self._table.dtype if dtype is None else dtype))


class GridTable:
    """A table on an integer grid: `parts`, [V, ...] each, and `decode`, which makes floats of their rows."""

    def __init__(self, parts: tuple[Tensor, ...], decode: Callable[..., Tensor], width: int) -> None:
        self._parts = parts
        self._decode = decode
        self.width = width

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [T, D], the rows `ids`[T]."""
        return self._decode(*(part[ids] for part in self._parts))

    def on(self, device: str, dtype: torch.dtype | None = None) -> GridTable:
        """The table on `device`, its bytes as they are; see `Table`."""
        if device == "cpu":
            return self
        return GridTable(tuple(part.to(device) for part in self._parts), self._decode, self.width)
