"""The different texts of a mining job, by number, on disk, and which passages must not be mined for a query.

    passages.jsonl  the passages, one a line: id (the number), text, title
    queries.jsonl   the queries
    texts.sqlite    where each of them stands, under which texts it is known, the positives of each query

Texts that differ only in case and white space are one; the first of them stands for all.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Self

import orjson

from gemb.errors import GembError, MachineError
from gemb.files import os_errors_explained, read_json, sync_to_disk, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSAGES = "passages.jsonl"
QUERIES = "queries.jsonl"
_CACHE_KIB = 65_536  # keys come in random order; a table far larger than this slows down
_TABLES = """
CREATE TABLE queries (number INTEGER PRIMARY KEY, key BLOB UNIQUE);
CREATE TABLE passages (number INTEGER PRIMARY KEY, key BLOB UNIQUE, start INTEGER, length INTEGER);
CREATE TABLE names (key BLOB, passage INTEGER, PRIMARY KEY (key, passage)) WITHOUT ROWID;
CREATE INDEX names_of ON names (passage);
CREATE TABLE positives (query INTEGER, passage INTEGER, PRIMARY KEY (query, passage)) WITHOUT ROWID;
"""
_FORBIDDEN = """
SELECT passage FROM positives WHERE query = :query
UNION SELECT other.passage FROM positives JOIN names AS own ON own.passage = positives.passage
JOIN names AS other ON other.key = own.key WHERE positives.query = :query
UNION SELECT names.passage FROM queries JOIN names ON names.key = queries.key WHERE queries.number = :query
"""


class Passage(NamedTuple):
    """A text that may answer a query."""

    text: str
    title: str | None = None


def key_of(text: str) -> bytes:
    """The key of a text [16 bytes]: the same for texts that differ only in case and white space."""
    return blake2b(
        " ".join(text.split()).casefold().encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


def _names(passage: Passage) -> list[bytes]:
    """The texts that a passage is known under: its title and text together first, then its text alone."""
    title = passage.title or ""
    texts = [f"{title} {passage.text}", passage.text] if title.strip() else [passage.text]
    return [key_of(text) for text in texts if text.strip()]


class TextWriter:
    """A new set of texts in a folder; `finish` makes it whole, until then it does not count."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.passages = self.queries = self.left_out = 0
        self.first_left_out = ""
        with os_errors_explained(folder), ExitStack() as opened:
            for name in (PASSAGES, QUERIES, "texts.sqlite", "texts.json"):
                (folder / name).unlink(missing_ok=True)
            self._passages: IO[bytes] = opened.enter_context((folder / PASSAGES).open("wb"))
            self._queries: IO[bytes] = opened.enter_context((folder / QUERIES).open("wb"))
            self._opened = opened.pop_all()
        self._start = 0
        with sqlite_explained(folder):
            self._database = sqlite3.connect(folder / "texts.sqlite", isolation_level=None)
            self._opened.callback(self._database.close)
            self._database.execute("PRAGMA journal_mode=OFF")  # a writer that is killed begins anew
            self._database.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            self._database.executescript(_TABLES)
            self._database.execute("BEGIN")

    def add_passage(self, passage: Passage) -> int:
        """The number of a passage, a new one unless its text is known."""
        names = _names(passage)
        with sqlite_explained(self._folder):
            known = self._database.execute(
                "SELECT number FROM passages WHERE key = ?", (names[0],)
            ).fetchone()
            if known is not None:
                return int(known[0])
            number = self.passages
            line = _line({"id": str(number), "text": passage.text, "title": passage.title or ""})
            self._database.execute(
                "INSERT INTO passages VALUES (?, ?, ?, ?)", (number, names[0], self._start, len(line))
            )
            rows = [(name, number) for name in names]
            self._database.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", rows)
        with os_errors_explained(self._folder / PASSAGES):
            self._passages.write(line)
        self._start += len(line)
        self.passages += 1
        return number

    def add_pair(self, query: str, positives: Iterable[Passage], negatives: Iterable[Passage]) -> None:
        """A query with the passages that answer it, and some that do not."""
        found = [self.add_passage(passage) for passage in positives]
        for passage in negatives:
            self.add_passage(passage)
        key = key_of(query)
        with sqlite_explained(self._folder):
            known = self._database.execute("SELECT number FROM queries WHERE key = ?", (key,)).fetchone()
            number = self.queries if known is None else int(known[0])
            if known is None:
                self._database.execute("INSERT INTO queries VALUES (?, ?)", (number, key))
                with os_errors_explained(self._folder / QUERIES):
                    self._queries.write(_line({"id": str(number), "text": query}))
                self.queries += 1
            pairs = [(number, passage) for passage in found]
            self._database.executemany("INSERT OR IGNORE INTO positives VALUES (?, ?)", pairs)

    def leave_out(self, reason: str) -> None:
        """Count a row that is no passage; the first reason is kept."""
        self.first_left_out = self.first_left_out or reason
        self.left_out += 1

    def finish(self) -> None:
        """Makes the set whole."""
        with sqlite_explained(self._folder):
            self._database.execute("COMMIT")
        with os_errors_explained(self._folder):
            for file in (self._passages, self._queries):
                file.flush()
                sync_to_disk(file.fileno())
        self.close()
        counts = ("passages", "queries", "left_out", "first_left_out")
        write_json(self._folder / "texts.json", {name: getattr(self, name) for name in counts})

    def close(self) -> None:
        """Closes the files."""
        with os_errors_explained(self._folder):
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TextSet:
    """The texts of a folder, whole. For one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        counts = read_json(folder / "texts.json")
        self.passages = int(counts["passages"])
        """How many there are; their numbers count from 0."""
        self.queries = int(counts["queries"])
        self.left_out = int(counts["left_out"])
        """Rows that are no passages."""
        self.first_left_out = str(counts["first_left_out"])
        """`FILE:LINE: reason` of the first of them."""
        with os_errors_explained(folder / PASSAGES, "read"):
            self._file = os.open(folder / PASSAGES, os.O_RDONLY | os.O_CLOEXEC)
        self._database = sqlite3.connect(f"file:{folder / 'texts.sqlite'}?mode=ro", uri=True)

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Whether a writer has finished there."""
        return (folder / "texts.json").is_file()

    def query(self, text: str) -> int:
        """The number of a query. Raises GembError if it is not there."""
        return self._number("queries", key_of(text), text)

    def passage_number(self, passage: Passage) -> int:
        """The number of a passage. Raises GembError if it is not there."""
        return self._number("passages", _names(passage)[0], passage.text)

    def passage(self, number: int) -> Passage:
        """The passage with a number."""
        with sqlite_explained(self._folder):
            start, length = self._database.execute(
                "SELECT start, length FROM passages WHERE number = ?", (number,)
            ).fetchone()
        with os_errors_explained(self._folder / PASSAGES, "read"):
            values = orjson.loads(os.pread(self._file, length, start))
        return Passage(values["text"], values["title"] or None)

    def forbidden(self, query: int, negatives: Iterable[Passage] = ()) -> set[int]:
        """Passages that must not be mined for a query.

        They are its positives in every row, passages with the text of one of them, passages with the text of
        the query, and passages with the text of one of the `negatives` that it has already.
        """
        with sqlite_explained(self._folder):
            found = {int(row[0]) for row in self._database.execute(_FORBIDDEN, {"query": query})}
            for passage in negatives:
                for name in _names(passage):
                    rows = self._database.execute("SELECT passage FROM names WHERE key = ?", (name,))
                    found.update(int(row[0]) for row in rows)
        return found

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _number(self, table: str, key: bytes, text: str) -> int:
        with sqlite_explained(self._folder):
            found = self._database.execute(f"SELECT number FROM {table} WHERE key = ?", (key,)).fetchone()
        if found is None:
            raise GembError(
                f"{self._folder}: the text {text[:40]!r} is not among the {table} collected; "
                f"remove {self._folder} to start anew"
            )
        return int(found[0])


@contextmanager
def sqlite_explained(folder: Path) -> Iterator[None]:
    """Turns what SQLite cannot do in the block into a MachineError."""
    try:
        yield
    except sqlite3.Error as error:
        raise MachineError(
            f"{folder / 'texts.sqlite'}: {error}; free some space, then run the command again"
        ) from error


def _line(values: dict[str, str]) -> bytes:
    return orjson.dumps(values) + b"\n"
