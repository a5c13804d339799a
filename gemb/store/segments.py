"""A segment: some rows of an index in flat files that never change, each with the checksums of its blocks.

    segments/<name>/
      rows.u64            the document's key of each row, ascending; a document's rows are its passages
      vectors.f16         the stored vectors, row-major; .bf16, .f32 or .i8 by the index's type
      codes.i8            int8 codes for the first stage, in segments without a graph
      graph.usearch       codes and HNSW graph, in segments that are worth one
      slots.u32           the row of each code in graph.usearch, where they are not in the order of the rows

Codes and graph are made from the stored vectors alone, so they can be made again. A segment is written to a
folder that nobody knows, put on the disk, and exists once the catalogue names it. B rows, D dims, C dims of
a code, W numbers of a stored row.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemb.files import fsync_folder, os_errors_explained
from gemb.store import graph as graphs
from gemb.store.blocks import BlockWriter, CheckedFile, block_checksums
from gemb.store.codes import CodeScale, choose_step, encode, residuals, sample_rows, unit
from gemb.vectors import Layout

ROWS, CODES, GRAPH, SLOTS = "rows.u64", "codes.i8", "graph.usearch", "slots.u32"
VECTORS: Mapping[str, str] = {
    "f32": "vectors.f32",
    "f16": "vectors.f16",
    "bf16": "vectors.bf16",
    "int8": "vectors.i8",
}
PASS_ROWS = 16_384
"""Rows that a pass over a whole segment holds in memory at a time."""


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """What the catalogue knows of a segment; `files` is the size of each in bytes."""

    name: str
    rows: int
    first_key: int
    last_key: int
    code_dims: int
    code_step: float
    code_residual: float
    files: Mapping[str, int]
    graph: Mapping[str, int] | None = None

    @property
    def has_graph(self) -> bool:
        """Whether the first stage of this segment is a graph."""
        return self.graph is not None

    @property
    def scale(self) -> CodeScale:
        """How this segment's codes become numbers."""
        return CodeScale(self.code_step, self.code_residual)

    def as_json(self) -> dict[str, object]:
        """The record as the catalogue keeps it."""
        return asdict(self)


Checksums = Mapping[str, NDArray[np.uint32]]
"""The block checksums of each file of a segment."""


class SegmentWriter:
    """A segment in the making: rows are appended, then codes or graph are made and all is put on the disk."""

    def __init__(self, segments: Path, layout: Layout) -> None:
        self.name = secrets.token_hex(8)
        self.folder = segments / self.name
        self.rows = 0
        self._layout = layout
        self.first_key = self._last_key = 0
        with os_errors_explained(self.folder):
            self.folder.mkdir()
        self._keys = BlockWriter(self.folder / ROWS)
        try:
            self._vectors = BlockWriter(self.folder / VECTORS[layout.dtype])
        except BaseException:
            self._keys.close()
            raise

    def append(self, keys: NDArray[np.uint64], stored: NDArray[Any]) -> None:
        """Adds stored rows[B, W] of the documents keys[B], which ascend from call to call.

        Raises ValueError where they do not.
        """
        if not len(keys):
            return
        first = int(keys[0])
        if len(keys) != len(stored) or first < self._last_key or (keys[1:] < keys[:-1]).any():
            raise ValueError("keys of a segment ascend, one a row")
        if not self.rows:
            self.first_key = first
        self._keys.append(keys.astype("<u8", copy=False))
        self._vectors.append(stored)
        self._last_key = int(keys[-1])
        self.rows += len(keys)

    def finish(
        self,
        code_dims: int,
        shape: graphs.GraphShape | None = None,
        *,
        threads: int = 1,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> tuple[SegmentRecord, Checksums]:
        """Makes codes of `code_dims`, or a graph where `shape` is given; returns when all is on the disk."""
        checksums: dict[str, NDArray[np.uint32]] = {
            self._keys.path.name: self._keys.finish(),
            self._vectors.path.name: self._vectors.finish(),
        }
        name = VECTORS[self._layout.dtype]
        source = CheckedFile(
            self.folder / name, checksums[name], self._vectors.bytes, "run the command again"
        )
        try:
            step = code_step(source, self.rows, self._layout, code_dims)
            made = _Codes(source, self.rows, self._layout, code_dims, step)
            record = SegmentRecord(
                self.name, self.rows, self.first_key, self._last_key, code_dims, step, 0.0, {}
            )
            if shape is None:
                checksums[CODES] = self._write_codes(made)
            else:
                record = replace(record, graph=asdict(shape))
                checksums |= self._write_graph(made, shape, threads, on_rows)
        finally:
            source.close()
        with os_errors_explained(self.folder):
            files = {file: (self.folder / file).stat().st_size for file in checksums}
        fsync_folder(self.folder)
        fsync_folder(self.folder.parent)
        return replace(record, code_residual=made.residual, files=files), checksums

    def discard(self) -> None:
        """Removes what was written."""
        self._keys.close()
        self._vectors.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_codes(self, made: _Codes) -> NDArray[np.uint32]:
        file = BlockWriter(self.folder / CODES)
        try:
            for _, codes in made:
                file.append(codes)
            return file.finish()
        finally:
            file.close()

    def _write_graph(
        self, made: _Codes, shape: graphs.GraphShape, threads: int, on_rows: Callable[[int], None]
    ) -> dict[str, NDArray[np.uint32]]:
        path = self.folder / GRAPH
        graphs.build(path, made, self.rows, made.code_dims, shape, threads, on_rows)
        checksums = {GRAPH: block_checksums(path)}
        slots = graphs.slot_rows(path, self.rows, made.code_dims)
        if slots is None or not _stand_in_slots(path, slots, made):
            checksums[CODES] = self._write_codes(made)  # another usearch lays its file out differently
        elif (slots != np.arange(self.rows, dtype=np.uint32)).any():
            file = BlockWriter(self.folder / SLOTS)
            try:
                file.append(slots.astype("<u4", copy=False))
                checksums[SLOTS] = file.finish()
            finally:
                file.close()
        return checksums


class Segment:
    """A published segment, open for reading; every byte is checked before it counts.

    `advice` is what a message about damage tells to do. `cache` is where the state of whole graph files is
    remembered; None reads them every time.

    Raises DamagedError where a file is missing or of another size.
    """

    def __init__(
        self,
        folder: Path,
        record: SegmentRecord,
        checksums: Checksums,
        layout: Layout,
        *,
        advice: str,
        cache: Path | None,
    ) -> None:
        self.record = record
        self.layout = layout
        self.files: dict[str, CheckedFile] = {}
        self._checksums = checksums
        self._cache = cache
        self._graph: graphs.Graph | None = None
        self._slots: NDArray[np.uint32] | None = None
        self._slot_of_row: NDArray[np.uint32] | None = None
        try:
            for name, size in record.files.items():
                self.files[name] = CheckedFile(folder / name, checksums[name], size, advice)
        except BaseException:
            self.close()
            raise
        self._rows = self.files[ROWS]
        self._vectors = self.files[VECTORS[layout.dtype]]
        self._keys: NDArray[np.uint64] = self._rows.array("<u8")
        self._stored: NDArray[Any] = self._vectors.array(layout.stored_dtype, layout.stored_width)
        codes_in_graph = CODES not in self.files
        self._codes_file = self.files[GRAPH if codes_in_graph else CODES]
        self._codes_offset = graphs.CODES_OFFSET if codes_in_graph else 0
        size = record.rows * record.code_dims
        codes = self._codes_file.array("i1", offset=self._codes_offset)[:size]
        self._codes: NDArray[np.int8] = codes.reshape(record.rows, record.code_dims)

    @property
    def rows(self) -> int:
        """N, dead rows counted."""
        return self.record.rows

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The document's key of each row, [N], ascending, checked."""
        self._rows.check_all()
        return self._keys

    def spans_of(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first row and the row behind the last one of each document; equal where it has none here."""
        own = self.keys
        return np.searchsorted(own, keys, "left"), np.searchsorted(own, keys, "right")

    def stored(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Stored rows[B, W], checked."""
        self._vectors.check_rows(rows, self.layout.row_bytes)
        return self._stored[rows]

    def stored_block(self, start: int, stop: int) -> NDArray[Any]:
        """Stored rows start..stop, checked and still mapped."""
        self._vectors.check(start * self.layout.row_bytes, stop * self.layout.row_bytes)
        return self._stored[start:stop]

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors[B, D] of rows."""
        return unit(self.layout.load(self.stored(rows)))

    def vector_block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Unit vectors[B, D] of the rows start..stop."""
        return unit(self.layout.load(self.stored_block(start, stop)))

    def code_block(self, start: int, stop: int) -> NDArray[np.int8]:
        """The codes of slots start..stop, checked, still mapped; `rows_of_slots` says whose they are."""
        width = self.record.code_dims
        self._codes_file.check(self._codes_offset + start * width, self._codes_offset + stop * width)
        return self._codes[start:stop]

    def codes(self, rows: NDArray[np.int64]) -> NDArray[np.int8]:
        """Codes[B, C] of rows, checked."""
        slots = rows
        if SLOTS in self.files:
            if self._slot_of_row is None:
                self._slot_of_row = np.empty(self.rows, dtype=np.uint32)
                self._slot_of_row[self._own_slots()] = np.arange(self.rows, dtype=np.uint32)
            slots = self._slot_of_row[rows].astype(np.int64)
        self._codes_file.check_rows(slots, self.record.code_dims, self._codes_offset)
        return self._codes[slots]

    @property
    def slots_are_rows(self) -> bool:
        """Whether code s is that of row s."""
        return SLOTS not in self.files

    def rows_of_slots(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of slots; -1 stays -1."""
        if self.slots_are_rows:
            return slots
        rows = self._own_slots()[np.maximum(slots, 0)].astype(np.int64)
        rows[slots < 0] = -1
        return rows

    def graph(self) -> graphs.Graph:
        """The graph, mapped after its whole file was checked."""
        if self._graph is None:
            file = self.files[GRAPH]
            self._graph = graphs.Graph(
                file, self._checksums[GRAPH], self.rows, self.record.code_dims, self._cache
            )
        return self._graph

    def refresh(self) -> None:
        """Sees to it that files which were touched since they were opened are checked again.

        Raises DamagedError where one changed its size.
        """
        for name, file in self.files.items():
            if not file.refresh():
                if name == GRAPH:
                    self._graph = None
                if name == SLOTS:
                    self._slots = self._slot_of_row = None

    def let_go(self, start: int, stop: int) -> None:
        """Gives back the memory of stored rows that were read once and are not needed again."""
        self._vectors.let_go(start * self.layout.row_bytes, stop * self.layout.row_bytes)

    def close(self) -> None:
        """Lets go of the files; nothing of this object may be used afterwards."""
        for file in self.files.values():
            file.close()

    def _own_slots(self) -> NDArray[np.uint32]:
        if self._slots is None:
            file = self.files[SLOTS]
            file.check_all()
            self._slots = file.array("<u4")
        return self._slots


def spread(first: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.int64]:
    """All numbers of first[0]..stop[0], first[1]..stop[1], and so on, in this order."""
    counts = stop - first
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    numbers: NDArray[np.int64] = np.arange(total) + np.repeat(first - (ends - counts), counts)
    return numbers


class _Codes:
    """The codes of a vectors file, block by block; `residual` is the largest one of a whole pass."""

    def __init__(self, source: CheckedFile, rows: int, layout: Layout, code_dims: int, step: float) -> None:
        self.code_dims = code_dims
        self.residual = 0.0
        self._source, self._rows, self._layout, self._step = source, rows, layout, step

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int8]]]:
        """Yields the first row and the codes[n, C] of each block."""
        stored = self._source.array(self._layout.stored_dtype, self._layout.stored_width)
        row_bytes = self._layout.row_bytes
        for start in range(0, self._rows, PASS_ROWS):
            stop = min(self._rows, start + PASS_ROWS)
            codes, residual = codes_of(stored[start:stop], self._layout, self.code_dims, self._step)
            self.residual = max(self.residual, residual)
            self._source.let_go(start * row_bytes, stop * row_bytes)
            yield start, codes


def codes_of(
    stored: NDArray[Any], layout: Layout, code_dims: int, step: float
) -> tuple[NDArray[np.int8], float]:
    """The codes[B, C] of stored rows[B, W], and the largest residual among them."""
    rows = unit_prefix(stored, layout, code_dims)
    codes = encode(rows, step)
    return codes, float(residuals(rows, codes, step).max(initial=0))


def unit_prefix(stored: NDArray[Any], layout: Layout, code_dims: int) -> NDArray[np.float32]:
    """The first C dims of stored rows[B, W], at unit length."""
    return unit(np.ascontiguousarray(layout.load(stored)[:, :code_dims]))


def code_step(source: CheckedFile, rows: int, layout: Layout, code_dims: int) -> float:
    """The step of a segment's codes, chosen from rows that are spread over all of it."""
    stored = source.array(layout.stored_dtype, layout.stored_width)
    return choose_step(unit_prefix(stored[sample_rows(rows, code_dims)], layout, code_dims))


def _stand_in_slots(path: Path, slots: NDArray[np.uint32], made: _Codes) -> bool:
    """Whether the codes in a graph file are those of the rows in `slots`, all of them compared."""
    content = np.memmap(path, dtype=np.int8, mode="r", offset=graphs.CODES_OFFSET)
    width = made.code_dims
    codes = content[: len(slots) * width].reshape(-1, width)
    slot_of_row = np.empty(len(slots), dtype=np.int64)
    slot_of_row[slots] = np.arange(len(slots))
    return all(np.array_equal(codes[slot_of_row[first : first + len(block)]], block) for first, block in made)
