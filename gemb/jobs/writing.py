"""From computed windows to rows on the disk: checked, cut, appended, synced, journalled, in input order.

What a job promises is what its journal says: a line goes there only after the rows it speaks of are on
the disk. A killed job goes on at its last line.

Letters: R rows of a window, U different texts among them, D width of a vector, K kept dims.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Full, Queue
from typing import Any, ClassVar, NoReturn

import numpy as np
import orjson

from gemb.engine.ahead import POLL_SECONDS
from gemb.engine.cache import VectorCache
from gemb.engine.windows import Refusal, Window
from gemb.errors import GembError
from gemb.files import Journal, os_errors_explained
from gemb.jobs.calibration import RowSink
from gemb.jobs.seen import SeenIds
from gemb.report import counted
from gemb.vectors.appending import AppendFile, End
from gemb.vectors.checks import bad_rows, cut
from gemb.vectors.shards import BLOCK_RECORDS
from gemb.vectors.sinks import id_lines

MANY_RECORDS = 1000  # from here on a share of rejected records is told from bad luck


@dataclass(slots=True)
class Counts:
    """What a job has done, in all its runs."""

    records: int = 0
    """Records read: of this shard, rejected and skipped ones counted."""
    rows: int = 0
    """Rows written."""
    tokens: int = 0
    """Tokens of the rows written, prompts and special tokens counted."""
    computed_texts: int = 0
    computed_tokens: int = 0
    truncated: int = 0
    """Rows whose text was cut."""
    lost_tokens: int = 0
    """Tokens that were cut away."""
    lost_more: int = 0
    """Rows so long that only their beginning was tokenised: what they lost is then an estimate."""
    chunked: int = 0
    """Records that became several rows."""
    rejected: int = 0
    empty_skipped: int = 0
    long_skipped: int = 0
    duplicates: int = 0
    """Rows whose text stood in the same window before: not computed again."""
    cache_hits: int = 0
    """Texts that the cache knew."""
    seconds: float = 0.0
    """From the start of the computing to the last row."""
    write_seconds: float = 0.0
    """Of which spent writing, beside the computing."""


@dataclass(frozen=True, slots=True)
class State:
    """Where a job stands: one line of its journal."""

    FORMAT: ClassVar[int] = 2
    """Another one for every change of these fields or of those of `Counts`; it stands in job.json."""

    next_record: int = 0
    """Number of the first record that is not done."""
    sink: Mapping[str, Any] | None = None
    rejects: End = field(default_factory=End)
    seen: int = 0
    """Ids in the table of ids."""
    counts: Counts = field(default_factory=Counts)
    precision: str | None = None
    """What the rows so far were computed in; None before the first engine."""

    def as_entry(self) -> dict[str, Any]:
        """For the journal; `from_entry` reads it back."""
        return {
            "next_record": self.next_record,
            "sink": self.sink,
            "rejects": list(self.rejects),
            "seen": self.seen,
            "counts": asdict(self.counts),
            "precision": self.precision,
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> State:
        """The state that a journal line holds."""
        return cls(
            next_record=entry["next_record"],
            sink=entry["sink"],
            rejects=End(*entry["rejects"]),
            seen=entry["seen"],
            counts=Counts(**entry["counts"]),
            precision=entry["precision"],
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """How many rejects a job bears."""

    stop_at_first: bool
    count: int | None = None
    share: float | None = None
    """Of the records read, 0 to 1."""
    text: str = ""
    """As the user wrote it."""

    def check(self, counts: Counts, place: str, newest: Sequence[Refusal]) -> None:
        """Raises GembError when more rows were rejected than the user bears.

        `counts` ends with the rejects in `newest`, in input order. The row that was one too many is named,
        not how many there are by now: that depends on how much is read at a time.
        """
        if self.count is not None and counts.rejected > self.count:
            first = newest[max(0, self.count - (counts.rejected - len(newest)))] if newest else None
            at = f", the last at {first.source}:{first.line}" if first else ""
            self._refuse(f"more than {counted(self.count, 'row')} were rejected{at}", place)
        if self.share is not None and counts.records >= MANY_RECORDS:
            self._check_share(counts, place)

    def check_at_end(self, counts: Counts, place: str) -> None:
        """As `check`, when all rows are read."""
        self.check(counts, place, ())
        if self.share is not None:
            self._check_share(counts, place)

    def _check_share(self, counts: Counts, place: str) -> None:
        if self.share is not None and counts.rejected > self.share * counts.records:
            self._refuse(f"{counts.rejected:,} of {counted(counts.records, 'row')} were rejected", place)

    def _refuse(self, what: str, place: str) -> NoReturn:
        raise GembError(f"{what}, and --max-rejects is {self.text}; see {place}, mend them or allow more")


class Rejects:
    """The file of rejected rows, made when the first one comes; without a path they are told to `tell`.

    What an earlier job rejected stays until then, or until `finish`: its output may still be there.

    `work` is the job's work folder, and `end` where its journal says that the file ends.
    """

    def __init__(self, path: Path | None, work: Path, end: End, tell: Callable[[str], None]) -> None:
        self.path = path
        self._work = work
        self._tell = tell
        self._end = end
        self._file: AppendFile | None = None
        if path is not None and end.bytes:
            self._file = AppendFile(path, work, end=end)

    def add(self, refusals: list[Refusal]) -> None:
        """Add rows to the file; on the disk only after `sync`."""
        if self.path is None:
            for refusal in refusals:
                self._tell(f"rejected {refusal}")
            return
        if refusals:
            self._file = self._file or AppendFile(self.path, self._work)
            lines = b"".join(orjson.dumps(refusal, option=orjson.OPT_APPEND_NEWLINE) for refusal in refusals)
            self._end = self._file.write(self._end, memoryview(lines))

    def sync(self) -> End:
        """The end of the file, when all up to it is on the disk."""
        if self._file is not None:
            self._file.sync()
        return self._end

    def finish(self) -> None:
        """Remove a file that an earlier job left, if this one rejected nothing; for the end of a job."""
        if self.path is not None and not self._end.bytes:
            with os_errors_explained(self.path):
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Destination:
    """Where the rows of a job go, and what belongs to that; all but the sink may be missing."""

    sink: RowSink
    rejects: Rejects
    journal: Journal | None
    seen: SeenIds | None
    open_cache: Callable[[], VectorCache] | None
    dims: int
    """K."""
    normalise: bool
    sharded: bool
    has_id_lines: bool
    """Whether ids stand one a line, so that none may hold a line break."""


class Writer:
    """Writes windows in a thread of its own while the next ones are computed.

    `deliver` may be called from any thread, one at a time; it waits while two windows are in hand. A
    failure sets `stop`, and comes out of `close`.
    """

    def __init__(
        self,
        destination: Destination,
        state: State,
        limits: Limits,
        *,
        stop: threading.Event,
        on_written: Callable[[Counts], None],
    ) -> None:
        self.state = state
        self._to = destination
        self._limits = limits
        self._stop = stop
        self._on_written = on_written
        self._failed: BaseException | None = None
        self._started = time.monotonic()
        self._seconds_before = state.counts.seconds
        self._windows: Queue[Window | None] = Queue(maxsize=1)
        self._thread = threading.Thread(target=self._write_all, name="gemb-writer", daemon=True)
        self._thread.start()

    def deliver(self, window: Window | None) -> None:
        """Hand over a complete window."""
        while self._failed is None:
            try:
                self._windows.put(window, timeout=POLL_SECONDS)
            except Full:
                continue
            return

    def close(self) -> None:
        """Return when all that was delivered is written; raises what went wrong."""
        self.close_quietly()
        if self._failed is not None:
            raise self._failed

    def close_quietly(self) -> None:
        """As `close`, when there is a failure to tell already."""
        self.deliver(None)
        self._thread.join()

    def _write_all(self) -> None:
        cache: VectorCache | None = None
        try:
            cache = self._to.open_cache() if self._to.open_cache else None
            while (window := self._windows.get()) is not None:
                self._write(window, cache)
        except BaseException as error:  # raised again by `close`
            self._failed = error
            self._stop.set()
        finally:
            if cache:
                cache.close()

    def _write(self, window: Window, cache: VectorCache | None) -> None:
        began = time.monotonic()
        refusals = list(window.refusals)
        keep = np.ones(len(window.ids), dtype=bool)
        vectors = cut(window.vectors, self._to.dims, normalise=self._to.normalise)  # [U, K]
        reasons = dict(window.failures)
        for text in bad_rows(vectors).tolist():
            reasons.setdefault(text, f"the first {self._to.dims} dims of its vector are zero")
        if reasons:
            for row in np.flatnonzero(np.isin(window.text_of_row, list(reasons))).tolist():
                keep[row] = False
                refusals.append(self._refusal(window, row, reasons[int(window.text_of_row[row])]))
        if self._to.has_id_lines:
            for row, reason in _unwritable(window.ids, keep).items():
                keep[row] = False
                refusals.append(self._refusal(window, row, reason))
        seen = self._check_ids(window, keep, refusals)
        refusals.sort(key=lambda refusal: refusal.index)
        if refusals and self._limits.stop_at_first:
            raise refusals[0].as_error()
        counts = self._counted(window, keep, len(refusals))
        ids = [id_ for id_, kept in zip(window.ids, keep.tolist(), strict=True) if kept]
        self._to.sink.append(ids, vectors[window.text_of_row[keep]])
        self._to.rejects.add(refusals)
        if cache is not None:
            cache.add(
                (window.keys[text], window.vectors[text])
                for text in range(len(window.keys))
                if text not in window.known and text not in window.failures
            )
        sink = self._to.sink.sync()
        rejects = self._to.rejects.sync()
        now = time.monotonic()
        counts.write_seconds += now - began
        counts.seconds = self._seconds_before + now - self._started
        state = replace(
            self.state,
            next_record=window.end,
            sink=sink,
            rejects=rejects,
            seen=self.state.seen + seen,
            counts=counts,
        )
        if self._to.journal is not None:
            entry = state.as_entry()
            if self._to.sharded:
                kept = np.flatnonzero(keep).tolist()
                blocks = Counter(window.places[row].index // BLOCK_RECORDS for row in kept)
                entry["blocks"] = sorted(blocks.items())
            self._to.journal.append(entry)
        self.state = state
        self._limits.check(counts, str(self._to.rejects.path or "above"), refusals)
        self._on_written(counts)

    def _check_ids(
        self, window: Window, keep: np.ndarray[Any, np.dtype[np.bool_]], refusals: list[Refusal]
    ) -> int:
        """Take the rows of records with an id that stood before out of `keep`; the number of new ids."""
        if self._to.seen is None:
            return 0
        # The records' ids, not the rows': of a document that is repeated no passage may slip through.
        places = list({(place := window.places[row]).index: place for row in np.flatnonzero(keep)}.values())
        repeats = self._to.seen.add(
            [place.id for place in places],
            [place.index for place in places],
            [str(place) for place in places],
        )
        for repeat in repeats:
            place = places[repeat.position]
            reason = f"id {place.id!r} stands already at {repeat.first_place}"
            refusals.append(Refusal(place.source, place.line, place.index, place.id, reason))
        if repeats:
            repeated = {places[repeat.position].index for repeat in repeats}
            keep &= [place.index not in repeated for place in window.places]
        return len(places) - len(repeats)

    def _refusal(self, window: Window, row: int, reason: str) -> Refusal:
        place = window.places[row]
        return Refusal(place.source, place.line, place.index, window.ids[row], reason)

    def _counted(self, window: Window, keep: np.ndarray[Any, np.dtype[np.bool_]], rejected: int) -> Counts:
        """The counts with this window."""
        texts = window.text_of_row[keep]
        lost = window.encoded.lost[texts]
        computed = np.ones(len(window.encoded.lengths), dtype=bool)
        computed[list(window.known)] = False
        counts = replace(self.state.counts)
        counts.records += window.records
        counts.rows += len(texts)
        counts.tokens += int(window.encoded.lengths[texts].sum())
        counts.computed_texts += int(computed.sum())
        counts.computed_tokens += int(window.encoded.lengths[computed].sum())
        counts.truncated += int((lost > 0).sum())
        counts.lost_tokens += int(lost.sum(dtype=np.int64))
        counts.lost_more += int(window.encoded.estimated[texts].sum())
        counts.chunked += window.chunked
        counts.rejected += rejected
        counts.empty_skipped += window.empty_skipped
        counts.long_skipped += window.long_skipped
        counts.duplicates += len(window.text_of_row) - len(window.encoded.lengths)
        counts.cache_hits += len(window.known)
        return counts


def _unwritable(ids: Sequence[str], keep: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[int, str]:
    """The rows of `keep` whose ids cannot stand one a line, and why."""
    try:
        id_lines(ids)
    except GembError:  # rare, so that each is asked only now
        reasons: dict[int, str] = {}
        for row in np.flatnonzero(keep).tolist():
            try:
                id_lines([ids[row]])
            except GembError as error:
                reasons[row] = str(error)
        return reasons
    return {}
