"""Readers of everything a sink writes, and of the same formats from other hands.

    with open_vectors("docs.npy") as vectors:
        for ids, block in vectors.blocks():
            ...

Rows are mapped or read when asked for, never all at once. B rows, K dims, W numbers in a stored row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import CHUNK_BYTES, file_digest, os_errors_explained, read_json
from gemb.vectors.headers import foreign_metadata, read_header, read_npy_header
from gemb.vectors.jsonlines import parse_line
from gemb.vectors.layout import MANIFEST, SHARDS_FORMAT, DType, Kind, Layout, ids_path, kind_of, ranges_path
from gemb.vectors.quantise import Int8Ranges

BLOCK_ROWS = 4096
OPEN_PARTS = 8


def open_vectors(path: Path | str, *, verify: bool = True, column: str | None = None) -> "VectorFile":
    """The vectors at `path`, whose format is known by its name.

    `column` is that of a Parquet file which holds them; by default embedding, embeddings or vector.

    Sizes and counts are always checked. With `verify` the whole content is read once and compared
    with the checksums in `NAME.gemb.json` beside it, or in a folder's manifest; without such a file
    there is nothing to compare with.

    Raises GembError where something is missing, damaged, or no vector file at all.
    """
    kind = kind_of(path)
    target = Path(path)
    if kind == "stream":
        raise GembError("vectors cannot be read from a pipe; write them to a file first")
    with os_errors_explained(path, "read"):
        if kind == "shards":
            return _ShardedFile(target, verify)
        listed = check_sidecar(target, verify)
        match kind:
            case "jsonl":
                return _JsonlFile(target)
            case "parquet":
                from gemb.vectors.parquet import open_table  # here, because pyarrow is slow to import

                return open_table(target, column)
        return _MatrixFile(target, kind, needs_ids=ids_path(target).name in listed)


class VectorFile(ABC):
    """Vectors with their ids: `rows` x `dims`, in the order they were written.

    `layout` tells type, metadata and int8 ranges; a sink opened with it writes the same again.
    """

    def __init__(self, path: Path, rows: int, layout: Layout) -> None:
        self.path = path
        self.rows = rows
        self.layout = layout

    @property
    def dims(self) -> int:
        """K, the width of a block."""
        return self.layout.dims

    @property
    def dtype(self) -> DType:
        """The stored type."""
        return self.layout.dtype

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the writer said about the vectors, where the format has a place for it."""
        return self.layout.metadata

    @abstractmethod
    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop in the stored type, [B, W]; maybe a view of the file."""

    @abstractmethod
    def _ids(self, start: int, stop: int) -> list[str]:
        """The ids of rows start..stop, a block's worth; row numbers from 0 where the file has none."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the file."""

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32[B, K]: exact for floats, mid-step for int8, +1 and -1 for binary."""
        return self.layout.load(self.stored(start, stop))

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        """All rows with their ids, `rows` at a time."""
        for start in range(0, self.rows, rows):
            stop = min(start + rows, self.rows)
            yield self._ids(start, stop), self.block(start, stop)

    def iter_ids(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The ids of rows start..stop (to the end if None), streamed; row numbers where the file has none."""
        stop = self.rows if stop is None else stop
        for first in range(start, stop, BLOCK_ROWS):
            yield from self._ids(first, min(first + BLOCK_ROWS, stop))

    def ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The same ids as a list."""
        return list(self.iter_ids(start, stop))

    def __len__(self) -> int:
        return self.rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LineIndex:
    """Random access to the lines of a file: where every 1,024th begins is kept, 8 bytes each.

    `count` is the number of lines; a last line without newline counts, an empty file has none.
    """

    EVERY = 1024

    def __init__(self, path: Path) -> None:
        self.path = path
        starts = [np.zeros(1, np.int64)]
        newlines = position = 0
        last = b"\n"
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                found = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                starts.append(found[(-newlines - 1) % self.EVERY :: self.EVERY] + position + 1)
                newlines += len(found)
                position += len(chunk)
                last = chunk[-1:]
        self.count = newlines + (last != b"\n")
        self._starts = np.concatenate(starts)

    def lines(self, start: int, stop: int) -> list[bytes]:
        """Lines start..stop, without their newlines."""
        if start >= stop:
            return []
        with self.path.open("rb") as file:
            file.seek(int(self._starts[start // self.EVERY]))
            found = islice(file, start % self.EVERY, start % self.EVERY + stop - start)
            return [line.removesuffix(b"\n").removesuffix(b"\r") for line in found]


class _MatrixFile(VectorFile):
    """`.npy`, `.safetensors` or `.fbin`, mapped; ids from `NAME.ids.txt`, else row numbers."""

    def __init__(
        self, path: Path, kind: Kind, *, needs_ids: bool = False, ranges: Int8Ranges | None = None
    ) -> None:
        header = read_header(path, kind)
        dims = header.width * 8 if header.dtype == "binary" else header.width
        if dims == 0:
            raise GembError(f"{path} holds vectors of no dims")
        if header.dtype == "int8":
            ranges = header.ranges or ranges or read_ranges(path, dims)
        else:
            ranges = None
        super().__init__(
            path, header.rows, Layout(dims, header.dtype, "list", foreign_metadata(header.metadata), ranges)
        )
        self._matrix: NDArray[Any] = np.empty((0, header.width), header.numbers)
        if header.rows:
            self._matrix = np.asarray(
                np.memmap(
                    path,
                    header.numbers,
                    "r",
                    header.offset,
                    (header.rows, header.width),
                    "F" if header.column_major else "C",
                )
            )
        self._lines = LineIndex(ids_path(path)) if needs_ids or ids_path(path).exists() else None
        if self._lines is not None and self._lines.count != self.rows:
            raise GembError(
                f"{self._lines.path} has {self._lines.count} ids but {path} has {self.rows} rows; "
                "they do not belong together, write them again"
            )

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        return np.ascontiguousarray(self._matrix[start:stop], self.layout.stored_dtype)

    def _ids(self, start: int, stop: int) -> list[str]:
        if self._lines is None:
            return [str(row) for row in range(start, stop)]
        return decoded(self._lines.lines(start, stop), self._lines.path, start)

    def close(self) -> None:
        self._matrix = self._matrix[:0].copy()


class _JsonlFile(VectorFile):
    """JSON lines; a line is parsed when its row is asked for, and must fit the first one."""

    def __init__(self, path: Path) -> None:
        self._lines = LineIndex(path)
        if not self._lines.count:
            raise GembError(f"{path} is empty; JSON lines of no rows tell no width")
        (first,) = self._lines.lines(0, 1)
        _, dtype, row = parse_line(first, f"{path}:1")
        dims = len(row) * 8 if dtype == "binary" else len(row)
        if dims == 0:
            raise GembError(f"{path}:1: the embedding is empty")
        ranges = read_ranges(path, dims) if dtype == "int8" else None
        is_list = b'"embedding":[' in first.replace(b" ", b"")
        super().__init__(
            path, self._lines.count, Layout(dims, dtype, "list" if is_list else "base64", {}, ranges)
        )
        (last,) = self._lines.lines(self.rows - 1, self.rows)
        parse_line(last, f"{path}:{self.rows}")
        self._parsed: tuple[int, int, list[str], NDArray[Any]] = (0, 0, [], row[:0])

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        return self._rows(start, stop)[1]

    def _ids(self, start: int, stop: int) -> list[str]:
        return self._rows(start, stop)[0]

    def close(self) -> None:
        self._parsed = (0, 0, [], self._parsed[3][:0].copy())

    def _rows(self, start: int, stop: int) -> tuple[list[str], NDArray[Any]]:
        if self._parsed[:2] != (start, stop):
            ids = []
            stored = np.empty((stop - start, self.layout.stored_width), self.layout.stored_dtype)
            for row, line in enumerate(self._lines.lines(start, stop)):
                place = f"{self.path}:{start + row + 1}"
                id_, dtype, values = parse_line(line, place)
                if dtype != self.dtype or len(values) != self.layout.stored_width:
                    raise GembError(
                        f"{place}: {len(values)} numbers of {dtype}, but the first line has "
                        f"{self.layout.stored_width} of {self.dtype}"
                    )
                ids.append(str(start + row) if id_ is None else id_)
                stored[row] = values
            self._parsed = (start, stop, ids, stored)
        return self._parsed[2], self._parsed[3]


class _ShardedFile(VectorFile):
    """A folder of parts with its manifest; parts are opened when needed and a few are kept open."""

    def __init__(self, folder: Path, verify: bool) -> None:
        if not folder.is_dir():
            raise GembError(f"cannot read {folder}: no such folder of vectors")
        if not (folder / MANIFEST).exists():
            raise GembError(f"{folder} has no {MANIFEST}; it is unfinished, or no folder of vectors")
        manifest = read_json(folder / MANIFEST)
        place = folder / MANIFEST
        if manifest.get("format") != SHARDS_FORMAT:
            raise GembError(
                f"{place} is not {SHARDS_FORMAT!r}; it was not written by gemb, or by a newer one"
            )
        try:
            check_files(folder, manifest["files"], place, verify)
            self._names = [str(part["file"]) for part in manifest["parts"]]
            counts = [int(part["rows"]) for part in manifest["parts"]]
            self._starts = np.cumsum([0, *counts])
            rows, dims, dtype = int(manifest["rows"]), int(manifest["dims"]), manifest["dtype"]
            layout = Layout(
                dims,
                dtype,
                metadata=manifest["metadata"],
                ranges=read_ranges_file(folder / "ranges.npy", dims) if dtype == "int8" else None,
                part_rows=int(manifest["part_rows"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GembError(f"{place} is damaged: {error}; write the folder again") from error
        super().__init__(folder, rows, layout)
        if self._starts[-1] != rows:
            raise GembError(f"{place} is damaged: its parts have {self._starts[-1]} rows, not {rows}")
        self._open: dict[int, _MatrixFile] = {}
        for part in range(len(counts)):
            self._part(part)

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        pieces = [self._part(part).stored(*span) for part, span in self._spans(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty((0, self.layout.stored_width), self.layout.stored_dtype), *pieces])

    def _ids(self, start: int, stop: int) -> list[str]:
        return [id_ for part, span in self._spans(start, stop) for id_ in self._part(part).ids(*span)]

    def close(self) -> None:
        self._open.clear()

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """The parts that hold rows start..stop, each with its own first and last row."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[part])
            end = min(stop, int(self._starts[part + 1]))
            yield part, (start - first, end - first)
            start = end
            part += 1

    def _part(self, part: int) -> _MatrixFile:
        if part not in self._open:
            if len(self._open) >= OPEN_PARTS:
                self._open.pop(next(iter(self._open)))
            path = self.path / self._names[part]
            found = _MatrixFile(path, "npy", needs_ids=True, ranges=self.layout.ranges)
            expected = int(self._starts[part + 1] - self._starts[part])
            if (found.rows, found.dims, found.dtype) != (expected, self.dims, self.dtype):
                raise GembError(
                    f"{path} holds {found.rows} x {found.dims} {found.dtype} but {MANIFEST} says "
                    f"{expected} x {self.dims} {self.dtype}; write the folder again"
                )
            self._open[part] = found
        return self._open[part]


def check_sidecar(path: Path, verify: bool) -> set[str]:
    """The names that `NAME.gemb.json` beside a file lists, after comparing their files with it."""
    sidecar = path.with_name(f"{path.name}.gemb.json")
    if not sidecar.exists():
        return set()
    listed = read_json(sidecar).get("files")
    if not isinstance(listed, list):
        return set()
    try:
        check_files(path.parent, listed, sidecar, verify)
        return {entry["file"] for entry in listed}
    except (KeyError, TypeError) as error:
        raise GembError(f'{sidecar}: "files" is damaged: {error}; write {path} again') from error


def check_files(folder: Path, listed: Sequence[Mapping[str, Any]], place: Path, verify: bool) -> None:
    """Raises GembError for the first file that is not what `place` says: size, with `verify` content."""
    for entry in listed:
        path = folder / entry["file"]
        if not path.exists():
            raise GembError(f"{path} is missing, but {place} lists it; write it again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise GembError(
                f"{path} is damaged: {size} bytes, but {place} says {entry['bytes']}; write it again"
            )
        if verify and file_digest(path) != entry["sha256"]:
            raise GembError(f"{path} is damaged: its checksum is not the one in {place}; write it again")


def read_ranges(path: Path, dims: int) -> Int8Ranges:
    """The int8 ranges that lie beside a file as `NAME.ranges.npy`."""
    beside = ranges_path(path)
    if not beside.exists():
        raise GembError(
            f"{path} holds int8 codes, but their ranges are not beside it ({beside.name}); write both again"
        )
    return read_ranges_file(beside, dims)


def read_ranges_file(path: Path, dims: int) -> Int8Ranges:
    """The int8 ranges [2, K] of an `.npy` file."""
    with os_errors_explained(path, "read"), path.open("rb") as file:
        header = read_npy_header(path, file)
        values = np.fromfile(file, header.numbers)
    if header.dtype != "f32" or (header.rows, header.width) != (2, dims) or values.size != 2 * dims:
        raise GembError(f"{path} holds no int8 ranges [2, {dims}]; write it again")
    return Int8Ranges.from_array(values.reshape(2, dims))


def decoded(lines: Sequence[bytes], path: Path, start: int) -> list[str]:
    """Lines as text; `start` is the row of the first one. Raises GembError where one is not UTF-8."""
    try:
        return b"\n".join(lines).decode().split("\n") if lines else []
    except UnicodeDecodeError as error:
        row = start + b"\n".join(lines).count(b"\n", 0, error.start)
        raise GembError(f"{path}:{row + 1}: the id is not UTF-8; write it again") from error
