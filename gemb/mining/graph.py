"""Search by a graph, for corpora where exact search takes too long: usearch's HNSW (arXiv 1603.09320).

The graph finds candidates, their scores are exact. It is built by one thread: the same vectors give the same
graph. It holds every vector in half precision, in memory while it is built, mapped while it is searched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.files import os_errors_explained
from gemb.mining.vectors import NumberedVectors, scores_of

_BLOCK_ROWS = 4096
_CONNECTIVITY = 32  # links a node; twice usearch's default, since hundreds of neighbours are asked for
_EXPANSION = 256  # candidates kept while adding


class GraphSearch:
    """The passages nearest to queries, nearly all of them found. Passages are told by number."""

    def __init__(
        self, passages: NumberedVectors, path: Path, on_rows: Callable[[int, int | None], None]
    ) -> None:
        """Builds the graph at `path` unless it is there."""
        from usearch.index import Index

        self._passages = passages
        if not path.exists():
            graph = Index(
                ndim=passages.dims,
                metric="cos",
                dtype="f16",
                connectivity=_CONNECTIVITY,
                expansion_add=_EXPANSION,
            )
            for start in range(0, passages.rows, _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, passages.rows)
                keys = np.arange(start, stop, dtype=np.uint64)
                graph.add(keys, passages.block(start, stop), threads=1)
                on_rows(stop, passages.rows)
            unfinished = path.with_name(path.name + ".new")
            with os_errors_explained(path):
                try:
                    graph.save(os.fspath(unfinished))
                except RuntimeError as error:  # usearch tells every failed write so
                    raise OSError(0, str(error)) from error
                os.replace(unfinished, path)
        self._graph = Index(ndim=passages.dims, metric="cos", dtype="f16", connectivity=_CONNECTIVITY)
        self._graph.view(os.fspath(path))

    def candidates(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores [Q, k] and numbers [Q, k], best first; where fewer are found -inf and -1 fill the row."""
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        numbers = np.full((len(queries), k), -1, dtype=np.int64)
        setattr(self._graph, "expansion_search", max(_EXPANSION, 2 * k))  # noqa: B010 - typed as read-only
        for place, query in enumerate(queries):
            found = np.asarray(self._graph.search(query, k, threads=1).keys).astype(np.int64)
            own = scores_of(query, self._passages.rows_at(found))
            order = np.lexsort((found, -own))
            scores[place, : len(found)] = own[order]
            numbers[place, : len(found)] = self._passages.numbers(found[order])
        return scores, numbers
