"""The sink of a job, with the int8 ranges found on the job's first rows.

int8 codes are relative to ranges that must be known before the first row is stored. So the first
CALIBRATION_ROWS rows are held back in the work folder, as float32, until there are enough of them (or no
more); the ranges then hold for the whole output, and depend on nothing but those rows.

B rows, K kept dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gemb.vectors.appending import AppendFile, End
from gemb.vectors.layout import Layout, OutputFile
from gemb.vectors.quantise import Int8Ranges, calibrate
from gemb.vectors.sinks import Position, Sink, open_sink

CALIBRATION_ROWS = 8192
BLOCK_ROWS = 4096  # of held rows that are stored at a time

MakeLayout = Callable[[Int8Ranges | None], Layout]


class RowSink:
    """Takes float32 rows [B, K] in their final order; what a `gemb.vectors` sink is, and int8 calibration.

    `make_layout` gives the layout for the ranges, which are None unless `int8`. `resume_at` is what
    `sync` gave last. `stream` is where an output of "-" goes.
    """

    def __init__(
        self,
        output: Path | str,
        work: Path,
        make_layout: MakeLayout,
        resume_at: Mapping[str, Any] | None,
        *,
        dims: int,
        int8: bool,
        stream: IO[bytes] | None = None,
    ) -> None:
        self._output = output
        self._work = work
        self._make_layout = make_layout
        self._dims = dims
        self._stream = stream
        self._sink: Sink | None = None
        self._held: _HeldRows | None = None
        if not int8:
            self._sink = self._open(None, resume_at)
            return
        held = resume_at["held"] if resume_at else None
        self._held = _HeldRows(work, dims, held)
        if resume_at and resume_at["sink"]:
            self._sink = self._open(self._held.ranges(), resume_at["sink"])

    def _open(self, ranges: Int8Ranges | None, resume_at: Mapping[str, Any] | None) -> Sink:
        position = Position(**resume_at) if resume_at is not None else None
        layout = self._make_layout(ranges)
        return open_sink(self._output, self._work, layout, position, stream=self._stream)

    def append(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Add rows [B, K]. Raises GembError for an id that the format cannot hold."""
        if self._sink is not None:
            self._sink.append(ids, vectors)
        elif self._held is not None:
            self._held.append(ids, vectors)
            if self._held.rows >= CALIBRATION_ROWS:
                self._settle()

    def sync(self) -> dict[str, Any]:
        """Where the rows end, as JSON; all rows up to there are on the disk."""
        position = asdict(self._sink.sync()) if self._sink is not None else None
        if self._held is None:
            return position or {}
        return {"held": self._held.sync(), "sink": position}

    def settle(self) -> dict[str, Any]:
        """No more rows come: store what is held back. Gives the final position."""
        if self._sink is None:
            self._settle()
        return self.sync()

    def _settle(self) -> None:
        if self._held is None:
            raise ValueError("nothing is held back")
        self._sink = self._open(self._held.ranges(), None)
        for ids, vectors in self._held.blocks():
            self._sink.append(ids, vectors)

    @property
    def clipped_values(self) -> int:
        """Numbers that lay outside the int8 ranges."""
        return self._sink.position.clipped_values if self._sink is not None else 0

    def finish(self) -> list[OutputFile]:
        """Put the finished files in their places, checked; after `settle`."""
        if self._sink is None:
            raise ValueError("the sink is not settled")
        if self._held is not None:
            self._held.close()
        return self._sink.finish()

    def close(self) -> None:
        """Close the files; the work folder stays."""
        if self._sink is not None:
            self._sink.close()
        if self._held is not None:
            self._held.close()


class _HeldRows:
    """Rows in float32 and their ids, in two files of the work folder; nothing is removed from them."""

    def __init__(self, work: Path, dims: int, resume_at: Mapping[str, Any] | None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._dims = dims
        self._data_end = End(*resume_at["data"]) if resume_at else End()
        self._ids_end = End(*resume_at["ids"]) if resume_at else End()
        self._data = AppendFile(work / "held.f32", work, end=self._data_end)
        self._ids = AppendFile(work / "held.ids", work, end=self._ids_end)

    @property
    def rows(self) -> int:
        return self._data_end.bytes // (4 * self._dims)

    def append(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        lines = b"".join(orjson.dumps(id_, option=orjson.OPT_APPEND_NEWLINE) for id_ in ids)
        ids_end = self._ids.write(self._ids_end, memoryview(lines))
        self._data_end = self._data.write(self._data_end, np.ascontiguousarray(vectors, dtype="<f4").data)
        self._ids_end = ids_end

    def sync(self) -> dict[str, Any]:
        self._data.sync()
        self._ids.sync()
        return {"data": list(self._data_end), "ids": list(self._ids_end)}

    def ranges(self) -> Int8Ranges:
        return calibrate(self._read(0, min(self.rows, CALIBRATION_ROWS)))

    def blocks(self) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        ids = [orjson.loads(line) for line in self._ids.path.read_bytes().splitlines()]
        for start in range(0, self.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.rows)
            yield ids[start:stop], self._read(start, stop)

    def _read(self, start: int, stop: int) -> NDArray[np.float32]:
        width = self._dims
        values = np.fromfile(
            self._data.path, dtype="<f4", count=(stop - start) * width, offset=4 * start * width
        )
        return values.reshape(stop - start, width)

    def close(self) -> None:
        self._data.close()
        self._ids.close()
