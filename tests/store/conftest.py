"""Small indexes, made in a moment, with everything an index can have in it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.store import Document, Settings, Writer

DIMS = 24


def vectors(count: int, seed: int = 0, dims: int = DIMS) -> NDArray[np.float32]:
    """Rows that lie around a few centres, as embeddings do."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((12, dims))
    return (centres[random.integers(0, 12, count)] + random.standard_normal((count, dims))).astype(np.float32)


def documents(start: int, stop: int) -> list[Document]:
    """d0, d1, ... with texts, titles and metadata that tell them apart."""
    return [
        Document(
            f"d{number}",
            f"text number {number}",
            f"title {number % 7}",
            {"n": number, "even": number % 2 == 0},
        )
        for number in range(start, stop)
    ]


def make(
    path: Path, rows: NDArray[np.float32], settings: Settings | None = None, commits: Sequence[int] = ()
) -> Path:
    """An index of documents d0, d1, ... with these vectors, committed at the given row numbers too."""
    with Writer.open(path, settings or Settings(dims=rows.shape[1])) as writer:
        bounds = [0, *commits, len(rows)]
        for start, stop in itertools.pairwise(bounds):
            writer.put(documents(start, stop), rows[start:stop])
            writer.commit()
    return path


@pytest.fixture(scope="session")
def rows() -> NDArray[np.float32]:
    """900 vectors."""
    return vectors(900)


@pytest.fixture
def index(tmp_path: Path, rows: NDArray[np.float32]) -> Path:
    """700 documents under a graph, 200 without, of which one each is dead; document d5 has a changed text."""
    path = tmp_path / "docs.gemb"
    with Writer.open(path, Settings(dims=DIMS, encoder={"fingerprint": "abc"})) as writer:
        writer.put(documents(0, 700), rows[:700])
        writer.compact(graph_rows=500)
        writer.put(documents(700, 900), rows[700:])
        writer.commit()
        writer.delete(["d3", "d750"])
    with Writer.open(path) as writer:
        changed = [Document("d5", "another text altogether", "title 5", {"n": 5})]
        writer.put(changed, rows[5:6])
    return path


def truth(rows: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines[Q, N] in float64."""
    exact, asked = rows.astype(np.float64), queries.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    cosines: NDArray[np.float64] = asked @ exact.T
    return cosines
