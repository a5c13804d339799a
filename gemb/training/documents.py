"""Texts by id, on disk: the corpus behind rows that hold ids, and the judged queries of a BEIR folder."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from gemb.errors import GembError, MachineError
from gemb.text.inputs import InputFile, resolve_inputs
from gemb.text.records import ReadOptions, Record, read_records
from gemb.training.columns import Example, Text, pair_problem
from gemb.training.rows import Wanted, read_rows

_JUDGED = ("query-id", "corpus-id", "score")


class Documents:
    """Texts by id in a temporary SQLite database, so that a corpus of any size costs little memory."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def add(self, table: str, file: InputFile) -> None:
        """The records of `file` as the table `table`.

        Raises GembError, `FILE:LINE: reason`, for an id that stands there twice. Records that cannot be
        read are no documents; a row that names one says so.
        """
        self._database.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY, text TEXT, title TEXT)")
        for record in read_records([file], ReadOptions()):
            if isinstance(record, Record):
                try:
                    self._database.execute(
                        f"INSERT INTO {table} VALUES (?, ?, ?)", (record.id, record.text, record.title)
                    )
                except sqlite3.IntegrityError as error:
                    raise GembError(f'{record.source}:{record.line}: id "{record.id}" is not new') from error

    def find(self, table: str, identifier: str) -> Text | None:
        """The text with this id."""
        found = self._database.execute(f"SELECT text, title FROM {table} WHERE id = ?", (identifier,))
        row = found.fetchone()
        return None if row is None else Text(row[0], row[1] or None)

    def judgements(self, file: InputFile) -> Iterator["_Judgement"]:
        """The rows of a qrels file, those of one query together, queries in order of their first line.

        Raises GembError for a header that is not BEIR's, `FILE:LINE: reason` for a score that is no integer.
        """
        self._database.execute("CREATE TABLE judged (line INTEGER PRIMARY KEY, query, document, score)")
        for row in read_rows(file, _check_judged(file)):
            if isinstance(row.values, str):
                raise GembError(f"{file.name}:{row.line}: {row.values}")
            query, document, score = (row.values[name] for name in _JUDGED)
            try:
                relevance = int(str(score))
            except ValueError as error:
                raise GembError(f'{file.name}:{row.line}: "score" is "{score}", not an integer') from error
            self._database.execute(
                "INSERT INTO judged VALUES (?, ?, ?, ?)", (row.line, query, document, relevance)
            )
        found = self._database.execute(
            "SELECT judged.line, query, document, score FROM judged JOIN"
            " (SELECT query AS own, MIN(line) AS first FROM judged GROUP BY query) ON query = own"
            " ORDER BY first, judged.line"
        )
        return map(_Judgement._make, found)


class _Judgement(NamedTuple):
    line: int
    query: str
    document: str
    score: int


@contextmanager
def open_documents() -> Iterator[Documents]:
    """An empty `Documents`; gone with the block. Raises MachineError where SQLite finds no room."""
    try:
        # "" is SQLite's own temporary database: in memory while small, then a file without a name.
        with closing(sqlite3.connect("", isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode=OFF")
            yield Documents(database)
    except sqlite3.OperationalError as error:
        raise MachineError(
            f"cannot keep the documents in a temporary file: {error}; free some space, or set TMPDIR"
        ) from error


def beir_files(name: str, split: str) -> tuple[InputFile, InputFile, InputFile] | None:
    """corpus, queries and qrels of a BEIR folder; None if `name` is no folder with queries.

    Raises GembError for a folder with queries that lacks the rest, with the splits there are.
    """
    folder = Path(name)
    queries = _first(folder, "queries.jsonl")
    if queries is None:
        return None
    corpus, qrels = _first(folder, "corpus.jsonl"), _first(folder / "qrels", f"{split}.tsv")
    if corpus is None:
        raise GembError(f"{name}: queries.jsonl is there, but no corpus.jsonl beside it")
    if qrels is None:
        there = sorted(path.name.partition(".")[0] for path in (folder / "qrels").glob("*.tsv*"))
        raise GembError(
            f"{name}: no qrels/{split}.tsv; "
            + (f"the splits are {', '.join(there)}, choose one with split:" if there else "it has no qrels")
        )
    files = resolve_inputs([str(corpus), str(queries), str(qrels)])
    return files[0], files[1], files[2]


class Judged(NamedTuple):
    """A query of a BEIR folder as an example, or why it, or one judged document, is none."""

    line: int
    """Of the qrels file."""
    example: Example | str


def read_judged(files: tuple[InputFile, InputFile, InputFile]) -> Iterator[Judged]:
    """One example a judged query: scores above 0 are positives, the others hard negatives."""
    corpus, queries, qrels = files
    with open_documents() as documents:
        documents.add("corpus", corpus)
        documents.add("queries", queries)
        for identifier, group in groupby(documents.judgements(qrels), key=lambda one: one.query):
            judged = list(group)
            query = documents.find("queries", identifier)
            if query is None:
                for one in judged:
                    yield Judged(one.line, f'no query "{identifier}" in {queries.name}')
                continue
            positives: list[Text] = []
            negatives: list[Text] = []
            for one in judged:
                document = documents.find("corpus", one.document)
                if document is None or document.is_blank():
                    yield Judged(one.line, f'no document "{one.document}" with a text in {corpus.name}')
                else:
                    (positives if one.score > 0 else negatives).append(document)
            example = Example(query, tuple(positives), tuple(negatives))
            if not positives:
                yield Judged(judged[0].line, f'no relevant document for query "{identifier}"')
            else:
                yield Judged(judged[0].line, pair_problem(example) or example)


def _first(folder: Path, name: str) -> Path | None:
    return next(
        (folder / (name + end) for end in ("", ".gz", ".zst") if (folder / (name + end)).is_file()), None
    )


def _check_judged(file: InputFile) -> Wanted:
    def wanted(names: Sequence[str]) -> Sequence[str]:
        missing = [name for name in _JUDGED if name not in names]
        if missing:
            raise GembError(
                f'{file.name}:1: no column "{missing[0]}"; the header of qrels is {", ".join(_JUDGED)}'
            )
        return _JUDGED

    return wanted
