"""The stages of `gemb mine`: collecting the texts, and mining rows block by block with a journal.

    rows/          the usable rows by number (`gemb.training.examples`)
    passages.jsonl, queries.jsonl, texts.sqlite, texts.json   the different texts (`gemb.mining.texts`)
    passages.npy, queries.npy, *.second.npy                   their vectors
    mined.jsonl    the rows with their negatives, appended block by block
    journal.jsonl  one line a block: rows done, bytes of mined.jsonl, counts; synced after the rows

B rows of a block, Q different queries in it, D dims, k candidates.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import Journal, os_errors_explained, sync_to_disk, write_fully
from gemb.mining.rules import Choice, Rules, Shortage, choose
from gemb.mining.texts import Passage, TextSet, TextWriter
from gemb.mining.vectors import NumberedVectors, Search, scores_of
from gemb.text.inputs import InputFile
from gemb.text.records import ReadOptions, Record, read_records
from gemb.training.columns import Example, Text, bind
from gemb.training.data_recipe import ColumnNames
from gemb.training.examples import Rows
from gemb.training.rows import read_rows

BLOCK_ROWS = 4096
"""Mined at a time, which reads the vectors of all passages once."""
CANDIDATES_AT_ONCE = 1 << 20
"""Q x k of one search; queries with very many positives make it several."""
_HEARD_EVERY = 4096

OnRows = Callable[[int, int | None], None]
"""Hears how many rows are done, and how many there are."""


def collect(
    rows: Rows, corpus: InputFile | None, work: Path, on_rows: OnRows, *, stop_at: float = math.inf
) -> bool:
    """Writes the different texts of the corpus and the rows into the work folder, anew.

    Records of the corpus that cannot be read are left out, and counted. The corpus is left at `stop_at`, in
    seconds of time.monotonic(). Returns whether it was read to its end.
    """
    complete = True
    with TextWriter(work) as writer:
        if corpus is not None:
            for number, record in enumerate(read_records([corpus], ReadOptions())):
                if isinstance(record, Record):
                    writer.add_passage(Passage(record.text, record.title))
                else:
                    writer.leave_out(str(record))
                if number % _HEARD_EVERY == 0:
                    on_rows(number, None)
                    if time.monotonic() > stop_at:
                        complete = False
                        break
        for row in range(rows.size):
            example = rows.example(row)
            writer.add_pair(
                example.query.joined(), map(_passage, example.positives), map(_passage, example.negatives)
            )
            if row % _HEARD_EVERY == 0:
                on_rows(row, rows.size)
        writer.finish()
    return complete


def _passage(text: Text) -> Passage:
    return Passage(text.text, text.title)


class Scorer(NamedTuple):
    """The vectors of one model."""

    passages: NumberedVectors
    queries: NumberedVectors

    @classmethod
    def open(cls, passages: Path, queries: Path, texts: TextSet) -> Scorer:
        """The vectors of all texts."""
        return cls(NumberedVectors(passages, texts.passages), NumberedVectors(queries, texts.queries))

    def score(self, query: int, passages: Sequence[int]) -> NDArray[np.float32]:
        """The cosines [n] of a query and passages, all by number; NaN where a vector is missing."""
        if not passages:
            return np.empty(0, np.float32)
        vector = self.queries.take(np.array([query]))[0]
        return scores_of(vector, self.passages.take(np.array(passages)))


@dataclass
class Tally:
    """What was mined so far."""

    rows: int = 0
    negatives: int = 0
    too_close: int = 0
    by_count: dict[int, int] = field(default_factory=dict)
    """Rows by how many negatives they got."""
    shortages: dict[str, int] = field(default_factory=dict)
    """Rows that got fewer than asked, by reason."""

    def add(self, choice: Choice) -> None:
        """Count a row."""
        found = len(choice.places)
        self.rows += 1
        self.negatives += found
        self.too_close += choice.too_close
        self.by_count[found] = self.by_count.get(found, 0) + 1
        if choice.shortage is not None:
            reason = choice.shortage.value
            self.shortages[reason] = self.shortages.get(reason, 0) + 1

    def as_entry(self) -> dict[str, object]:
        """For the journal; `from_entry` reads it back."""
        return {
            "rows": self.rows,
            "negatives": self.negatives,
            "too_close": self.too_close,
            "by_count": {str(count): rows for count, rows in self.by_count.items()},
            "shortages": self.shortages,
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Tally:
        """What `as_entry` gave."""
        by_count = {int(count): int(rows) for count, rows in entry["by_count"].items()}
        return cls(entry["rows"], entry["negatives"], entry["too_close"], by_count, dict(entry["shortages"]))


class _Asked(NamedTuple):
    """A row before it is mined."""

    row: int
    example: Example
    query: int
    positives: list[int]
    forbidden: set[int]


class _Mined(NamedTuple):
    """A row's negatives by number, best rank first."""

    choice: Choice
    negatives: list[int]


class Miner:
    """Mines the rows in order, from the last line of the journal on."""

    def __init__(
        self,
        rows: Rows,
        texts: TextSet,
        scorers: Sequence[Scorer],
        search: Search,
        rules: Rules,
        work: Path,
        *,
        files: Sequence[InputFile],
        columns: ColumnNames | None,
        written: int | None,
    ) -> None:
        """Goes on behind the last line of the journal in `work`.

        `search` finds passages by the vectors of the first scorer. `files` are those of the rows, whose other
        columns are kept; none for a BEIR folder. `written` is the scorer whose scores are written beside.
        """
        self.path = work / "mined.jsonl"
        self._rows = rows
        self._texts = texts
        self._scorers = scorers
        self._search = search
        self._rules = rules
        self._files = files
        self._columns = columns
        self._written = written
        self._journal = Journal(work / "journal.jsonl")
        last = self._journal.last
        self.tally = Tally.from_entry(last) if last else Tally()
        self._bytes = int(last["bytes"]) if last else 0
        with os_errors_explained(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(self._file).st_size < self._bytes:
                raise GembError(f"{self.path} is shorter than its journal says; remove {work} to start anew")
            os.ftruncate(self._file, self._bytes)

    def run(self, stop: threading.Event, on_rows: OnRows) -> Tally:
        """Mine until all rows are done, or `stop` is set; then the block in hand is finished."""
        originals = self._originals(self.tally.rows)
        on_rows(self.tally.rows, self._rows.size)
        while self.tally.rows < self._rows.size and not stop.is_set():
            first = self.tally.rows
            asked = [self._asked(row) for row in range(first, min(first + BLOCK_ROWS, self._rows.size))]
            lines = []
            for one, mined in zip(asked, self._mined(asked), strict=True):
                self.tally.add(mined.choice)
                lines.append(orjson.dumps(self._line(one, mined, next(originals)), default=str) + b"\n")
            content = b"".join(lines)
            with os_errors_explained(self.path):
                write_fully(self._file, memoryview(content), self._bytes)
                sync_to_disk(self._file)
            self._bytes += len(content)
            self._journal.append({**self.tally.as_entry(), "bytes": self._bytes})
            on_rows(self.tally.rows, self._rows.size)
        return self.tally

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, row: int) -> _Asked:
        example = self._rows.example(row)
        query = self._texts.query(example.query.joined())
        positives = [self._texts.passage_number(_passage(text)) for text in example.positives]
        forbidden = self._texts.forbidden(query, map(_passage, example.negatives))
        return _Asked(row, example, query, positives, forbidden)

    def _mined(self, asked: Sequence[_Asked]) -> list[_Mined]:
        """The negatives of each row. Rows of one query share its search."""
        of_query: dict[int, list[int]] = {}
        for place, one in enumerate(asked):
            of_query.setdefault(one.query, []).append(place)
        most = max(len(one.forbidden) for one in asked)
        k = min(self._rules.last_rank + most, self._scorers[0].passages.rows)
        at_once = max(1, CANDIDATES_AT_ONCE // k)
        found: dict[int, _Mined] = {}
        queries = np.array(list(of_query), dtype=np.int64)
        for start in range(0, len(queries), at_once):
            some = queries[start : start + at_once]
            vectors = self._scorers[0].queries.take(some)
            scores, numbers = self._search(np.nan_to_num(vectors), k)
            for query, own_scores, own_numbers in zip(some.tolist(), scores, numbers, strict=True):
                for place in of_query[query]:
                    found[place] = self._choose(asked[place], own_scores, own_numbers)
        return [found[place] for place in range(len(asked))]

    def _choose(self, one: _Asked, scores: NDArray[np.float32], numbers: NDArray[np.int64]) -> _Mined:
        positives = [scorer.score(one.query, one.positives) for scorer in self._scorers]
        if any(np.isnan(own).any() for own in positives):
            return _Mined(Choice([], Shortage.NO_VECTOR, 0), [])
        allowed = ~np.isin(numbers, [-1, *one.forbidden])  # -1: a graph found fewer
        scores, numbers = scores[allowed], numbers[allowed]
        second: NDArray[np.float32] | None = None
        second_positive = 0.0
        if len(self._scorers) > 1:
            # Only what is in the range of ranks is judged again.
            scores, numbers = scores[: self._rules.last_rank], numbers[: self._rules.last_rank]
            second = self._scorers[1].score(one.query, numbers.tolist())
            second_positive = float(positives[1].min())
        choice = choose(self._rules, one.row, scores, float(positives[0].min()), second, second_positive)
        return _Mined(choice, numbers[choice.places].tolist())

    def _originals(self, start: int) -> Iterator[dict[str, object] | None]:
        """The rows as they stand in the files, from usable row `start` on; None each for a BEIR folder."""
        row = start
        if not self._files:
            while True:
                yield None
        for file in self._files:
            for raw in read_rows(file, lambda names: names):
                if row == self._rows.size:
                    return
                if isinstance(raw.values, dict) and f"{file.name}:{raw.line}" == self._rows.place(row):
                    yield raw.values
                    row += 1

    def _line(self, one: _Asked, mined: _Mined, original: dict[str, object] | None) -> dict[str, object]:
        """The row as it is written: what it held, all its negatives in one column, and the scores."""
        example = one.example
        if original is None:
            values: dict[str, object] = {
                "query": example.query.joined(),
                "positive": [_shown(_passage(text)) for text in example.positives],
            }
        else:
            bound = bind(tuple(original), shape="pairs", columns=self._columns)
            values = {
                name: value for name, value in original.items() if name not in bound.roles.get("negative", ())
            }
        own = [_passage(text) for text in example.negatives]
        passages = own + [self._texts.passage(number) for number in mined.negatives]
        values["negative"] = [_shown(passage) for passage in passages]
        if self._written is not None:
            scorer = self._scorers[self._written]
            numbers = [self._texts.passage_number(passage) for passage in own] + mined.negatives
            values["pos_scores"] = _rounded(scorer.score(one.query, one.positives))
            values["neg_scores"] = _rounded(scorer.score(one.query, numbers))
        return values


def _shown(passage: Passage) -> str | dict[str, str]:
    """A passage as training reads it: its text, or text and title."""
    return {"text": passage.text, "title": passage.title} if passage.title else passage.text


def _rounded(scores: NDArray[np.float32]) -> list[float | None]:
    """Scores to six decimals, which is what float32 gives; null where there is none."""
    return [None if np.isnan(score) else round(float(score), 6) for score in scores]
