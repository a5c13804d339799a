"""Ready vectors with their documents, block by block: for an index that is made without a model.

Vectors have ids (of `--ids`, or kept beside them) or take those of the input by their place. An input, where
there is one, holds texts and metadata in the order of the vectors; rows of it that have no vector are passed
over, as `gemb embed` passed over what it rejected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.engine.windows import Refusal
from gemb.errors import GembError
from gemb.files import os_errors_explained
from gemb.store import Document
from gemb.text.records import Record, Reject, read_records
from gemb.vectors import VectorFile
from gemb.vectors.layout import ids_path, kind_of
from gemb.vectors.readers import LineIndex, decoded

if TYPE_CHECKING:
    from gemb.jobs.index_setup import IndexSetup

BLOCK_ROWS = 4096
EXPORTED_FIELDS = {"passage", "metadata"}
"""What a row of `gemb index export` has besides id, title, text and vector."""

DocumentOf = Callable[[Record, list[Refusal]], Document | None]
"""The document of a record; None, with a refusal added, if it cannot be kept."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some documents with their vectors[B, D], and rows that are refused."""

    documents: list[Document]
    vectors: NDArray[np.float32]
    lines: Sequence[int]
    """[B], 1-based, in `source`."""
    source: str
    refusals: list[Refusal]

    def take(self, rows: Sequence[int]) -> Rows:
        """The rows with these numbers, without the refusals."""
        documents = [self.documents[row] for row in rows]
        return Rows(documents, self.vectors[rows], [self.lines[row] for row in rows], self.source, [])

    def refusal(self, row: int, reason: str) -> Refusal:
        """A refusal of one of the rows."""
        line = self.lines[row]
        return Refusal(self.source, line, line - 1, self.documents[row].id, reason)


def ready_rows(setup: IndexSetup, document_of: DocumentOf) -> Iterator[Rows]:
    """The rows of `setup.vectors`, in order, with their documents.

    Raises GembError where ids, vectors and input do not belong together.
    """
    vectors = setup.vectors
    if vectors is None:
        raise ValueError("there are no ready vectors")
    ids = _ids(vectors, setup.recipe.ids)
    if not setup.inputs:
        yield from _without_input(vectors, ids or vectors.iter_ids())
        return
    records = map(_as_indexed, read_records(setup.inputs, setup.read_options))
    name = ", ".join(file.name for file in setup.inputs)
    own = [file.path for file in setup.inputs] == [vectors.path]
    if ids is None or own:
        yield from _by_place(vectors, records, document_of, name)
    else:
        yield from _by_id(vectors, ids, records, document_of, name)


def _ids(vectors: VectorFile, path: Path | None) -> Iterator[str] | None:
    """The ids of the vectors; None where they have none of their own."""
    if path is not None:
        with os_errors_explained(path, "read"):
            lines = LineIndex(path)
        if lines.count != vectors.rows:
            raise GembError(
                f"{path} has {lines.count:,} ids, but {vectors.path} has {vectors.rows:,} rows; "
                "give each row its id"
            )
        return (
            id_
            for start in range(0, lines.count, BLOCK_ROWS)
            for id_ in decoded(lines.lines(start, min(start + BLOCK_ROWS, lines.count)), path, start)
        )
    is_matrix = kind_of(vectors.path) in ("npy", "safetensors", "fbin")
    return None if is_matrix and not ids_path(vectors.path).exists() else vectors.iter_ids()


def _as_indexed(record: Record | Reject) -> Record | Reject:
    """The record; of a row that `gemb index export` wrote, with the metadata that it had in the index.

    Raises GembError for a passage: an export has the passages of a text, and not what lay between them.
    """
    if isinstance(record, Reject) or record.fields.keys() != EXPORTED_FIELDS:
        return record
    if record.fields["passage"] not in (None, 0):
        raise GembError(
            f"{record.source}:{record.line}: a further passage of {record.id!r}; documents in passages "
            "cannot be made again from an export, index their texts"
        )
    metadata = record.fields["metadata"]
    if isinstance(metadata, str):  # Parquet
        with contextlib.suppress(orjson.JSONDecodeError):
            metadata = orjson.loads(metadata)
    if isinstance(metadata, dict):
        record.fields = metadata
    return record


def _without_input(vectors: VectorFile, ids: Iterator[str]) -> Iterator[Rows]:
    for start, block in _blocks(vectors):
        documents = [Document(id_) for id_ in islice(ids, len(block))]
        empty = [row for row, document in enumerate(documents) if not document.id]
        rows = Rows(documents, block, _lines(start, block), str(vectors.path), [])
        if not empty:
            yield rows
            continue
        kept = rows.take([row for row in range(len(block)) if row not in set(empty)])
        kept.refusals.extend(_nameless(rows, row) for row in empty)
        yield kept


def _by_place(
    vectors: VectorFile, records: Iterator[Record | Reject], document_of: DocumentOf, name: str
) -> Iterator[Rows]:
    """Row r of the vectors belongs to row r of the input."""
    read = 0
    for start, block in _blocks(vectors):
        items = list(islice(records, len(block)))
        read += len(items)
        if len(items) < len(block):
            break
        documents, rows, refusals = [], [], []
        for row, item in enumerate(items):
            if isinstance(item, Reject):
                refusals.append(Refusal(item.source, item.line, item.index, item.id, item.reason))
            elif (document := document_of(item, refusals)) is not None:
                documents.append(document)
                rows.append(row)
        lines = [start + row + 1 for row in rows]
        yield Rows(documents, block[rows], lines, str(vectors.path), refusals)
    read += sum(1 for _ in islice(records, 1))
    if read != vectors.rows:
        count = f"{read:,}" if read < vectors.rows else "more"
        raise GembError(
            f"{vectors.path} has {vectors.rows:,} vectors without ids, but {name} has {count} rows; "
            "each row needs its vector, or name the ids with --ids"
        )


def _by_id(
    vectors: VectorFile,
    ids: Iterator[str],
    records: Iterator[Record | Reject],
    document_of: DocumentOf,
    name: str,
) -> Iterator[Rows]:
    """Vectors and input have their ids in one order; the input may have more."""
    for start, block in _blocks(vectors):
        documents, rows, refusals = [], [], []
        for row, id_ in enumerate(islice(ids, len(block))):
            record = next((item for item in records if item.id == id_), None)
            if record is None:
                raise GembError(
                    f"{name} has no {id_!r} where {vectors.path} has it; "
                    "the documents must stand in the order of the vectors"
                )
            if isinstance(record, Reject):
                refusals.append(Refusal(record.source, record.line, record.index, record.id, record.reason))
            elif (document := document_of(record, refusals)) is not None:
                documents.append(document)
                rows.append(row)
        lines = [start + row + 1 for row in rows]
        yield Rows(documents, block[rows], lines, str(vectors.path), refusals)


def _blocks(vectors: VectorFile) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, vectors.rows, BLOCK_ROWS):
        yield start, vectors.block(start, min(start + BLOCK_ROWS, vectors.rows))


def _lines(start: int, block: NDArray[np.float32]) -> range:
    return range(start + 1, start + len(block) + 1)


def _nameless(rows: Rows, row: int) -> Refusal:
    return Refusal(rows.source, rows.lines[row], rows.lines[row] - 1, None, "its id is empty")
