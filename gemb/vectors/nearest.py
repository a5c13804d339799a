"""Exact nearest neighbours of a few vectors among many, in blocks, on the processor.

Q queries, N documents, D dims, k neighbours.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 16_384
BLOCK_QUERIES = 512
"""512 x 16,384 scores are 32 MiB."""


class Rows(Protocol):
    """Vectors that are read in blocks: `gemb.vectors.VectorFile` is one."""

    @property
    def rows(self) -> int:
        """N."""

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """float32[stop - start, D] of these rows."""


def nearest(
    queries: NDArray[np.float32], documents: Rows, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores [Q, k] and rows [Q, k] of the k largest dot products of queries[Q, D], best first.

    k is cut to N. Of equal scores that are both among the k the smaller row stands first.
    """
    k = min(k, documents.rows)
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, documents.rows, BLOCK_ROWS):
        block = documents.block(start, min(start + BLOCK_ROWS, documents.rows))
        best = [
            _best(queries[first : first + BLOCK_QUERIES] @ block.T, k)
            for first in range(0, len(queries), BLOCK_QUERIES)
        ]
        if not best:
            break
        scores = np.concatenate([scores, np.concatenate([part[0] for part in best])], axis=1)
        rows = np.concatenate([rows, np.concatenate([part[1] for part in best]) + start], axis=1)
        if scores.shape[1] > k:
            scores, places = _best(scores, k)
            rows = np.take_along_axis(rows, places, 1)
    # Rows stand in ascending order within equal scores, so that a stable sort keeps the smaller in front.
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _best(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k largest of each row of scores[Q, M] and their columns, in any order; all if M <= k."""
    count = scores.shape[1]
    if count <= k:
        columns = np.broadcast_to(np.arange(count), scores.shape)
    else:
        columns = np.argpartition(scores, count - k, axis=1)[:, count - k :]
    return np.take_along_axis(scores, columns, 1), columns.astype(np.int64)
