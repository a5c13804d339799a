"""Columns by name: every known shape, and what is said where names do not tell."""

from collections.abc import Mapping

import pytest

from gemb.errors import GembError
from gemb.training.columns import Columns, Example, Text, bind
from gemb.training.data_recipe import ColumnNames, Shape


def read(
    row: Mapping[str, object], *, shape: Shape | None = None, columns: ColumnNames | None = None
) -> Example | str:
    return bind(tuple(row), shape=shape, columns=columns).example(row, {"7": Text("seven", "Seven")}.get)


def pair(query: str, positive: str | list[str], negatives: list[str] | None = None) -> Example:
    positives = [positive] if isinstance(positive, str) else positive
    return Example(Text(query), tuple(map(Text, positives)), tuple(map(Text, negatives or [])))


PAIRS: list[tuple[Mapping[str, object], Example]] = [
    ({"anchor": "q", "positive": "p"}, pair("q", "p")),
    ({"positive": "p", "anchor": "q"}, pair("q", "p")),
    ({"anchor": "q", "positive": "p", "negative": "n"}, pair("q", "p", ["n"])),
    ({"negative": "n", "positive": "p", "query": "q"}, pair("q", "p", ["n"])),
    (
        {"anchor": "q", "positive": "p", "negative_2": "m", "negative_1": "n"},
        pair("q", "p", ["m", "n"]),
    ),
    ({"query": "q", "answer": "p"}, pair("q", "p")),
    ({"question": "q", "passage": "p"}, pair("q", "p")),
    ({"sentence1": "q", "sentence2": "p"}, pair("q", "p")),
    # FlagEmbedding
    (
        {"query": "q", "pos": ["p", "o"], "neg": ["n", "m"], "pos_scores": [1.0, 0.5], "prompt": "x: "},
        pair("q", ["p", "o"], ["n", "m"]),
    ),
    # Tevatron
    (
        {
            "query_id": "1",
            "query": "q",
            "positive_passages": [{"docid": "2", "title": "T", "text": "p"}],
            "negative_passages": [{"docid": "3", "title": "", "text": "n"}],
        },
        Example(Text("q"), (Text("p", "T"),), (Text("n"),)),
    ),
    (
        {"query_id": "1", "query_text": "q", "positive_document_ids": ["7"], "negative_document_ids": []},
        Example(Text("q"), (Text("seven", "Seven"),)),
    ),
    # NeMo
    (
        {"question_id": "1", "question": "q", "corpus_id": "c", "pos_doc": [{"id": "7"}], "neg_doc": []},
        Example(Text("q"), (Text("seven", "Seven"),)),
    ),
    # ms-swift
    (
        {
            "messages": [{"role": "user", "content": "q"}],
            "positive_messages": [[{"role": "user", "content": "p"}]],
            "negative_messages": [
                [{"role": "user", "content": "n"}],
                [{"role": "user", "content": "m"}, {"role": "assistant", "content": "l"}],
            ],
        },
        pair("q", "p", ["n", "m\nl"]),
    ),
    ({"anchor": "q", "positive": "p", "negative": None}, pair("q", "p")),
    ({"anchor": "q", "positive": "p", "negative": ""}, pair("q", "p")),
]


@pytest.mark.parametrize(("row", "example"), PAIRS, ids=[", ".join(row) for row, _ in PAIRS])
def test_every_known_shape_of_pairs_is_read_without_conversion(
    row: Mapping[str, object], example: Example
) -> None:
    assert read(row) == example


def test_scored_pairs_and_labelled_texts_are_told_by_their_names() -> None:
    scored = Example(Text("a"), (Text("b"),), score=2.5)
    assert read({"score": 2.5, "sentence2": "b", "sentence1": "a"}) == scored
    assert read({"sentence1": "a", "sentence2": "b", "label": "2.5"}) == scored
    assert read({"query": "a", "passage": "b", "score": 2.5}, shape="scored") == scored
    assert read({"text": "a", "label": 3}) == Example(Text("a"), label="3")
    assert read({"label": "x", "sentence": "a"}) == Example(Text("a"), label="x")


def test_named_columns_win_over_their_names_and_leave_the_others_out() -> None:
    row = {"query": "wrong", "b": "q", "c": "p", "d": ["n"], "e": "T", "positive": "wrong"}
    names = ColumnNames(query="b", positive="c", negative=("d", "f"), title="e")
    columns = bind(tuple(row), shape=None, columns=names)
    assert columns.example(row, None) == Example(Text("q"), (Text("p", "T"),), (Text("n"),))
    assert str(columns) == ("query <- b, positive <- c, negative <- d, title <- e; left out: query, positive")


def test_metadata_are_left_out_and_that_is_said() -> None:
    columns = bind(("id", "anchor", "positive", "source"), shape=None, columns=None)
    assert str(columns) == "query <- anchor, positive <- positive; left out: id, source"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"anchor": "", "positive": "p"}, '"anchor" is empty'),
        ({"anchor": " \n", "positive": "p"}, '"anchor" is empty'),
        ({"anchor": "q", "positive": "\t"}, '"positive" is empty'),
        ({"anchor": "q", "positive": []}, '"positive" is empty'),
        ({"anchor": "q", "positive": None}, '"positive" is empty'),
        ({"anchor": "q", "pos": ["p", ""]}, '"pos" is empty'),
        ({"anchor": "q", "positive": "p", "negative": " "}, '"negative" is empty'),
        ({"anchor": "q", "positive": "q"}, "the positive equals the query"),
        ({"anchor": "q", "pos": ["p", "q"]}, "the positive equals the query"),
        ({"anchor": "q", "positive": "p", "neg": ["n", "p"]}, "a negative equals a positive"),
        ({"anchor": 5, "positive": "p"}, '"anchor" is the number 5, not a text'),
        ({"anchor": True, "positive": "p"}, '"anchor" is true, not a text'),
        ({"anchor": ["a", "b"], "positive": "p"}, '"anchor" holds 2 texts, not one'),
        ({"anchor": "q", "positive": [["p"]]}, '"positive" holds a list inside a list'),
        (
            {"anchor": "q", "positive": {"body": "p"}},
            '"positive" holds an object without "text" and without an id',
        ),
        (
            {"anchor": "q", "positive": {"text": "p", "title": 3}},
            'the title in "positive" is the number 3, not a text',
        ),
        (
            {"anchor": "q", "positive_document_ids": ["8"]},
            '"positive_document_ids" names document "8", which the corpus does not hold',
        ),
        ({"anchor": "q", "pos_doc": [{"id": None}]}, '"pos_doc" holds null, not the id of a document'),
        ({"sentence1": "a", "sentence2": "b", "label": "yes"}, '"label" is "yes", not a number'),
        ({"sentence1": "a", "sentence2": "b", "score": True}, '"score" is true, not a number'),
        ({"sentence1": "a", "sentence2": "b", "score": "nan"}, '"score" is "nan", not a number'),
        ({"sentence1": "a", "sentence2": "b", "score": None}, '"score" is null, not a number'),
        ({"text": "a", "label": None}, '"label" is null, not a text or an integer'),
        ({"text": "a", "label": 0.5}, '"label" is the number 0.5, not a text or an integer'),
    ],
)
def test_a_row_that_teaches_nothing_says_why(row: Mapping[str, object], reason: str) -> None:
    assert read(row) == reason


def test_a_row_without_a_role_names_what_it_has() -> None:
    columns = bind(("anchor", "id"), shape="pairs", columns=None)
    assert columns.example({"anchor": "q", "id": 1}, None) == 'no positive; this row has "anchor", "id"'
    columns = bind(("positive",), shape="pairs", columns=None)
    assert columns.example({"positive": "q"}, None) == 'no query; this row has "positive"'


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (
            ("anchor", "positive", "negatve"),
            None,
            'unknown column "negatve"; did you mean negative?; name the columns that are wanted under '
            "columns:, the others are then left out",
        ),
        (
            ("anchor", "positive", "weather"),
            None,
            'unknown column "weather"; it has no role among anchor, positive, weather; name the columns that '
            "are wanted under columns:, the others are then left out",
        ),
        (
            ("anchr", "positive"),
            None,
            'unknown column "anchr"; did you mean anchor?; or name the columns under columns:',
        ),
        (
            ("a", "b"),
            None,
            'cannot tell the roles of the columns "a", "b"; name them under columns: query and positive, '
            "or first, second and score, or text and label",
        ),
        (
            ("question", "answer", "passage"),
            None,
            '"answer" and "passage" can all be the positive; say which one under columns: {positive: ...}',
        ),
        (
            ("query", "passage", "score"),
            None,
            'the columns with "score" can be pairs or scored pairs; say shape: pairs, which leaves "score" '
            "out, or shape: scored",
        ),
    ],
)
def test_a_column_that_nothing_explains_is_an_error(
    names: tuple[str, ...], shape: Shape | None, message: str
) -> None:
    with pytest.raises(GembError) as error:
        bind(names, shape=shape, columns=None)
    assert str(error.value) == message


def test_ids_of_documents_need_a_corpus() -> None:
    row = {"query": "q", "positive_document_ids": ["7"]}
    columns = bind(tuple(row), shape=None, columns=None)
    with pytest.raises(GembError) as error:
        columns.example(row, None)
    assert str(error.value) == (
        '"positive_document_ids" holds ids of documents; name the file with their texts under corpus:'
    )


def test_a_score_is_left_out_where_pairs_are_asked_for() -> None:
    columns = bind(("query", "passage", "score"), shape="pairs", columns=None)
    assert isinstance(columns, Columns)
    assert columns.left_out == ("score",)
