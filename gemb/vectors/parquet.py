"""Vectors as a Parquet table: `id: string` and `embedding: fixed_size_list<number>`.

Vectors do not compress and never repeat, so neither compression nor a dictionary is tried on them.
The same rows give the same bytes with the same pyarrow.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import explain_os_error, os_errors_explained
from gemb.vectors.headers import foreign_metadata, own_metadata
from gemb.vectors.layout import DType, Layout
from gemb.vectors.quantise import Int8Ranges
from gemb.vectors.readers import VectorFile

ARROW_NAMES: dict[DType, str] = {"f32": "float", "f16": "halffloat", "int8": "int8", "binary": "uint8"}
ARROW_DTYPES: dict[str, DType] = {
    "float": "f32", "double": "f32", "halffloat": "f16", "int8": "int8", "uint8": "binary"
}  # fmt: skip
GROUP_BYTES = 32 << 20
ID_COLUMNS = ("id", "_id", "doc_id", "docid", "custom_id")
VECTOR_COLUMNS = ("embedding", "embeddings", "vector")
RANGES_KEY = "gemb.ranges"

Rows = tuple[Sequence[str], NDArray[Any]]


def rows_per_group(layout: Layout) -> int:
    """Rows of a row group: about 32 MiB of vectors."""
    return max(1024, GROUP_BYTES // layout.row_bytes)


def schema_of(layout: Layout) -> pa.Schema:
    """The two columns, and the metadata; int8 ranges are hexadecimal float32[2, K]."""
    number = pa.type_for_alias(ARROW_NAMES[layout.dtype])
    metadata = own_metadata(layout)
    if layout.ranges is not None:
        metadata[RANGES_KEY] = layout.ranges.as_array().tobytes().hex()
    vector = pa.list_(pa.field("element", number, nullable=False), layout.stored_width)
    return pa.schema(
        [pa.field("id", pa.string(), nullable=False), pa.field("embedding", vector, nullable=False)], metadata
    )


def write_table(path: Path, layout: Layout, groups: Iterable[Rows]) -> None:
    """Writes a table of one row group for each of `groups`: ids and stored rows[B, W]."""
    schema = schema_of(layout)
    with (
        os_errors_explained(path),
        path.open("wb") as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=["id"],
            write_page_checksum=True,
        ) as writer,
    ):
        for ids, stored in groups:
            flat = pa.array(stored.reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
            batch = pa.record_batch([pa.array(ids, pa.string()), vectors], schema=schema)
            writer.write_batch(batch, row_group_size=max(1, len(ids)))


def open_table(path: Path, column: str | None = None) -> VectorFile:
    """The vectors in a column of a Parquet file; by default embedding, as in ours, embeddings or vector.

    Raises GembError where it has none, or is damaged; a damaged page is found when it is read.
    """
    return _Table(path, column)


class _Table(VectorFile):
    """A table with a column of vectors, read one row group at a time; the last one is kept."""

    def __init__(self, path: Path, named: str | None) -> None:
        with read_explained(path):
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            schema = self._file.schema_arrow
        columns = schema.names
        candidates = VECTOR_COLUMNS if named is None else (named,)
        column = next((name for name in candidates if name in columns), None)
        if column is None:
            raise GembError(f'{path} has no column "{candidates[0]}"; it has {", ".join(columns) or "none"}')
        self._vector_column: str = column
        self._id_column: str | None = next((name for name in ID_COLUMNS if name in columns), None)
        kind = schema.field(column).type
        dtype = ARROW_DTYPES.get(str(getattr(kind, "value_type", None)))
        if dtype is None:
            raise GembError(
                f'{path}: column "{column}" is {kind}, not a list of float, halffloat, int8 or uint8'
            )
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        rows = int(self._starts[-1])
        if pa.types.is_fixed_size_list(kind):
            width = kind.list_size
        elif rows:
            with read_explained(path):
                first = next(self._file.iter_batches(1, columns=[column])).column(0)[0].as_py()
            width = len(first or ())
        else:
            raise GembError(f"{path} has no rows, and lists without a fixed size tell no width")
        if width == 0:
            raise GembError(f'{path}: the first "{column}" is empty')
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        dims = width * 8 if dtype == "binary" else width
        ranges = ranges_in(metadata, dims, path) if dtype == "int8" else None
        super().__init__(path, rows, Layout(dims, dtype, "list", foreign_metadata(metadata), ranges))
        self._group = -1
        self._group_stored: NDArray[Any] = np.empty((0, width), self.layout.stored_dtype)
        self._group_ids: list[str] = []

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        pieces = [self._group_stored[slice(*span)] for span in self._spans(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty((0, self.layout.stored_width), self.layout.stored_dtype), *pieces])

    def _ids(self, start: int, stop: int) -> list[str]:
        if self._id_column is None:
            return [str(row) for row in range(start, stop)]
        return [id_ for span in self._spans(start, stop) for id_ in self._group_ids[slice(*span)]]

    def close(self) -> None:
        self._file.close()

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Loads the row groups that hold rows start..stop one after the other; yields each one's own span."""
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            first = int(self._starts[group])
            end = min(stop, int(self._starts[group + 1]))
            if group != self._group:
                self._load(group)
            yield start - first, end - first
            start = end

    def _load(self, group: int) -> None:
        columns = [self._vector_column] if self._id_column is None else [self._id_column, self._vector_column]
        with read_explained(self.path):
            table = self._file.read_row_group(group, columns=columns, use_threads=False)
        vectors = table.column(self._vector_column).combine_chunks()
        lengths = vectors.value_lengths().fill_null(0).to_numpy()
        odd = np.flatnonzero(lengths != self.layout.stored_width)
        numbers = vectors.flatten()
        if len(odd) or numbers.null_count:
            row = int(self._starts[group]) + (int(odd[0]) if len(odd) else 0)
            raise GembError(
                f'{self.path}: a row at or after row {row} has no "{self._vector_column}" of '
                f"{self.layout.stored_width} numbers; every row needs one"
            )
        stored = numbers.to_numpy(zero_copy_only=False).astype(self.layout.stored_dtype, copy=False)
        self._group_stored = stored.reshape(-1, self.layout.stored_width)
        if self._id_column is not None:
            ids = table.column(self._id_column)
            if ids.null_count:
                raise GembError(f'{self.path}: a row has no "{self._id_column}"; every row needs one')
            self._group_ids = ids.cast(pa.string()).to_pylist()
        self._group = group


@contextlib.contextmanager
def read_explained(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors into one message; what the system says of a file keeps its own."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise explain_os_error(error, path, "read") from error
        reason = str(error).splitlines()[0].rstrip(".")
        raise GembError(f"{path} is damaged, or no Parquet file: {reason}; write it again") from error


def ranges_in(metadata: dict[str, str], dims: int, path: Path) -> Int8Ranges:
    """The int8 ranges in a table's metadata. Raises GembError where they are not there or do not fit."""
    try:
        values = np.frombuffer(bytes.fromhex(metadata[RANGES_KEY]), "<f4")
        return Int8Ranges.from_array(values.reshape(2, dims))
    except (KeyError, ValueError) as error:
        raise GembError(
            f"{path} holds int8 codes without their ranges [2, {dims}]; write it again"
        ) from error
