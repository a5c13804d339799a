"""From the start of a process to the vector of one line on stdout: gemb against sentence-transformers.

Both read the line from stdin, load MiniLM from a folder and print the vector; the clock stops at the
first line on stdout, and the processor time is that of the whole process. Starts are interleaved, after
one of each that warms the file cache and gemb's own cache of what it proved about the model. A second
gemb row starts with that cache empty, as the first start after an installation does.

    python -m benchmarks.cold_start --rounds 7
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import MODEL_HELP, show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import MODELS, REPOSITORY

LINE = "The quick brown fox jumps over the lazy dog.\n"
SHORTEST_SCRIPT = """\
import sys
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1]).encode(sys.stdin.readline()).tolist())
"""
BAR = 0.35


@dataclass(slots=True)
class Start:
    """A command and what each of its starts took."""

    name: str
    command: Sequence[str]
    fresh_cache: bool = False
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def run(self, environment: Mapping[str, str], *, keep: bool = True) -> None:
        """Start it once and note the times, unless it is the warm-up.

        Raises RuntimeError with its stderr if it fails or prints no vector.
        """
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with (
            tempfile.TemporaryDirectory(prefix="gemb-cache-") as cache,
            tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        ):
            places = {"XDG_CACHE_HOME": cache} if self.fresh_cache else {}
            started = time.perf_counter()
            with subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=REPOSITORY,
                env={**environment, **places},
            ) as process:
                if process.stdin is None or process.stdout is None:
                    raise ValueError("the process has no pipes")
                process.stdin.write(LINE)
                process.stdin.close()
                first = process.stdout.readline()
                wall = time.perf_counter() - started
                process.stdout.read()
            if process.returncode or "[" not in first:
                stderr.seek(0)
                raise RuntimeError(f"{self.name} ended with {process.returncode}:\n{stderr.read()}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if keep:
            self.wall_seconds.append(wall)
            self.cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def starts(model: str) -> list[Start]:
    """The commands that are compared; the first is the reference."""
    folder = str(MODELS[model].folder())
    gemb = [sys.executable, "-m", "gemb", "embed", "-", "-o", "-", "-m", folder]
    return [
        Start("sentence-transformers", [sys.executable, "-c", SHORTEST_SCRIPT, folder]),
        Start("gemb embed", gemb),
        Start("gemb embed, first start", gemb, fresh_cache=True),
    ]


def run(model: str, rounds: int, console: Console) -> dict[str, object]:
    """Start all of them `rounds` times in turn, print the table, and give the result as JSON values."""
    environment = thread_environment(len(os.sched_getaffinity(0)))
    entrants = starts(model)
    for entrant in entrants:
        entrant.run(environment, keep=False)
    for _ in range(rounds):
        for entrant in entrants:
            entrant.run(environment)
    reference = entrants[0]
    table = Table(title=f"{MODELS[model].title}: process start to first vector", title_justify="left")
    for heading in ("", "wall s", "x", "CPU s", "x"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows: list[dict[str, object]] = []
    ratios: dict[str, float] = {}
    for entrant in entrants:
        wall = _median_ratio(entrant.wall_seconds, reference.wall_seconds)
        cpu = _median_ratio(entrant.cpu_seconds, reference.cpu_seconds)
        ratios[entrant.name] = wall
        rows.append(
            {
                "name": entrant.name,
                "wall_seconds": statistics.median(entrant.wall_seconds),
                "wall_over_reference": wall,
                "cpu_seconds": statistics.median(entrant.cpu_seconds),
                "cpu_over_reference": cpu,
                "wall_seconds_by_round": entrant.wall_seconds,
                "cpu_seconds_by_round": entrant.cpu_seconds,
            }
        )
        table.add_row(
            entrant.name,
            f"{statistics.median(entrant.wall_seconds):.2f}",
            f"{wall:.2f}",
            f"{statistics.median(entrant.cpu_seconds):.2f}",
            f"{cpu:.2f}",
        )
    console.print(table)
    verdicts = [
        Bar("gemb embed: wall time over sentence-transformers", ratios["gemb embed"], BAR, at_most=True)
    ]
    if model == "minilm":
        show_bars(console, verdicts)
    return {
        "settings": {"model": model, "rounds": rounds, "script": SHORTEST_SCRIPT, "line": LINE},
        "starts": rows,
        "bars": [bar.as_dict() for bar in verdicts] if model == "minilm" else [],
    }


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "minilm",
    rounds: Annotated[int, typer.Option(help="Interleaved starts of each.")] = MINIMUM_ROUNDS,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Compare cold starts."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(model, rounds, console)
    if store:
        path: Path = write_result(f"cold-start-{model}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
