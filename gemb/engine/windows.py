"""Read-ahead windows: a stream of records in, vectors in input order out, in constant memory.

A window is a run of consecutive records, tokenised together so that texts of one length can be computed
together, with every different text of it computed once. How much goes into a window follows the
measured speed: about WINDOW_SECONDS of work, which is all that a killed job loses of a window.

Letters: R rows of a window as they will be written, U different texts among them, D width of a vector.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemb.engine import BatchFailure, Engine, run_batches
from gemb.engine.ahead import ReadAhead
from gemb.engine.cache import VectorCache
from gemb.errors import GembError
from gemb.text.batches import Batch, token_batches
from gemb.text.prompts import Template
from gemb.text.records import EMPTY_TEXT, NOT_UTF_8, Record, Reject
from gemb.text.tokenisation import Encoded, Tokeniser
from gemb.vectors.shards import BLOCK_RECORDS, is_mine

WINDOW_SECONDS = 15.0  # of work: what a kill costs, against what sorting by length and a sync gain
WINDOW_ROWS = 65_536
WINDOW_CHARACTERS = 32_000_000
WINDOW_VECTOR_BYTES = 32 << 20  # three windows are in hand at a time
FIRST_CHARACTERS = 16_384  # 4,000 tokens: 15 s of a 300M model on a slow core
GROWTH = 4.0  # a window holds at most so many times what the one before it held
PAUSE_SECONDS = 0.2  # a pipe that gives nothing for so long closes the window
TOO_LONG = "too long"
"""How the reason of a row that is refused for its length begins."""
CHARACTERS_A_TOKEN = 5  # of what a text can cost at most: max_tokens times this

T = TypeVar("T")

OnLong: TypeAlias = Literal["truncate", "error", "skip", "chunk"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row to be written came from."""

    source: str
    line: int
    index: int
    id: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record or row that gets no vector, and why."""

    source: str
    line: int
    index: int
    id: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"

    def as_error(self) -> GembError:
        """The error of a job that stops at this row, with what can be done about it."""
        convert, option = "", "--on-error skip"
        if self.reason == EMPTY_TEXT:
            option = "--empty skip"
        elif self.reason.startswith(TOO_LONG):
            option = "--on-long skip"
        elif self.reason.startswith(NOT_UTF_8):
            convert = "; iconv -f latin1 -t utf-8 converts a file that is Latin-1"
        return GembError(f"{self}{convert}; {option} leaves such rows out")


@dataclass
class Window:
    """Consecutive records from number `start` to before `end`, on their way to vectors."""

    start: int
    end: int
    records: int
    """How many of them are of this shard; refused and skipped ones are counted."""
    ids: list[str]
    """[R], as they will be written."""
    places: list[Place]
    """[R]."""
    text_of_row: NDArray[np.int64]
    """[R], which of the U texts a row has."""
    encoded: Encoded
    """The U texts."""
    refusals: list[Refusal]
    """Rows that are not among R: unreadable, or refused for their length."""
    empty_skipped: int
    """Records left out because they are empty, as the user wished."""
    long_skipped: int
    """Records left out because they are too long, as the user wished."""
    chunked: int
    """Records that became more than one row."""
    work: float
    """Characters to compute, weighed; only compared with other windows."""
    known: dict[int, NDArray[np.float32]]
    """Vectors of texts that the cache knows."""
    keys: list[bytes]
    """[U], the texts' keys in the cache; empty without one."""
    spans: list[tuple[int, int] | None] = field(default_factory=list)
    """[R], which characters of its record's text a row is; None is all of them."""
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    """[U, D], complete when `waiting` is 0, except for `failures`."""
    failures: dict[int, str] = field(default_factory=dict)
    """Texts that could not be computed, and why."""
    waiting: int = 0
    """Texts still to be computed."""
    begun: float = 0.0
    """time.monotonic() when its first batch was handed out."""


class Pace:
    """How much work the next window may hold, from how fast the last ones were computed."""

    def __init__(self, seconds: float = WINDOW_SECONDS) -> None:
        self._seconds = min(seconds, WINDOW_SECONDS)
        self._last = FIRST_CHARACTERS * self._seconds / WINDOW_SECONDS
        self._work = self._work_seconds = 0.0  # of the last windows, each counting half of the next one
        self._finished_at = 0.0

    def next(self) -> float:
        """Characters of the window that is begun now."""
        # Windows are read ahead of what is computed: growing before the first of them is measured would
        # give a slow model minutes of work that a kill, or --max-seconds, cannot divide.
        if self._work_seconds:
            measured = max(1.0, self._work / self._work_seconds * self._seconds)
            self._last = min(self._last * GROWTH, measured)
        return self._last

    def finished(self, window: Window) -> None:
        """Learn from a window whose last vector has just come."""
        now = time.monotonic()
        seconds = now - max(window.begun, self._finished_at)
        self._finished_at = now
        # Two windows may end at nearly the same time, so no rate is taken from one alone.
        self._work = self._work / 2 + window.work
        self._work_seconds = self._work_seconds / 2 + seconds


@dataclass(frozen=True, slots=True)
class Rules:
    """What to do with the rows of a stream."""

    on_long: OnLong
    skip_empty: bool
    """Leave empty texts out, instead of refusing them."""
    stop_at_refusal: bool
    """The first refused row ends the stream with its message."""
    shard: tuple[int, int] | None
    """(i, n): only blocks b of BLOCK_RECORDS records with b mod n = i."""
    limit_records: int | None
    deadline: float | None
    """time.monotonic() at which no further window is begun."""
    overlap_tokens: int = 0
    """How much of a passage the next one repeats at most, under `chunk`."""


def in_shard(index: int, shard: tuple[int, int]) -> bool:
    """Whether record number `index` belongs to shard (i, n)."""
    return is_mine(index // BLOCK_RECORDS, *shard)


class Windows:
    """The windows of a stream of records: rendered, each text once, tokenised, looked up in the cache.

    Iterating does the work, in the thread that iterates. A None among the records closes the window.
    `ended` becomes True when they are all out. Then `end` is the number of the first record that is in no
    window, `more` tells whether a limit ended them before the records did, and `read` is how many records
    there are, those of other shards counted.

    Raises GembError, `FILE:LINE: reason`, at the first refused row if the rules say so.
    """

    def __init__(
        self,
        records: Iterator[Record | Reject | None],
        tokeniser: Tokeniser,
        template: Template,
        rules: Rules,
        pace: Pace,
        *,
        start: int,
        dims: int,
        prompt_tokens: int = 0,
        open_cache: Callable[[], VectorCache] | None = None,
    ) -> None:
        self.ended = self.more = False
        self.read = start
        self._records = records
        self._tokeniser = tokeniser
        self._template = template
        self._rules = rules
        self._pace = pace
        self.end = start
        self._taken = 0
        self._prompt_tokens = prompt_tokens
        self._open_cache = open_cache
        self._records_at_most = max(1, min(WINDOW_ROWS, WINDOW_VECTOR_BYTES // (4 * dims)))
        self._work_at_most = tokeniser.max_tokens * CHARACTERS_A_TOKEN

    def __iter__(self) -> Iterator[Window]:
        cache = self._open_cache() if self._open_cache else None  # here: SQLite belongs to one thread
        start = self.end
        try:
            for run in self._runs():
                yield self._window(run, start, cache)
                start = self.end
        finally:
            if cache:
                cache.close()

    def _runs(self) -> Iterator[_Run]:
        """The records of one window each; `end` stands after the last record of the run."""
        rules = self._rules
        run = _Run(self._pace.next())
        for item in self._records:
            if item is None:
                if run.records:
                    yield run
                    run = _Run(self._pace.next())
                if self._is_late():
                    self.more = True  # for all that is known
                    break
                continue
            self.read = item.index + 1
            if rules.shard and not in_shard(item.index, rules.shard):
                continue
            if self._taken and self._limit_is_reached():
                self.more = True
                break
            self._taken += 1
            self.end = item.index + 1
            run.records += 1
            if isinstance(item, Record):
                run.texts.append(item)
                run.characters += len(item.text)
                run.work += min(len(item.text), self._work_at_most)
            elif rules.skip_empty and item.reason == EMPTY_TEXT:
                run.empty_skipped += 1
            else:
                run.refusals.append(self._refused(item.source, item.line, item.index, item.id, item.reason))
            if (
                run.work >= run.target
                or run.characters >= WINDOW_CHARACTERS
                or run.records >= self._records_at_most
            ):
                yield run
                run = _Run(self._pace.next())
        if run.records:
            yield run
        self.ended = True

    def _limit_is_reached(self) -> bool:
        return self._taken == self._rules.limit_records or self._is_late()

    def _is_late(self) -> bool:
        return self._rules.deadline is not None and time.monotonic() >= self._rules.deadline

    def _refused(self, source: str, line: int, index: int, id_: str | None, reason: str) -> Refusal:
        refusal = Refusal(source, line, index, id_, reason)
        if self._rules.stop_at_refusal:
            raise refusal.as_error()
        return refusal

    def _window(self, run: _Run, start: int, cache: VectorCache | None) -> Window:
        rows = [
            _Row(record.id, self._template.render(record.text, record.title), record) for record in run.texts
        ]
        texts, text_of_row = _different(rows)
        encoded = self._tokeniser.encode(texts, prompt_tokens=self._prompt_tokens)
        chunked = 0
        if self._rules.on_long == "chunk":
            too_long = (encoded.lost > 0)[text_of_row]
            chunked = int(too_long.sum())
            rows = [
                passage
                for row, is_long in zip(rows, too_long.tolist(), strict=True)
                for passage in self._passages(row, is_long)
            ]
            if chunked:
                texts, text_of_row = _different(rows)
                encoded = self._tokeniser.encode(texts, prompt_tokens=self._prompt_tokens)
        refusals = run.refusals
        long_skipped = 0
        unfit = self._unfit(encoded)
        if unfit:
            kept: list[int] = []
            for position, text in enumerate(text_of_row.tolist()):
                reason = unfit.get(text)
                if reason is None:
                    kept.append(position)
                elif self._rules.on_long == "skip" and encoded.lost[text]:
                    long_skipped += 1
                else:
                    record = rows[position].record
                    refusals.append(
                        self._refused(record.source, record.line, record.index, rows[position].id, reason)
                    )
            rows = [rows[position] for position in kept]
            used, text_of_row = np.unique(text_of_row[kept], return_inverse=True)
            encoded = encoded.take(used)
            texts = [texts[text] for text in used.tolist()]
        keys, known = self._look_up(encoded, cache)
        return Window(
            start=start,
            end=self.end,
            records=run.records,
            ids=[row.id for row in rows],
            places=[
                Place(row.record.source, row.record.line, row.record.index, row.record.id) for row in rows
            ],
            text_of_row=text_of_row,
            encoded=encoded,
            refusals=sorted(refusals, key=lambda refusal: refusal.index),
            empty_skipped=run.empty_skipped,
            long_skipped=long_skipped,
            spans=[row.span for row in rows],
            chunked=chunked,
            work=sum(
                min(len(text), self._work_at_most) for number, text in enumerate(texts) if number not in known
            ),
            keys=keys,
            known=known,
            waiting=len(texts) - len(known),
        )

    def _unfit(self, encoded: Encoded) -> dict[int, str]:
        """Texts that get no vector, and why."""
        unfit: dict[int, str] = {}
        if self._rules.on_long in ("error", "skip"):
            for text in np.flatnonzero(encoded.lost).tolist():
                tokens = int(encoded.lengths[text]) + int(encoded.lost[text])
                about = "about " if encoded.estimated[text] else ""
                unfit[text] = (
                    f"{TOO_LONG}: {about}{tokens:,} tokens, "
                    f"and --max-tokens is {self._tokeniser.max_tokens:,}"
                )
        for text in np.flatnonzero(encoded.lengths == 0).tolist():
            unfit[text] = "the tokenizer finds no token in the text"
        return unfit

    def _passages(self, row: _Row, too_long: bool) -> list[_Row]:
        """The rows that a row becomes under `chunk`: one a passage, and one for a text that fits."""
        record = row.record
        if not too_long:
            return [row._replace(id=f"{row.id}#0")]

        def render(body: str) -> str:
            return self._template.render(body, record.title)

        passages = self._tokeniser.passages(record.text, render, overlap_tokens=self._rules.overlap_tokens)
        return [
            _Row(f"{row.id}#{number}", render(passage.text), record, (passage.start, passage.end))
            for number, passage in enumerate(passages)
        ]

    def _look_up(
        self, encoded: Encoded, cache: VectorCache | None
    ) -> tuple[list[bytes], dict[int, NDArray[np.float32]]]:
        if cache is None:
            return [], {}
        ends = np.cumsum(encoded.lengths, dtype=np.int64)
        keys = [
            cache.key(encoded.ids[end - length : end], encoded.prompt_tokens)
            for end, length in zip(ends.tolist(), encoded.lengths.tolist(), strict=True)
        ]
        found = cache.find(keys)
        return keys, {text: found[key] for text, key in enumerate(keys) if key in found}


@dataclass(slots=True)
class _Run:
    """The records of a window while it is filled."""

    target: float
    texts: list[Record] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    records: int = 0
    empty_skipped: int = 0
    characters: int = 0
    work: float = 0.0


class _Row(NamedTuple):
    """A row to be written, before it is tokenised."""

    id: str
    text: str
    """Rendered."""
    record: Record
    span: tuple[int, int] | None = None


def _different(rows: list[_Row]) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts in order of appearance, and for each row [R] its place among them."""
    numbers: dict[str, int] = {}
    of_row = np.fromiter(
        (numbers.setdefault(row.text, len(numbers)) for row in rows), dtype=np.int64, count=len(rows)
    )
    return list(numbers), of_row


def pausing(records: Iterator[T], stop: threading.Event) -> Iterator[T | None]:
    """The records, and a None whenever none came for PAUSE_SECONDS: for pipes, which may be slow."""
    ahead = ReadAhead(_holding(sys.stdin, records), depth=1024, stop=stop, name="gemb-pipe")
    try:
        while True:
            try:
                item = ahead.take(PAUSE_SECONDS)
            except StopIteration:
                return
            yield item[0] if item else None
    finally:
        ahead.close()


def _holding(stream: object, records: Iterator[T]) -> Iterator[T]:
    """The records; `stream` lives as long as the thread that reads them.

    A thread may still wait for stdin when the interpreter ends. If sys.stdin were closed then, which
    happens when nothing refers to it any more, Python would abort over the lock that the thread holds.
    """
    yield from records
    del stream


def compute(
    windows: Iterator[Window],
    engine: Engine,
    deliver: Callable[[Window], None],
    *,
    pace: Pace,
    stop: threading.Event,
    notice: Callable[[str], None],
    on_piece: Callable[[int, int], None],
) -> None:
    """Compute the vectors of all windows and `deliver` each, complete, in order.

    Batches of the next window begin while the last ones of this window are computed, so that no worker
    waits at a border. `deliver` is called from one thread at a time, not always the same; while it
    blocks, no further window is begun. `on_piece` hears the texts and tokens that were just computed.
    When `stop` is set, batches in flight are finished, and windows that are then incomplete are dropped.
    """
    order = _Order(deliver, pace)
    batches = _batches(windows, engine, order)
    for batch, result in run_batches(engine, batches, stop=stop, notice=notice):
        order.put(batch, result)
        on_piece(len(batch.rows), len(batch.ids))


def _batches(windows: Iterator[Window], engine: Engine, order: _Order) -> Iterator[Batch]:
    """The batches of all windows; `Batch.rows` count the texts of the whole job, no two are the same."""
    for window in windows:
        first, texts = order.begin(window, engine.dims)
        encoded = window.encoded.take(texts)
        for batch in token_batches(encoded, engine.batch_tokens):
            yield replace(batch, rows=texts[batch.rows] + first)


class _Order:
    """Windows in flight, oldest first; each is delivered when it and all before it are complete."""

    def __init__(self, deliver: Callable[[Window], None], pace: Pace) -> None:
        self._deliver = deliver
        self._pace = pace
        self._lock = threading.Lock()
        self._in_flight: deque[tuple[int, Window]] = deque()
        self._texts = 0  # of all windows so far

    def begin(self, window: Window, dims: int) -> tuple[int, NDArray[np.int64]]:
        """The number of its first text in the job, and its texts [.] that must be computed."""
        texts = len(window.encoded.lengths)
        window.vectors = np.empty((texts, dims), dtype=np.float32)
        unknown = np.ones(texts, dtype=bool)
        for text, vector in window.known.items():
            window.vectors[text] = vector
            unknown[text] = False
        with self._lock:
            first = self._texts
            self._texts += texts
            window.begun = time.monotonic()
            self._in_flight.append((first, window))
            self._advance()
        return first, np.flatnonzero(unknown)

    def put(self, batch: Batch, result: NDArray[np.float32] | BatchFailure) -> None:
        """Take a piece, which is of one window."""
        with self._lock:
            first, window = self._holder(int(batch.rows[0]))
            texts = batch.rows - first
            if isinstance(result, BatchFailure):
                window.failures.update(dict.fromkeys(texts.tolist(), result.reason))
                window.vectors[texts] = 0.0
            else:
                window.vectors[texts] = result
            window.waiting -= len(texts)
            if window.waiting == 0:
                self._pace.finished(window)
            self._advance()

    def _holder(self, row: int) -> tuple[int, Window]:
        return next(entry for entry in reversed(self._in_flight) if entry[0] <= row)

    def _advance(self) -> None:
        while self._in_flight and self._in_flight[0][1].waiting == 0:
            self._deliver(self._in_flight.popleft()[1])
