"""Peak memory of `gemb train` over few and many rows: it streams, so a million need what ten thousand do.

    python -m benchmarks.train_memory                                 some minutes: the rows are read once
    python -m benchmarks.train_memory --rows 2000 --more-rows 20000   a look

The rows are real pairs, repeated with a number of their own, so that all are different. What is watched is
the resident memory that no file backs (RssAnon) of the whole process, from its start to the finished model:
mapped files come and go as the kernel likes. Batches are cut into chunks of one size, so that the peak is not
that of the longest batch that was drawn.
"""

import gzip
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.memory import watched
from benchmarks.models import REPOSITORY, SHARED_DATA
from benchmarks.train import shape_folder
from gemb.errors import UnavailableError

DATA_SET = "wiki-split"
SHAPE = "10m"
BOUND = 1.03
RECIPE = """\
model: {model}
data: [{{path: {rows}, prompts: none}}]
matryoshka: {{sizes: [128, 64]}}
max_tokens: 64
batch: {{pairs: 64, memory_gib: 0.1}}
batch_tokens: 1024
precision: fp32
steps: {steps}
threads: {threads}
device: cpu
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished training."""

    rows: int
    peak_anonymous_bytes: int
    seconds: float


def write_rows(path: Path, rows: int, pairs: Path) -> None:
    """`rows` pairs as JSONL: those of `pairs` again and again, each with its number.

    Raises UnavailableError where the shared data are not there.
    """
    if not pairs.exists():
        raise UnavailableError(f"{pairs} does not exist; the memory benchmark needs its pairs")
    with path.open("w", encoding="utf-8") as lines:
        for number, row in enumerate(itertools.islice(_repeated(pairs), rows)):
            query = f"{row['anchor']} {number}"
            lines.write(json.dumps({"id": str(number), "query": query, "positive": row["positive"]}) + "\n")


def _repeated(pairs: Path) -> Iterator[dict[str, str]]:
    while True:
        with gzip.open(pairs, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def peak_of(rows: int, command: list[str], threads: int, console: Console | None = None) -> Run:
    """Run a command to its end, give the most anonymous memory that it was seen with, and say so at once.

    Raises RuntimeError with its stderr if it fails.
    """
    finished = Run(rows, *watched("gemb train", command, threads, "RssAnon"))
    if console:
        console.print(
            f"{rows:,} rows: {finished.peak_anonymous_bytes / 2**20:,.1f} MiB, {finished.seconds:.0f} s",
            highlight=False,
        )
    return finished


def growth(runs: list[Run]) -> float:
    """The median peak of the runs with the most rows over that of the runs with the fewest."""
    peaks = {
        rows: statistics.median(run.peak_anonymous_bytes for run in runs if run.rows == rows)
        for rows in {run.rows for run in runs}
    }
    return peaks[max(peaks)] / peaks[min(peaks)]


def run(
    rows: int, more_rows: int, *, steps: int, rounds: int, threads: int, console: Console
) -> dict[str, object]:
    """Train over both files in turn, print the table and the bar, and give the result as JSON values."""
    model, pairs = shape_folder(SHAPE), SHARED_DATA / "pairs" / f"{DATA_SET}.jsonl.gz"
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        for count in (rows, more_rows):
            write_rows(Path(scratch) / f"{count}.jsonl", count, pairs)
        for number in range(rounds):
            for count in (rows, more_rows):
                recipe = Path(scratch) / f"{count}.yaml"
                text = RECIPE.format(
                    model=model, rows=f"{scratch}/{count}.jsonl", steps=steps, threads=threads
                )
                recipe.write_text(text, encoding="utf-8")
                output = Path(scratch) / f"{count}-{number}"
                command = [sys.executable, "-m", "gemb", "train", str(recipe), "-o", str(output)]
                runs.append(peak_of(count, command, threads, console))
    table = Table(title=f"gemb train, {SHAPE}, {steps} steps: anonymous memory", title_justify="left")
    for heading in ("rows", "peak MiB", "seconds"):
        table.add_column(heading, justify="right")
    for one in runs:
        table.add_row(f"{one.rows:,}", f"{one.peak_anonymous_bytes / 2**20:,.1f}", f"{one.seconds:.0f}")
    console.print(table)
    claim = f"gemb train: peak at {more_rows:,} rows over that at {rows:,}"
    bar = Bar(claim, growth(runs), BOUND, at_most=True)
    show_bars(console, [bar])
    return {
        "settings": {
            "shape": SHAPE,
            "data_set": DATA_SET,
            "steps": steps,
            "threads": threads,
            "rounds": rounds,
            "memory": "peak of RssAnon of the whole process",
        },
        "runs": [asdict(one) for one in runs],
        "bars": [bar.as_dict()],
    }


def main(
    rows: Annotated[int, typer.Option(help="Rows of the small file.")] = 10_000,
    more_rows: Annotated[int, typer.Option(help="Rows of the large file.")] = 1_000_000,
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 30,
    rounds: Annotated[int, typer.Option(help="Trainings over each file, in turn.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Compare the peak memory of a training over few rows and over many."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(rows, more_rows, steps=steps, rounds=rounds, threads=threads, console=console)
    if store:
        path = write_result(f"train-memory-{rows}-{more_rows}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
