"""The documents of an index with their vectors, into one file that other programs read.

One row a vector: a document that is divided gives a row for each passage. Metadata are JSON, since a field
may hold anything.

    .parquet   columns id, passage, title, text, metadata (JSON as text), embedding (list of float)
    .jsonl     the same as keys of an object a line; metadata as an object
    .npy       the vectors alone, float32; ids in NAME.ids.txt and the rest in NAME.documents.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import atomic_write, check_writable, os_errors_explained, readable_bytes
from gemb.report import Event, OnProgress, Report, counted, ignore
from gemb.store import Exported, Index
from gemb.store.documents import metadata_json
from gemb.store.where import parse
from gemb.vectors.layout import ids_path
from gemb.vectors.sinks import id_lines

SUFFIXES = (".parquet", ".jsonl", ".npy")


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows: what stands beside each vector, and vectors[R, D]."""

    rows: list[dict[str, Any]]
    """id, passage (from 0), title, text (of the passage) and metadata."""
    metadata: list[str]
    """[R], JSON."""
    vectors: NDArray[np.float32]


Write = Callable[[Block], None]


def export(
    path: Path,
    output: Path,
    on_progress: OnProgress = ignore,
    *,
    where: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes the documents of the index, or those of which `where` is true; the files are whole or absent.

    Raises GembError for an output that exists (unless `overwrite`) or has another suffix, for a filter that
    is none and if no document is left by it.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise GembError(f"{output}: an index is exported to {', '.join(SUFFIXES)}; choose one of these names")
    files = [output]
    if suffix == ".npy":
        files = [ids_path(output), documents_path(output), output]
    for file in files:
        if file.exists() and not overwrite:
            raise GembError(f"{file} exists; pass --overwrite to replace it, or choose another output")
    check_writable(output)
    with Index.open(path) as index:
        condition = None if where is None else parse(where, index.fields())
        total = index.state.documents if condition is None else None
        documents = rows = 0
        opened = {".parquet": _parquet, ".jsonl": _jsonl, ".npy": _npy}[suffix]
        with opened(output, index.settings.dims) as write:
            for exported in index.export(condition):
                block = _rows_of(exported)
                write(block)
                documents += len(exported.documents)
                rows += len(block.rows)
                on_progress(Event("exporting", documents, total, "documents"))
            if not documents:
                raise GembError(f"{path}: there is no document to export")
    size = sum(file.stat().st_size for file in files)
    return Report(
        title=f"exported {counted(documents, 'document')} in {counted(rows, 'row')} to {output}",
        rows=[("files", "\n".join(map(str, files))), ("size", readable_bytes(size))],
        data={"index": str(path), "documents": documents, "rows": rows, "bytes": size},
        outputs=files,
    )


def documents_path(output: Path) -> Path:
    """Where titles, texts and metadata lie beside a matrix: `docs.documents.jsonl` for `docs.npy`."""
    return output.with_suffix(".documents.jsonl")


def _rows_of(exported: Exported) -> Block:
    rows, metadata = [], []
    for document, spans, count in zip(exported.documents, exported.spans, exported.counts, strict=True):
        own = metadata_json(document)
        for passage in range(count):
            begin, end = (0, len(document.text)) if spans is None else spans[passage]
            text = document.text[begin:end]
            rows.append({"id": document.id, "passage": passage, "title": document.title, "text": text})
            metadata.append(own)
    return Block(rows, metadata, exported.vectors)


@contextmanager
def _jsonl(output: Path, dims: int) -> Iterator[Write]:
    with atomic_write(output) as file:

        def write(block: Block) -> None:
            for row, metadata, vector in zip(block.rows, block.metadata, block.vectors, strict=True):
                line = {**row, "metadata": orjson.Fragment(metadata), "embedding": vector}
                file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))

        yield write


@contextmanager
def _parquet(output: Path, dims: int) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), dims)
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("passage", pa.int32(), nullable=False),
            pa.field("title", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("metadata", pa.string(), nullable=False),
            pa.field("embedding", vector, nullable=False),
        ]
    )
    with (
        atomic_write(output) as file,
        pq.ParquetWriter(file, schema, use_dictionary=False, write_page_checksum=True) as writer,
    ):

        def write(block: Block) -> None:
            columns = [
                pa.array([row[name] for row in block.rows], schema.field(name).type)
                for name in ("id", "passage", "title", "text")
            ]
            columns.append(pa.array(block.metadata, pa.string()))
            flat = pa.array(block.vectors.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=vector))
            writer.write_batch(pa.record_batch(columns, schema=schema))

        yield write


@contextmanager
def _npy(output: Path, dims: int) -> Iterator[Write]:
    """The matrix goes last, so that it is there only when all is."""
    with ExitStack() as stack:
        matrix = stack.enter_context(atomic_write(output))
        others = stack.enter_context(atomic_write(documents_path(output)))
        ids = stack.enter_context(atomic_write(ids_path(output)))
        rows = 0
        _npy_header(matrix, rows, dims)

        def write(block: Block) -> None:
            nonlocal rows
            ids.write(id_lines([row["id"] for row in block.rows]))
            for row, metadata in zip(block.rows, block.metadata, strict=True):
                line = {**row, "metadata": orjson.Fragment(metadata)}
                others.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            matrix.write(np.ascontiguousarray(block.vectors, "<f4").data)
            rows += len(block.vectors)

        yield write
        with os_errors_explained(output):
            _npy_header(matrix, rows, dims)


def _npy_header(file: IO[bytes], rows: int, dims: int) -> None:
    """Writes the head of a float32[rows, dims] at the beginning of the file; all heads are of one length."""
    file.seek(0)
    head = {"descr": "<f4", "fortran_order": False, "shape": (rows, dims)}
    np.lib.format.write_array_header_1_0(file, head)  # numpy pads it, so that the number of rows may grow
