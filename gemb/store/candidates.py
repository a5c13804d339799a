"""The best rows of one segment for each query: codes first, stored vectors last.

A first stage names candidates from int8 codes: a scan of all codes or of a subset, or the graph. They are
scored anew from the stored vectors. An exact search also proves that no other row could have come in, or
looks at every row that could. Q queries, R candidates, N rows, D dims, C dims of a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemb.store.codes import QueryCodes, encode_queries
from gemb.store.graph import search_expansion
from gemb.store.scan import LEFT_OUT, BestRows, PackedQueries, block_spans
from gemb.store.segments import Segment, spread

CANDIDATES = 30
"""Rows that are scored anew, at least, where codes are as wide as the vectors; at least twice k."""
PREFIX_CANDIDATES = 100
"""The same where codes are a prefix of the vectors; at least five times k."""
SUBSET_SHARE = 0.1
"""Of a filter that keeps a smaller share of the rows, exactly these rows are scanned."""
EXACT_QUERIES = 16
"""From so many queries at once on, an exact search multiplies all vectors in float32 instead of codes."""
WALKED_VALUES = 40_000
"""Code values that a scan goes through in the time in which a graph looks at one candidate more."""
SCAN_QUERIES = 16
SCAN_VALUES = 50_000_000
"""With so many queries at once, a scan of up to so many code values costs less than the graph.

Measured with benchmarks/store/switch.py on a processor with AMX: 0.4 to 0.8 of the graph's time up to 38
million values. It would pay for more there; processors with slower integer instructions set the limit.
"""
FINE_SPARE = 16
"""Rows scored anew beyond k where float32 products of a matrix multiplication were ranked."""
RESCORED_VALUES = 1 << 21
"""Values of stored vectors that are in memory at a time while candidates are scored."""


class Queries:
    """Unit queries[Q, D] and what the first stage needs of them."""

    def __init__(self, vectors: NDArray[np.float32], code_dims: int) -> None:
        self.vectors = vectors
        self.code_dims = code_dims

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def codes(self) -> QueryCodes:
        """int8 codes of the queries."""
        return encode_queries(self.vectors, self.code_dims)

    @cached_property
    def packed(self) -> PackedQueries:
        """The codes as the scan wants them."""
        return PackedQueries(self.codes.codes)

    def part(self, which: NDArray[np.int64]) -> Queries:
        """Some of the queries."""
        return Queries(self.vectors[which], self.code_dims)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which rows may be found: `rows` where they are few, else those with True in `mask`[N], else all."""

    count: int
    rows: NDArray[np.int64] | None = None
    mask: NDArray[np.bool_] | None = None


class LiveSegment:
    """A segment and which of its rows are dead in one generation."""

    def __init__(self, segment: Segment, dead: NDArray[np.bool_] | None, live_rows: int) -> None:
        self.segment = segment
        self.live_rows = live_rows
        self._live = None if dead is None else ~dead

    def choose(self, keys: NDArray[np.uint64] | None) -> Chosen:
        """The live rows, of the documents `keys` (ascending) alone if they are given."""
        if keys is None:
            return Chosen(self.live_rows, mask=self._live)
        record = self.segment.record
        inside = keys[
            np.searchsorted(keys, record.first_key) : np.searchsorted(keys, record.last_key, "right")
        ]
        first, stop = self.segment.spans_of(inside)
        rows = spread(first, stop)  # a document that is dead is not in the catalogue, so not among the keys
        if len(rows) < SUBSET_SHARE * self.segment.rows:
            return Chosen(len(rows), rows=rows)
        mask = np.zeros(self.segment.rows, dtype=bool)
        mask[rows] = True
        return Chosen(len(rows), mask=mask)

    def best(
        self, queries: Queries, wanted: int, chosen: Chosen, *, exact: bool, threads: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """At least the `wanted` best rows[Q, R] and their cosines[Q, R], in no order; -1 and -inf fill up.

        Raises DamagedError where a file is not what was written.
        """
        is_prefix = self.segment.record.code_dims < self.segment.layout.dims
        if exact and (is_prefix or len(queries) >= EXACT_QUERIES):
            rows = self._scan_vectors(queries, wanted + FINE_SPARE, chosen)
            return rows, self.score(queries, rows)
        count = max(PREFIX_CANDIDATES, 5 * wanted) if is_prefix else max(CANDIDATES, 2 * wanted)
        if not exact and self._suits_graph(queries, chosen):
            rows = self._walk(queries, count, wanted, chosen, threads)
            return rows, self.score(queries, rows)
        rows, products = self._scan_codes(queries, count, chosen)
        scores = self.score(queries, rows)
        if exact:
            rows, scores = self._completed(queries, wanted, chosen, rows, scores, products)
        return rows, scores

    def score(self, queries: Queries, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosines[Q, R] of queries and rows[Q, R]; -inf for -1. Each from its own pair alone, to the bit."""
        if len(rows) == 1 and rows.min(initial=0) >= 0:
            found = self.segment.vectors(rows[0])
            alone: NDArray[np.float32] = np.einsum("ij,j->i", found, queries.vectors[0])[None]
            return alone
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        step = max(1, RESCORED_VALUES // max(1, rows.shape[1] * self.segment.layout.dims))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            query, place = np.nonzero(part >= 0)
            found = self.segment.vectors(part[query, place])
            own = queries.vectors[start : start + step]
            if len(own) == 1:
                scores[start, place] = np.einsum("ij,j->i", found, own[0])
            else:
                scores[start + query, place] = np.einsum("ij,ij->i", found, own[query])
        return scores

    # ------------------------------------------------------------------ first stages

    def _suits_graph(self, queries: Queries, chosen: Chosen) -> bool:
        record = self.segment.record
        many = len(queries) >= SCAN_QUERIES and record.rows * record.code_dims <= SCAN_VALUES
        return record.has_graph and chosen.rows is None and not many

    def _walk(
        self, queries: Queries, count: int, wanted: int, chosen: Chosen, threads: int, fetched: int = 0
    ) -> NDArray[np.int64]:
        """Up to `count` chosen rows[Q, count] by the graph, or by a scan where it finds too few.

        Of a share of the rows the graph gives as many more (`fetched`) and looks at as many more, so that
        those that are left are the nearest; soon a scan costs less than that.
        """
        segment = self.segment
        recorded = (segment.record.graph or {}).get("expansion_search", 0)
        share = chosen.count / segment.rows
        if not fetched:
            fetched = count if share == 1 else int(count / share * 1.1) + 8
        fetched = min(fetched, segment.rows)
        expansion = max(recorded, search_expansion(segment.rows))
        if chosen.mask is not None:
            expansion = max(round(expansion / share), 2 * fetched)
            if expansion * WALKED_VALUES > segment.rows * segment.record.code_dims:
                return self._scan_codes(queries, count, chosen)[0]
        rows = segment.graph().nearest(queries.codes.codes, fetched, max(expansion, fetched), threads)
        enough = min(wanted, chosen.count)
        if chosen.mask is not None:
            rows[~chosen.mask[rows]] = -1  # row -1 is the last one, which may or may not stay -1
            order = np.argsort(rows < 0, axis=1, kind="stable")[:, :count]
            rows = np.take_along_axis(rows, order, 1)
        if rows[:, enough - 1].min(initial=0) >= 0:  # what is missing is behind
            return rows
        short = np.flatnonzero(rows[:, enough - 1] < 0)
        if chosen.mask is None or fetched == segment.rows:
            more, _ = self._scan_codes(queries.part(short), count, chosen)
        else:
            more = self._walk(queries.part(short), count, wanted, chosen, threads, 4 * fetched)
        rows = _widened(rows, more.shape[1])
        rows[short] = _widened(more, rows.shape[1])
        return rows

    def _scan_codes(
        self, queries: Queries, count: int, chosen: Chosen
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The `count` chosen rows[Q, count] with the largest products[Q, count] of codes; -1 fills up."""
        best = BestRows(len(queries), min(count, max(1, chosen.count)))
        for first, products in self._products(queries, chosen):
            best.offer(first, products)
        places, products = best.rows()
        return self._rows_of(places, chosen), products

    def _products(self, queries: Queries, chosen: Chosen) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Yields the first place and the products[n, Q] of each block; LEFT_OUT where not chosen."""
        segment = self.segment
        if chosen.rows is not None:
            for start, stop in block_spans(len(chosen.rows), len(queries)):
                yield start, queries.packed.dots(segment.codes(chosen.rows[start:stop]))
            return
        for start, stop in block_spans(segment.rows, len(queries)):
            products = queries.packed.dots(segment.code_block(start, stop))
            if chosen.mask is not None:
                rows = segment.rows_of_slots(np.arange(start, stop))
                products[~chosen.mask[rows]] = LEFT_OUT
            yield start, products

    def _rows_of(self, places: NDArray[np.int64], chosen: Chosen) -> NDArray[np.int64]:
        """The rows of places in the scan, -1 for -1."""
        if chosen.rows is None:
            return self.segment.rows_of_slots(places)
        if not len(chosen.rows):
            return places
        rows = chosen.rows[np.maximum(places, 0)]
        rows[places < 0] = -1
        return rows

    def _scan_vectors(self, queries: Queries, count: int, chosen: Chosen) -> NDArray[np.int64]:
        """The `count` chosen rows[Q, count] with the largest cosines, by matrix multiplication in float32."""
        best = BestRows(len(queries), min(count, max(1, chosen.count)))
        total = self.segment.rows if chosen.rows is None else len(chosen.rows)
        for start, stop in block_spans(total, max(len(queries), self.segment.layout.dims)):
            if chosen.rows is None:
                vectors = self.segment.vector_block(start, stop)
            else:
                vectors = self.segment.vectors(chosen.rows[start:stop])
            cosines = vectors @ queries.vectors.T
            cosines += 3  # between 2 and 4 the bits of float32 are in the order of the numbers
            products = cosines.view(np.int32)
            if chosen.mask is not None:
                products[~chosen.mask[start:stop]] = LEFT_OUT
            best.offer(start, products)
        places, _ = best.rows()
        if chosen.rows is None:
            return places
        return self._rows_of(places, chosen)

    # ------------------------------------------------------------------ proof

    def _completed(
        self,
        queries: Queries,
        wanted: int,
        chosen: Chosen,
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        products: NDArray[np.int32],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Candidates[Q, R] that hold the `wanted` best rows for certain.

        The cosine of a row lies within `margin` of its codes' product. So a row that is not among the
        candidates, whose product is at most the smallest one there, cannot beat the wanted-th score where
        that is more than the margin above. Of the other queries every row is looked at whose product is
        close enough.
        """
        if rows.shape[1] >= chosen.count or rows.shape[1] < wanted:
            return rows, scores  # all rows are candidates
        scale = self.segment.record.scale
        steps = queries.codes.steps.astype(np.float64) * scale.step
        worst = np.partition(scores, -wanted, axis=1)[:, -wanted].astype(np.float64)
        floors = np.floor((worst - scale.margin(queries.codes.residuals)) / steps)
        floors = np.clip(floors, -(2.0**31) + 1, 2.0**31 - 1).astype(np.int64)
        open_ones = np.flatnonzero(products[:, -1] >= floors)
        if not open_ones.size:
            return rows, scores
        part = queries.part(open_ones)
        best_rows, best_scores = rows[open_ones], scores[open_ones]
        for first, found in self._products(part, chosen):
            places, owners = np.nonzero((found >= floors[open_ones]) & (found != LEFT_OUT))
            if not len(places):
                continue
            own = self._rows_of(first + places, chosen)
            order = np.argsort(owners, kind="stable")
            bounds = np.searchsorted(owners[order], np.arange(len(part) + 1))
            for query in np.flatnonzero(np.diff(bounds)).tolist():
                mine = own[order[bounds[query] : bounds[query + 1]]]
                mine = mine[~np.isin(mine, best_rows[query])]
                single = part.part(np.array([query]))
                self._take(best_rows[query], best_scores[query], mine, self.score(single, mine[None])[0])
        rows[open_ones], scores[open_ones] = best_rows, best_scores
        return rows, scores

    @staticmethod
    def _take(
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        more: NDArray[np.int64],
        found: NDArray[np.float32],
    ) -> None:
        """Puts the best of rows[R] and more[n] into rows and scores, in place."""
        both, values = np.concatenate([rows, more]), np.concatenate([scores, found])
        order = np.lexsort((both, -values))[: len(rows)]
        rows[:], scores[:] = both[order], values[order]


def _widened(rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    if rows.shape[1] >= width:
        return rows
    return np.concatenate([rows, np.full((len(rows), width - rows.shape[1]), -1)], axis=1)
