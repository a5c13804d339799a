from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.store import Document, Index, Settings, Writer, candidates, where
from gemb.store.graph import search_expansion
from tests.store.conftest import vectors

ROWS, DIMS = 3000, 24


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    return vectors(ROWS, seed=5, dims=DIMS)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, rows: NDArray[np.float32]) -> Path:
    """A graph over rows whose `side` is their rank by the cosine with the first one."""
    path = tmp_path_factory.mktemp("candidates") / "docs.gemb"
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    ranks = np.argsort(np.argsort(-(unit @ unit[0])))
    with Writer.open(path, Settings(dims=DIMS, words=False)) as writer:
        writer.put([Document(str(row), metadata={"side": int(ranks[row])}) for row in range(ROWS)], rows)
        writer.compact(graph_rows=1)
    return path


def test_an_exact_search_of_many_queries_finds_what_each_finds_alone(
    graph: Path, rows: NDArray[np.float32]
) -> None:
    asked = vectors(candidates.EXACT_QUERIES + 5, seed=6, dims=DIMS)
    with Index.open(graph) as index:
        together = index.nearest(asked, 10, exact=True)
        alone = [index.nearest(query, 10, exact=True) for query in asked]
    np.testing.assert_array_equal(together.keys, np.concatenate([near.keys for near in alone]))
    np.testing.assert_array_equal(together.scores, np.concatenate([near.scores for near in alone]))


def test_an_exact_search_of_many_queries_ranks_negative_cosines_rightly(
    graph: Path, rows: NDArray[np.float32]
) -> None:
    asked = np.repeat(-rows[:1], candidates.EXACT_QUERIES, axis=0)
    with Index.open(graph) as index:
        near = index.nearest(asked, 10, exact=True, where=where.parse("side < 600", index.fields()))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = np.sort(-(unit @ unit[0]))[:600][::-1][:10]  # of the 600 rows farthest from the query
    assert wanted[0] < 0
    np.testing.assert_allclose(near.scores, np.repeat(wanted[None], len(asked), axis=0), atol=2e-4)


@pytest.mark.parametrize("kept", [1500, 600])
def test_a_walk_under_a_filter_far_from_the_query_gives_what_an_exact_search_gives(
    graph: Path, rows: NDArray[np.float32], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = -rows[:8] + 0.1 * vectors(8, seed=7, dims=DIMS)
    monkeypatch.setattr(candidates, "WALKED_VALUES", 0)  # so that the graph is not left for a scan
    with Index.open(graph) as index:
        condition = where.parse(f"side < {kept}", index.fields())
        walked = index.nearest(asked, 10, where=condition)
        exact = index.nearest(asked, 10, where=condition, exact=True)
    assert walked.keys.all()
    hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(walked.keys, exact.keys, strict=True))
    assert hits >= 0.99 * exact.keys.size


def test_a_graph_is_left_for_a_scan_where_that_costs_less(
    graph: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    monkeypatch.setattr("gemb.store.graph.Graph.nearest", lambda *_: walks.append(1))
    with Index.open(graph) as index:
        condition = where.parse("side < 1500", index.fields())
        assert index.nearest(rows[0], 10, where=condition).keys.all()
    assert not walks


def test_a_larger_graph_is_searched_wider() -> None:
    assert [search_expansion(rows) for rows in (0, 20_000, 100_000, 1_000_000)] == [128, 128, 220, 876]
