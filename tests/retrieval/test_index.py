"""`gemb.Index`: the answers of sentence-transformers, in every form in which they can be asked for."""

import doctest
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import gemb
from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.model.hub import minilm_folder
from gemb.retrieval import Index
from gemb.store import Document, Writer
from tests.indexes import FILMS, LONG, embedded, long_spans, make_films, make_plain, minilm, needs_minilm

pytestmark = needs_minilm
QUERY = "robots that dream"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILMS and LONG, made once."""
    return make_films(tmp_path_factory.mktemp("made") / "films.gemb", with_long=True)


@pytest.fixture
def index(films: Path) -> Iterator[Index]:
    with open_(films) as opened:
        yield opened


def open_(path: Path) -> Index:
    return Index.open(path, device="cpu", precision="fp32", threads=1, engine="torch")


# --- equivalence


def test_scores_are_the_cosines_of_sentence_transformers(index: Index) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    texts = [f"{film.title} {film.text}" for film in FILMS]
    texts += [LONG.text[start:stop] for start, stop in long_spans()]
    query, *rows = model.encode([QUERY, *texts], normalize_embeddings=True)
    cosines = [float(query @ row) for row in rows]
    expected = {film.id: cosine for film, cosine in zip(FILMS, cosines, strict=False)}
    expected[LONG.id] = max(cosines[len(FILMS) :])
    hits = index.search(QUERY)
    assert [hit.id for hit in hits] == sorted(expected, key=lambda id_: -expected[id_])
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.id], abs=1e-5)


def test_a_text_texts_and_their_vectors_give_the_same_hits(index: Index) -> None:
    texts = [QUERY, "a ship goes down"]
    together = index.search(texts, k=3)
    assert together == [index.search(text, k=3) for text in texts]
    assert index.search(minilm().embed(texts, as_="query"), k=3) == together
    assert index.search(minilm().embed(texts, as_="query") * 7.5, k=3)[0][0].id == together[0][0].id


def test_exact_finds_the_same(index: Index) -> None:
    assert index.search(QUERY, exact=True) == index.search(QUERY)


def test_the_example_in_the_docstring_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_films(tmp_path / "films.gemb")
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(Index, "Index", globs={})
    assert len(example.examples) == 2
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_public_name_is_this_class() -> None:
    assert gemb.Index is Index
    assert "Index" in dir(gemb)


# --- what can be asked for


def test_a_long_document_is_found_once_with_its_best_passage(index: Index) -> None:
    (hit,) = index.search("growing vegetables on another planet", k=1)
    assert hit.id == "mission"
    assert hit.passage == long_spans()[2]
    assert hit.excerpt == "They grow potatoes in the soil of Mars, with water made from fuel."
    assert [one.id for one in index.search("rocket", k=10)].count("mission") == 1


def test_a_filter_is_a_text_or_a_condition(index: Index) -> None:
    from gemb.store.where import parse

    hits = index.search(QUERY, where="year >= 2007 and lang is not null")
    assert {hit.id for hit in hits} == {"heist", "mission"}
    assert index.search(QUERY, where=parse("year >= 2007 and lang is not null")) == hits
    assert index.fields() == {"year": "number", "lang": "text", "silent": "boolean"}


def test_words_and_meaning(index: Index) -> None:
    (by_words,) = index.search("whale", lexical=True)
    assert (by_words.id, by_words.score) == ("whale", None)
    assert by_words.words is not None
    assert by_words.words > 0
    hybrid = index.search("whale", hybrid=True, k=3)
    assert hybrid[0].id == "whale"
    by_meaning = {hit.id: hit.score for hit in index.search("whale")}
    assert {hit.id: hit.score for hit in hybrid} == {hit.id: by_meaning[hit.id] for hit in hybrid}


def test_min_score_and_k_bound_the_hits(index: Index) -> None:
    hits = index.search(QUERY)
    assert len(index.search(QUERY, k=1000)) == len(index) == len(FILMS) + 1
    third = hits[2].score
    assert third is not None
    assert index.search(QUERY, min_score=third) == hits[:3]
    assert index.search(QUERY, min_score=1.0) == []


def test_neighbours_of_a_document_are_those_of_its_vector(index: Index) -> None:
    (film,) = [film for film in FILMS if film.id == "android"]
    (by_vector,) = index.search(embedded([f"{film.title} {film.text}"]), k=4)
    assert by_vector[0].id == "android"
    assert [hit.id for hit in index.like("android", k=3)] == [hit.id for hit in by_vector[1:]]
    best = index.like("android", k=1)[0].score
    assert best is not None
    assert len(index.like("android", min_score=best)) == 1
    assert {hit.id for hit in index.like("android", where="year < 1960")} == {"metropolis", "whale"}


def test_documents_come_back_as_they_were(index: Index) -> None:
    assert index.get(["mission", "nosuch", "whale"]) == {"mission": LONG, "whale": FILMS[3]}
    assert (index.dims, index.encoder["model"], repr(index)) == (
        384,
        "minilm",
        f"Index({str(index.path)!r}, dims=384)",
    )


# --- edges


def test_an_empty_index_has_no_hits(tmp_path: Path) -> None:
    with open_(make_films(tmp_path / "empty.gemb", [])) as index:
        assert len(index) == 0
        assert index.search(QUERY) == []
        assert index.search([QUERY, "x"], hybrid=True) == [[], []]
        assert index.search(QUERY, lexical=True) == []


def test_no_queries_have_no_answers(index: Index) -> None:
    assert index.search([]) == []
    assert index.search(np.empty((0, 384), np.float32)) == []


def test_any_id_is_found_again(tmp_path: Path) -> None:
    ids = ["a b\tc", "日本 🎬", "'; DROP TABLE documents; --", "e\u0301", "\u00e9", "x" * 5000, "\u200d"]
    rows = np.random.default_rng(0).standard_normal((len(ids), 8)).astype(np.float32)
    path = make_plain(tmp_path / "ids.gemb", rows)
    with Writer.open(path) as writer:
        writer.put([Document(id_) for id_ in ids], rows, ready=True)
    with open_(path) as index:
        for id_, row in zip(ids, rows, strict=True):
            assert id_ in {hit.id for hit in index.search(row[None], k=2)[0]}
            assert index.get([id_]) == {id_: Document(id_)}
            assert id_ not in {hit.id for hit in index.like(id_)}


def test_a_folder_that_moves_while_it_is_open_is_still_searched_or_told(tmp_path: Path) -> None:
    path = make_films(tmp_path / "films.gemb")
    with open_(path) as index:
        before = index.search(QUERY)
        path.rename(tmp_path / "moved.gemb")
        assert index.search(QUERY) == before
        assert index.search("whale", lexical=True)[0].id == "whale"
    with pytest.raises(UnavailableError):
        open_(path)
    with open_(tmp_path / "moved.gemb") as moved:
        assert moved.search(QUERY) == before


def test_a_copy_is_an_index_of_its_own(films: Path, tmp_path: Path, index: Index) -> None:
    shutil.copytree(films, tmp_path / "copy.gemb")
    with open_(tmp_path / "copy.gemb") as copy:
        assert copy.search(QUERY) == index.search(QUERY)


def test_what_a_writer_publishes_is_seen_by_the_next_search(tmp_path: Path) -> None:
    path = make_films(tmp_path / "films.gemb", FILMS[:2])
    with open_(path) as index, Writer.open(path) as writer:
        assert len(index) == 2
        writer.put(FILMS[2:], embedded([film.text for film in FILMS[2:]]))
        assert len(index.search("a whale")) == 2
        writer.commit()
        assert index.search("a whale")[0].id == "whale"


def test_an_index_that_is_replaced_by_one_of_another_model_is_not_asked_with_the_old_one(
    tmp_path: Path,
) -> None:
    path = make_films(tmp_path / "films.gemb")
    other = make_films(tmp_path / "other.gemb", FILMS[3:], fingerprint="0" * 64, model="other")
    with open_(path) as index:
        index.search(QUERY)
        path.rename(tmp_path / "old.gemb")
        other.rename(path)
        with pytest.raises(MismatchError):
            index.search(QUERY)


def test_threads_may_search_together(index: Index) -> None:
    expected = index.search(QUERY)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(index.search(QUERY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


# --- refusals, word for word


def test_wrong_arguments_are_told(index: Index) -> None:
    asked: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (GembError, "k is 0; ask for at least 1 document", lambda: index.search(QUERY, k=0)),
        (GembError, "the query is empty; ask for something", lambda: index.search(" ")),
        (GembError, "query 1 is empty; ask for something", lambda: index.search(["a", ""])),
        (
            GembError,
            "hybrid and lexical are two ways to search; choose one",
            lambda: index.search(QUERY, hybrid=True, lexical=True),
        ),
        (
            GembError,
            "a hybrid search needs words; pass texts instead of vectors",
            lambda: index.search(np.ones((1, 384), np.float32), hybrid=True),
        ),
        (
            GembError,
            "query vectors have the shape [Q, D], but these [384]",
            lambda: index.search(np.ones(384, np.float32)),
        ),
        (
            MismatchError,
            f"{index.path} holds 384-wide vectors, but the query is 3 wide; "
            "search with the model that made it",
            lambda: index.search(np.ones((1, 3), np.float32)),
        ),
        (
            GembError,
            "the vector of query 1 is zeros only, or has NaN or infinity in it",
            lambda: index.search(np.array([[1.0] * 384, [np.nan] * 384], np.float32)),
        ),
        (GembError, f"{index.path} has no document 'nosuch'", lambda: index.like("nosuch")),
        (TypeError, "ids is one string; pass a list of ids", lambda: index.get("whale")),
        (TypeError, "query 0 is of type int, not a text", lambda: index.search([1])),  # type: ignore[list-item]
    ]
    for kind, message, ask in asked:
        with pytest.raises(kind) as caught:
            ask()
        assert str(caught.value) == message


def test_a_mistake_in_a_filter_points_at_its_character(index: Index) -> None:
    for expression, message in {
        "yaer > 1990": "where: no field yaer; did you mean year?\n  yaer > 1990\n  ^",
        "year > 'x'": (
            "where: year holds numbers, but 'x' is a text; write a number\n  year > 'x'\n         ^"
        ),
        "year > 1; DROP TABLE documents": (
            "where: ; has no meaning outside quotes and backticks\n"
            "  year > 1; DROP TABLE documents\n"
            "          ^"
        ),
        " ": "where: there is no condition; write one such as year >= 2020",
    }.items():
        with pytest.raises(GembError) as caught:
            index.search(QUERY, where=expression)
        assert str(caught.value) == message
    assert len(index) == len(FILMS) + 1


def test_what_is_no_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        Index.open(tmp_path / "none.gemb")
    with pytest.raises(GembError):
        Index.open(tmp_path)


def test_a_closed_index_says_so(films: Path) -> None:
    opened = open_(films)
    opened.close()
    with pytest.raises(ValueError, match="is closed"):
        opened.search(QUERY, lexical=True)
