"""Peak memory of `gemb embed` over many short rows, and of sentence-transformers over the same file.

gemb streams: a million rows must not need more than a hundred thousand. sentence-transformers takes a
list and gives an array, so its script reads all texts, encodes them and saves the array, as its users do.
The figure is VmHWM of the process, the kernel's own mark, read until the process ends.

    python -m benchmarks.memory                                 hours on a slow machine
    python -m benchmarks.memory --rows 20000 --more-rows 60000  some minutes
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import MODELS, REPOSITORY

WORDS = (
    "index vector query passage model token batch memory thread window layer weight prompt folder record "
    "search cosine shard cache journal"
).split()
WORDS_A_ROW = 5
SCRIPT = """\
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[3], model.encode(texts, batch_size=32, show_progress_bar=False))
"""
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process."""

    name: str
    rows: int
    peak_rss_bytes: int
    seconds: float


def write_rows(path: Path, rows: int) -> None:
    """`rows` short texts as JSONL, all different: five words and the row's number."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as lines:
        for row in range(rows):
            text = " ".join([*draw.choices(WORDS, k=WORDS_A_ROW), str(row)])
            lines.write(json.dumps({"id": str(row), "text": text}) + "\n")


def peak_of(name: str, rows: int, command: list[str], threads: int, console: Console | None = None) -> Run:
    """Run a command to its end, give the highest resident memory it had, and say so at once: runs are long.

    Raises RuntimeError with its stderr if it fails.
    """
    # VmHWM only rises, so the last reading before the end is the peak; waiting for ru_maxrss instead would
    # count the memory of this process at the fork.
    finished = Run(name, rows, *watched(name, command, threads, "VmHWM"))
    if console:
        console.print(
            f"{name}: {rows:,} rows, {finished.peak_rss_bytes / 2**20:,.0f} MiB, {finished.seconds:.0f} s",
            highlight=False,
        )
    return finished


def watched(name: str, command: list[str], threads: int, figure: str) -> tuple[int, float]:
    """(largest `figure` of /proc/PID/status in bytes, seconds) of a command, which is run to its end.

    Raises RuntimeError with its stderr if it fails; `name` is what it is called there.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, stdout=subprocess.DEVNULL, cwd=REPOSITORY, env=thread_environment(threads)
        )
        status, peak = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            try:
                peak = max(peak, bytes_of(figure, status.read_text(encoding="utf-8")))
            except (FileNotFoundError, ProcessLookupError):
                break
            time.sleep(POLL_SECONDS)
        if process.wait():
            stderr.seek(0)
            raise RuntimeError(f"{name} ended with {process.returncode}:\n{stderr.read()[-3000:]}")
    return peak, time.perf_counter() - started


def bytes_of(figure: str, status: str) -> int:
    """A figure such as VmHWM in the text of /proc/PID/status; 0 of a process that has ended."""
    line = next((line for line in status.splitlines() if line.startswith(f"{figure}:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def run(
    rows: int, more_rows: int, *, precision: str, threads: int, peer: bool, console: Console
) -> dict[str, object]:
    """Measure, print the table, and give the result as JSON values."""
    folder = str(MODELS["minilm"].folder())
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        for count in sorted({rows, more_rows}):
            source, target = Path(scratch) / f"{count}.jsonl", Path(scratch) / f"{count}.npy"
            write_rows(source, count)
            command = [sys.executable, "-m", "gemb", "embed", str(source), "-o", str(target), "-m", folder]
            command += ["--precision", precision, "--threads", str(threads)]
            runs.append(peak_of("gemb embed", count, command, threads, console))
            if count == rows and peer:
                script = [sys.executable, "-c", SCRIPT, folder, str(source), str(Path(scratch) / "peer.npy")]
                runs.append(peak_of("sentence-transformers", count, script, threads, console))
            target.unlink()
    table = Table(title=f"MiniLM, {precision}, {threads} threads: peak memory", title_justify="left")
    for heading in ("", "rows", "peak MiB", "rows/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for entry in runs:
        table.add_row(
            entry.name,
            f"{entry.rows:,}",
            f"{entry.peak_rss_bytes / 2**20:,.0f}",
            f"{entry.rows / entry.seconds:,.0f}",
        )
    console.print(table)
    peaks = {(entry.name, entry.rows): entry.peak_rss_bytes for entry in runs}
    ours = peaks["gemb embed", rows]
    verdicts = []
    if more_rows != rows:
        growth = peaks["gemb embed", more_rows] / ours
        verdicts.append(
            Bar(f"gemb: peak at {more_rows:,} rows over that at {rows:,}", growth, 1.05, at_most=True)
        )
    if peer:
        ratio = ours / peaks["sentence-transformers", rows]
        verdicts.append(
            Bar(f"gemb: peak over sentence-transformers' at {rows:,} rows", ratio, 0.7, at_most=True)
        )
    show_bars(console, verdicts)
    return {
        "settings": {
            "model": "minilm",
            "precision": precision,
            "threads": threads,
            "words_a_row": WORDS_A_ROW + 1,
        },
        "runs": [asdict(entry) for entry in runs],
        "bars": [bar.as_dict() for bar in verdicts],
    }


def main(
    rows: Annotated[int, typer.Option(help="Rows of the file both read.")] = 100_000,
    more_rows: Annotated[int, typer.Option(help="Rows of the file only gemb reads.")] = 1_000_000,
    precision: Annotated[str, typer.Option(help="Of gemb: auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of both.")] = 2,
    peer: Annotated[bool, typer.Option(help="Run sentence-transformers too.")] = True,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Compare peak memory over many short rows."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(rows, more_rows, precision=precision, threads=threads, peer=peer, console=console)
    if store:
        path = write_result(f"memory-{rows}-{more_rows}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
