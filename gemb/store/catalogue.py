"""The SQLite file of an index: manifest, segments, documents, the words of their texts.

`index.db` is the only file of an index that changes, and a change is one transaction: it is there as a
whole or not at all. While a writer is open the file is in WAL mode; a clean close leaves it alone and whole
(journal mode DELETE). Every row carries a CRC-32 over its values, so that a damaged page which SQLite takes
for sound is found.

The layout is told in docs/index-format.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import GembError, LockedError, MachineError, MismatchError, UnavailableError
from gemb.files import atomic_write, explain_os_error, os_errors_explained, read_json
from gemb.store.blocks import DamagedError
from gemb.store.documents import (
    Document,
    Span,
    StoredDocument,
    checksum,
    encoded,
    matches,
    metadata_json,
    spans_json,
)
from gemb.store.field_types import FieldType, infer_fields, value_type
from gemb.store.segments import Checksums, SegmentRecord
from gemb.vectors import Int8Ranges, Layout
from gemb.vectors.layout import DType

DATABASE = "index.db"
SEGMENTS = "segments"
LOCK = "writer.lock"
COMMITTED = f"{DATABASE}-committed"
"""The number of the last commit, beside a journal that may hold it: SQLite drops damaged commits silently."""
REPLACES = f"{DATABASE}-replaces"
"""The mark of a whole index that is about to take the place of another one."""
OLD_RECORD, OLD_FORMAT = "gemb.json", "gemb index 1"
"""What tells an index of version 0.1.0, which had no database."""
FORMAT = 1
"""PRAGMA user_version; a gemb reads its own, and `gemb.store.upgrade` makes older ones new."""
APPLICATION = 0x67656D62  # "gemb", what `file` and other programs know the file by
BUSY_SECONDS = 30.0
OPENING_TRIES = 20
"""How often a database that is replaced, or changes while it is copied, is opened again."""
REST_SECONDS = 0.3
"""How long a writer that is done tries to leave one file; readers that stay connected keep it from that."""
KEYS_A_QUERY = 500  # below SQLite's classical limit of 999 parameters
CACHE_KIB = 32_768
SQLITE_FAILURES = (sqlite3.Error, UnicodeDecodeError)
"""What a statement raises: Python reads SQLite's messages as UTF-8, and a damaged name may stand in one."""
_SCHEMA = """
CREATE TABLE manifest (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE segments (
    name TEXT PRIMARY KEY, first_key INTEGER NOT NULL, record TEXT NOT NULL,
    dead BLOB NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE checksums (
    segment TEXT NOT NULL, file TEXT NOT NULL, blocks BLOB NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (segment, file)
);
CREATE TABLE documents (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, content BLOB NOT NULL, rows INTEGER NOT NULL,
    checksum INTEGER NOT NULL, title TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE TABLE texts (key INTEGER PRIMARY KEY, spans TEXT NOT NULL, text TEXT NOT NULL);
CREATE VIEW contents AS
    SELECT documents.key AS key, title, coalesce(text, '') AS text
    FROM documents LEFT JOIN texts ON texts.key = documents.key
    WHERE title != '' OR coalesce(text, '') != '';
CREATE TABLE fields (
    name TEXT NOT NULL, type TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (name, type)
);
"""
_WORDS = """
CREATE VIRTUAL TABLE words USING fts5(
    title, text, content='contents', content_rowid='key', tokenize='porter unicode61 remove_diacritics 2'
);
"""


def advice(folder: Path) -> str:
    """What to do about a damaged index."""
    return f"run gemb index verify {folder}, then gemb index rebuild {folder}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every row of an index, chosen when it is made.

    `dims` D and `dtype` are of the stored vectors; `code_dims` C <= D is the width of the first stage,
    below D only for models that were trained for it (Matryoshka, arXiv 2205.13147). `encoder` is whatever
    tells the model and its prompts ("fingerprint", "model", ...), empty for vectors from elsewhere. `words`
    keeps the texts' words for a search by words. `int8_ranges` [2][D] belong to int8 and are found on the
    first rows where they are not given.
    """

    dims: int
    dtype: DType = "f16"
    code_dims: int = 0
    encoder: Mapping[str, Any] = field(default_factory=dict)
    words: bool = True
    int8_ranges: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.dims < 1:
            raise ValueError(f"dims is {self.dims}")
        if self.dtype not in ("f32", "f16", "bf16", "int8"):
            raise GembError(f"an index stores f32, f16, bf16 or int8 vectors, not {self.dtype}")
        if not 0 <= self.code_dims <= self.dims:
            raise ValueError(f"code_dims is {self.code_dims} of {self.dims}")
        if not self.code_dims:
            object.__setattr__(self, "code_dims", self.dims)

    def layout(self) -> Layout:
        """How a vector lies in the segments. Raises ValueError while the int8 ranges are not known."""
        ranges = None
        if self.dtype == "int8":
            if self.int8_ranges is None:
                raise ValueError("the int8 ranges are not known yet")
            ranges = Int8Ranges.from_array(np.array(self.int8_ranges, np.float32))
        return Layout(self.dims, self.dtype, ranges=ranges)


@dataclass(frozen=True, slots=True)
class State:
    """What changes with every commit: its number, how many documents and live rows, the next free key."""

    generation: int = 0
    documents: int = 0
    rows: int = 0
    next_key: int = 1


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """A segment as the catalogue names it; bit r of `dead` (lowest first) says that row r is dead."""

    record: SegmentRecord
    dead: bytes

    def dead_rows(self) -> NDArray[np.bool_] | None:
        """[N], True where the row is dead; None where none is."""
        if not self.dead:
            return None
        bits = np.unpackbits(np.frombuffer(self.dead, np.uint8), bitorder="little", count=self.record.rows)
        return bits.view(np.bool_)

    @property
    def live_rows(self) -> int:
        """Rows that are not dead."""
        return self.record.rows - int.from_bytes(self.dead, "little").bit_count()


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalogue has under an id."""

    key: int
    content: bytes
    metadata: str


class Catalogue:
    """An open `index.db`; `Catalogue.create`, `.open_for_writing` and `.open_for_reading` give one.

    It may be used by any thread, one at a time.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self.path = folder / DATABASE
        self.identity = _identity(self.path)
        """Tells the file from one that was put in its place."""
        self._connection = connection
        self._reading: _Reading | None = None
        self._generation = 0
        self._noted = -1

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> Catalogue:
        """A new catalogue in `folder`, which holds no finished one."""
        catalogue = cls(folder, _connect(folder / DATABASE, "rwc"))
        try:
            catalogue._prepare_writing()
            with catalogue.transaction():
                for statement in (_SCHEMA + (_WORDS if settings.words else "")).split(";"):
                    catalogue._execute(statement)
                catalogue._execute(f"PRAGMA application_id = {APPLICATION}")
                catalogue._execute(f"PRAGMA user_version = {FORMAT}")
                catalogue.put_settings(settings)
                catalogue.put_state(State())
        except BaseException:
            catalogue.close()
            raise
        return catalogue

    @classmethod
    def open_for_writing(cls, folder: Path) -> Catalogue:
        """The catalogue of an index, in WAL mode; the caller holds the writer's lock."""
        catalogue = cls(folder, _connect(folder / DATABASE, "rw"))
        try:
            catalogue._check_opened(is_complete=True)
            catalogue._prepare_writing()
        except BaseException:
            catalogue.close()
            raise
        return catalogue

    @classmethod
    def open_for_reading(cls, folder: Path, *, is_complete: bool = True) -> Catalogue:
        """The catalogue of an index, read-only; works on read-only media and while a writer is at work.

        A database whose journal cannot be read in place (a read-only folder with a `-wal` of a killed
        writer) is copied with it to a temporary folder: without the journal it would hide rows that were
        promised.

        `is_complete` False takes what is left of an index whose last commits were lost.

        Raises UnavailableError if there is no index, GembError if it is none or unfinished, MismatchError
        if a newer gemb wrote it, DamagedError where a commit is missing.
        """
        check_is_index(folder)
        reading = _Reading.open(folder / DATABASE)
        catalogue = cls(folder, reading.connection)
        catalogue._reading, catalogue.identity = reading, reading.stamp
        try:
            catalogue._check_opened(is_complete=is_complete)
        except BaseException:
            catalogue.close()
            raise
        return catalogue

    @classmethod
    def open_damaged(cls, folder: Path) -> Catalogue:
        """What is left of a catalogue, read-only; one that is cut off is read up to there.

        Raises DamagedError where SQLite finds nothing in it.
        """
        try:
            return cls.open_for_reading(folder, is_complete=False)
        except DamagedError:
            reading = _Reading.open_filled_up(folder / DATABASE)
            if reading is None:
                raise
        catalogue = cls(folder, reading.connection)
        catalogue._reading = reading
        try:
            catalogue.check_format()
        except BaseException:
            catalogue.close()
            raise
        return catalogue

    def _check_opened(self, *, is_complete: bool) -> None:
        """Returns if this gemb reads the file and, where asked, no commit is missing."""
        promised = self._promised() if is_complete else 0  # asked first: a writer may be at work
        self.check_format()
        generation = self.state().generation if is_complete else 0
        if generation < promised:
            raise self.damaged(
                f"its last commit is number {generation}, but number {promised} was made; its journal "
                f"{self.path.name}-wal was damaged, cut off or removed"
            )

    def _reopen(self) -> None:
        """Opens the file again that is there now; nothing of the old one is remembered."""
        check_is_index(self.folder)
        reading = _Reading.open(self.path)
        self.close()
        self._connection, self._reading = reading.connection, reading
        self.identity = reading.stamp
        self._generation = 0
        self._check_opened(is_complete=True)

    def close(self) -> None:
        """Lets go of the file."""
        with contextlib.suppress(*SQLITE_FAILURES):
            self._connection.close()
        if self._reading is not None:
            self._reading.remove_copy()

    def close_writing(self) -> None:
        """Closes after writing and leaves one whole file; its `-wal` stays where a reader is in the way."""
        deadline = time.monotonic() + REST_SECONDS
        with contextlib.suppress(*SQLITE_FAILURES):
            self._connection.execute("PRAGMA busy_timeout = 200")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        while True:
            try:
                mode = self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
            except SQLITE_FAILURES:
                mode = "wal"
            if mode == "delete" or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.close()
        if mode == "delete":
            with contextlib.suppress(OSError):  # one that stays promises no more than there is
                (self.folder / COMMITTED).unlink(missing_ok=True)

    @property
    def is_in_place(self) -> bool:
        """Whether the file that is open is the one at its path."""
        return _identity(self.path)[:2] == self.identity[:2]

    def _promised(self) -> int:
        """The number of the last commit, as it was noted beside the journal; 0 where none is noted."""
        place = self.folder / COMMITTED
        try:
            with os_errors_explained(place, "read"):
                number, _, crc = place.read_text("ascii", "replace").partition(" ")
        except GembError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return 0
            raise
        if not number.isdecimal() or len(number) > 18 or crc != f"{checksum(int(number)):08x}\n":
            raise DamagedError(f"{place} is damaged: it tells no number of a commit; {advice(self.folder)}")
        return int(number)

    def _note_commit(self) -> None:
        """Notes the number of the commit that was just made, so that it is missed if the journal is lost."""
        generation = self.state().generation
        if generation != self._noted:
            with atomic_write(self.folder / COMMITTED) as file:
                file.write(f"{generation} {checksum(generation):08x}\n".encode())
            self._noted = generation

    def check_format(self) -> None:
        """Returns if this gemb reads the file.

        Raises GembError if it is no index, MismatchError if a newer gemb wrote it.
        """
        self._execute("BEGIN")  # one look: the catalogue may be made at this moment
        try:
            application = self._one("PRAGMA application_id")
            version = self._one("PRAGMA user_version")
            tables = self._one("SELECT count(*) FROM sqlite_schema")
        finally:
            self.roll_back()
        if application != APPLICATION:
            if not tables:
                raise UnfinishedError(
                    f"{self.folder} is not finished; run the gemb index command that began it again"
                )
            raise GembError(
                f"{self.folder} is no index: its {DATABASE} belongs to another program; choose another path"
            )
        if version > FORMAT:
            raise MismatchError(
                f"{self.folder} is an index of format {version}, this gemb reads up to {FORMAT}; upgrade gemb"
            )
        if version < 1:
            raise self.damaged(f"there is no format {version}")
        if version < FORMAT:
            raise MismatchError(
                f"{self.folder} is an index of format {version}, this gemb reads {FORMAT}; "
                f"run gemb index upgrade {self.folder}"
            )

    def _prepare_writing(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:  # SQLite does not wait by itself for readers that keep it from changing the mode
            try:
                mode = self._one("PRAGMA journal_mode = WAL")
            except LockedError:
                mode = "busy"
            if mode == "wal":
                break
            if time.monotonic() > deadline:
                raise LockedError(
                    f"{self.path} is being read by other programs for more than {BUSY_SECONDS:g} s; "
                    "run the command again later"
                )
            time.sleep(0.02)
        self._execute("PRAGMA synchronous = FULL")
        self._execute("PRAGMA fullfsync = ON")  # for macOS, whose fsync stops at the drive's own cache
        self._execute("PRAGMA checkpoint_fullfsync = ON")
        self._execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    # ------------------------------------------------------------------ statements

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One change that is there as a whole or not at all, on the disk when the block ends."""
        self.begin()
        try:
            yield
        except BaseException:
            self.roll_back()
            raise
        self.commit()

    def begin_snapshot(self) -> State:
        """Begins to answer every question by one and the same generation, until `roll_back`; gives its state.

        Where the file was replaced by another one since it was opened, that one answers from now on.

        Raises DamagedError where commits that this object has seen are gone.
        """
        state = self._snapshot()
        generation = state.generation
        if generation < self._generation:
            self.roll_back()
            raise self.damaged(
                f"its last commit is number {generation}, but number {self._generation} was there; its "
                f"journal {self.path.name}-wal was damaged, cut off or removed"
            )
        self._generation = generation
        return state

    def _snapshot(self) -> State:
        """Begins a snapshot of the file that is at the path now; its state."""
        for _ in range(OPENING_TRIES):
            try:
                self._execute("BEGIN")
                state = self.state()  # the first question takes the snapshot
                if self._is_current():
                    return state
                self.roll_back()
            except GembError as error:
                self.roll_back()
                if self._is_current() and not isinstance(error, _CannotOpen):
                    raise
            self._reopen()
        raise LockedError(f"{self.path} changes all the time; run the command again later")

    def _is_current(self) -> bool:
        """Whether what is open is what lies at its path; a folder that was moved away counts as such."""
        return self._reading is None or self._reading.is_current(self.path)

    def begin(self) -> None:
        """Begins a change."""
        self._execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Returns when the change is on the disk; a failed one is taken back."""
        try:
            self._execute("COMMIT")
        except BaseException:
            self.roll_back()
            raise
        self._note_commit()

    def roll_back(self) -> None:
        """Takes back what was not committed."""
        with contextlib.suppress(*SQLITE_FAILURES):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """Whether a change has begun."""
        return self._connection.in_transaction

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, parameters)
        except SQLITE_FAILURES as error:
            self._explain(error)

    def _rows(self, statement: str, parameters: Sequence[Any] = ()) -> Iterator[Any]:
        """The answer's rows; an error on the way is explained as well."""
        try:
            yield from self._connection.execute(statement, parameters)
        except SQLITE_FAILURES as error:
            self._explain(error)

    def _many(self, statement: str, parameters: Iterable[Sequence[Any]]) -> None:
        try:
            self._connection.executemany(statement, parameters)
        except SQLITE_FAILURES as error:
            self._explain(error)

    def _one(self, statement: str, parameters: Sequence[Any] = ()) -> Any:  # noqa: ANN401  # as in sqlite3
        try:
            row = self._connection.execute(statement, parameters).fetchone()
        except SQLITE_FAILURES as error:
            self._explain(error)
        return None if row is None else row[0]

    def _explain(self, error: sqlite3.Error | UnicodeDecodeError) -> NoReturn:
        """Raises what a failed statement means to a user."""
        try:
            _explain(error, self.folder)
        except _CannotOpen as unopened:
            if self._reading is None:  # for a writer the disk is the likely reason
                _explain_write(self.path, error)
                if os.access(self.path, os.W_OK):
                    raise MachineError(
                        f"cannot open {self.path}: {str(error).lower()}; "
                        "check the disk, then run the same command again"
                    ) from error
            raise unopened from error

    # ------------------------------------------------------------------ manifest

    def _manifest(self, name: str) -> dict[str, Any]:
        found = next(iter(self._rows("SELECT value, checksum FROM manifest WHERE name = ?", (name,))), None)
        if found is None or not matches(found[1], name, found[0]):
            raise self.damaged(f"the manifest's {name} does not match its checksum")
        value: dict[str, Any] = orjson.loads(found[0])
        return value

    def _put_manifest(self, name: str, value: object) -> None:
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY).decode()
        self._execute("INSERT OR REPLACE INTO manifest VALUES (?, ?, ?)", (name, text, checksum(name, text)))

    def settings(self) -> Settings:
        """What holds for every row."""
        return Settings(**self._manifest("settings"))

    def put_settings(self, settings: Settings) -> None:
        """Replaces the settings."""
        self._put_manifest("settings", settings)

    def state(self) -> State:
        """The state after the last commit, or within the change at hand."""
        return State(**self._manifest("state"))

    def put_state(self, state: State) -> None:
        """Replaces the state."""
        self._put_manifest("state", state)

    def damaged(self, what: str) -> DamagedError:
        """The error for something in this file that is not as it was written."""
        return DamagedError(f"{self.path} is damaged: {what}; {advice(self.folder)}")

    # ------------------------------------------------------------------ segments

    def segments(self) -> list[SegmentEntry]:
        """All segments, by their keys."""
        found = []
        for name, first, text, dead, wanted in self._rows(
            "SELECT name, first_key, record, dead, checksum FROM segments ORDER BY first_key"
        ):
            if not matches(wanted, name, first, text, dead):
                raise self.damaged(f"the entry of segment {name} does not match its checksum")
            found.append(SegmentEntry(SegmentRecord(**orjson.loads(text)), dead))
        return found

    def complete_segments(self) -> list[SegmentEntry]:
        """What `segments` gives. Raises DamagedError where a segment is missing, told by the rows of all."""
        found, rows = self.segments(), self.state().rows
        live = sum(entry.live_rows for entry in found)
        if live != rows:
            raise self.damaged(f"its segments have {live:,} rows, but {rows:,} were committed")
        return found

    def checksums(self, record: SegmentRecord) -> dict[str, NDArray[np.uint32]]:
        """The block checksums of each file of a segment."""
        found = {}
        for file, blocks, wanted in self._rows(
            "SELECT file, blocks, checksum FROM checksums WHERE segment = ?", (record.name,)
        ):
            if matches(wanted, record.name, file, blocks):
                found[file] = np.frombuffer(blocks, "<u4")
        lost = [file for file in record.files if file not in found]
        if lost:
            raise self.damaged(f"the block checksums of {record.name}/{lost[0]} are missing or damaged")
        return found

    def readable_checksums(self) -> dict[str, Checksums]:
        """The block checksums that can still be read, by segment, whatever else is damaged."""
        found: dict[str, dict[str, NDArray[np.uint32]]] = {}
        for order in ("ASC", "DESC"):  # up to a damaged page from either side
            with contextlib.suppress(DamagedError):
                for segment, file, blocks, wanted in self._rows(
                    f"SELECT segment, file, blocks, checksum FROM checksums ORDER BY rowid {order}"
                ):
                    if matches(wanted, segment, file, blocks):
                        found.setdefault(segment, {})[file] = np.frombuffer(blocks, "<u4")
        return dict(found)

    def put_segment(self, record: SegmentRecord, checksums: Checksums) -> None:
        """Adds a segment."""
        self.put_dead(record, b"")
        for file, blocks in checksums.items():
            content = blocks.tobytes()
            row = (record.name, file, content, checksum(record.name, file, content))
            self._execute("INSERT INTO checksums VALUES (?, ?, ?, ?)", row)

    def put_dead(self, record: SegmentRecord, dead: bytes) -> None:
        """Replaces the dead rows of a segment."""
        text = orjson.dumps(record.as_json(), option=orjson.OPT_SORT_KEYS).decode()
        row = (record.name, record.first_key, text, dead, checksum(record.name, record.first_key, text, dead))
        self._execute("INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?)", row)

    def remove_segment(self, name: str) -> None:
        """Takes a segment out; its files are the caller's."""
        self._execute("DELETE FROM segments WHERE name = ?", (name,))
        self._execute("DELETE FROM checksums WHERE segment = ?", (name,))

    # ------------------------------------------------------------------ documents

    def known(self, ids: Sequence[str]) -> dict[str, Known]:
        """What lies under those of the ids that are there."""
        found = {}
        for part in _parts(ids, KEYS_A_QUERY):
            marks = ",".join("?" * len(part))
            for id_, *values in self._rows(
                f"SELECT id, key, content, metadata FROM documents WHERE id IN ({marks})", part
            ):
                found[id_] = Known(*values)
        return found

    def put_documents(
        self,
        documents: Sequence[Document],
        keys: Sequence[int],
        contents: Sequence[bytes],
        spans: Sequence[Sequence[Span] | None],
        *,
        words: bool,
    ) -> None:
        """Adds documents under new keys; their ids are free. Spans are those of a document's passages."""
        rows, texts, titled = [], [], []
        counts: Counter[tuple[str, str]] = Counter()
        for document, key, content, own in zip(documents, keys, contents, spans, strict=True):
            encoded(document.id, document.id, "id")
            metadata, places = metadata_json(document), spans_json(own)
            count = 1 if own is None else len(own)
            crc = checksum(key, document.id, content, count, document.title, metadata, places, document.text)
            rows.append((key, document.id, content, count, crc, document.title, metadata))
            if document.text or places:
                texts.append((key, places, document.text))
            if document.title or document.text:
                titled.append((key, document.title, document.text))
            counts.update(field_counts(metadata))
        self._many("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._many("INSERT INTO texts VALUES (?, ?, ?)", texts)
        if words:
            self._many("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", titled)
        self._count_fields(counts)

    def put_metadata(self, key: int, document: Document) -> None:
        """Replaces the metadata of a document whose text and vector stay."""
        stored = self.documents([key])[key]
        metadata = metadata_json(document)
        old = stored.document
        crc = checksum(
            key, old.id, stored.content, stored.rows, old.title, metadata, spans_json(stored.spans), old.text
        )
        self._execute("UPDATE documents SET metadata = ?, checksum = ? WHERE key = ?", (metadata, crc, key))
        counts = Counter(field_counts(metadata))
        counts.subtract(field_counts(metadata_json(old)))
        self._count_fields(counts)

    def remove_documents(self, keys: Sequence[int], *, words: bool) -> int:
        """Takes documents out and returns how many rows they had; the rows are the caller's."""
        gone = 0
        for part in _parts(keys, KEYS_A_QUERY):
            chosen = f"({','.join('?' * len(part))})"
            counts: Counter[tuple[str, str]] = Counter()
            for rows, metadata in self._rows(
                f"SELECT rows, metadata FROM documents WHERE key IN {chosen}", part
            ):
                try:
                    gone += rows
                    counts.subtract(field_counts(metadata))
                except (TypeError, orjson.JSONDecodeError) as error:
                    raise self.damaged(f"a document to be removed cannot be read ({error})") from error
            self._count_fields(counts)
            if words:  # FTS5 keeps no texts of its own: to forget a document it must be told its words
                self._execute(
                    "INSERT INTO words (words, rowid, title, text) "
                    f"SELECT 'delete', key, title, text FROM contents WHERE key IN {chosen}",
                    part,
                )
            self._execute(f"DELETE FROM texts WHERE key IN {chosen}", part)
            self._execute(f"DELETE FROM documents WHERE key IN {chosen}", part)
        return gone

    def documents(self, keys: Iterable[int]) -> dict[int, StoredDocument]:
        """The documents under those of the keys that are there, each checked against its checksum."""
        found = {}
        for part in _parts(keys, KEYS_A_QUERY):
            marks = ",".join("?" * len(part))
            for row in self._rows(f"{_SELECT_DOCUMENTS} WHERE documents.key IN ({marks})", part):
                found[row[0]] = self._document(row)
        return found

    def all_documents(self, after_key: int = 0) -> Iterator[StoredDocument]:
        """Every document by its key, from behind `after_key` on, as a stream."""
        for row in self._rows(
            f"{_SELECT_DOCUMENTS} WHERE documents.key > ? ORDER BY documents.key", (after_key,)
        ):
            yield self._document(row)

    def keys_where(self, fragment: str, parameters: Sequence[Any]) -> NDArray[np.uint64]:
        """The keys, ascending, of the documents for which a condition over `documents` is true."""
        rows = self._rows(f"SELECT key FROM documents WHERE {fragment} ORDER BY key", tuple(parameters))
        return np.fromiter((row[0] for row in rows), dtype=np.uint64)

    def keys_not_in(self, seen: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """The keys, ascending, of the documents that are False (or beyond the end) in seen[key]."""
        found = []
        rows = self._rows("SELECT key FROM documents ORDER BY key")
        while part := list(islice(rows, 65_536)):
            keys = np.array(part, dtype=np.int64)[:, 0]
            is_seen = np.zeros(len(keys), dtype=bool)
            inside = keys < len(seen)
            is_seen[inside] = seen[keys[inside]]
            found.append(keys[~is_seen].astype(np.uint64))
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def keys_with_words(
        self, query: str, limit: int, condition: tuple[str, Sequence[Any]] | None
    ) -> list[tuple[int, float]]:
        """Key and BM25 score (higher is better) of the documents that best fit an FTS5 query, best first."""
        among = f" AND rowid IN (SELECT key FROM documents WHERE {condition[0]})" if condition else ""
        parameters = [query, *(condition[1] if condition else ()), limit]
        return [
            (key, -score)
            for key, score in self._rows(
                f"SELECT rowid, bm25(words) FROM words WHERE words MATCH ?{among} "
                "ORDER BY bm25(words), rowid LIMIT ?",
                parameters,
            )
        ]

    def count_documents(self) -> tuple[int, int]:
        """How many documents there are, and how many rows they have, counted anew."""
        ((documents, rows),) = self._rows("SELECT count(*), coalesce(sum(rows), 0) FROM documents")
        return documents, rows

    def fields(self) -> dict[str, FieldType]:
        """The metadata fields of all documents and their types, as `gemb.store.where.parse` wants them."""
        try:
            return infer_fields(self._rows("SELECT name, type, count FROM fields ORDER BY name"))
        except (KeyError, TypeError) as error:
            raise self.damaged(f"the counts of metadata fields cannot be read ({error})") from error

    def field_counts(self) -> Counter[tuple[str, str]]:
        """How many documents have a field of a type, as it is kept."""
        return Counter({(name, type_): count for name, type_, count in self._rows("SELECT * FROM fields")})

    def _count_fields(self, counts: Counter[tuple[str, str]]) -> None:
        self._many(
            "INSERT INTO fields VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            [(name, type_, count) for (name, type_), count in counts.items() if count],
        )

    def rows_of_keys(self, first: int, last: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Key and number of rows of each document whose key is in first..last, ascending."""
        statement = "SELECT key, rows FROM documents WHERE key BETWEEN ? AND ? ORDER BY key"
        try:
            found = np.fromiter(self._rows(statement, (first, last)), dtype=np.dtype("i8,i8"))
        except (TypeError, ValueError, OverflowError) as error:
            raise self.damaged(f"a document's number of rows is no number ({error})") from error
        return found["f0"].astype(np.uint64), found["f1"].astype(np.int64)

    def audit(self) -> tuple[list[str], Counter[tuple[str, str]]]:
        """The ids of documents that do not match their checksums, and the field counts of all, read anew."""
        damaged: list[str] = []
        counts: Counter[tuple[str, str]] = Counter()
        for row in self._rows(f"{_SELECT_DOCUMENTS} ORDER BY documents.key"):
            try:
                stored = self._document(row)
            except DamagedError:
                damaged.append(repr(row[1]))
                continue
            counts.update(field_counts(metadata_json(stored.document)))
        return damaged, counts

    def integrity_problems(self) -> list[str]:
        """What SQLite itself finds wrong with the file."""
        found = [str(row[0]) for row in self._rows("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def schema_problems(self) -> list[str]:
        """What is not as this gemb makes it: the header's marks of the file, tables, indexes and the view.

        A search by words depends on the text of its table's declaration, which no other check compares.
        """
        found = []
        with os_errors_explained(self.path, "read"), self.path.open("rb") as file:
            modes = file.read(20)[18:]
        if modes not in (b"\x01\x01", b"\x02\x02"):  # rollback journal, WAL
            found.append(f"its header names the journal modes {modes.hex()}, not 0101 or 0202")
        memory = sqlite3.connect(":memory:")
        try:
            memory.executescript(_SCHEMA + (_WORDS if self.settings().words else ""))
            wanted = dict(memory.execute(_DECLARATIONS))
        finally:
            memory.close()
        declared = dict(self._rows(_DECLARATIONS))
        for name in sorted(wanted.keys() | declared.keys()):
            if name.startswith("words_"):
                continue  # FTS5's own, which differ with its version
            if wanted.get(name) != declared.get(name):
                found.append(f"the declaration of {name} is not the one that was written")
        return found

    def words_problem(self) -> str | None:
        """What is wrong with the words, compared with the texts; the catalogue is open for writing."""
        try:
            with self.transaction():
                self._connection.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
        except SQLITE_FAILURES as error:
            return str(error)
        return None

    def _document(self, row: Sequence[Any]) -> StoredDocument:
        key, id_, content, count, wanted, title, metadata, spans, text = row
        spans, text = spans or "", text or ""
        if not matches(wanted, key, id_, content, count, title, metadata, spans, text):
            raise self.damaged(f"the document {id_!r} does not match its checksum")
        places = tuple((begin, end) for begin, end in orjson.loads(spans)) if spans else None
        return StoredDocument(key, Document(id_, text, title, orjson.loads(metadata)), content, count, places)


_DECLARATIONS = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"
_SELECT_DOCUMENTS = (
    "SELECT documents.key, id, content, rows, checksum, title, metadata, spans, text "
    "FROM documents LEFT JOIN texts ON texts.key = documents.key"
)


class UnfinishedError(GembError):
    """An index whose making was interrupted before anything was in it."""


class _CannotOpen(GembError):
    """SQLite cannot open the file in place: no permission to make the files it needs beside it."""


_LARGEST_DATABASE = 1 << 42
"""A header that tells of more bytes is damaged itself."""
Stamp = tuple[int, ...]
"""Device and inode of a file, and whatever else tells that it is as it was."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A connection for reading, and what tells that it still shows the file at its path.

    `copy` is the temporary folder where the file was copied with its journal, to be read there.
    `is_static` is True where SQLite itself would not notice a change.
    """

    connection: sqlite3.Connection
    stamp: Stamp
    is_static: bool
    copy: Path | None = None

    @classmethod
    def open(cls, path: Path) -> _Reading:
        """Opens the file in place where that is possible; else a copy, or as one that nobody changes."""
        for _ in range(OPENING_TRIES):
            stamp = _full_stamp(path)
            try:
                reading = cls._open_in_place(path, stamp)
            except _CannotOpen as error:
                if cls._recover(path):
                    continue
                reading = cls._open_static(path, stamp, error)
            if reading.is_current(path):
                return reading
            reading.connection.close()
            reading.remove_copy()
        raise LockedError(f"{path} changes all the time; run the command again later")

    @classmethod
    def _open_in_place(cls, path: Path, stamp: Stamp) -> _Reading:
        connection = _connect(path, "ro")
        try:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        except SQLITE_FAILURES as error:
            connection.close()
            _explain(error, path.parent)
        return cls(connection, stamp[:2], is_static=False)

    @classmethod
    def _recover(cls, path: Path) -> bool:
        """Whether what a killed writer left was taken back or taken over, so that a reader can look again.

        SQLite does so for whoever may write; a kill while the journal mode changes leaves such a journal.
        """
        if not any(journal.exists() for journal in _journals(path)):
            return False
        connection = _connect(path, "rw")
        try:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            cls._open_in_place(path, ()).connection.close()
        except (*SQLITE_FAILURES, GembError):
            return False
        finally:
            connection.close()
        return True

    @classmethod
    def _open_static(cls, path: Path, stamp: Stamp, reason: _CannotOpen) -> _Reading:
        journals = [journal for journal in _journals(path) if journal.exists()]
        copy = None
        try:
            if journals:
                copy = Path(tempfile.mkdtemp(prefix="gemb-"))
                with os_errors_explained(path, "read"):
                    for source in (path, *journals):
                        shutil.copyfile(source, copy / source.name)
            connection = _connect(copy / DATABASE, "rw") if copy else _connect(path, "ro", "&immutable=1")
            try:
                connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            except SQLITE_FAILURES as error:
                connection.close()
                _explain(error, path.parent)
        except BaseException as error:
            if copy is not None:
                shutil.rmtree(copy, ignore_errors=True)
            if isinstance(error, _CannotOpen):
                raise GembError(f"cannot read {path}: {reason}; check its mode and its folder's") from reason
            raise
        return cls(connection, stamp, True, copy)

    @classmethod
    def open_filled_up(cls, path: Path) -> _Reading | None:
        """A copy of a database that was cut off, with zeros up to its length; None for one that was not.

        SQLite reads nothing of a file that is shorter than its header says; of this one it reads all pages
        that are there.
        """
        with os_errors_explained(path, "read"), path.open("rb") as file:
            head, size = file.read(100), os.fstat(file.fileno()).st_size
        # Page size (1 is 65,536) and number of pages, big-endian: section 1.3 of SQLite's file format.
        page_bytes, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
        whole = (65_536 if page_bytes == 1 else page_bytes) * pages
        if not head.startswith(b"SQLite format 3\0") or not size < whole < _LARGEST_DATABASE:
            return None
        copy = Path(tempfile.mkdtemp(prefix="gemb-"))
        try:
            with os_errors_explained(path, "read"):
                for source in (path, *(journal for journal in _journals(path) if journal.exists())):
                    shutil.copyfile(source, copy / source.name)
                os.truncate(copy / DATABASE, whole)
            return cls(_connect(copy / DATABASE, "rw"), _full_stamp(path), True, copy)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise

    def is_current(self, path: Path) -> bool:
        """Whether this still shows the file at `path`; True where nothing is there any more."""
        stamp = _full_stamp(path) if self.is_static else _identity(path)
        return not stamp or stamp == self.stamp

    def remove_copy(self) -> None:
        """Removes the copy, if there is one."""
        if self.copy is not None:
            shutil.rmtree(self.copy, ignore_errors=True)


def field_counts(metadata: str) -> dict[tuple[str, str], int]:
    """1 for each metadata field of one document and its type."""
    if metadata == "{}":
        return {}
    return {(name, value_type(value)): 1 for name, value in orjson.loads(metadata).items()}


def check_is_index(folder: Path) -> None:
    """Returns if `folder` holds an index database.

    Raises UnavailableError if nothing is there, MismatchError for one of an older layout, GembError if it is
    something else.
    """
    if not folder.exists():
        for verb in ("upgrade", "rebuild"):
            fresh = replacement_of(folder, verb)
            if (fresh / REPLACES).exists():
                raise UnavailableError(
                    f"there is no index {folder}: it was being replaced by {fresh}, which is whole; "
                    f"run gemb index {verb} {folder} to put it there"
                )
        raise UnavailableError(f"there is no index {folder}; make one with gemb index INPUT -o {folder}")
    if not (folder / DATABASE).is_file():
        if is_old_layout(folder):
            raise MismatchError(
                f"{folder} is an index of gemb 0.1.0, this gemb reads format {FORMAT}; "
                f"run gemb index upgrade {folder}"
            )
        if folder.is_dir() and (folder / LOCK).exists():
            raise GembError(f"{folder} is not finished; run the gemb index command that began it again")
        raise GembError(
            f"{folder} is no index: it has no {DATABASE}; make one with gemb index INPUT -o NAME.gemb"
        )


def is_old_layout(folder: Path) -> bool:
    """Whether `folder` holds a finished index of version 0.1.0."""
    record = folder / OLD_RECORD
    if (folder / DATABASE).exists() or not record.is_file():
        return False
    try:
        return read_json(record).get("format") == OLD_FORMAT
    except GembError:
        return False


def replacement_of(folder: Path, verb: str) -> Path:
    """Where `upgrade` or `rebuild` makes the new index, beside the old one."""
    return folder.with_name(f"{folder.name}.{'upgrading' if verb == 'upgrade' else 'rebuilding'}")


def uri_of(path: Path, mode: str, extra: str = "") -> str:
    """The SQLite URI of a file; every character that means something there is escaped."""
    return f"{path.absolute().as_uri()}?mode={mode}{extra}"


def _connect(path: Path, mode: str, extra: str = "") -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            uri_of(path, mode, extra),
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,  # transactions begin and end where this module says so
            check_same_thread=False,
            cached_statements=256,
        )
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
    except SQLITE_FAILURES as error:
        _explain(error, path.parent)
    return connection


def _identity(path: Path) -> Stamp:
    """Device and inode of a file; empty where it is not there."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return state.st_dev, state.st_ino


def _full_stamp(path: Path) -> Stamp:
    """Device and inode of a database, then sizes and times of it and its journals; empty where it is gone."""
    found: list[int] = []
    for part in (path, *_journals(path)):
        try:
            state = part.stat()
        except OSError:
            continue
        # Without the time of change: SQLite, run by root, sets the owner of a journal that it looks at.
        found += [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns]
    return tuple(found) if _identity(path) else ()


def _journals(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}-{kind}") for kind in ("wal", "journal")]


def _explain(error: sqlite3.Error | UnicodeDecodeError, folder: Path) -> NoReturn:
    """Raises what a failed statement means to a user."""
    if isinstance(error, sqlite3.ProgrammingError):
        raise error  # our bug
    path = folder / DATABASE
    code = getattr(error, "sqlite_errorcode", None)
    match None if code is None else code & 0xFF:
        case sqlite3.SQLITE_FULL:
            raise explain_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from error
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            raise LockedError(f"{path} is held by another process; run the command again later") from error
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            raise _CannotOpen(
                f"cannot open {path}: {str(error).lower()}; check its mode and its folder's"
            ) from error
        case sqlite3.SQLITE_IOERR if code != sqlite3.SQLITE_IOERR_SHORT_READ:
            _explain_write(path, error)
            raise MachineError(
                f"cannot read or write {path}: {str(error).lower()}; "
                "check the disk, then run the same command again"
            ) from error
        case sqlite3.SQLITE_TOOBIG:
            raise GembError(f"a text is longer than SQLite takes (1 GB): {error}") from error
        case sqlite3.SQLITE_NOMEM:
            raise MachineError(f"out of memory in {path}; close other programs and run it again") from error
        case sqlite3.SQLITE_NOTADB:
            raise DamagedError(
                f"{path} is no SQLite database, or its first page is damaged; {advice(folder)}"
            ) from error
    what = "a name in it is no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).lower()
    raise DamagedError(f"{path} is damaged: {what}; {advice(folder)}") from error


def _explain_write(path: Path, error: Exception) -> None:
    """Raises what the disk says to a write beside `path` now, if it refuses: SQLite keeps its reason."""
    with os_errors_explained(path):
        try:
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError as refused:
            raise OSError(refused.errno, refused.strerror) from error


def _parts(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part
