"""One run of `gemb index`: what is new or changed is embedded and put into the index, and committed.

A run needs no journal: a document that was committed is found unchanged by the next run, which costs a hash.
Records are read and compared in one thread, texts are computed in others, and windows are put in a third;
the index is changed by one of them at a time.

Letters: R rows of a window, U different texts among them, D width of a vector, K kept dims.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.device import available_threads
from gemb.engine import Engine
from gemb.engine.ahead import ReadAhead
from gemb.engine.cache import ARITHMETIC, VectorCache
from gemb.engine.opening import arithmetic, open_engine, stdout_guarded
from gemb.engine.windows import Pace, Refusal, Rules, Window, Windows, compute, pausing
from gemb.errors import GembError, Interrupted, MismatchError
from gemb.files import Lock, check_writable
from gemb.jobs.index_report import make_report
from gemb.jobs.index_setup import Announce, Encoding, IndexSetup, OpenEngine, building_path, document_of
from gemb.jobs.index_vectors import Rows, ready_rows
from gemb.jobs.interrupts import Interrupts
from gemb.jobs.running import FIRST_WINDOW_SECONDS, WINDOWS_AHEAD
from gemb.jobs.watch import Watch
from gemb.jobs.writing import Counts, Rejects
from gemb.model.folder import fingerprint
from gemb.report import Event, OnProgress, Report, counted
from gemb.store import Document, Step, Writer
from gemb.store.catalogue import LOCK, REPLACES
from gemb.store.documents import Span
from gemb.store.replacement import free_name, put_in_place, settle, settle_missing
from gemb.text.records import EMPTY_TEXT, Record, Reject, read_records
from gemb.vectors import bad_rows, cut
from gemb.vectors.appending import End

COMPARED_ROWS = 1024  # records that are looked up in the index at once
COMPARED_CHARACTERS = 4_000_000
CALIBRATION_ROWS = 8192  # rows that the int8 ranges are found on, as in gemb embed


def open_torch_engine(setup: IndexSetup, encoding: Encoding, notice: Announce) -> Engine:
    """The engine that the recipe asks for."""
    recipe = setup.recipe
    return open_engine(
        encoding.folder,
        device=recipe.device,
        precision=recipe.precision,
        threads=recipe.threads,
        batch_tokens=recipe.batch_tokens,
        notice=notice,
        engine=recipe.engine,
    )


@dataclass
class Outcome:
    """What a run has done so far."""

    counts: Counts = field(default_factory=Counts)
    """`rows` are those put into the index; all counters are of this run alone."""
    device_line: str = ""
    notes: list[str] = field(default_factory=list)
    more: bool = False
    """A limit ended the run before the input."""
    nameless: int = 0
    """Rejected rows whose id could not be read."""
    pruned: bool = False
    compacted: bool = False


class Run:
    """One run of a job, from its setup to its report."""

    def __init__(
        self,
        setup: IndexSetup,
        watch: Watch,
        on_progress: OnProgress,
        interrupts: Interrupts,
        open_engine: OpenEngine,
    ) -> None:
        self._setup = setup
        self._watch = watch
        self._on_progress = on_progress
        self._interrupts = interrupts
        self._open_engine = open_engine
        self._outcome = Outcome(notes=list(setup.notes))
        self._began = time.monotonic()
        self._is_compacting = False

    def run(self) -> Report:
        """The work, up to the report."""
        setup = self._setup
        with self._interrupts.at_once():
            check_writable(setup.output)
        if not setup.replaces:
            return self._write(setup.output)
        fresh = building_path(setup.output)
        settle_missing(fresh, setup.output)
        lock = Lock(setup.output / LOCK, str(setup.output), setup.recipe.wait_lock, self._watch.note)
        with lock:
            if (setup.output / REPLACES).exists() or (fresh / REPLACES).exists():
                settle(fresh, setup.output, lambda: free_name(setup.output, "old"))
            report = self._write(fresh)
            if self._outcome.more:
                return report
            old = free_name(setup.output, "old")
            put_in_place(fresh, setup.output, old, lock)
        shutil.rmtree(old, ignore_errors=True)
        return report

    def _write(self, folder: Path) -> Report:
        """Brings the index at `folder` up to date; what was done before an error or a signal is kept."""
        setup, recipe = self._setup, self._setup.recipe
        with self._interrupts.at_once():
            writer = self._open(folder)
        with writer:
            rejects = Rejects(setup.rejects_file, setup.output, End(), self._watch.note)
            adding = Adding(setup, writer, rejects, self._watch, self._interrupts, self._outcome, self._began)
            try:
                adding.run(self._open_engine)
                if not self._outcome.more:
                    self._prune(writer)
                writer.commit()
                if recipe.compact and not self._outcome.more:
                    self._compact(writer)
            except GembError:
                writer.commit()
                if not setup.exists and not writer.documents:
                    shutil.rmtree(folder, ignore_errors=True)  # nothing is in it, and it was not there before
                raise
            finally:
                rejects.close()
            rejects.finish()
            documents, rows = writer.documents, writer.rows
            changes = replace(writer.changes)
        self._outcome.counts.seconds = time.monotonic() - self._began
        return make_report(setup, self._outcome, changes, documents, rows, folder)

    def _open(self, folder: Path) -> Writer:
        setup = self._setup
        opened = partial(
            Writer.open,
            folder,
            setup.settings,
            threads=setup.recipe.threads or available_threads(),
            wait_seconds=setup.recipe.wait_lock,
            on_wait=self._watch.note,
            on_step=self._on_step,
        )
        try:
            return opened()
        except MismatchError:
            if not setup.replaces:
                raise
            shutil.rmtree(folder)  # begun by another request, and --overwrite says to begin anew
            return opened()

    def _on_step(self, step: Step) -> None:
        """Tells how far the index's own work is, and ends it where a signal asks for that."""
        if self._is_compacting and self._interrupts.exit_code is not None:
            raise Interrupted(
                f"interrupted while compacting; all documents are in {self._setup.output}, "
                f"gemb index compact {self._setup.output} goes on",
                self._interrupts.exit_code,
            )
        self._on_progress(Event(step.name, step.done, step.total))

    def _prune(self, writer: Writer) -> None:
        """Removes what the input no longer has, if it is known to have been read as a whole."""
        outcome = self._outcome
        # Beside an index that is to be replaced, what an earlier, killed run put there may be gone since.
        if not (self._setup.recipe.prune or self._setup.replaces):
            return
        if outcome.nameless:
            rejected = counted(outcome.nameless, "rejected row")
            outcome.notes.append(
                f"nothing was pruned: {rejected} without an id that can be read, "
                "so that their documents would have gone too"
            )
            return
        writer.prune()
        outcome.pruned = True

    def _compact(self, writer: Writer) -> None:
        self._is_compacting = True
        before = [entry.record.name for entry in writer.segments()]
        writer.compact()
        self._outcome.compacted = before != [entry.record.name for entry in writer.segments()]


class Adding:
    """One pass over the input, into an open index."""

    def __init__(
        self,
        setup: IndexSetup,
        writer: Writer,
        rejects: Rejects,
        watch: Watch,
        interrupts: Interrupts,
        outcome: Outcome,
        began: float,
    ) -> None:
        self._setup = setup
        self._writer = writer
        self._rejects = rejects
        self._watch = watch
        self._interrupts = interrupts
        self._outcome = outcome
        seconds = setup.recipe.max_seconds
        self._deadline = None if seconds is None else began + seconds
        self._turn = threading.Lock()  # the index, the rejects and the counts belong to one thread at a time
        self._reads_no_more = False
        self._flying: dict[int, Document] = {}  # documents on their way to vectors, by number of record
        self._flying_ids: set[str] = set()
        self._handed = 0  # documents found new or changed
        self._kept_unseen = set(setup.kept_fields or ())
        self._held: list[tuple[list[Document], NDArray[np.float32], list[list[Span] | None]]] = []

    def run(self, open_engine: OpenEngine) -> None:
        """Reads, compares, embeds and puts, as far as the input or a limit goes.

        Raises Interrupted after a signal; what was put by then is the caller's to commit.
        """
        counts, setup = self._outcome.counts, self._setup
        self._watch.begin(counts, setup.inputs, total=None if setup.vectors is None else setup.vectors.rows)
        if setup.vectors is not None:
            self._add_vectors()
        else:
            self._add_texts(open_engine)
        self._put_held()
        if self._interrupts.exit_code is not None:
            done = self._writer.changes.added + self._writer.changes.changed
            raise Interrupted(
                f"interrupted; {counted(done, 'document')} added or changed in {setup.output}, "
                "run the same command again to go on",
                self._interrupts.exit_code,
            )
        if not counts.records and not self._outcome.more:
            names = [file.name for file in setup.inputs] or [str(setup.recipe.vectors)]
            raise GembError(f"{', '.join(names)}: no rows")
        setup.limits.check_at_end(counts, str(setup.rejects_file))
        if self._kept_unseen and not self._outcome.more:
            unseen = ", ".join(sorted(self._kept_unseen))
            self._outcome.notes.append(f"no row has {unseen}, which --keep names")

    # --- texts ------------------------------------------------------------------------------------------

    def _add_texts(self, open_engine: OpenEngine) -> None:
        setup, encoding, stop = self._setup, self._setup.encoding, self._interrupts.stop
        if encoding is None:
            raise ValueError("there is no model to embed texts with")
        needed = self._needed()
        first = next((record for record in needed if record is not None), None)
        if first is None:
            return  # nothing is new: no model is loaded
        recipe = setup.recipe
        open_cache = None if recipe.cache is None else self._cache_of(recipe.cache, encoding)
        pace = Pace() if recipe.max_seconds is None else Pace(recipe.max_seconds / 8)
        tokeniser = encoding.load_tokeniser()
        prefix, pooling = encoding.template.prefix, encoding.folder.pooling
        windows = Windows(
            chain([first], needed),
            tokeniser,
            encoding.template,
            Rules(
                on_long="truncate" if encoding.passages is None else "chunk",
                skip_empty=False,  # empty texts do not come so far
                stop_at_refusal=setup.limits.stop_at_first,
                shard=None,
                limit_records=None,  # unchanged documents do not come so far either, and do not count
                deadline=self._deadline,
                overlap_tokens=encoding.passages.overlap if encoding.passages else 0,
            ),
            pace,
            start=0,
            dims=encoding.folder.dims,
            prompt_tokens=0 if pooling.include_prompt else tokeniser.prompt_tokens(prefix),
            open_cache=open_cache,
        )
        ahead = ReadAhead(iter(windows), depth=WINDOWS_AHEAD, stop=stop, name="gemb-reader")
        try:
            with self._interrupts.at_once():
                # What is wrong with the first rows shows before the model is loaded.
                early = ahead.take(timeout=FIRST_WINDOW_SECONDS)
                with stdout_guarded():
                    engine = open_engine(setup, encoding, self._watch.note)
        except StopIteration:
            return
        except BaseException:
            self._end_reading(ahead)
            raise
        self._outcome.device_line = engine.device_line
        self._outcome.notes += engine.notes
        with Putting(partial(self._put_window, encoding), open_cache) as putting:
            try:
                compute(
                    chain(early or (), ahead),
                    engine,
                    putting.deliver,
                    pace=pace,
                    stop=stop,
                    notice=self._watch.note,
                    on_piece=self._watch.computed,
                )
            finally:
                self._end_reading(ahead)
                engine.close()
        if windows.more:
            self._outcome.more = True
        if not stop.is_set() and (not windows.ended or self._flying):
            raise RuntimeError(f"{len(self._flying):,} documents were read and not put into the index")

    def _end_reading(self, ahead: ReadAhead[Window]) -> None:
        """When this returns, the thread that reads is done with the index, though it may still run."""
        ahead.close()
        with self._turn:
            self._reads_no_more = True

    def _cache_of(self, place: Path, encoding: Encoding) -> partial[VectorCache]:
        recipe = self._setup.recipe
        computed = arithmetic(recipe.device, recipe.precision, recipe.engine)
        context = [fingerprint(encoding.folder), *computed, str(ARITHMETIC)]
        opened = partial(VectorCache, place, context=context, dims=encoding.folder.dims)
        opened().close()  # a folder that cannot be a cache shows now
        return opened

    def _needed(self) -> Iterator[Record | None]:
        """The records that need vectors, in order; None where a pipe pauses."""
        records = read_records(self._setup.inputs, self._setup.read_options)
        items: Iterator[Record | Reject | None] = records
        if self._setup.reads_pipe:
            items = pausing(records, self._interrupts.stop)
        chunk: list[Record | Reject] = []
        characters = 0
        for item in items:
            if item is not None:
                chunk.append(item)
                characters += len(item.text) if isinstance(item, Record) else 0
                if len(chunk) < COMPARED_ROWS and characters < COMPARED_CHARACTERS:
                    continue
            if self._interrupts.stop.is_set():
                return
            yield from self._new_among(chunk)
            if self._outcome.more:
                return
            if item is None and self._is_late():
                self._outcome.more = True  # for all that is known
                return
            if item is None:
                yield None
            chunk, characters = [], 0
        yield from self._new_among(chunk)

    def _new_among(self, chunk: Sequence[Record | Reject]) -> Iterator[Record]:
        """The records of a chunk that are new or changed; the others are settled here."""
        records: list[Record] = []
        documents: list[Document] = []
        refusals: list[Refusal] = []
        empty = 0
        for item in chunk:
            if isinstance(item, Record):
                document = self._document(item, refusals)
                if document is not None:
                    records.append(item)
                    documents.append(document)
            elif item.reason == EMPTY_TEXT and self._setup.recipe.empty == "skip":
                empty += 1
            else:
                refusals.append(Refusal(item.source, item.line, item.index, item.id, item.reason))
        with self._turn:
            if self._reads_no_more:
                return
            compared = self._writer.compare(documents)
            needed, repeated = [], set(compared.repeated)
            for place in compared.needed:
                if documents[place].id in self._flying_ids:
                    repeated.add(place)
                    continue
                self._flying[records[place].index] = documents[place]
                self._flying_ids.add(documents[place].id)
                needed.append(place)
            refusals += [repeat_of(records[place]) for place in sorted(repeated)]
            counts = self._outcome.counts
            counts.empty_skipped += empty
            counts.records += len(chunk) - len(needed) - len(refusals)
            self._refuse(refusals)
            self._watch.written(counts)
        limit = self._setup.recipe.limit_rows
        for number, place in enumerate(needed):
            if self._handed == limit or (self._handed and self._is_late()):
                with self._turn:
                    for left in needed[number:]:
                        self._flying_ids.discard(self._flying.pop(records[left].index).id)
                self._outcome.more = True
                return
            self._handed += 1
            yield records[place]

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _document(self, record: Record, refusals: list[Refusal]) -> Document | None:
        """What the index keeps of a record; None, with a refusal, if it cannot keep it."""
        if self._kept_unseen:
            self._kept_unseen.difference_update(record.fields)
        found = document_of(record, self._setup.kept_fields)
        if isinstance(found, Refusal):
            refusals.append(found)
            return None
        return found

    def _refuse(self, refusals: list[Refusal]) -> None:
        """Adds rejected rows; the caller has the turn. Raises GembError where the user bears no more."""
        if not refusals:
            return
        refusals.sort(key=lambda refusal: refusal.index)
        if self._setup.limits.stop_at_first:
            raise refusals[0].as_error()
        counts = self._outcome.counts
        counts.rejected += len(refusals)
        counts.records += len(refusals)
        self._outcome.nameless += sum(refusal.id is None for refusal in refusals)
        # What is in the index under the id of a row that cannot be read is no document that is gone.
        self._writer.keep([refusal.id for refusal in refusals if refusal.id is not None])
        self._rejects.add(refusals)
        self._setup.limits.check(counts, str(self._setup.rejects_file), refusals)

    def _put_window(self, encoding: Encoding, window: Window, cache: VectorCache | None) -> None:
        """Puts the documents of a complete window into the index, each with all its passages or not."""
        vectors = cut(window.vectors, self._setup.settings.dims, normalise=True)  # [U, K]
        reasons = dict(window.failures)
        for text in bad_rows(vectors).tolist():
            reasons.setdefault(text, f"the first {self._setup.settings.dims} dims of its vector are zero")
        if cache is not None:
            cache.add(
                (window.keys[text], window.vectors[text])
                for text in range(len(window.keys))
                if text not in window.known and text not in window.failures
            )
        refused = {refusal.index: refusal for refusal in reversed(window.refusals)}  # rows: maybe passages
        refusals: list[Refusal] = []
        documents: list[Document] = []
        spans: list[list[Span] | None] = []
        rows: list[int] = []
        with self._turn:
            for first, stop in _runs([place.index for place in window.places]):
                place = window.places[first]
                if place.index in refused:
                    continue
                document = self._landed(place.index)
                texts = window.text_of_row[first:stop].tolist()
                reason = next((reasons[text] for text in texts if text in reasons), None)
                if reason is not None:
                    refusals.append(Refusal(place.source, place.line, place.index, place.id, reason))
                    continue
                documents.append(document)
                own = [span for span in window.spans[first:stop] if span is not None]
                spans.append(own or None)
                rows += range(first, stop)
            refusals += [replace(refusal, id=self._landed(refusal.index).id) for refusal in refused.values()]
            self._count(window, rows, len(documents))
            self._refuse(refusals)
            self._put(documents, vectors[window.text_of_row[rows]], spans)
            self._watch.written(self._outcome.counts)

    def _landed(self, index: int) -> Document:
        """The document of a record that has its vectors, or never will; its id may not come again before."""
        document = self._flying.pop(index)
        if not self._holds:
            self._flying_ids.discard(document.id)
        return document

    @property
    def _holds(self) -> bool:
        """Whether documents are held back until there are enough to find the int8 ranges on."""
        settings = self._writer.settings
        return settings.dtype == "int8" and settings.int8_ranges is None

    def _put(
        self, documents: list[Document], vectors: NDArray[np.float32], spans: list[list[Span] | None]
    ) -> None:
        if not self._holds:
            self._writer.put(documents, vectors, spans, ready=self._setup.vectors is not None)
            return
        self._held.append((documents, vectors, spans))
        if sum(len(held) for _, held, _ in self._held) >= CALIBRATION_ROWS:
            self._put_held()

    def _put_held(self) -> None:
        """Puts what was held back."""
        held, self._held = self._held, []
        if held:
            documents = [document for some, _, _ in held for document in some]
            spans = [own for _, _, some in held for own in some]
            vectors = np.concatenate([some for _, some, _ in held])
            self._writer.put(documents, vectors, spans, ready=self._setup.vectors is not None)
            self._flying_ids.difference_update(document.id for document in documents)

    def _count(self, window: Window, rows: list[int], documents: int) -> None:
        texts = window.text_of_row[rows]
        lost = window.encoded.lost[texts]
        computed = np.ones(len(window.encoded.lengths), dtype=bool)
        computed[list(window.known)] = False
        counts = self._outcome.counts
        counts.records += documents
        counts.rows += len(rows)
        counts.tokens += int(window.encoded.lengths[texts].sum())
        counts.computed_texts += int(computed.sum())
        counts.computed_tokens += int(window.encoded.lengths[computed].sum())
        counts.truncated += int((lost > 0).sum())
        counts.lost_tokens += int(lost.sum(dtype=np.int64))
        counts.lost_more += int(window.encoded.estimated[texts].sum())
        counts.chunked += window.chunked
        counts.duplicates += len(window.text_of_row) - len(window.encoded.lengths)
        counts.cache_hits += len(window.known)

    # --- ready vectors ----------------------------------------------------------------------------------

    def _add_vectors(self) -> None:
        for block in ready_rows(self._setup, self._document):
            if self._interrupts.stop.is_set():
                return
            if self._handed and self._is_late():
                self._outcome.more = True
                return
            self._add_block(block)
            if self._outcome.more:
                return

    def _add_block(self, block: Rows) -> None:
        """Settles a block of ready rows."""
        counts, dims = self._outcome.counts, self._setup.settings.dims
        vectors = cut(block.vectors, dims, normalise=False)
        bad = set(bad_rows(vectors).tolist())
        refusals = [*block.refusals, *(block.refusal(row, _what_is_wrong(vectors[row])) for row in bad)]
        if bad:
            good = [row for row in range(len(vectors)) if row not in bad]
            block = block.take(good)
            vectors = vectors[good]
        compared = self._writer.compare(block.documents, vectors)
        needed, repeated = [], set(compared.repeated)
        for place in compared.needed:
            if block.documents[place].id in self._flying_ids:
                repeated.add(place)
            else:
                needed.append(place)
        refusals += [block.refusal(place, _repeated(block.documents[place].id)) for place in sorted(repeated)]
        limit = self._setup.recipe.limit_rows
        if limit is not None and self._handed + len(needed) > limit:
            needed = needed[: limit - self._handed]
            self._outcome.more = True
        self._handed += len(needed)
        counts.records += len(block.documents) - len(repeated)
        self._refuse(refusals)
        counts.rows += len(needed)
        documents = [block.documents[place] for place in needed]
        if self._holds:
            self._flying_ids.update(document.id for document in documents)
        self._put(documents, vectors[needed], [None] * len(needed))
        self._watch.written(counts)


class Putting:
    """Windows are put into the index in a thread of its own while the next ones are computed.

    `deliver` may be called from any thread, one at a time; it waits while a window is being put. What goes
    wrong comes out of the next `deliver`, or of the end of the with block.
    """

    def __init__(self, put: partial[None], open_cache: partial[VectorCache] | None) -> None:
        self._put = put
        self._open_cache = open_cache
        self._cache: VectorCache | None = None
        self._thread = ThreadPoolExecutor(1, "gemb-writer")
        self._last: Future[None] | None = None

    def deliver(self, window: Window) -> None:
        """Hands over a complete window."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
        self._last = self._thread.submit(self._put_one, window)

    def _put_one(self, window: Window) -> None:
        if self._cache is None and self._open_cache is not None:
            self._cache = self._open_cache()  # here: SQLite belongs to one thread
        self._put(window, self._cache)

    def _close_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Putting:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._thread.submit(self._close_cache)
        self._thread.shutdown(wait=True)
        if self._last is not None and kind is None:  # else there is a failure to tell already
            self._last.result()


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, stop) of each run of equal numbers."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[first]:
            yield first, place
            first = place


def repeat_of(record: Record) -> Refusal:
    """The refusal of a record whose id stood before."""
    return Refusal(record.source, record.line, record.index, record.id, _repeated(record.id))


def _repeated(id_: str) -> str:
    return f"the id {id_!r} stands already in the input; ids are unique"


def _what_is_wrong(vector: NDArray[np.float32]) -> str:
    what = "zeros only" if np.isfinite(vector).all() else "NaN or infinity in it"
    return f"its vector has {what}; it would ruin every ranking"
