from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError, MismatchError
from gemb.store import Document, Index, Settings, Writer, reader
from gemb.store.blocks import DamagedError
from gemb.store.catalogue import SEGMENTS, Catalogue
from gemb.store.where import parse
from gemb.vectors.layout import DType

DIMS, COUNT = 32, 900


def unit_rows(count: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, DIMS)).astype(np.float32)
    scaled: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


ROWS, QUERIES = unit_rows(COUNT, 1), unit_rows(20, 2)
DOCUMENTS = [Document(f"d{row}", f"word{row % 7} text", "", {"part": row % 50}) for row in range(COUNT)]


def made(
    folder: Path, dtype: DType = "f32", code_dims: int = 0, graph: bool = False, commits: int = 3
) -> Path:
    with Writer.open(folder, Settings(DIMS, dtype, code_dims)) as writer:
        for part in np.array_split(np.arange(COUNT), commits):
            writer.put([DOCUMENTS[row] for row in part], ROWS[part])
            writer.commit()
        if graph:
            writer.compact(graph_rows=100)
    return folder


def plainly(rows: NDArray[np.float32], k: int, among: NDArray[np.int64]) -> list[list[str]]:
    """Every cosine, sorted."""
    cosines = QUERIES.astype(np.float64) @ rows[among].T.astype(np.float64)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return [[f"d{among[place]}" for place in places] for places in order]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("code_dims", [0, 8])
@pytest.mark.parametrize("graph", [False, True])
def test_exact_search_equals_sorting_every_cosine(
    tmp_path: Path, dtype: DType, code_dims: int, graph: bool
) -> None:
    with Index.open(made(tmp_path / "wiki", dtype, code_dims, graph)) as index:
        (stored,) = index.export(block=COUNT)
        hits = index.search(QUERIES, k=10, exact=True)
    assert [[hit.id for hit in found] for found in hits] == plainly(stored.vectors, 10, np.arange(COUNT))


@pytest.mark.parametrize("graph", [False, True])
def test_search_finds_nearly_all_of_the_exact_best(tmp_path: Path, graph: bool) -> None:
    with Index.open(made(tmp_path / "wiki", "f16", graph=graph)) as index:
        hits = index.search(QUERIES, k=10)
    wanted = plainly(ROWS, 10, np.arange(COUNT))
    shared = [len({hit.id for hit in found} & set(best)) for found, best in zip(hits, wanted, strict=True)]
    assert np.mean(shared) > 9.8


@pytest.mark.parametrize(("condition", "share"), [("part = 3", 0.02), ("part < 40", 0.8)])
@pytest.mark.parametrize("graph", [False, True])
def test_a_filter_finds_the_best_of_what_it_keeps(
    tmp_path: Path, condition: str, share: float, graph: bool
) -> None:
    kept = np.array([row for row in range(COUNT) if (row % 50 == 3 if share < 0.1 else row % 50 < 40)])
    with Index.open(made(tmp_path / "wiki", graph=graph)) as index:
        hits = index.search(QUERIES, k=10, where=parse(condition, index.fields()), exact=True)
    assert [[hit.id for hit in found] for found in hits] == plainly(ROWS, 10, kept)


def test_a_filter_asks_the_documents_once_a_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    own = Catalogue.keys_where

    def keys_where(self: Catalogue, fragment: str, parameters: Sequence[object]) -> NDArray[np.uint64]:
        asked.append(fragment)
        return own(self, fragment, parameters)

    monkeypatch.setattr(Catalogue, "keys_where", keys_where)
    made(tmp_path / "wiki")
    with Index.open(tmp_path / "wiki") as index:
        where = parse("part = 3", index.fields())
        found = [hit.id for hit in index.search(QUERIES[0], k=99, where=where)[0]]
        assert [hit.id for hit in index.search(QUERIES[0], k=99, where=where)[0]] == found
        assert len(asked) == 1
        index.search(QUERIES[0], where=parse("part = 4", index.fields()))
        assert len(asked) == 2
        with Writer.open(tmp_path / "wiki") as writer:
            writer.put([Document("new", "", "", {"part": 3})], QUERIES[:1])
            writer.commit()
        assert [hit.id for hit in index.search(QUERIES[0], k=99, where=where)[0]] == ["new", *found]
        assert len(asked) == 3
        monkeypatch.setattr(reader, "REMEMBERED_BYTES", 0)
        index.search(QUERIES[0], where=parse("part = 4", index.fields()))
        assert index.search(QUERIES[0], k=99, where=where)[0][0].id == "new"
        assert len(asked) == 5, "what takes too much memory is forgotten"


def test_a_query_alone_and_among_others_scores_the_same_to_the_bit(tmp_path: Path) -> None:
    with Index.open(made(tmp_path / "wiki", "f16")) as index:
        together = index.search(QUERIES, k=5)
        alone = [index.search(query, k=5)[0] for query in QUERIES]
    assert together == alone


def test_a_passage_stands_for_its_document_once(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "wiki", Settings(DIMS)) as writer:
        writer.put(
            [Document("long", "abcdef"), Document("short", "xyz")],
            QUERIES[:4],
            [[(0, 2), (2, 4), (4, 6)], None],
        )
    with Index.open(tmp_path / "wiki") as index:
        hits = index.search(QUERIES[1], k=5)[0]
    assert [hit.id for hit in hits] == ["long", "short"]
    assert (hits[0].passage, hits[0].excerpt, hits[1].excerpt) == ((2, 4), "cd", "xyz")


def test_words_find_documents_and_are_fused_with_vectors(tmp_path: Path) -> None:
    with Index.open(made(tmp_path / "wiki")) as index:
        by_words = index.search(words=["word3"], k=COUNT)[0]
        both = index.search(ROWS[3], words=["word3"], k=1)[0]
    assert [hit.id for hit in by_words] == [f"d{row}" for row in range(COUNT) if row % 7 == 3]
    assert both[0].id == "d3"
    assert both[0].score == pytest.approx(1, abs=1e-6)


def test_like_finds_neighbours_without_the_document_itself(tmp_path: Path) -> None:
    with Index.open(made(tmp_path / "wiki")) as index:
        like = index.like("d5", k=4)
        near = index.search(ROWS[5], k=5)[0]
    assert [hit.id for hit in like] == [hit.id for hit in near[1:]]


def test_scores_below_the_minimum_are_dropped(tmp_path: Path) -> None:
    with Index.open(made(tmp_path / "wiki")) as index:
        (hits,) = index.search(ROWS[0], k=10, min_score=0.99)
    assert [hit.id for hit in hits] == ["d0"]


def test_an_open_index_sees_what_was_committed_since(tmp_path: Path) -> None:
    folder = made(tmp_path / "wiki")
    with Index.open(folder) as index:
        with Writer.open(folder) as writer:
            writer.delete(["d0"])
            writer.commit()
            writer.put([Document("new")], QUERIES[:1])
            assert [hit.id for hit in index.search(ROWS[0], k=1)[0]] != ["d0"]
            assert [hit.id for hit in index.search(QUERIES[0], k=1)[0]] != ["new"]
        assert [hit.id for hit in index.search(QUERIES[0], k=1)[0]] == ["new"]


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "wiki", Settings(DIMS)):
        pass
    with Index.open(tmp_path / "wiki") as index:
        assert index.search(QUERIES[:2]) == [[], []]


def test_a_damaged_vector_is_never_ranked(tmp_path: Path) -> None:
    folder = made(tmp_path / "wiki", commits=1)
    (path,) = (folder / SEGMENTS).glob("*/vectors.f32")
    content = bytearray(path.read_bytes())
    content[1000] ^= 64
    path.write_bytes(content)
    with Index.open(folder) as index, pytest.raises(DamagedError) as caught:
        index.search(QUERIES)
    assert str(caught.value) == (
        f"{path} is damaged: the checksum of block 0 does not match; "
        f"run gemb index verify {folder}, then gemb index rebuild {folder}"
    )


def test_queries_that_do_not_fit_are_told(tmp_path: Path) -> None:
    folder = made(tmp_path / "wiki")
    with Index.open(folder) as index:
        with pytest.raises(MismatchError) as caught:
            index.search(np.ones(7, np.float32))
        assert str(caught.value) == (
            f"{folder} holds 32-wide vectors, but the query is 7 wide; search with the model that made it"
        )
        with pytest.raises(GembError, match="the vector of query 0 is zeros only"):
            index.search(np.zeros(DIMS, np.float32))
        with pytest.raises(GembError, match="k is 0; ask for at least 1 document"):
            index.search(QUERIES, k=0)
        with pytest.raises(GembError, match="has no document 'cow'"):
            index.like("cow")
