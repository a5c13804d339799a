"""Rows a second of every output format, from float32 rows in memory to the finished, checked files.

"append" is what overlaps with the computing of a job: storing, checksum, write and one sync for each
window of 4,096 rows. "finish" comes once at the end: reading back, for Parquet building the table, and
the moves. The disk takes part, so a second column gives the processor time alone.

    python -m benchmarks.writers --rows 65536
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY
from gemb.vectors import Layout, calibrate, open_sink
from gemb.vectors.layout import DType, Encoding

WINDOW_ROWS = 4096
BARS = {".npy f32": 150_000, "JSON lines base64": 60_000}
"""Rows a second that writing must reach at 768 dims."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write rows."""

    title: str
    output: str
    dtype: DType = "f32"
    encoding: Encoding = "list"


FORMATS = [
    Format(".npy f32", "docs.npy"),
    Format(".npy f16", "docs.npy", "f16"),
    Format(".npy bf16", "docs.npy", "bf16"),
    Format(".npy int8", "docs.npy", "int8"),
    Format(".npy binary", "docs.npy", "binary"),
    Format(".safetensors f32", "docs.safetensors"),
    Format("folder of parts f32", "docs"),
    Format(".parquet f32", "docs.parquet"),
    Format("JSON lines base64", "docs.jsonl", encoding="base64"),
    Format("JSON lines list", "docs.jsonl"),
]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: on the clock and of the processor, until the last append and until the end."""

    append_wall: float
    append_processor: float
    total_wall: float
    total_processor: float


def timed(format_: Format, ids: list[str], vectors: NDArray[np.float32], folder: Path) -> Timing:
    """One whole run of a format in an empty folder."""
    ranges = calibrate(vectors[:WINDOW_ROWS]) if format_.dtype == "int8" else None
    layout = Layout(vectors.shape[1], format_.dtype, format_.encoding, ranges=ranges)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        start = time.perf_counter(), time.process_time()
        sink = open_sink(Path(place) / format_.output, Path(place) / "work", layout)
        for first in range(0, len(ids), WINDOW_ROWS):
            sink.append(ids[first : first + WINDOW_ROWS], vectors[first : first + WINDOW_ROWS])
            sink.sync()
        appended = time.perf_counter(), time.process_time()
        sink.finish()
        ended = time.perf_counter(), time.process_time()
        shutil.rmtree(place, ignore_errors=True)
        Path(place).mkdir()
    return Timing(appended[0] - start[0], appended[1] - start[1], ended[0] - start[0], ended[1] - start[1])


def measure(rows: int, dims: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """The median rows a second of each format, over `rounds` interleaved rounds."""
    vectors = np.random.default_rng(0).standard_normal((rows, dims), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"document-{row:010}" for row in range(rows)]
    timings: dict[str, list[Timing]] = {format_.title: [] for format_ in FORMATS}
    for _ in range(rounds):
        for format_ in FORMATS:
            timings[format_.title].append(timed(format_, ids, vectors, folder))
    fields = ("append_wall", "append_processor", "total_wall", "total_processor")
    return {
        title: {
            f"{field}_rows_a_second": rows / statistics.median(getattr(run, field) for run in runs)
            for field in fields
        }
        for title, runs in timings.items()
    }


def main(
    rows: Annotated[int, typer.Option(help="Rows of a run.")] = 32_768,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; the folder for temporary files if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only the result, as JSON.")] = False,
) -> None:
    """Print and store the rows a second of every output format at 384 and 768 dims."""
    place = folder or Path(tempfile.gettempdir())
    console, machine = Console(stderr=as_json), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result: dict[str, Any] = {"rows": rows, "rounds": rounds, "window_rows": WINDOW_ROWS, "bars_at_768": BARS}
    result["load_at_start"] = os.getloadavg()[0]  # above 1 the clock measures the neighbours too
    for dims in (384, 768):
        rates = measure(rows, dims, rounds, place)
        result[f"dims_{dims}"] = rates
        table = Table(title=f"thousand rows a second, {dims} dims, one thread")
        for column in ("format", "append, clock", "append, processor", "whole, clock", "whole, processor"):
            table.add_column(column, justify="left" if column == "format" else "right")
        for title, by_field in rates.items():
            table.add_row(title, *(f"{rate / 1000:.0f}" for rate in by_field.values()))
        console.print(table)
    path = write_result("writers", machine, result)
    console.print(f"stored in {path.relative_to(REPOSITORY)}")
    if as_json:
        typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
