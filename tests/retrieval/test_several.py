"""One ranking out of several indexes: the same as that of one index with all their documents."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.retrieval.several import Found, Ranking, Wanted, parse_where, search_all
from gemb.store import Document, Index, Settings, Writer

DIMS = 16


def vectors(count: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, DIMS)).astype(np.float32)


def make(path: Path, numbers: range, rows: NDArray[np.float32], field: str = "number") -> Index:
    """Documents of these numbers; even ones speak of apples, threes of pears."""
    texts = ["apple " * (number % 2 == 0) + "pear " * (number % 3 == 0) + "tree" for number in numbers]
    with Writer.open(path, Settings(dims=DIMS, dtype="f32")) as writer:
        documents = [
            Document(f"d{number}", text, metadata={field: number})
            for number, text in zip(numbers, texts, strict=True)
        ]
        writer.put(documents, rows[numbers.start : numbers.stop])
    return Index.open(path)


def ids(answers: list[list[Found]]) -> list[list[str]]:
    return [[found.hit.id for found in answer] for answer in answers]


def test_parts_give_the_hits_of_the_whole(tmp_path: Path) -> None:
    rows, queries = vectors(60, 1), vectors(7, 2)
    parts = [
        make(tmp_path / f"{start}.gemb", range(start, stop), rows)
        for start, stop in ((0, 20), (20, 25), (25, 60))
    ]
    whole = make(tmp_path / "whole.gemb", range(60), rows)
    wanted = Wanted(k=12, where=parse_where("number < 50", [whole]))
    together, alone = search_all(parts, wanted, vectors=queries), search_all([whole], wanted, vectors=queries)
    assert ids(together) == ids(alone)
    assert [[found.hit.score for found in answer] for answer in together] == [
        [found.hit.score for found in answer] for answer in alone
    ]
    for answer in together:
        for found in answer:
            number = int(found.hit.id[1:])
            assert found.place == (number >= 20) + (number >= 25)


@pytest.mark.parametrize("ranking", ["lexical", "hybrid"])
def test_rankings_that_depend_on_the_collection_take_turns(tmp_path: Path, ranking: Ranking) -> None:
    rows = vectors(40, 3)
    one, other = make(tmp_path / "a", range(0, 10), rows), make(tmp_path / "b", range(10, 40), rows)
    wanted = Wanted(k=6, ranking=ranking)
    asked = {"texts": ["apple pear"], "vectors": vectors(1, 4)}
    (first,) = search_all([one], wanted, **asked)  # type: ignore[arg-type]
    (second,) = search_all([other], wanted, **asked)  # type: ignore[arg-type]
    (both,) = search_all([one, other], wanted, **asked)  # type: ignore[arg-type]
    assert [found.place for found in both] == [0, 1, 0, 1, 0, 1]
    assert [found.hit for found in both[::2]] == [found.hit for found in first[:3]]
    assert [found.hit for found in both[1::2]] == [found.hit for found in second[:3]]


def test_an_index_without_hits_leaves_its_turn_to_the_others(tmp_path: Path) -> None:
    rows = vectors(40, 3)
    one, other = make(tmp_path / "a", range(1, 2), rows), make(tmp_path / "b", range(10, 40), rows)
    (found,) = search_all([one, other], Wanted(k=4, ranking="lexical"), texts=["apple"])
    assert [one_.place for one_ in found] == [1, 1, 1, 1]


def test_of_equal_scores_the_index_named_first_comes_first(tmp_path: Path) -> None:
    same = np.ones((4, DIMS), np.float32)
    one, other = make(tmp_path / "a", range(0, 2), same), make(tmp_path / "b", range(2, 4), same)
    assert ids(search_all([one, other], Wanted(), vectors=same[:1])) == [["d0", "d1", "d2", "d3"]]
    assert ids(search_all([other, one], Wanted(), vectors=same[:1])) == [["d2", "d3", "d0", "d1"]]


def test_no_query_has_no_answer(tmp_path: Path) -> None:
    index = make(tmp_path / "a", range(0, 3), vectors(3, 0))
    assert search_all([index], Wanted(), vectors=np.empty((0, DIMS), np.float32)) == []


def test_a_filter_knows_the_fields_of_every_index(tmp_path: Path) -> None:
    rows = vectors(6, 5)
    one = make(tmp_path / "a", range(0, 3), rows, "year")
    other = make(tmp_path / "b", range(3, 6), rows, "page")
    wanted = Wanted(where=parse_where("year >= 1 or page = 4", [one, other]))
    (found,) = search_all([one, other], wanted, vectors=rows[:1])
    assert {hit.hit.id for hit in found} == {"d1", "d2", "d4"}
    with pytest.raises(GembError) as caught:
        parse_where("yaer = 1", [one, other])
    assert str(caught.value) == "--where: no field yaer; did you mean year?\n  yaer = 1\n  ^"


def test_a_field_of_two_types_may_be_compared_with_either(tmp_path: Path) -> None:
    rows = vectors(3, 5)
    indexes = []
    for name, value in (("a", 1), ("b", "one")):
        with Writer.open(tmp_path / name, Settings(dims=DIMS)) as writer:
            writer.put([Document(name, metadata={"page": value})], rows[:1])
        indexes.append(Index.open(tmp_path / name))
    for order in (indexes, indexes[::-1]):
        wanted = Wanted(where=parse_where("page = 1 or page = 'one'", order))
        assert len(search_all(order, wanted, vectors=rows[:1])[0]) == 2


def test_what_cannot_be_wanted_is_told() -> None:
    told = {
        "k is 0; ask for at least 1 document": {"k": 0},
        "min_score is 1.5; a score is a cosine, from -1 to 1": {"min_score": 1.5},
        "min_score is nan; a score is a cosine, from -1 to 1": {"min_score": float("nan")},
        "min_score is a cosine, and a lexical search has none; leave one of them out": {
            "ranking": "lexical",
            "min_score": 0.1,
        },
        "a lexical search is always exact, and compares no vectors; leave exact out": {
            "ranking": "lexical",
            "exact": True,
        },
    }
    for message, arguments in told.items():
        with pytest.raises(GembError) as caught:
            Wanted(**arguments)  # type: ignore[arg-type]
        assert str(caught.value) == message
