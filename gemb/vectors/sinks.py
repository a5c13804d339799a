"""Writers of every output format: append rows, sync, go on after a kill, finish.

    sink = open_sink("docs.npy", Path("docs.npy.partial"), layout, resume_at=None)
    sink.append(ids, vectors)
    position = sink.sync()      # on the disk; goes into the journal
    files = sink.finish()       # only now docs.npy and docs.ids.txt appear

A sink is append-only. Everything before `finish` happens in the work folder; an existing output is
untouched until then. Opened again with the last position that `sync` gave, a sink forgets what came
after it and goes on; the finished files are the same to the byte as those of one uninterrupted run,
however the rows were divided over the calls. Memory does not grow with the number of rows.
"""

import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.errors import GembError, MachineError
from gemb.files import Journal, file_digest, fsync_folder, os_errors_explained, sync_to_disk, write_json
from gemb.vectors.appending import AppendFile, End, damaged
from gemb.vectors.checks import bad_rows
from gemb.vectors.headers import header_bytes
from gemb.vectors.jsonlines import json_lines, json_string, not_utf8
from gemb.vectors.layout import (
    MANIFEST,
    SHARDS_FORMAT,
    Kind,
    Layout,
    OutputFile,
    check_output,
    ids_path,
    output_files,
    ranges_path,
)
from gemb.vectors.publishing import MOVES, REPLACED, Move, complete, is_publishing, publish
from gemb.vectors.readers import open_vectors

DATA = "data"
IDS = "ids.txt"
RANGES = "ranges.npy"
PARTS = "parts"
PART_SUMS = "parts.jsonl"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a sink has come: what a journal keeps and `open_sink` takes back as `Position(**entry)`.

    Bytes and CRC-32 are those of the rows and of the ids without headers; in a folder, of its last part.
    """

    rows: int = 0
    data_bytes: int = 0
    data_crc32: int = 0
    ids_bytes: int = 0
    ids_crc32: int = 0
    clipped_values: int = 0

    @property
    def data(self) -> End:
        """Where the rows end."""
        return End(self.data_bytes, self.data_crc32)

    @property
    def ids(self) -> End:
        """Where the ids end."""
        return End(self.ids_bytes, self.ids_crc32)

    def moved(self, rows: int, data: End, ids: End, clipped: int) -> "Position":
        """The position after `rows` more rows that end at `data` and `ids`."""
        return Position(self.rows + rows, *data, *ids, self.clipped_values + clipped)


class Sink(Protocol):
    """Takes rows in their final order. After an error in `append` the sink is where it was before."""

    @property
    def position(self) -> Position:
        """Rows taken so far, and how many values int8 had to clip; on the disk only after `sync`."""

    def append(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Adds rows float32[B, K], finite and not zero. Raises GembError for an id the format cannot hold."""

    def append_stored(self, ids: Sequence[str], stored: NDArray[Any]) -> None:
        """Adds rows that are in the stored type already, [B, W]: another sink's, unchanged."""

    def sync(self) -> Position:
        """Returns the position once all rows up to it are on the disk."""

    def finish(self) -> list[OutputFile]:
        """Puts the finished files in place, on the disk, opened again and checked; the main one is last."""

    def close(self) -> None:
        """Closes files without finishing; the work folder stays as it is."""


def open_sink(
    output: Path | str,
    work: Path,
    layout: Layout,
    resume_at: Position | None = None,
    *,
    stream: IO[bytes] | None = None,
) -> Sink:
    """The sink for an output's name, with its unfinished files in `work` (made if missing, on the same disk).

    `resume_at` None starts afresh; else what was written after that position is cut off. `stream` is
    where "-" writes, stdout if None.

    Raises GembError where the format cannot hold `layout`, or the work folder is damaged.
    """
    kind = check_output(output, layout)
    if kind == "stream":
        if resume_at is not None and resume_at.rows:
            raise ValueError("a stream cannot be resumed")
        return _StreamSink(stream or sys.stdout.buffer, layout)
    target = Path(output)
    with os_errors_explained(work):
        work.mkdir(parents=True, exist_ok=True)
        if resume_at is None:
            clear(work)
    start = resume_at or Position()
    if is_publishing(work):
        return _PublishedSink(target, work, start)
    match kind:
        case "jsonl":
            return _JsonlSink(target, work, layout, start)
        case "parquet":
            return _ParquetSink(target, work, layout, start)
        case "shards":
            return _ShardsSink(target, work, layout, start)
    return _MatrixSink(target, kind, work, layout, start)


def clear(work: Path) -> None:
    """Removes what an earlier sink left in its work folder, and nothing else."""
    for name in (MOVES, DATA, IDS, RANGES, PART_SUMS, _ParquetSink.TABLE):
        (work / name).unlink(missing_ok=True)
    for name in (PARTS, REPLACED):
        shutil.rmtree(work / name, ignore_errors=True)


class _FileSink:
    """What the sinks that write files share: checks, the position and the work folder."""

    def __init__(self, target: Path, work: Path, layout: Layout, start: Position) -> None:
        self.target = target
        self.work = work
        self.layout = layout
        self._position = start

    @property
    def position(self) -> Position:
        return self._position

    def append(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        check_rows(ids, vectors, self.layout)
        self._write(ids, *self.layout.store(vectors))

    def append_stored(self, ids: Sequence[str], stored: NDArray[Any]) -> None:
        wanted = (len(ids), self.layout.stored_width)
        if stored.shape != wanted or stored.dtype != self.layout.stored_dtype:
            raise ValueError(
                f"stored rows are {stored.dtype}{list(stored.shape)}, not {self.layout.dtype}{wanted}"
            )
        self._write(ids, np.ascontiguousarray(stored), 0)

    def _write(self, ids: Sequence[str], stored: NDArray[Any], clipped: int) -> None:
        raise NotImplementedError

    def _publish(self, moves: Sequence[Move]) -> list[OutputFile]:
        files = publish(self.work, self.target.parent, moves)
        check_published(self.target, self._position.rows)
        return files

    def _ranges_move(self, path: Path) -> list[Move]:
        """The move that brings the int8 ranges beside an output that has no place for them."""
        if path not in output_files(self.target, self.layout):
            return []
        return [Move(RANGES, path.name, *write_ranges(self.work / RANGES, self.layout))]


class _MatrixFiles:
    """Rows under a header in one file, and their ids, one a line, in another."""

    def __init__(
        self, kind: Kind, layout: Layout, work: Path, data: Path, ids: Path, start: Position
    ) -> None:
        self._kind = kind
        self._layout = layout
        self._data = AppendFile(data, work, header_bytes(kind, layout, 0), start.data)
        self._ids = AppendFile(ids, work, b"", start.ids)

    def write(self, position: Position, ids: Sequence[str], stored: NDArray[Any], clipped: int) -> Position:
        ids_end = self._ids.write(position.ids, memoryview(id_lines(ids)))
        data_end = self._data.write(position.data, stored.data)
        return position.moved(len(ids), data_end, ids_end, clipped)

    def sync(self) -> None:
        self._data.sync()
        self._ids.sync()

    def seal(self, position: Position, rows: int) -> tuple[OutputFile, OutputFile]:
        """Ends both files with `rows` rows; returns the rows' and the ids' sizes and checksums."""
        header = header_bytes(self._kind, self._layout, rows)
        data = OutputFile(
            self._data.path, len(header) + position.data_bytes, self._data.seal(position.data, header)
        )
        return data, OutputFile(self._ids.path, position.ids_bytes, self._ids.seal(position.ids))

    def close(self) -> None:
        self._data.close()
        self._ids.close()


class _MatrixSink(_FileSink):
    """`.npy`, `.safetensors` or `.fbin`, the ids beside it; int8 ranges too, but in safetensors itself."""

    def __init__(self, target: Path, kind: Kind, work: Path, layout: Layout, start: Position) -> None:
        super().__init__(target, work, layout, start)
        self._files = _MatrixFiles(kind, layout, work, work / DATA, work / IDS, start)
        fsync_folder(work)

    def _write(self, ids: Sequence[str], stored: NDArray[Any], clipped: int) -> None:
        self._position = self._files.write(self._position, ids, stored, clipped)

    def sync(self) -> Position:
        position = self._position
        self._files.sync()
        return position

    def finish(self) -> list[OutputFile]:
        data, ids = self._files.seal(self._position, self._position.rows)
        self.close()
        return self._publish(
            [
                Move(IDS, ids_path(self.target).name, ids.bytes, ids.sha256),
                *self._ranges_move(ranges_path(self.target)),
                Move(DATA, self.target.name, data.bytes, data.sha256),
            ]
        )

    def close(self) -> None:
        self._files.close()


class _JsonlSink(_FileSink):
    """`.jsonl`: the work file is the output already."""

    def __init__(self, target: Path, work: Path, layout: Layout, start: Position) -> None:
        super().__init__(target, work, layout, start)
        self._data = AppendFile(work / DATA, work, b"", start.data)
        fsync_folder(work)

    def _write(self, ids: Sequence[str], stored: NDArray[Any], clipped: int) -> None:
        end = self._data.write(self._position.data, memoryview(json_lines(ids, stored, self.layout)))
        self._position = self._position.moved(len(ids), end, End(), clipped)

    def sync(self) -> Position:
        position = self._position
        self._data.sync()
        return position

    def finish(self) -> list[OutputFile]:
        sha256 = self._data.seal(self._position.data)
        self.close()
        return self._publish(
            [
                *self._ranges_move(ranges_path(self.target)),
                Move(DATA, self.target.name, self._position.data_bytes, sha256),
            ]
        )

    def close(self) -> None:
        self._data.close()


class _ParquetSink(_FileSink):
    """`.parquet`, which cannot be appended to: rows and ids lie apart until `finish` builds it."""

    TABLE = "table.parquet"

    def __init__(self, target: Path, work: Path, layout: Layout, start: Position) -> None:
        super().__init__(target, work, layout, start)
        self._data = AppendFile(work / DATA, work, b"", start.data)
        self._ids = AppendFile(work / IDS, work, b"", start.ids)
        fsync_folder(work)

    def _write(self, ids: Sequence[str], stored: NDArray[Any], clipped: int) -> None:
        # JSON strings, so that an id may hold a line break here
        lines = b"".join([json_string(id_) + b"\n" for id_ in ids])
        ids_end = self._ids.write(self._position.ids, memoryview(lines))
        data_end = self._data.write(self._position.data, stored.data)
        self._position = self._position.moved(len(ids), data_end, ids_end, clipped)

    def sync(self) -> Position:
        position = self._position
        self._data.sync()
        self._ids.sync()
        return position

    def finish(self) -> list[OutputFile]:
        from gemb.vectors.parquet import write_table

        self._data.cut(self._position.data)
        self._ids.cut(self._position.ids)
        self.close()
        table = self.work / self.TABLE
        write_table(table, self.layout, self._groups())
        made = sealed(table)
        self._compare(table)
        return self._publish([Move(self.TABLE, self.target.name, made.bytes, made.sha256)])

    def close(self) -> None:
        self._data.close()
        self._ids.close()

    def _groups(self) -> Iterator[tuple[list[str], NDArray[Any]]]:
        """The rows of each row group; raises MachineError after the last if they are not what was written."""
        from gemb.vectors.parquet import rows_per_group

        size = rows_per_group(self.layout)
        data_crc = ids_crc = 0
        with (self.work / DATA).open("rb") as data, (self.work / IDS).open("rb") as lines:
            for start in range(0, self._position.rows, size):
                count = min(size, self._position.rows - start)
                stored = np.fromfile(data, self.layout.stored_dtype, count * self.layout.stored_width)
                encoded = list(islice(lines, count))
                data_crc = zlib.crc32(stored.data, data_crc)
                ids_crc = zlib.crc32(b"".join(encoded), ids_crc)
                yield [orjson.loads(line) for line in encoded], stored.reshape(count, -1)
        for path, crc, end in (
            (self.work / DATA, data_crc, self._position.data),
            (self.work / IDS, ids_crc, self._position.ids),
        ):
            if crc != end.crc32:
                raise damaged(path, self.work)

    def _compare(self, table: Path) -> None:
        """Raises MachineError unless the table gives back the rows and ids it was made from."""
        start = 0
        with open_vectors(table) as made:
            for ids, stored in self._groups():
                same = np.array_equal(made.stored(start, start + len(ids)), stored)
                start += len(ids)
                if not same or made.ids(start - len(ids), start) != ids:
                    raise MachineError(
                        f"{table} does not hold what was written to it; check the disk, then run again"
                    )


class _ShardsSink(_FileSink):
    """A folder of `part-00000.npy`, its ids beside it, and so on, all but the last of the same length.

    The folder appears with its manifest in one rename. A part is checked and its checksum noted
    when it is full, so that finishing a job of any size takes no second look at all of it.
    """

    def __init__(self, target: Path, work: Path, layout: Layout, start: Position) -> None:
        super().__init__(target, work, layout, start)
        self._folder = work / PARTS
        with os_errors_explained(self._folder):
            self._folder.mkdir(exist_ok=True)
        fsync_folder(work)
        first = self._part_at(start.rows)
        self._sums = Journal(work / PART_SUMS)
        known = {entry["part"] for entry in self._sums.entries()}
        if not known.issuperset(range(first)):
            raise GembError(
                f"{self._sums.path} does not list all finished parts; remove {work} to start again"
            )
        self._remove_parts_from(first + (start.rows % layout.rows_per_part > 0))
        self._open: dict[int, _MatrixFiles] = {}
        self._full: dict[int, Position] = {}  # parts that are complete but not sealed yet
        if start.rows % layout.rows_per_part:
            self._files(first, start)

    def _part_at(self, row: int) -> int:
        return row // self.layout.rows_per_part

    def _files(self, part: int, start: Position) -> _MatrixFiles:
        if part not in self._open:
            data = self._folder / part_name(part)
            self._open[part] = _MatrixFiles("npy", self.layout, self.work, data, ids_path(data), start)
        return self._open[part]

    def _write(self, ids: Sequence[str], stored: NDArray[Any], clipped: int) -> None:
        position = self._position
        full: dict[int, Position] = {}
        start = 0
        while start < len(ids):
            part = self._part_at(position.rows)
            room = self.layout.rows_per_part - position.rows % self.layout.rows_per_part
            stop = min(len(ids), start + room)
            position = self._files(part, position).write(position, ids[start:stop], stored[start:stop], 0)
            if stop - start == room:
                full[part] = position
                position = Position(position.rows, clipped_values=position.clipped_values)
            start = stop
        self._full.update(full)
        self._position = replace(position, clipped_values=position.clipped_values + clipped)

    def sync(self) -> Position:
        position = self._position
        for part in sorted(self._full):
            self._seal(part, self._full[part], self.layout.rows_per_part)
            del self._full[part]
        for files in self._open.values():
            files.sync()
        fsync_folder(self._folder)
        return position

    def _seal(self, part: int, end: Position, rows: int) -> None:
        files = self._files(part, end)
        data, ids = files.seal(end, rows)
        files.close()
        del self._open[part]
        self._sums.append({"part": part, "rows": rows, "files": [data.as_json(), ids.as_json()]})

    def finish(self) -> list[OutputFile]:
        position = self.sync()
        count = self._part_at(position.rows)
        rest = position.rows % self.layout.rows_per_part
        if rest:
            self._seal(count, position, rest)
            count += 1
        sums = {entry["part"]: entry for entry in self._sums.entries()}  # of two lines the later one holds
        self.close()
        self._remove_parts_from(count)
        files = [file for part in range(count) for file in sums[part]["files"]]
        if self.layout.ranges is not None:
            size, sha256 = write_ranges(self._folder / RANGES, self.layout)
            files.append({"file": RANGES, "bytes": size, "sha256": sha256})
        write_json(
            self._folder / MANIFEST,
            {
                "format": SHARDS_FORMAT,
                "rows": position.rows,
                "dims": self.layout.dims,
                "dtype": self.layout.dtype,
                "part_rows": self.layout.rows_per_part,
                "metadata": self.layout.metadata,
                "parts": [{"file": part_name(part), "rows": sums[part]["rows"]} for part in range(count)],
                "files": files,
            },
        )
        manifest = sealed(self._folder / MANIFEST)
        fsync_folder(self._folder)
        return self._publish([Move(PARTS, self.target.name, manifest.bytes, manifest.sha256, MANIFEST)])

    def close(self) -> None:
        for files in self._open.values():
            files.close()
        self._open.clear()
        self._sums.close()

    def _remove_parts_from(self, first: int) -> None:
        """Removes what a run left beyond its position: part `first` and later ones, and a manifest."""
        kept = {name.name for part in range(first) for name in part_files(self._folder / part_name(part))}
        with os_errors_explained(self._folder):
            for path in self._folder.iterdir():
                if path.name not in kept:
                    path.unlink()


class _StreamSink:
    """JSON lines to a pipe as soon as rows come; nothing to resume. A closed pipe raises BrokenPipeError."""

    def __init__(self, stream: IO[bytes], layout: Layout) -> None:
        self._stream = stream
        self._layout = layout
        self._position = Position()

    @property
    def position(self) -> Position:
        return self._position

    def append(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        check_rows(ids, vectors, self._layout)
        self.append_stored(ids, self._layout.store(vectors)[0])

    def append_stored(self, ids: Sequence[str], stored: NDArray[Any]) -> None:
        lines = json_lines(ids, stored, self._layout)
        rest = memoryview(lines)
        with os_errors_explained("stdout"):
            while rest.nbytes:  # with PYTHONUNBUFFERED stdout takes what the pipe has room for, and no more
                rest = rest[self._stream.write(rest) or 0 :]
            self._stream.flush()
        self._position = self._position.moved(len(ids), End(), End(), 0)

    def sync(self) -> Position:
        return self._position

    def finish(self) -> list[OutputFile]:
        return []

    def close(self) -> None:
        """Leaves the stream open; it is the caller's."""


class _PublishedSink:
    """A job that was cut off between the moves of its `finish`: only the rest of them is to be done."""

    def __init__(self, target: Path, work: Path, position: Position) -> None:
        self._target = target
        self._work = work
        self._position = position

    @property
    def position(self) -> Position:
        return self._position

    def append(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        raise ValueError(f"{self._target} is finished; no row can be added")

    def append_stored(self, ids: Sequence[str], stored: NDArray[Any]) -> None:
        raise ValueError(f"{self._target} is finished; no row can be added")

    def sync(self) -> Position:
        return self._position

    def finish(self) -> list[OutputFile]:
        files = complete(self._work, self._target.parent)
        check_published(self._target, self._position.rows)
        return files

    def close(self) -> None:
        """Nothing is open."""


def check_rows(ids: Sequence[str], vectors: NDArray[np.float32], layout: Layout) -> None:
    """Raises ValueError for rows that must not be written: wrong shape or type, not finite, all zero."""
    if vectors.dtype != np.float32 or vectors.shape != (len(ids), layout.dims):
        raise ValueError(
            f"{len(ids)} ids with vectors {vectors.dtype}{list(vectors.shape)}, "
            f"not float32[{len(ids)}, {layout.dims}]"
        )
    bad = bad_rows(vectors)
    if len(bad):
        raise ValueError(
            f"the vector of id {ids[int(bad[0])]!r} is not finite or all zero; it must not be written"
        )


def id_lines(ids: Sequence[str]) -> bytes:
    """One id a line, for `.ids.txt`.

    Raises GembError for an id with a line break, of any kind that Python's `splitlines` knows.
    """
    text = "\n".join([*ids, ""])
    # A carriage return at the end of an id would pass for a part of the newline after it.
    if len(text.splitlines()) != len(ids) or "\r" in text:
        broken = next(id_ for id_ in ids if "\r" in id_ or len(f"{id_}\n".splitlines()) > 1)
        raise GembError(
            f"id {broken!r} holds a line break, but .ids.txt has one id a line; write .jsonl or .parquet"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise not_utf8(next(id_ for id_ in ids if not id_.isascii() and not is_utf8(id_))) from error


def is_utf8(text: str) -> bool:
    """Whether the text has no lone surrogate."""
    return text == text.encode(errors="replace").decode()


def part_name(part: int) -> str:
    """`part-00000.npy`."""
    return f"part-{part:05}.npy"


def part_files(data: Path) -> tuple[Path, Path]:
    """The two files of a part."""
    return data, ids_path(data)


def write_ranges(path: Path, layout: Layout) -> tuple[int, str]:
    """Writes the int8 ranges [2, K] as `.npy`; returns bytes and SHA-256."""
    if layout.ranges is None:
        raise ValueError(f"{layout.dtype} has no ranges")
    with os_errors_explained(path), path.open("wb") as file:
        np.save(file, layout.ranges.as_array())
    made = sealed(path)
    return made.bytes, made.sha256


def sealed(path: Path) -> OutputFile:
    """Size and checksum of a file, once it is on the disk."""
    with os_errors_explained(path), path.open("rb") as file:
        sync_to_disk(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return OutputFile(path, size, file_digest(path))


def check_published(target: Path, rows: int) -> None:
    """Opens a finished output as a stranger would; raises MachineError if it has not all the rows."""
    if not rows:
        return  # JSON lines of no rows have no width that a reader could tell
    with open_vectors(target, verify=False) as found:
        if found.rows != rows:
            raise MachineError(f"{target} has {found.rows} rows but {rows} were written; check the disk")
