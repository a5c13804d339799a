"""The search job: where queries come from, what becomes of them, and everything that must be refused."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb.errors import Exit, GembError, MismatchError, UnavailableError
from gemb.jobs import search
from gemb.jobs.search import SearchRecipe, split_words
from gemb.report import Event, Report
from gemb.retrieval.queries import QueryEncoder
from gemb.store import Document, Settings, Writer
from tests.indexes import FILMS, embedded, make_films, make_plain, minilm, needs_minilm

pytestmark = needs_minilm
QUERY = "robots that dream"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILMS and the long one, made once."""
    return make_films(tmp_path_factory.mktemp("made") / "films.gemb", with_long=True)


def recipe(*indexes: Path, **settings: Any) -> SearchRecipe:  # noqa: ANN401  # fields of the recipe
    fast: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1, "format": "jsonl"}
    return SearchRecipe(indexes=indexes, **(fast | settings))


def ask(*indexes: Path, **settings: Any) -> tuple[Report, list[dict[str, Any]]]:  # noqa: ANN401
    """Report and hits of a search."""
    output = io.StringIO()
    report = search.run(recipe(*indexes, **settings), output=output)
    return report, [json.loads(line) for line in output.getvalue().splitlines()]


def ids(hits: Sequence[dict[str, Any]]) -> list[str]:
    return [hit["id"] for hit in hits]


def refused(*indexes: Path, **settings: Any) -> str:  # noqa: ANN401
    with pytest.raises(GembError) as caught:
        ask(*indexes, **settings)
    assert caught.value.exit_code == Exit.USAGE
    return str(caught.value)


# --- equivalence


def test_the_hits_are_those_of_the_python_api(films: Path) -> None:
    from gemb import Index

    for settings in (
        {},
        {"k": 2},
        {"hybrid": True},
        {"lexical": True},
        {"where": "year < 2000"},
        {"exact": True},
    ):
        hits = ask(films, query="a white whale", **settings)[1]
        with Index.open(films, device="cpu", precision="fp32", threads=1) as index:
            expected = index.search("a white whale", **settings)
        assert ids(hits) == [hit.id for hit in expected]
        for hit, other in zip(hits, expected, strict=True):
            assert hit["score"] == (None if other.score is None else pytest.approx(other.score, abs=1e-6))
            assert (hit["text"], hit["metadata"]) == (other.excerpt, other.metadata)


def write_queries(folder: Path, texts: Sequence[str]) -> dict[str, Path]:
    """The same queries as BEIR's queries.jsonl, as CSV and as plain lines."""
    paths = {name: folder / name for name in ("queries.jsonl", "q.csv", "q.txt")}
    rows = [{"_id": f"q{number}", "text": text, "metadata": {}} for number, text in enumerate(texts)]
    paths["queries.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    paths["q.csv"].write_text(
        "id,text\n" + "".join(f"q{n},{text}\n" for n, text in enumerate(texts)), "utf-8"
    )
    paths["q.txt"].write_text("".join(f"{text}\n" for text in texts), "utf-8")
    return paths


TEXTS = [QUERY, "cooking", "the sea", "outer space", "a burglary"]


def test_queries_from_any_file_in_any_batches_are_answered_as_one_by_one(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [ids(ask(films, query=text, k=3)[1]) for text in TEXTS]
    for name, path in write_queries(tmp_path, TEXTS).items():
        for batch in (2, 100):
            monkeypatch.setattr(search, "BATCH_QUERIES", batch)
            report, hits = ask(films, queries=str(path), k=3)
            names = [f"{number + 1}" if name == "q.txt" else f"q{number}" for number in range(len(TEXTS))]
            assert [[hit["id"] for hit in hits if hit["query"] == one] for one in names] == expected
            assert [hit["rank"] for hit in hits] == [1, 2, 3] * len(TEXTS)
            assert (report.data["queries"], report.data["found"]) == (5, 15)
            assert report.title.startswith("answered 5 queries in ")


@pytest.mark.parametrize(
    "row",
    [
        {"query_id": "q7", "query": QUERY},
        {"qid": "q7", "query": QUERY, "text": "the passage that answers it", "id": "p1"},
        {"_id": "q7", "query": QUERY},
    ],
)
def test_the_usual_names_of_queries_are_found(films: Path, tmp_path: Path, row: dict[str, str]) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    hits = ask(films, queries=str(path), k=3)[1]
    assert ids(hits) == ids(ask(films, query=QUERY, k=3)[1])
    assert {hit["query"] for hit in hits} == {"q7"}


def test_ready_vectors_give_the_hits_of_their_texts(films: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", minilm().embed(TEXTS, as_="query"))
    hits = ask(films, vectors=tmp_path / "q.npy", k=2)[1]
    expected = [ids(ask(films, query=text, k=2)[1]) for text in TEXTS]
    assert [[hit["id"] for hit in hits if hit["query"] == str(number)] for number in range(5)] == expected


def test_two_indexes_are_searched_as_one(films: Path, tmp_path: Path) -> None:
    first, second = make_films(tmp_path / "a.gemb", FILMS[:2]), make_films(tmp_path / "b.gemb", FILMS[2:])
    whole = make_films(tmp_path / "whole.gemb")
    hits = ask(first, second, query=QUERY, k=4)[1]
    expected = ask(whole, query=QUERY, k=4)[1]
    assert [(hit["id"], hit["score"]) for hit in hits] == [(hit["id"], hit["score"]) for hit in expected]
    in_first = {film.id for film in FILMS[:2]}
    assert all(hit["index"] == str(first if hit["id"] in in_first else second) for hit in hits)


# --- where the query comes from


@pytest.mark.parametrize("query", [None, "-"])
def test_a_query_comes_from_stdin(films: Path, monkeypatch: pytest.MonkeyPatch, query: str | None) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf a white\nwhale \n"))
    monkeypatch.setattr("sys.stdin", piped)
    assert ids(ask(films, query=query, k=1)[1]) == ["whale"]


def test_a_bad_stdin_is_told(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert refused(films) == "stdin is not UTF-8 text (byte 2); pass a text as the query"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert refused(films) == "the query is empty; ask for something"
    monkeypatch.setattr("sys.stdin", None)
    assert refused(films) == f"no query given; gemb search {films} 'what to search for'"


def test_the_neighbours_of_a_document(films: Path) -> None:
    hits = ask(films, like="android", k=2)[1]
    assert len(hits) == 2
    assert "android" not in ids(hits)
    assert refused(films, like="nosuch") == f"{films} has no document 'nosuch'"


def test_words_that_follow_the_indexes_are_told_apart(films: Path, tmp_path: Path) -> None:
    path = str(films)
    assert split_words([], has_queries=False) == ([], None)
    assert split_words([path], has_queries=False) == ([path], None)
    assert split_words([path, "a query"], has_queries=False) == ([path], "a query")
    assert split_words([path, path, "-"], has_queries=False) == ([path, path], "-")
    assert split_words([path, path], has_queries=False) == ([path, path], None)
    assert split_words([path, "b.gemb"], has_queries=True) == ([path, "b.gemb"], None)
    with pytest.raises(GembError) as caught:
        split_words([path, "what", "is", "love?"], has_queries=False)
    assert str(caught.value) == (
        f"what is no index; a query of several words stands in quotes: gemb search {path} 'what is love?'"
    )
    assert split_words([path, "long " * 5000], has_queries=False) == ([path], "long " * 5000)
    assert split_words([path, "a\0b"], has_queries=False) == ([path], "a\0b")
    # A second index that is missing is told as such.
    assert split_words([path, "gone.gemb", "a query"], has_queries=False) == ([path, "gone.gemb"], "a query")


# --- what comes out


def test_a_search_for_words_loads_no_model(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueryEncoder, "embed", lambda *_, **__: pytest.fail("a model was loaded"))
    hits = ask(films, query="whale", lexical=True)[1]
    assert (ids(hits), hits[0]["score"]) == (["whale"], None)
    assert hits[0]["words"] > 0
    assert len(ask(films, like="whale")[1]) == len(FILMS)


def test_the_data_of_one_query_hold_its_hits(films: Path) -> None:
    output = io.StringIO()
    report = search.run(recipe(films, query=QUERY, k=2), output=output, json=True)
    assert output.getvalue() == ""
    hits = ask(films, query=QUERY, k=2)[1]
    assert {**report.data, "seconds": 0} == {
        "indexes": [str(films)], "query": QUERY, "hits": hits,
        "queries": 1, "found": 2, "without_hits": 0, "cut": 0, "lost_tokens": 0, "seconds": 0,
    }  # fmt: skip


def test_a_terminal_gets_a_table_and_a_pipe_lines(films: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for output, first in ((Terminal(), QUERY), (io.StringIO(), '{"rank":1')):
        search.run(recipe(films, query=QUERY, format="auto"), output=output)
        assert first in output.getvalue().splitlines()[0]


def test_a_query_without_a_hit_fails_only_where_it_was_asked_to(films: Path, tmp_path: Path) -> None:
    every: list[dict[str, Any]] = [{"where": "year > 3000"}, {"min_score": 0.99}]
    for settings in every:
        report, hits = ask(films, query=QUERY, **settings)
        assert (report.exit_code, hits) == (Exit.DONE, [])
        report, _ = ask(films, query=QUERY, **settings, fail_empty=True)
        assert report.exit_code == Exit.GATE
    assert ask(films, query=QUERY, fail_empty=True)[0].exit_code == Exit.DONE
    queries = write_queries(tmp_path, ["whale", "zzz1", "zzz2", "zzz3", "zzz4"])["queries.jsonl"]
    report, hits = ask(films, queries=str(queries), lexical=True, fail_empty=True)
    assert (report.exit_code, ids(hits)) == (Exit.GATE, ["whale"])
    assert dict(report.rows) == {"hits": "1", "without a hit": "4: q1, q2, q3, ..."}


def test_an_empty_index_is_no_error(tmp_path: Path) -> None:
    empty = make_films(tmp_path / "empty.gemb", [])
    assert ask(empty, query=QUERY, hybrid=True)[1] == []


def test_more_than_there_is_is_all_there_is(films: Path) -> None:
    assert len(ask(films, query=QUERY, k=100_000)[1]) == len(FILMS) + 1


def test_a_long_file_of_queries_shows_how_far_it_is(films: Path, tmp_path: Path) -> None:
    queries = write_queries(tmp_path, TEXTS)["q.txt"]
    seen: list[Event] = []
    search.run(recipe(films, queries=str(queries), lexical=True), seen.append, output=io.StringIO())
    assert seen == [Event("searching", 5, unit="queries")]
    search.run(recipe(films, query="whale", lexical=True), seen.append, output=io.StringIO())
    assert len(seen) == 1  # no bar for a single query


def test_a_query_longer_than_the_model_takes_is_told(films: Path, tmp_path: Path) -> None:
    report, hits = ask(films, query="whale " * 300, k=1)  # MiniLM takes 256 tokens, two of which are its own
    assert dict(report.rows) == {
        "hits": "1",
        "cut": "1 query lost about 46 tokens, which the model does not take",
    }
    assert hits == ask(films, query="whale " * 254, k=1)[1]
    report, _ = ask(films, query="!" * 255, k=1)  # a token each: fewer characters than tokens that are taken
    assert (report.data["cut"], report.data["lost_tokens"]) == (1, 1)
    queries = write_queries(tmp_path, ["whale", "rat " * 260, "a " * 254])["queries.jsonl"]
    report, _ = ask(films, queries=str(queries), k=1)
    assert (report.data["cut"], report.data["lost_tokens"]) == (1, 6)
    output = io.StringIO()
    search.run(recipe(films, query="whale " * 300, k=1, format="table"), output=output)
    assert "cut  about 46 tokens, which the model does not take\n" in output.getvalue()


# --- refusals, word for word


@pytest.mark.parametrize(("settings", "message"), [
    ({"query": " "}, "the query is empty; ask for something"),
    ({"query": "x", "queries": "q"}, "a query and --queries are two things to search for; choose one"),
    ({"queries": "q", "vectors": Path("v")},
     "--queries and --vectors are two things to search for; choose one"),
    ({"like": "a", "hybrid": True}, "--hybrid needs the words of the query; leave it or --like out"),
    ({"vectors": Path("v"), "lexical": True},
     "--lexical needs the words of the query; leave it or --vectors out"),
    ({"query": "x", "lexical": True, "hybrid": True},
     "hybrid and lexical are two ways to search; choose one"),
    ({"query": "x", "lexical": True, "min_score": 0.5},
     "min_score is a cosine, and a lexical search has none; leave one of them out"),
    ({"query": "x", "where": "year >"}, "--where: expected a value after >\n  year >\n        ^"),
    ({"query": "x", "where": "lang = 5"},
     "--where: lang holds texts, but 5 is a number; write '5' to compare it as a text\n"
     "  lang = 5\n"
     "         ^"),
    ({"queries": "nosuch.jsonl"}, "nosuch.jsonl: no such file or folder"),
])  # fmt: skip
def test_what_does_not_go_together_is_told(films: Path, settings: dict[str, Any], message: str) -> None:
    assert refused(films, **settings) == message


def test_no_index_and_two_indexes_where_one_is_needed_are_told(films: Path) -> None:
    assert refused(films, films, query="x") == f"{films} is named twice; each index is searched once"
    assert refused(query="x") == "no index given; gemb search docs.gemb 'what to search for'"
    assert refused(films, films.parent, like="whale") == (
        "like looks for the neighbours of a document in its own index; name one index"
    )


def test_a_mistake_is_told_before_the_model_is_loaded(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueryEncoder, "embed", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(films, query="x", where="yaer = 1")
    with pytest.raises(UnavailableError):
        ask(films, films.parent / "gone.gemb", query="x")


def test_bad_rows_in_a_file_of_queries_are_told_with_their_lines(films: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": " "}\n', "utf-8")
    assert refused(films, queries=str(path)) == f"{path}:2: empty text; correct the queries"
    path.write_text('{"id": "a", "question": "x"}\n', "utf-8")
    assert refused(films, queries=str(path)) == (
        f'{path}:1: no "query"; this line has id, question; name its field with --text-field'
    )
    assert len(ask(films, queries=str(path), text_field="question", k=1)[1]) == 1


def test_a_file_without_a_query_is_told(films: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n", "utf-8")
    assert refused(films, queries=str(tmp_path / "q.jsonl")) == f"{tmp_path}/q.jsonl: no rows"
    np.save(tmp_path / "q.npy", np.empty((0, 384), np.float32))
    assert refused(films, vectors=tmp_path / "q.npy") == f"{tmp_path}/q.npy: no rows"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_vectors_that_are_none_are_told(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    monkeypatch.setattr(search, "BATCH_QUERIES", 2)
    np.save(tmp_path / "q.npy", np.array([[1.0] * 384] * 3 + [[bad] * 384], np.float32))
    assert refused(films, vectors=tmp_path / "q.npy") == (
        f"{tmp_path}/q.npy: the vector '3' is zeros only, or has NaN or infinity in it; leave it out"
    )


def test_what_does_not_fit_the_index_ends_with_5(films: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", np.ones((1, 7), np.float32))
    plain = make_plain(tmp_path / "plain.gemb", embedded(["a"]))
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: ask(films, vectors=tmp_path / "q.npy"), "holds 384-wide vectors, but the query is 7 wide"),
        (
            lambda: ask(films, plain, query="x"),
            "a model that is not recorded; their scores",
        ),
        (lambda: ask(films, query="x", as_="nosuch"), "the model has no prompt 'nosuch'"),
    ]
    for call, message in calls:
        with pytest.raises(MismatchError, match=message):
            call()


def test_words_of_an_index_without_words_are_told(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "silent.gemb", Settings(dims=2, words=False)) as writer:
        writer.put([Document("a")], np.eye(1, 2, dtype=np.float32))
    assert refused(tmp_path / "silent.gemb", query="x", lexical=True).startswith(
        f"{tmp_path}/silent.gemb keeps no words;"
    )


def test_one_object_for_many_queries_is_refused(films: Path, tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        search.run(recipe(films, queries="q.jsonl"), json=True)
    assert str(caught.value) == (
        "--json is one object for one query; leave it out, a pipe gets one object a hit"
    )


def test_two_forms_of_one_answer_are_refused(films: Path) -> None:
    with pytest.raises(GembError) as raised:
        search.run(recipe(films, query=QUERY, format="trec"), json=True)
    assert str(raised.value) == "--json is a form of its own; leave it or --format trec out"


def test_a_closed_stdout_is_told(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(GembError, match="stdout is closed, so there is no place for the hits"):
        search.run(recipe(films, query="x"))
