"""The one writer of an index: documents and vectors in, segments out, each change published by one commit.

    with Writer.open(Path("wiki.gemb"), Settings(dims=384)) as writer:
        for documents in chunks:
            compared = writer.compare(documents)
            needed = [documents[place] for place in compared.needed]
            writer.put(needed, embed(needed))
        writer.prune()

Killed at any moment, the index is what it was at the last commit; what lies about of an unfinished segment
is swept by the next writer. A writer is one pass over one input: an id that comes twice is told as
repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError, MismatchError
from gemb.files import Lock, fsync_folder, os_errors_explained
from gemb.store import catalogue as catalogues
from gemb.store.catalogue import Catalogue, SegmentEntry, Settings, advice
from gemb.store.documents import (
    Document,
    Span,
    StoredDocument,
    content_hash,
    encoded,
    metadata_json,
)
from gemb.store.graph import GraphShape
from gemb.store.segments import PASS_ROWS, Checksums, Segment, SegmentRecord, SegmentWriter, spread
from gemb.vectors import Int8Ranges, Layout, bad_rows, calibrate, cut

GRAPH_ROWS = 10_000
"""Rows from which a segment gets a graph; below, a scan of its codes answers one query about as quickly."""
SEGMENT_BYTES = 1 << 30
"""Codes and links of the largest graph that is built in one piece: what a build holds in memory."""
COMMIT_ROWS = 131_072
COMMIT_SECONDS = 60.0
MERGE_FACTOR = 4
"""A segment is merged into the one before it once it has a fourth of its rows."""
DEAD_SHARE = 0.2
"""A segment with a larger share of dead rows is written anew when the index is compacted."""
RANGES_MARGIN = 0.1
"""How much wider than the first rows' the int8 ranges are made, of their width, for the rows to come."""


@dataclass(slots=True)
class Changes:
    """How many documents a writer found new, changed (text, vector or metadata), unchanged, and removed."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """Which documents of a chunk need vectors, and which repeat an id of this pass; positions, ascending."""

    needed: list[int]
    repeated: list[int]


@dataclass(frozen=True, slots=True)
class Step:
    """How far a longer work of a writer has come, in rows."""

    name: str
    done: int
    total: int


OnStep = Callable[[Step], None]


class Writer:
    """An index that is open for changes; only one at a time can be.

    Changes are kept from readers until `commit`, which comes by itself every COMMIT_ROWS rows or
    COMMIT_SECONDS, and at the end of the with block. After an error nothing since the last commit is kept.
    """

    def __init__(self, folder: Path, lock: Lock, catalogue: Catalogue, threads: int, on_step: OnStep) -> None:
        self.folder = folder
        self.changes = Changes()
        self._published_changes = Changes()
        self.settings = catalogue.settings()
        self._lock = lock
        self._catalogue = catalogue
        self._threads = threads
        self._on_step = on_step
        self._state = catalogue.state()
        self._first_new_key = self._state.next_key
        self._seen = np.zeros(0, dtype=bool)
        self._pending: SegmentWriter | None = None
        self._dead_keys: list[int] = []
        self._rows_since = 0
        self._committed_at = time.monotonic()
        self._layout = self.settings.layout() if self._is_calibrated else None
        self._sweep()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        settings: Settings | None = None,
        *,
        threads: int = 1,
        wait_seconds: float = 0.0,
        on_wait: Callable[[str], None] | None = None,
        on_step: OnStep = lambda step: None,
    ) -> Writer:
        """The writer of the index at `folder`, which is made if it is not there and `settings` are given.

        Raises LockedError (6) while another writer is at work, MismatchError (5) if the index has other
        settings or a newer format, UnavailableError (7) if there is none and no settings are given.
        """
        folder = Path(folder)
        if settings is None:
            catalogues.check_is_index(folder)
        else:
            check_free(folder)
        with os_errors_explained(folder):
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / catalogues.SEGMENTS).mkdir(exist_ok=True)
            if is_new:  # a commit puts what is in the folder on the disk, not the folder's own name
                fsync_folder(folder)
                fsync_folder(folder.absolute().parent)
        lock = Lock(folder / catalogues.LOCK, str(folder), wait_seconds, on_wait)
        lock.acquire()
        try:
            catalogue = _open_or_create(folder, settings)
            try:
                if settings is not None:
                    check_same(folder, catalogue.settings(), settings)
                return cls(folder, lock, catalogue, threads, on_step)
            except BaseException:
                catalogue.close_writing()
                raise
        except BaseException:
            lock.release()
            raise

    # ------------------------------------------------------------------ documents

    def compare(self, documents: Sequence[Document], vectors: NDArray[np.float32] | None = None) -> Compared:
        """What is to be done about documents; the unchanged, and changes of metadata alone, are settled.

        With ready `vectors` [B, D], one a document, a document has changed if its vector has.
        """
        known = self._catalogue.known(_checked_ids(documents))
        needed, repeated = [], []
        in_chunk: set[str] = set()
        for place, document in enumerate(documents):
            entry = known.get(document.id)
            if document.id in in_chunk or (entry is not None and self._is_seen(entry.key)):
                repeated.append(place)
                continue
            in_chunk.add(document.id)
            if entry is None:
                needed.append(place)
                continue
            self._see(entry.key)
            own = None if vectors is None else vectors[place : place + 1]
            if entry.content != content_hash(document, own):
                needed.append(place)
            elif entry.metadata == metadata_json(document):
                self.changes.unchanged += 1
            else:
                with self._all_or_nothing():
                    self._begin()
                    self._catalogue.put_metadata(entry.key, document)
                self.changes.changed += 1
                self._rows_since += 1  # not a row, but as much to lose
        self._commit_if_due()
        return Compared(needed, repeated)

    def put(
        self,
        documents: Sequence[Document],
        vectors: NDArray[np.floating],
        spans: Sequence[Sequence[Span] | None] | None = None,
        *,
        ready: bool = False,
    ) -> None:
        """Adds documents, or puts them in the place of those with the same ids.

        vectors[R, D] are the rows of all documents in order, at any length above zero. `spans` are the
        passages of each document, one a row; a document with None has one row. `ready` is for vectors from
        elsewhere, one a document: they then count as content of the document, as `compare` was told.

        Raises GembError for an id that was put in this pass already, and vectors that are none;
        MismatchError for another width.
        """
        spans = [None] * len(documents) if spans is None else spans
        counts = np.array([1 if own is None else len(own) for own in spans], dtype=np.int64)
        if len(spans) != len(documents) or int(counts.sum()) != len(vectors) or (counts < 1).any():
            raise ValueError(
                f"{len(documents)} documents with {counts.sum()} rows, but {len(vectors)} vectors"
            )
        if not documents:
            return
        rows = self._checked(documents, vectors, counts)
        contents = [
            content_hash(document, np.asarray(vectors[place : place + 1], np.float32) if ready else None)
            for place, document in enumerate(documents)
        ]
        known = self._catalogue.known(_checked_ids(documents))
        keys_replaced = [entry.key for entry in known.values()]
        twice = next(
            (id_ for id_, entry in known.items() if entry.key >= self._first_new_key),
            _first_repeated(documents),
        )
        if twice is not None:
            raise GembError(f"the id {twice!r} comes twice in the input; ids are unique")
        with self._all_or_nothing():
            self._begin()
            stored, _ = self._calibrated(rows).store(rows)
            self._add(documents, keys_replaced, contents, spans, stored, counts)
        self.changes.changed += len(keys_replaced)
        self.changes.added += len(documents) - len(keys_replaced)
        self._commit_if_due()

    def _add(
        self,
        documents: Sequence[Document],
        replaced: list[int],
        contents: Sequence[bytes],
        spans: Sequence[Sequence[Span] | None],
        stored: NDArray[Any],
        counts: NDArray[np.int64],
    ) -> None:
        self._remove(replaced)
        first = self._state.next_key
        keys = list(range(first, first + len(documents)))
        self._catalogue.put_documents(documents, keys, contents, spans, words=self.settings.words)
        if self._pending is None:
            self._pending = SegmentWriter(self.folder / catalogues.SEGMENTS, self.settings.layout())
        self._pending.append(np.repeat(np.array(keys, np.uint64), counts), stored)
        self._state = dataclasses.replace(
            self._state,
            next_key=first + len(documents),
            documents=self._state.documents + len(documents),
            rows=self._state.rows + len(stored),
        )
        self._see(keys[0], keys[-1])
        self._rows_since += len(stored)

    def put_stored(self, documents: Sequence[StoredDocument], stored: NDArray[Any]) -> None:
        """Adds documents of another index with the same settings, their stored rows[R, W] as they lie there.

        Their ids are new to this index.
        """
        counts = np.array([entry.rows for entry in documents], dtype=np.int64)
        with self._all_or_nothing():
            self._begin()
            self._add(
                [entry.document for entry in documents],
                [],
                [entry.content for entry in documents],
                [entry.spans for entry in documents],
                stored,
                counts,
            )
        self.changes.added += len(documents)
        self._commit_if_due()

    def delete(self, ids: Iterable[str]) -> list[str]:
        """Removes the documents with these ids, at the next commit; returns the ids that are not there."""
        wanted = list(dict.fromkeys(ids))
        known = self._catalogue.known(wanted)
        self._delete([entry.key for entry in known.values()])
        return [id_ for id_ in wanted if id_ not in known]

    def keep(self, ids: Iterable[str]) -> None:
        """Counts the documents with these ids as seen, so that `prune` leaves them."""
        for entry in self._catalogue.known(list(dict.fromkeys(ids))).values():
            self._see(entry.key)

    def prune(self) -> int:
        """Removes, at the next commit, every document that this pass has not seen; returns how many."""
        gone = self._catalogue.keys_not_in(self._seen)
        for start in range(0, len(gone), PASS_ROWS):
            self._delete(gone[start : start + PASS_ROWS].tolist())
        return len(gone)

    # ------------------------------------------------------------------ publishing

    def commit(self) -> None:
        """Publishes what was changed: it is on the disk, and there for readers, when this returns."""
        if not self._catalogue.in_transaction:
            self._published_changes = dataclasses.replace(self.changes)  # nothing but unchanged documents
            return
        with self._all_or_nothing():
            self._check_place()
            if self._pending is not None:
                self._catalogue.put_segment(*self._pending.finish(self.settings.code_dims))
            self._mark_dead()
            self._state = dataclasses.replace(self._state, generation=self._state.generation + 1)
            self._catalogue.put_state(self._state)
            # From here on the segment's files stay, whatever happens: a commit that a failing disk refused
            # to confirm may be there when the journal is read anew. If it is not, they are swept.
            self._pending = None
            self._catalogue.commit()
        self._published_changes = dataclasses.replace(self.changes)
        self._rows_since = 0
        self._committed_at = time.monotonic()
        self._merge_small()

    def compact(
        self, *, dead_share: float = DEAD_SHARE, graph_rows: int = GRAPH_ROWS, shape: GraphShape | None = None
    ) -> None:
        """Merges segments, drops dead rows and builds graphs where they are worth it.

        A segment is written anew where more than `dead_share` of its rows are dead; one of `graph_rows`
        rows or more has a graph afterwards. Each merge is published by itself, so a killed compaction loses
        one at most.
        """
        self.commit()
        for group in self._groups(graph_rows, dead_share):
            self._merge(group, (shape or GraphShape()) if _live(group) >= graph_rows else None)

    def close(self) -> None:
        """Publishes what is left and leaves the index at rest, for the next writer."""
        try:
            self.commit()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Gives the index back without publishing what was changed since the last commit."""
        try:
            self._forget()
            if self._catalogue.is_in_place:
                self._catalogue.close_writing()
            else:
                self._catalogue.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    @property
    def documents(self) -> int:
        """How many documents the index has, those not yet published counted."""
        return self._state.documents

    @property
    def rows(self) -> int:
        """How many rows they have: passages of long documents count."""
        return self._state.rows

    def segments(self) -> list[SegmentEntry]:
        """The published segments."""
        return self._catalogue.segments()

    # ------------------------------------------------------------------ inside

    @property
    def _is_calibrated(self) -> bool:
        return self.settings.dtype != "int8" or self.settings.int8_ranges is not None

    def _calibrated(self, rows: NDArray[np.float32]) -> Layout:
        """How rows are stored; the int8 ranges are found on the first ones and never change."""
        if self._layout is None:
            if len(rows) > 1:
                found = calibrate(rows)
                margin = RANGES_MARGIN * (found.maximum - found.minimum)
                ranges = Int8Ranges(found.minimum - margin, found.maximum + margin).as_array()
            else:
                ranges = np.repeat(np.array([[-1], [1]], np.float32), self.settings.dims, axis=1)
            self.settings = dataclasses.replace(self.settings, int8_ranges=ranges.tolist())
            self._catalogue.put_settings(self.settings)
            self._layout = self.settings.layout()
        return self._layout

    def _checked(
        self, documents: Sequence[Document], vectors: NDArray[np.floating], counts: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Unit rows[R, D] of vectors that were found sound."""
        if vectors.ndim != 2 or vectors.shape[1] != self.settings.dims:
            width = vectors.shape[-1] if vectors.ndim == 2 else list(vectors.shape)
            raise MismatchError(
                f"{self.folder} holds {self.settings.dims}-wide vectors, but these are {width} wide; "
                "index with the model that made it"
            )
        bad = bad_rows(vectors)
        if bad.size:
            owner = int(np.searchsorted(np.cumsum(counts), int(bad[0]), side="right"))
            row = vectors[int(bad[0])]
            what = "zeros only" if np.isfinite(row).all() else "NaN or infinity"
            raise GembError(
                f"the vector of {documents[owner].id!r} is {what}; it would ruin every ranking, leave it out"
            )
        return cut(vectors, self.settings.dims, normalise=True)

    def _commit_if_due(self) -> None:
        if self._rows_since >= COMMIT_ROWS or time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self.commit()

    def _begin(self) -> None:
        if not self._catalogue.in_transaction:
            self._catalogue.begin()

    def _delete(self, keys: list[int]) -> None:
        if not keys:
            return
        if self._pending is not None and max(keys) >= self._first_pending_key:
            self.commit()  # a row that is not published yet has no place to be marked dead in
        with self._all_or_nothing():
            self._begin()
            self._remove(keys)
        self.changes.removed += len(keys)

    @property
    def _first_pending_key(self) -> int:
        return self._state.next_key if self._pending is None else self._pending.first_key

    def _remove(self, keys: list[int]) -> None:
        if not keys:
            return
        rows = self._catalogue.remove_documents(keys, words=self.settings.words)
        self._dead_keys += keys
        self._state = dataclasses.replace(
            self._state, documents=self._state.documents - len(keys), rows=self._state.rows - rows
        )

    def _mark_dead(self) -> None:
        """Sets the bits of the rows whose documents were replaced or removed."""
        if not self._dead_keys:
            return
        keys = np.sort(np.array(self._dead_keys, dtype=np.uint64))
        self._dead_keys = []
        for entry in self._catalogue.segments():
            record = entry.record
            own = keys[(keys >= record.first_key) & (keys <= record.last_key)]
            if not own.size:
                continue
            segment = self._open(entry)
            try:
                first, stop = segment.spans_of(own)
            finally:
                segment.close()
            dead = entry.dead_rows()
            dead = np.zeros(record.rows, dtype=bool) if dead is None else dead.copy()
            dead[spread(first, stop)] = True
            if dead.all():
                self._catalogue.remove_segment(record.name)
            else:
                self._catalogue.put_dead(record, np.packbits(dead, bitorder="little").tobytes())

    def _open(self, entry: SegmentEntry) -> Segment:
        record = entry.record
        return Segment(
            self.folder / catalogues.SEGMENTS / record.name,
            record,
            self._catalogue.checksums(record),
            self.settings.layout(),
            advice=advice(self.folder),
            cache=None,
        )

    def _merge_small(self) -> None:
        """Merges the newest segments, so that each is small beside the one before it and they stay few.

        Each row is so copied a few times over the index's life. Segments with a graph are left to `compact`.
        """
        entries = self._catalogue.segments()
        group = entries[-1:]
        for entry in reversed(entries[:-1]):
            is_large = entry.record.rows >= MERGE_FACTOR * _rows(group)
            if entry.record.has_graph or is_large or _rows([entry, *group]) > self._largest_segment():
                break
            group.insert(0, entry)
        if len(group) >= MERGE_FACTOR and not group[-1].record.has_graph:
            self._merge(group, None)
        else:
            self._sweep()

    def _groups(self, graph_rows: int, dead_share: float) -> list[list[SegmentEntry]]:
        """Which neighbouring segments a compaction makes one of, from the newest back.

        A segment joins the newer ones unless it is large beside them, so that a large graph is not built
        anew for a few more rows, or their graph would be too large to build in one piece.
        """
        groups: list[list[SegmentEntry]] = []
        for entry in reversed(self._catalogue.segments()):
            newer = _live(groups[0]) if groups else 0
            fits = newer + entry.live_rows <= self._largest_segment()
            if groups and fits and entry.live_rows < MERGE_FACTOR * newer:
                groups[0].insert(0, entry)
            else:
                groups.insert(0, [entry])
        return [group for group in groups if not _is_settled(group, graph_rows, dead_share)]

    def _largest_segment(self) -> int:
        shape = GraphShape()
        return max(1, SEGMENT_BYTES // (self.settings.code_dims + 8 * shape.connectivity + 32))

    def _merge(self, group: list[SegmentEntry], shape: GraphShape | None) -> None:
        """Puts one segment in the place of neighbouring ones, without their dead rows."""
        total = _live(group)
        is_committing = False
        self._check_place()
        made = SegmentWriter(self.folder / catalogues.SEGMENTS, self.settings.layout())
        try:
            for entry in group:
                segment = self._open(entry)
                try:
                    self._copy_live(segment, entry, made, total)
                finally:
                    segment.close()
            published: tuple[SegmentRecord, Checksums] | None = None
            if made.rows:
                published = made.finish(
                    self.settings.code_dims,
                    shape,
                    threads=self._threads,
                    on_rows=lambda rows: self._on_step(Step("building the graph", rows, total)),
                )
            with self._catalogue.transaction():
                for entry in group:
                    self._catalogue.remove_segment(entry.record.name)
                if published is not None:
                    self._catalogue.put_segment(*published)
                self._state = dataclasses.replace(self._state, generation=self._state.generation + 1)
                self._catalogue.put_state(self._state)
                is_committing = True
        except BaseException:
            if not is_committing:  # for a commit that may be there nevertheless, see `commit`
                made.discard()
            with contextlib.suppress(GembError):
                self._state = self._catalogue.state()
            self._check_place()
            raise
        if published is None:
            made.discard()
        self._sweep()

    def _copy_live(self, segment: Segment, entry: SegmentEntry, made: SegmentWriter, total: int) -> None:
        dead = entry.dead_rows()
        keys = segment.keys
        for start in range(0, segment.rows, PASS_ROWS):
            stop = min(segment.rows, start + PASS_ROWS)
            stored = segment.stored_block(start, stop)
            own = keys[start:stop]
            if dead is not None:
                live = ~dead[start:stop]
                stored, own = stored[live], own[live]
            made.append(own, stored)
            segment.let_go(start, stop)
            self._on_step(Step("merging", made.rows, total))

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Drops what was changed since the last commit where the block fails.

        That the folder was moved explains a file that cannot be written better than the file does.
        """
        try:
            yield
        except BaseException as error:
            self._forget()
            if isinstance(error, GembError):
                self._check_place()
            raise

    def _check_place(self) -> None:
        """Returns if the index is still where it was opened: what lies at its path now may be another's."""
        if not self._catalogue.is_in_place:
            raise GembError(
                f"{self.folder} was moved or replaced while it was written; what was committed before is "
                "with it, run the command again"
            )

    def _forget(self) -> None:
        """Drops what was changed since the last commit."""
        self._catalogue.roll_back()
        if self._pending is not None:
            self._pending.discard()
            self._pending = None
        self._dead_keys = []
        self._rows_since = 0
        for name in Changes.__slots__:
            setattr(self.changes, name, getattr(self._published_changes, name))
        with contextlib.suppress(GembError):  # the error that led here is the one to tell
            self.settings = self._catalogue.settings()
            self._layout = self.settings.layout() if self._is_calibrated else None
            self._state = self._catalogue.state()
            self._seen[self._state.next_key :] = False

    def _sweep(self) -> None:
        """Removes what no published segment owns: leftovers of a killed writer, segments that were merged."""
        self._check_place()
        folder = self.folder / catalogues.SEGMENTS
        # A catalogue that lost a segment's entry must not cost its files too.
        named = {entry.record.name for entry in self._catalogue.complete_segments()}
        with os_errors_explained(folder):
            for path in self.folder.glob(f".{catalogues.COMMITTED}.*"):
                path.unlink(missing_ok=True)  # of a writer that was killed while it noted a commit
            orphans = [path for path in folder.iterdir() if path.name not in named]
        for path in orphans:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        if orphans:
            fsync_folder(folder)

    def _is_seen(self, key: int) -> bool:
        return key < len(self._seen) and bool(self._seen[key])

    def _see(self, first: int, last: int | None = None) -> None:
        stop = (first if last is None else last) + 1
        if stop > len(self._seen):
            grown = np.zeros(max(stop, 2 * len(self._seen), self._state.next_key), dtype=bool)
            grown[: len(self._seen)] = self._seen
            self._seen = grown
        self._seen[first:stop] = True


def check_free(folder: Path) -> None:
    """Returns if `folder` is an index, empty, or not there. Raises GembError if it holds anything else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise GembError(f"{folder} is a file; an index is a folder, choose another name")
    if catalogues.is_old_layout(folder):
        catalogues.check_is_index(folder)  # says what to run
    names = {path.name for path in folder.iterdir()}
    own = {catalogues.DATABASE, catalogues.SEGMENTS, catalogues.LOCK}
    others = sorted(name for name in names - own if not name.startswith(f"{catalogues.DATABASE}-"))
    if others and catalogues.DATABASE not in names:
        raise GembError(
            f"{folder} exists and is no index: it has {', '.join(others[:3])}; choose another name"
        )


def check_same(folder: Path, have: Settings, want: Settings) -> None:
    """Returns if an index can take rows made for `want`.

    Raises MismatchError where encoder, dims or stored type differ.
    """
    for name, old, new in (
        ("dims", have.dims, want.dims),
        ("stored type", have.dtype, want.dtype),
        ("first-stage dims", have.code_dims, want.code_dims),
        ("encoder", have.encoder.get("fingerprint"), want.encoder.get("fingerprint")),
    ):
        if old != new:
            raise MismatchError(
                f"{folder} was made with {name} {old}, but this run has {new}; "
                "use the same, or make a new index"
            )


def _open_or_create(folder: Path, settings: Settings | None) -> Catalogue:
    path = folder / catalogues.DATABASE
    if settings is None or (path.exists() and path.stat().st_size):
        try:
            return Catalogue.open_for_writing(folder)
        except catalogues.UnfinishedError:
            if settings is None:
                raise
    return Catalogue.create(folder, settings)


def _checked_ids(documents: Sequence[Document]) -> list[str]:
    for document in documents:
        encoded(document.id, document.id, "id")
    return [document.id for document in documents]


def _first_repeated(documents: Sequence[Document]) -> str | None:
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            return document.id
        seen.add(document.id)
    return None


def _is_settled(group: Sequence[SegmentEntry], graph_rows: int, dead_share: float) -> bool:
    """Whether a group is one segment that is as it should be."""
    entry = group[0]
    dead = entry.record.rows - entry.live_rows
    wants_graph = entry.live_rows >= graph_rows
    return (
        len(group) == 1 and entry.record.has_graph == wants_graph and dead <= dead_share * entry.record.rows
    )


def _rows(group: Sequence[SegmentEntry]) -> int:
    return sum(entry.record.rows for entry in group)


def _live(group: Sequence[SegmentEntry]) -> int:
    return sum(entry.live_rows for entry in group)
