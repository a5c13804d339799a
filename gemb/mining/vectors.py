"""Vectors on disk by the number of their text, and the search of them. N texts, D dims, k candidates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.vectors import open_vectors
from gemb.vectors.nearest import nearest


class NumberedVectors:
    """Unit vectors of the texts 0 to N - 1, mapped from a .npy file whose ids are the numbers.

    Texts may be missing, where the model gave them no vector.
    """

    def __init__(self, path: Path, count: int) -> None:
        with open_vectors(path) as file:  # compares the file with its checksum
            self.rows = file.rows
            """How many texts have a vector."""
            self.dims = file.dims
            self._numbers: NDArray[np.int64] | None = None  # of each row; None where all are there
            if file.rows != count:
                self._numbers = np.fromiter(map(int, file.iter_ids()), dtype=np.int64, count=file.rows)
        if self._numbers is not None and (np.diff(self._numbers) <= 0).any():
            raise GembError(f"{path}: its ids are not the numbers of the texts; remove it to start anew")
        self._matrix: NDArray[np.float32] = np.load(path, mmap_mode="r")

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """float32[stop - start, D] of these rows."""
        return np.asarray(self._matrix[start:stop])

    def rows_at(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[n, D] of these rows, in any order."""
        return np.asarray(self._matrix[rows])

    def numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the texts in these rows."""
        return rows if self._numbers is None else self._numbers[rows]

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[n, D] of the texts with these numbers; NaN for a text without vector."""
        if self._numbers is None:
            return np.asarray(self._matrix[numbers])
        places = np.searchsorted(self._numbers, numbers)
        there = places < self.rows
        there[there] = self._numbers[places[there]] == numbers[there]
        found = np.full((len(numbers), self.dims), np.nan, dtype=np.float32)
        found[there] = self._matrix[places[there]]
        return found


Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Scores [Q, k] and numbers [Q, k] of the k passages nearest to queries[Q, D], best first."""


def exact_search(passages: NumberedVectors) -> Search:
    """The search that compares every query with every passage, block by block."""

    def search(queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, rows = nearest(queries, passages, k)
        return scores, passages.numbers(rows)

    return search


def scores_of(query: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The dot products [n] of query[D] with vectors[n, D]; each from its own row alone, so that it does not
    depend on what else is scored."""  # noqa: D205, D209 - one sentence
    found: NDArray[np.float32] = np.einsum("nd,d->n", vectors, query)
    return found
