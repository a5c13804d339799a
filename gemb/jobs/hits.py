"""The hits of a search, written: a table for people, JSON lines for programs, a TREC run for evaluation."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import orjson

from gemb.errors import GembError
from gemb.report import Report, Table, terminal
from gemb.report.result import write
from gemb.retrieval.excerpts import excerpt
from gemb.retrieval.several import Found, Ranking

PASSAGE_CHARACTERS = 160
"""How much of the best passage a table shows, and of the query below."""
QUERY_CHARACTERS = 200
METADATA_COLUMNS = 4
_METADATA_CHARACTERS = 24
_TREC_TAG = "gemb"
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found for one query, best first.

    `query_id` is None for a query that has no id, `query` empty for one that is a ready vector. `indexes`
    are the names of those that were searched, by `Found.place`. About `lost_tokens` of the query were
    more than the model takes.
    """

    query_id: str | None
    query: str
    found: Sequence[Found]
    indexes: Sequence[str]
    ranking: Ranking
    lost_tokens: int = 0

    def hits(self) -> list[dict[str, object]]:
        """Each hit as JSON: `text` is the best passage, and `span` where it stands in the document's text.

        `query` is there only where queries have ids, `index` only where several were searched, and `words`,
        the BM25 score, only where words were searched for.
        """
        return [self._hit(rank, found) for rank, found in enumerate(self.found, 1)]

    def _hit(self, rank: int, found: Found) -> dict[str, object]:
        hit = found.hit
        entry: dict[str, object] = {}
        if self.query_id is not None:
            entry["query"] = self.query_id
        if len(self.indexes) > 1:
            entry["index"] = self.indexes[found.place]
        entry |= {"rank": rank, "score": _rounded(hit.score)}
        if self.ranking != "vector":
            entry["words"] = _rounded(hit.words)
        return entry | {
            "id": hit.id,
            "title": hit.title,
            "text": hit.excerpt,
            "span": hit.passage,
            "metadata": hit.metadata,
        }


def write_jsonl(answer: Answer, output: TextIO) -> None:
    """One JSON object a hit and line."""
    for hit in answer.hits():
        output.write(orjson.dumps(hit, option=orjson.OPT_APPEND_NEWLINE).decode())


def write_trec(answer: Answer, output: TextIO) -> None:
    """One line a hit, as trec_eval reads it: `query Q0 document rank score gemb`.

    trec_eval orders by the score, so this is the score that made the order: the cosine, the BM25 score, or
    1/rank where ranks did. A query without an id is called 1.

    Raises GembError for an id with white space, for which the format has no room.
    """
    query = "1" if answer.query_id is None else _trec_id(answer.query_id, "query")
    is_by_ranks = answer.ranking == "hybrid" or (answer.ranking == "lexical" and len(answer.indexes) > 1)
    for rank, found in enumerate(answer.found, 1):
        hit = found.hit
        score = 1 / rank if is_by_ranks else hit.words if answer.ranking == "lexical" else hit.score
        output.write(f"{query} Q0 {_trec_id(hit.id, 'document')} {rank} {score:.9g} {_TREC_TAG}\n")


def write_table(answer: Answer, output: TextIO) -> None:
    """The query, and a row a hit: scores, id, title, the sentence that fits the query best, metadata."""
    write(as_report(answer), output)
    if not (terminal.is_interactive(output) or terminal.has_colour(output)):
        output.write("\n")  # between answers; a table in colour ends with an empty line by itself


WRITERS: Mapping[str, Callable[[Answer, TextIO], None]] = {
    "table": write_table,
    "jsonl": write_jsonl,
    "trec": write_trec,
}


def as_report(answer: Answer) -> Report:
    """An answer for people."""
    query = textwrap.shorten(_printable(answer.query), QUERY_CHARACTERS, placeholder=" …")
    title = ": ".join(part for part in (_printable(answer.query_id or ""), query) if part) or "query"
    notes = []
    if answer.lost_tokens:
        notes.append(("cut", f"about {answer.lost_tokens:,} tokens, which the model does not take"))
    if not answer.found:
        return Report(title=f"{title}\n  no document found", rows=notes)
    columns = _columns(answer)
    shown = [column for column in columns if column.is_fixed or any(column.cells)]
    rows = list(zip(*(column.cells for column in shown), strict=True))
    numbers = [column.name for column in shown if column.is_number]
    table = Table([column.name for column in shown], rows, right_aligned=numbers)
    return Report(title=title, rows=notes, tables=[table])


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    cells: Sequence[str]
    is_fixed: bool = False
    is_number: bool = False


def _columns(answer: Answer) -> list[_Column]:
    hits = [found.hit for found in answer.found]
    columns = []
    if answer.ranking != "lexical":
        scores = [f"{hit.score:.3f}" for hit in hits]
        columns.append(_Column("score", scores, is_fixed=True, is_number=True))
    if answer.ranking != "vector":
        words = ["" if hit.words is None else f"{hit.words:.2f}" for hit in hits]
        columns.append(_Column("words", words, is_fixed=True, is_number=True))
    if len(answer.indexes) > 1:
        columns.append(_Column("index", [answer.indexes[found.place] for found in answer.found]))
    # A title that only repeats the id says nothing.
    titles = [_printable(hit.title) if hit.title != hit.id else "" for hit in hits]
    passages = [_printable(excerpt(hit.excerpt, answer.query, PASSAGE_CHARACTERS)) for hit in hits]
    columns += [
        _Column("id", [_printable(hit.id) for hit in hits], is_fixed=True),
        _Column("title", titles),
        _Column("passage", passages),
    ]
    names = dict.fromkeys(name for hit in hits for name in hit.metadata)
    for name in list(names)[:METADATA_COLUMNS]:
        values = [hit.metadata.get(name) for hit in hits]
        is_number = all(value is None or type(value) in (int, float) for value in values)
        columns.append(_Column(_printable(name), [_cell(value) for value in values], is_number=is_number))
    return columns


def _cell(value: object) -> str:
    """A value of the metadata, in a few characters."""
    if value is None:
        return ""
    text = _printable(value if isinstance(value, str) else orjson.dumps(value).decode())
    return text if len(text) <= _METADATA_CHARACTERS else f"{text[: _METADATA_CHARACTERS - 1]}…"


def _printable(text: str) -> str:
    """`text` on one line and without what could steer a terminal."""
    return _CONTROLS.sub(" ", text)


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 6)


def _trec_id(id_: str, what: str) -> str:
    if not id_ or any(character.isspace() for character in id_):
        raise GembError(f"the {what} id {id_!r} has white space, for which a TREC run has no room; use jsonl")
    return id_
