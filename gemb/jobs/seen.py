"""The ids a job has seen, on disk, so that a repeated id is found at any number of rows.

A temporary SQLite table from the hash of an id to the place where it first stood. It lives in the work
folder of a job and goes with it; a killed job finds it again and drops what its journal does not know.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from gemb.errors import MachineError

KEYS_A_QUERY = 900  # below SQLite's classical limit of 999 parameters


@dataclass(frozen=True, slots=True)
class Repeat:
    """An id that stood somewhere before."""

    position: int
    """Where it is in the sequence that was added."""
    first_place: str
    """FILE:LINE of its first use."""


class SeenIds:
    """The ids of the rows so far; `path` None keeps them in a temporary file that nobody else sees."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            self._database = self._open()
        except sqlite3.OperationalError as error:
            raise self._failed(error) from error
        except sqlite3.DatabaseError:  # damaged, as a power failure may leave it
            self._database = self._open_anew()

    def _open(self) -> sqlite3.Connection:
        # "" is SQLite's own temporary database: in memory while small, then a file without a name.
        # Two threads use it, one after the other: the one that opens, and the one that writes.
        database = sqlite3.connect(
            "" if self._path is None else self._path, isolation_level=None, check_same_thread=False
        )
        try:
            # With a write-ahead log a killed process leaves a whole table. After a power failure the count
            # betrays what is missing, so that a sync for each window would buy nothing.
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=OFF")
            database.execute(
                "CREATE TABLE IF NOT EXISTS seen"
                " (id BLOB PRIMARY KEY, record INTEGER NOT NULL, place TEXT NOT NULL) WITHOUT ROWID"
            )
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _open_anew(self) -> sqlite3.Connection:
        """An empty table in the place of a damaged one."""
        if self._path is not None:
            for ending in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
        return self._open()

    def keep_before(self, record: int) -> int:
        """Drop the ids of records from number `record` on; the number of ids that are left.

        A damaged table is begun anew, so that none is left.
        """
        try:
            self._database.execute("DELETE FROM seen WHERE record >= ?", (record,))
            return int(self._database.execute("SELECT count(*) FROM seen").fetchone()[0])
        except sqlite3.OperationalError as error:
            raise self._failed(error) from error
        except sqlite3.DatabaseError:
            self._database.close()
            self._database = self._open_anew()
            return 0

    def add(self, ids: Sequence[str], records: Sequence[int], places: Sequence[str]) -> list[Repeat]:
        """Add ids with the number and place of their records; those that were there before, in order.

        A repeated id keeps its first place.
        """
        keys = [blake2b(id_.encode(), digest_size=16).digest() for id_ in ids]
        first_here: dict[bytes, int] = {}
        repeats: list[Repeat] = []
        for position, key in enumerate(keys):
            first = first_here.setdefault(key, position)
            if first != position:
                repeats.append(Repeat(position, places[first]))
        # In the order of the keys the pages of the table are touched one after the other.
        fresh = sorted((key, records[position], places[position]) for key, position in first_here.items())
        try:
            before = self._database.total_changes
            self._database.execute("BEGIN")
            known: dict[bytes, str] = {}
            self._database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", fresh)
            if self._database.total_changes - before < len(fresh):
                known = self._older(fresh)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error
        if known:
            repeats = [
                Repeat(position, known[key]) if key in known else Repeat(position, places[first_here[key]])
                for position, key in enumerate(keys)
                if key in known or first_here[key] != position
            ]
        return repeats

    def _older(self, fresh: Sequence[tuple[bytes, int, str]]) -> dict[bytes, str]:
        """The first place of those keys of `fresh` that were in the table already."""
        older: dict[bytes, str] = {}
        for start in range(0, len(fresh), KEYS_A_QUERY):
            some = {key: record for key, record, _ in fresh[start : start + KEYS_A_QUERY]}
            query = f"SELECT id, record, place FROM seen WHERE id IN ({','.join('?' * len(some))})"
            for key, record, place in self._database.execute(query, list(some)):
                if record != some[key]:
                    older[key] = place
        return older

    def close(self) -> None:
        """Close the table."""
        self._database.close()

    def _failed(self, error: sqlite3.Error) -> MachineError:
        place = self._path or "the temporary table of ids"
        return MachineError(f"{place}: {error}; see that the disk has room, then run the same command again")
