"""A cache of vectors, addressed by content: what was embedded once with a model costs nothing again.

A folder with one SQLite file; several processes may share it. The key of a vector covers everything it
depends on (token ids after prompt and cut, the model's fingerprint, the arithmetic), so nothing in it
ever goes stale; delete the folder to free the space.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError, MachineError

FILE_NAME = "vectors.sqlite"
FORMAT = 1  # PRAGMA user_version
KEYS_A_QUERY = 900  # below SQLite's classical limit of 999 parameters
ARITHMETIC = 1
"""Part of every key; raised when a change of gemb's own changes vectors by more than rounding does."""
BUSY_SECONDS = 60.0  # another process may be writing a whole window


class VectorCache:
    """Vectors [D] in float32 under 16-byte keys.

    An instance belongs to the thread that made it (SQLite's rule). `context` stands for all that a
    vector depends on besides its token ids.
    """

    def __init__(self, folder: Path, *, context: Sequence[str], dims: int) -> None:
        self._folder = folder
        self._dims = dims
        self._seed = blake2b("\0".join(context).encode(), digest_size=32).digest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / FILE_NAME, timeout=BUSY_SECONDS, isolation_level=None)
            version = self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise GembError(
                f"{folder} cannot be used as a cache: {error}; pass another --cache, or delete it"
            ) from error
        if version != FORMAT:
            raise GembError(
                f"{folder / FILE_NAME} is a cache of format {version}, this gemb writes {FORMAT}; "
                "pass another --cache"
            )

    def _prepare(self) -> int:
        """The format of the file, which is created if it is new."""
        database = self._database
        database.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
        # A cache may lose its newest rows when the power fails, but never gets damaged in WAL mode.
        database.execute("PRAGMA synchronous=NORMAL")
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        if version:
            return version
        with _transaction(database):
            database.execute(
                "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL)"
            )
            database.execute(f"PRAGMA user_version={FORMAT}")
        return FORMAT

    def key(self, ids: NDArray[np.int32], prompt_tokens: int) -> bytes:
        """The key of the text with these token ids, of which the first `prompt_tokens` are prompt."""
        digest = blake2b(self._seed, digest_size=16)
        digest.update(prompt_tokens.to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        return digest.digest()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The vectors that are known, by key."""
        found: dict[bytes, NDArray[np.float32]] = {}
        try:
            for start in range(0, len(keys), KEYS_A_QUERY):
                some = keys[start : start + KEYS_A_QUERY]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, vector FROM vectors WHERE key IN ({marks})"
                for key, vector in self._database.execute(query, some):
                    if len(vector) == 4 * self._dims:  # else it is damaged: computed again
                        found[key] = np.frombuffer(vector, dtype="<f4")
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return found

    def add(self, items: Iterable[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Keep these vectors; keys that are there already stay as they are."""
        rows = ((key, np.ascontiguousarray(vector, dtype="<f4").tobytes()) for key, vector in items)
        try:
            with _transaction(self._database):
                self._database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _failed(self, error: sqlite3.Error) -> MachineError:
        return MachineError(
            f"{self._folder / FILE_NAME}: {error}; delete the cache, or run the command without --cache"
        )


class _transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK after an exception.

    The write lock is taken at the start: SQLite does not wait for it in the middle. After some failures (a
    full disk) it has rolled back by itself; then the failure is what is told.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._database.execute("COMMIT")
        elif self._database.in_transaction:
            self._database.execute("ROLLBACK")
