"""The first stage without a graph: every code's dot product with every query, and the best rows of each.

Integer products are exact, so the result is one and the same on every machine and for every batch of queries.
n rows of a block, C dims of a code, Q queries. Memory is that of one block, whatever the number of rows.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_PRODUCTS_A_BLOCK = 1 << 21  # 8 MiB of int32, which stay in the cache between product and selection
_FIRST_ROWS = 1024  # a small first block, so that few rows pass the floor in the next
_MANY_QUERIES = 16
_FIRST_ROWS_OF_MANY = 128
_LOWEST = np.iinfo(np.int32).min
_NOTHING = np.iinfo(np.int64).min
_ROW_LIMIT = (1 << 32) - 1


def block_spans(rows: int, queries: int) -> Iterator[tuple[int, int]]:
    """The first and last row of each block that a scan goes through.

    All rows of the first block pass the floor, and half of a block as long as everything before it; so for
    many queries blocks begin short and double.
    """
    longest = max(1024, min(65_536, _PRODUCTS_A_BLOCK // max(queries, 1)))
    step = _FIRST_ROWS if queries < _MANY_QUERIES else _FIRST_ROWS_OF_MANY
    start = 0
    while start < rows:
        stop = min(rows, start + step)
        yield start, stop
        start = stop
        step = longest if queries < _MANY_QUERIES else min(longest, 2 * step)


class PackedQueries:
    """Query codes[Q, C] laid out for the processor's integer instructions."""

    def __init__(self, codes: NDArray[np.int8]) -> None:
        import numkong  # here, because a search by words alone needs none of it

        self.count = len(codes)
        self._packed = numkong.dots_pack(np.ascontiguousarray(codes))
        self._product = numkong.dots_packed

    def dots(self, codes: NDArray[np.int8]) -> NDArray[np.int32]:
        """Dot products[n, Q] of codes[n, C] with the queries, exact."""
        products: NDArray[np.int32] = np.asarray(self._product(codes, self._packed))
        return products


class BestRows:
    """The `count` rows with the largest products so far, for each of Q queries.

    Rows are offered in ascending order; of equal products the smaller row stays. A row and its product are
    kept as one int64, product in front, so that one partition settles both.
    """

    def __init__(self, queries: int, count: int) -> None:
        self.count = count
        self._kept = np.full((queries, max(4 * count, 64)), _NOTHING, dtype=np.int64)
        self._filled = np.zeros(queries, dtype=np.int64)
        self.floor = np.full(queries, _LOWEST, dtype=np.int32)
        """[Q] what a product must exceed to be among the best, as far as is known."""

    def offer(self, first: int, products: NDArray[np.int32]) -> None:
        """Takes in the products[n, Q] of rows first..first+n; the lowest int32 marks a row left out."""
        if len(self.floor) == 1:
            rows = np.flatnonzero(products[:, 0] > self.floor[0])
            if rows.size:
                self._take(0, _joined(products[rows, 0], first + rows))
            return
        rows, queries = _places(products > self.floor)
        if not rows.size:
            return
        order = np.argsort(queries, kind="stable")
        rows, queries = rows[order], queries[order]
        joined = _joined(products[rows, queries], first + rows)
        counts = np.bincount(queries, minlength=len(self.floor))
        starts = np.cumsum(counts) - counts
        fits = self._filled + counts <= self._kept.shape[1]
        easy = fits[queries]
        places = self._filled[queries] + np.arange(len(queries)) - starts[queries]
        self._kept[queries[easy], places[easy]] = joined[easy]
        self._filled[fits] += counts[fits]
        for query in np.flatnonzero(~fits).tolist():
            self._take(query, joined[starts[query] : starts[query] + counts[query]])
        if (self._filled >= 2 * self.count).any():
            self._shrink()

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Rows[Q, count] and products[Q, count] by falling product; -1 and LEFT_OUT fill up."""
        best = np.sort(self._best(), axis=1)[:, ::-1]
        products = (best >> 32).astype(np.int32)
        rows = _ROW_LIMIT - (best & _ROW_LIMIT)
        rows[products == _LOWEST] = -1
        return rows, products

    def _best(self) -> NDArray[np.int64]:
        """The best `count` of each query, in no order; the lowest int64 where there are fewer."""
        width = self._kept.shape[1]
        self._kept[np.arange(width) >= self._filled[:, None]] = _NOTHING
        best: NDArray[np.int64] = np.partition(self._kept, width - self.count, axis=1)[
            :, width - self.count :
        ]
        return best

    def _take(self, query: int, joined: NDArray[np.int64]) -> None:
        held = self._kept[query, : self._filled[query]]
        both = np.concatenate([held, joined])
        if len(both) > self.count:
            both = np.partition(both, len(both) - self.count)[len(both) - self.count :]
            self.floor[query] = both.min() >> 32
        self._kept[query, : len(both)] = both
        self._filled[query] = len(both)

    def _shrink(self) -> None:
        best = np.sort(self._best(), axis=1)[:, ::-1]  # [Q, count], what is filled in front
        self._kept[:, : self.count] = best
        self._filled = np.minimum(self._filled, self.count)
        full = self._filled == self.count
        self.floor[full] = best[full, -1] >> 32


def _places(passed: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where passed[n, Q] is True; eight at a time are asked first, because few are."""
    flat = passed.reshape(-1)
    if flat.size % 8:
        rows, queries = np.nonzero(passed)
        return rows, queries
    eights = np.flatnonzero(flat.view(np.uint64))
    which, bit = np.nonzero(flat.reshape(-1, 8)[eights])
    rows, queries = np.divmod(eights[which] * 8 + bit, passed.shape[1])
    return rows, queries


def _joined(products: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    joined: NDArray[np.int64] = (products.astype(np.int64) << 32) + (_ROW_LIMIT - rows)
    return joined


LEFT_OUT = np.int32(_LOWEST)
"""The product of a row that must not be found."""
