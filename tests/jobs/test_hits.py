"""How hits are written: one JSON object, one line of a run, one row of a table each."""

import io
import json

import pytest

from gemb.errors import GembError
from gemb.jobs.hits import Answer, as_report, write_jsonl, write_table, write_trec
from gemb.report import Report
from gemb.retrieval.several import Found, Ranking
from gemb.store import Hit

LONG = "One thing first. Then the comet came back. " + "Nothing else happened in that year. " * 8


def hit(id_: str, score: float | None = 0.5, **more: object) -> Hit:
    return Hit(id_, score, **({"title": "", "text": f"text of {id_}", "metadata": {}} | more))  # type: ignore[arg-type]


def answer(
    *hits: Hit, query_id: str | None = None, ranking: Ranking = "vector", places: tuple[int, ...] = ()
) -> Answer:
    found = [Found(places[number] if places else 0, one) for number, one in enumerate(hits)]
    names = ["a.gemb", "b.gemb"] if places else ["a.gemb"]
    return Answer(query_id, "when did the comet return?", found, names, ranking)


def lines(of: Answer) -> list[dict[str, object]]:
    output = io.StringIO()
    write_jsonl(of, output)
    return [json.loads(line) for line in output.getvalue().split("\n")[:-1]]


def trec(of: Answer) -> list[str]:
    output = io.StringIO()
    write_trec(of, output)
    return output.getvalue().splitlines()


def test_a_hit_is_one_object_with_its_best_passage() -> None:
    first = hit("d1", 0.87654321, title="T", text=LONG, metadata={"year": 1910}, passage=(17, 42))
    assert lines(answer(first, hit("d2", -0.25))) == [
        {
            "rank": 1, "score": 0.876543, "id": "d1", "title": "T", "text": "Then the comet came back.",
            "span": [17, 42], "metadata": {"year": 1910},
        },
        {
            "rank": 2, "score": -0.25, "id": "d2", "title": "", "text": "text of d2",
            "span": None, "metadata": {},
        },
    ]  # fmt: skip


def test_what_only_some_searches_have_is_there_only_then() -> None:
    (one,) = lines(answer(hit("d"), query_id="q7", places=(1,)))
    assert list(one)[:4] == ["query", "index", "rank", "score"]
    assert (one["query"], one["index"]) == ("q7", "b.gemb")
    (one,) = lines(answer(hit("d", None, words=3.25), ranking="lexical"))
    assert (one["score"], one["words"]) == (None, 3.25)
    (one,) = lines(answer(hit("d", 0.5), ranking="hybrid"))
    assert (one["score"], one["words"]) == (0.5, None)


def test_an_id_of_any_letters_is_one_line() -> None:
    (one,) = lines(answer(hit("a\nb\u2028日本")))
    assert one["id"] == "a\nb\u2028日本"


def test_a_run_has_the_scores_that_made_its_order() -> None:
    assert trec(answer(hit("d1", 0.75), hit("d2", 0.5), query_id="q1")) == [
        "q1 Q0 d1 1 0.75 gemb",
        "q1 Q0 d2 2 0.5 gemb",
    ]
    assert trec(answer(hit("d1", None, words=2.5), ranking="lexical")) == ["1 Q0 d1 1 2.5 gemb"]
    # The cosines of a fused ranking do not fall, and trec_eval would order by them.
    fused = answer(hit("d1", 0.1), hit("d2", 0.9), hit("d3", 0.5), ranking="hybrid")
    assert [line.split()[4] for line in trec(fused)] == ["1", "0.5", "0.333333333"]
    of_two = answer(hit("d", None, words=1.0), hit("e", None, words=9.0), ranking="lexical", places=(0, 1))
    assert [line.split()[4] for line in trec(of_two)] == ["1", "0.5"]


@pytest.mark.parametrize("id_", ["a b", "a\tb", "a\u3000b", ""])
def test_a_run_has_no_room_for_white_space_in_ids(id_: str) -> None:
    with pytest.raises(GembError) as caught:
        trec(answer(hit(id_)))
    assert str(caught.value) == (
        f"the document id {id_!r} has white space, for which a TREC run has no room; use jsonl"
    )
    with pytest.raises(GembError, match=r"^the query id .* has white space"):
        trec(answer(hit("d"), query_id=id_ or " "))


def table(of: Answer) -> tuple[list[str], list[list[str]]]:
    report = as_report(of)
    (shown,) = report.tables
    return list(shown.columns), [list(row) for row in shown.rows]


def test_a_table_has_the_columns_that_have_something_in_them() -> None:
    columns, rows = table(answer(hit("d1", 0.87654), hit("d2")))
    assert (columns, rows) == (
        ["score", "id", "passage"],
        [["0.877", "d1", "text of d1"], ["0.500", "d2", "text of d2"]],
    )
    columns, rows = table(
        answer(
            hit("d1", title="One", metadata={"year": 1999, "tags": ["a", "b"], "note": None}),
            hit("d2", title="d2", metadata={"year": None, "long": "x" * 60}),
            places=(0, 1),
        )
    )
    assert columns == ["score", "index", "id", "title", "passage", "year", "tags", "long"]
    assert rows[0] == ["0.500", "a.gemb", "d1", "One", "text of d1", "1999", '["a","b"]', ""]
    assert rows[1] == ["0.500", "b.gemb", "d2", "", "text of d2", "", "", "x" * 23 + "…"]


def test_the_score_of_words_has_its_own_column() -> None:
    assert table(answer(hit("d", None, words=3.256), ranking="lexical"))[1] == [["3.26", "d", "text of d"]]
    columns, rows = table(answer(hit("d", 0.5), hit("e", 0.25, words=1.0), ranking="hybrid"))
    assert columns[:2] == ["score", "words"]
    assert [row[:2] for row in rows] == [["0.500", ""], ["0.250", "1.00"]]


def test_a_table_shows_the_sentence_that_fits_the_query() -> None:
    ((_, _, passage),) = table(answer(hit("d", text=LONG)))[1]
    assert "the comet came back" in passage
    ((_, _, passage),) = table(
        answer(hit("d", text="Filler goes on here. " * 40 + "A comet! " + "More. " * 40))
    )[1]
    assert "A comet!" in passage


def test_nothing_in_a_text_can_steer_the_terminal() -> None:
    output = io.StringIO()
    evil = hit("a\x1b[2J", text="\x1b]0;gotcha\x07x", title="t\rb", metadata={"n\x9bm": "\x1b[31m"})
    write_table(answer(evil, query_id="q\x1b"), output)
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(output.getvalue())


def test_no_hit_is_said() -> None:
    report = as_report(answer(query_id="q1"))
    assert report == Report(title="q1: when did the comet return?\n  no document found", rows=[])
    assert lines(answer()) == []
    assert trec(answer()) == []
