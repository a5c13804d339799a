"""What a row of training data says: its columns bound to roles by their names, never by their order.

Read without conversion: the pairs, triples, n-tuples and scored pairs of sentence-transformers, the JSONL of
FlagEmbedding, Tevatron, NeMo and ms-swift, labelled texts. A column that nothing explains is an error.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple, TypeAlias, cast

from gemb.errors import GembError
from gemb.recipe.problems import did_you_mean
from gemb.training.data_recipe import ColumnNames, Shape

QUERY = ("query", "anchor", "question", "query_text", "messages")
POSITIVE = (
    "positive",
    "positives",
    "pos",
    "answer",
    "passage",
    "positive_passages",
    "positive_messages",
    "positive_document_ids",
    "pos_doc",
)
NEGATIVE = (
    "negative",
    "negatives",
    "neg",
    "negative_passages",
    "negative_messages",
    "negative_document_ids",
    "neg_doc",
)
FIRST = ("sentence1", "first", "text1")
SECOND = ("sentence2", "second", "text2")
SCORE = ("score", "scores", "label", "labels")
TEXT = ("text", "sentence")
LABEL = ("label", "labels")
TITLE = ("positive_title",)
METADATA = (
    *("id", "_id", "idx", "query_id", "question_id", "doc_id", "docid", "corpus_id", "source", "split"),
    *("subset", "language", "lang", "domain", "type", "prompt", "pos_scores", "neg_scores", "pos_id"),
    "neg_id",
)
"""Columns of the known layouts that carry no text; they are left out, and the plan says so."""

_NUMBERED = {"positive": re.compile(r"positive_\d+"), "negative": re.compile(r"negative_\d+")}
_IDS = ("positive_document_ids", "negative_document_ids")
_ID_KEYS = ("docid", "id", "_id", "doc_id")  # of a passage that is an object


class Text(NamedTuple):
    """A text of an example, without prompt."""

    text: str
    title: str | None = None

    def joined(self) -> str:
        """The title, a space and the text, as in BEIR; the text alone where there is no title."""
        return f"{self.title} {self.text}" if self.title and not self.title.isspace() else self.text

    def is_blank(self) -> bool:
        """True if there is nothing but white space."""
        return not self.text.strip() and not (self.title or "").strip()


class Example(NamedTuple):
    """A usable row."""

    query: Text
    """The first text of a scored pair; the text of a labelled one."""
    positives: tuple[Text, ...] = ()
    """At least one; of a scored pair the second text; empty for labelled texts."""
    negatives: tuple[Text, ...] = ()
    score: float | None = None
    """Of a scored pair."""
    label: str | None = None
    """Of a labelled text."""


Lookup: TypeAlias = Callable[[str], Text | None]
"""The document with an id."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column has which role, for all rows with the same columns."""

    shape: Shape
    roles: Mapping[str, tuple[str, ...]]
    """Role to columns; only those of the row."""
    left_out: tuple[str, ...]

    def example(self, row: Mapping[str, object], lookup: Lookup | None) -> Example | str:
        """The example in a row, or why it is none."""
        try:
            return _READERS[self.shape](_Row(self.roles, row, lookup))
        except _UnusableError as error:
            return str(error)

    def __str__(self) -> str:
        """`query <- anchor, positive <- positive; left out: id`."""
        bound = ", ".join(f"{role} <- {' + '.join(names)}" for role, names in self.roles.items())
        return f"{bound}; left out: {', '.join(self.left_out)}" if self.left_out else bound


def bind(names: Sequence[str], *, shape: Shape | None, columns: ColumnNames | None) -> Columns:
    """The roles of the columns `names` of a row.

    `columns` says them if given. Otherwise the names do; a `shape` of None is then told by them, and one
    that is given lets `score` and `label` be left out of pairs, and query and positive be a scored pair.

    Raises GembError for a column that nothing explains, a role that two columns claim, no shape at all.
    """
    if columns is not None:
        return _bind_named(names, columns)
    chosen = shape or _shape_of(names)
    claims = _claims(chosen)
    roles: dict[str, tuple[str, ...]] = {}
    for role, known in claims.items():
        found = tuple(name for name in names if name in known)
        numbered = _NUMBERED.get(role)
        more = tuple(name for name in names if numbered and numbered.fullmatch(name))
        if len(found) > 1 and role != "negative":
            raise GembError(
                f"{_quoted(found, ' and ')} can all be the {role}; "
                f"say which one under columns: {{{role}: ...}}"
            )
        if found or more:
            roles[role] = found + more
    bound = {name for found in roles.values() for name in found}
    allowed = {*METADATA, *(SCORE if chosen == "pairs" and shape is not None else ())}
    for name in names:
        if name not in bound and name not in allowed:
            choices = [known for role, names_of in claims.items() if role not in roles for known in names_of]
            hint = did_you_mean(name, [*choices, *(["negative"] if chosen == "pairs" else [])])
            raise GembError(
                f'unknown column "{name}"{hint or "; it has no role among " + ", ".join(names)}; '
                "name the columns that are wanted under columns:, the others are then left out"
            )
    return Columns(chosen, roles, tuple(name for name in names if name not in bound))


def _bind_named(names: Sequence[str], columns: ColumnNames) -> Columns:
    roles: dict[str, tuple[str, ...]] = {}
    for role in type(columns).model_fields:
        wanted = getattr(columns, role)
        found = tuple(name for name in _sequence(wanted) if name in names)
        if found:
            roles[role] = found
    bound = {name for found in roles.values() for name in found}
    return Columns(columns.shape, roles, tuple(name for name in names if name not in bound))


def _sequence(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else names


def named(columns: ColumnNames) -> dict[str, str]:
    """The columns that a mapping names, each with its role."""
    return {name: role for role in type(columns).model_fields for name in _sequence(getattr(columns, role))}


def _claims(shape: Shape) -> dict[str, tuple[str, ...]]:
    """Role to the names that stand for it."""
    if shape == "pairs":
        return {
            "query": (*QUERY, FIRST[0]),
            "positive": (*POSITIVE, SECOND[0]),
            "negative": NEGATIVE,
            "title": TITLE,
        }
    if shape == "scored":
        return {"first": (*FIRST, *QUERY), "second": (*SECOND, *POSITIVE), "score": SCORE}
    return {"text": TEXT, "label": LABEL}


def _shape_of(names: Sequence[str]) -> Shape:
    have = set(names)
    numbered = any(_NUMBERED["positive"].fullmatch(name) for name in names)
    if have & set(QUERY) and (have & set(POSITIVE) or numbered):
        score = [name for name in SCORE if name in have]
        if score:
            raise GembError(
                f'the columns with "{score[0]}" can be pairs or scored pairs; say shape: pairs, '
                f'which leaves "{score[0]}" out, or shape: scored'
            )
        return "pairs"
    if have & set(FIRST) and have & set(SECOND):
        return "scored" if have & set(SCORE) else "pairs"
    if have & set(TEXT) and have & set(LABEL):
        return "labelled"
    for name in names:  # a slip of the finger in one of two columns
        known = [*QUERY, *POSITIVE, *FIRST, *SECOND, *SCORE, *TEXT]
        if name not in known and name not in METADATA and (hint := did_you_mean(name, known)):
            raise GembError(f'unknown column "{name}"{hint}; or name the columns under columns:')
    raise GembError(
        f"cannot tell the roles of the columns {_quoted(names, ', ')}; name them under columns: "
        "query and positive, or first, second and score, or text and label"
    )


def pair_problem(example: Example) -> str | None:
    """Why nothing can be learned from a query with these positives and negatives; None if something can."""
    if example.query in example.positives:
        return "the positive equals the query"
    if set(example.positives) & set(example.negatives):
        return "a negative equals a positive"
    return None


class _UnusableError(Exception):
    """Why a row is no example."""


class _Row(NamedTuple):
    roles: Mapping[str, tuple[str, ...]]
    row: Mapping[str, object]
    lookup: Lookup | None

    def values(self, role: str) -> Iterator[tuple[str, object]]:
        """Columns of the role, with what the row has there."""
        for column in self.roles.get(role, ()):
            yield column, self.row.get(column)

    def texts(self, role: str) -> tuple[Text, ...]:
        """The texts of a role; none where the row has null, an empty text or an empty list."""
        found = [
            text
            for column, value in self.values(role)
            if value is not None and value != "" and value != []
            for text in _texts(value, column, self.lookup)
        ]
        return tuple(found)

    def one(self, role: str) -> Text:
        """The one text of a role."""
        texts = self.texts(role)
        names = self.roles.get(role)
        if not names:
            raise _UnusableError(f"no {role}; this row has {_quoted(tuple(self.row), ', ') or 'no columns'}")
        if not texts:
            raise _UnusableError(f'"{names[0]}" is empty')
        if len(texts) > 1:
            raise _UnusableError(f'"{names[0]}" holds {len(texts)} texts, not one')
        return _not_blank(texts[0], names[0])

    def several(self, role: str) -> tuple[Text, ...]:
        texts = self.texts(role)
        for text in texts:
            _not_blank(text, self.roles[role][0])
        return texts


def _pair(row: _Row) -> Example:
    query = row.one("query")
    positives = row.several("positive")
    if not row.roles.get("positive"):
        raise _UnusableError(f"no positive; this row has {_quoted(tuple(row.row), ', ')}")
    if not positives:
        raise _UnusableError(f'"{row.roles["positive"][0]}" is empty')
    titles = [value for _, value in row.values("title") if value]
    if titles:
        if len(positives) > 1 or not isinstance(titles[0], str):
            raise _UnusableError(f'"{row.roles["title"][0]}" is not the title of one positive')
        positives = (positives[0]._replace(title=titles[0]),)
    example = Example(query, positives, row.several("negative"))
    if problem := pair_problem(example):
        raise _UnusableError(problem)
    return example


def _scored(row: _Row) -> Example:
    first, second = row.one("first"), row.one("second")
    values = list(row.values("score"))
    if not values:
        raise _UnusableError(f"no score; this row has {_quoted(tuple(row.row), ', ')}")
    column, value = values[0]
    try:
        score = float(cast("float | str", value)) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        score = None
    if score is None or not isfinite(score):
        raise _UnusableError(f'"{column}" is {_kind(value)}, not a number')
    return Example(first, (second,), score=score)


def _labelled(row: _Row) -> Example:
    text = row.one("text")
    values = list(row.values("label"))
    if not values:
        raise _UnusableError(f"no label; this row has {_quoted(tuple(row.row), ', ')}")
    column, value = values[0]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _UnusableError(f'"{column}" is {_kind(value)}, not a text or an integer')
    return Example(text, label=str(value))


_READERS: dict[Shape, Callable[[_Row], Example]] = {
    "pairs": _pair,
    "scored": _scored,
    "labelled": _labelled,
}


def _not_blank(text: Text, column: str) -> Text:
    if text.is_blank():
        raise _UnusableError(f'"{column}" is empty')
    return text


def _texts(value: object, column: str, lookup: Lookup | None) -> Iterator[Text]:
    """The texts in one value: a text, an object, a chat, or a list of them."""
    if column in _IDS:
        for number in value if isinstance(value, list) else [value]:
            yield _document(number, column, lookup)
    elif isinstance(value, str):
        yield Text(value)
    elif isinstance(value, Mapping):
        yield _passage(value, column, lookup)
    elif isinstance(value, list) and value and all(_is_message(item) for item in value):
        yield Text("\n".join(str(item["content"]) for item in value))  # the turns of one chat (ms-swift)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, list) and not (item and all(_is_message(turn) for turn in item)):
                raise _UnusableError(f'"{column}" holds a list inside a list')
            yield from _texts(item, column, lookup)
    else:
        raise _UnusableError(f'"{column}" is {_kind(value)}, not a text')


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value and isinstance(value.get("content"), str)


def _passage(value: Mapping[str, object], column: str, lookup: Lookup | None) -> Text:
    """A passage that is an object: {docid, title, text} of Tevatron, {id} of NeMo."""
    text, title = value.get("text"), value.get("title")
    if isinstance(text, str):
        if title is not None and not isinstance(title, str):
            raise _UnusableError(f'the title in "{column}" is {_kind(title)}, not a text')
        return Text(text, title or None)
    key = next((key for key in _ID_KEYS if key in value), None)
    if key is None:
        raise _UnusableError(f'"{column}" holds an object without "text" and without an id')
    return _document(value[key], column, lookup)


def _document(identifier: object, column: str, lookup: Lookup | None) -> Text:
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise _UnusableError(f'"{column}" holds {_kind(identifier)}, not the id of a document')
    if lookup is None:
        raise GembError(f'"{column}" holds ids of documents; name the file with their texts under corpus:')
    found = lookup(str(identifier))
    if found is None:
        raise _UnusableError(f'"{column}" names document "{identifier}", which the corpus does not hold')
    return found


def _quoted(names: Sequence[str], between: str) -> str:
    shown = between.join(f'"{name}"' for name in names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _kind(value: object) -> str:
    """What a JSON value is called."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f'"{value[:40]}"'
    return "a list" if isinstance(value, list) else "an object"
