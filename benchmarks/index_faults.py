"""An index attacked: writers killed, files altered, the disk full at every operation; what came of it.

    python -m benchmarks.index_faults                  100 kills, 200 alterations, the sweep; some 10 minutes
    python -m benchmarks.index_faults --kills 20 --alterations 0 --points 0 --no-store

The figures are counts of what must not happen, and they must be 0.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.index_damage import DamageTrial
from benchmarks.index_full_disk import run_sweep
from benchmarks.index_kills import KINDS, Trial
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY

SHARES = {"build": 0.2, "sync": 0.3, "compact": 0.2, "rebuild": 0.15, "upgrade": 0.15}
"""Of all kills, by kind of work."""


def show_table(console: Console, title: str, counts: dict[str, dict[str, int]]) -> None:
    """A table of outcomes by file."""
    outcomes = sorted({outcome for row in counts.values() for outcome in row})
    table = Table(title=title, title_justify="left")
    table.add_column("file")
    for outcome in outcomes:
        table.add_column(outcome, justify="right")
    for name, row in counts.items():
        table.add_row(name, *(str(row.get(outcome, 0)) for outcome in outcomes))
    console.print(table)


def main(
    kills: Annotated[int, typer.Option(help="Writers killed, of all kinds of work together.")] = 100,
    alterations: Annotated[int, typer.Option(help="Bits flipped and ends cut off.")] = 200,
    points: Annotated[int, typer.Option(help="Operations made to fail, of each work and mode.")] = 40,
    readers: Annotated[int, typer.Option(help="Processes that search during the kills.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the moments and places.")] = 1,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Attack indexes, and count what must not happen."""
    import usearch.index  # noqa: F401  # here, so that no forked process spends its life importing it

    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result: dict[str, object] = {
        "settings": {
            "kills": kills,
            "alterations": alterations,
            "points": points,
            "readers": readers,
            "seed": seed,
        }
    }
    bars, failures = [], []
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        if kills:
            began = time.monotonic()
            (Path(scratch) / "kills").mkdir()
            counts = {kind: max(1, round(kills * SHARES[kind])) for kind in KINDS}
            killed = Trial(Path(scratch) / "kills", seed, readers).run(counts)
            result["kills"] = {**killed.as_json(), "seconds": time.monotonic() - began}
            failures += killed.failures
            claim = f"rows lost, torn or unseen after {killed.kills.total()} kills, {killed.looks:,} looks"
            bars.append(Bar(claim, len(killed.failures), 0, at_most=True))
        if alterations:
            began = time.monotonic()
            (Path(scratch) / "damage").mkdir()
            damaged = DamageTrial(Path(scratch) / "damage", seed).run(alterations)
            result["alterations"] = {**damaged.as_json(), "seconds": time.monotonic() - began}
            failures += [f"{case.file}, {case.alteration}: {case.wrong}" for case in damaged.failures]
            show_table(console, "what came of an alteration", damaged.outcomes)
            claim = f"alterations of {alterations} that crashed or stayed unseen and changed an answer"
            bars.append(Bar(claim, len(damaged.failures), 0, at_most=True))
    if points:
        began = time.monotonic()
        swept = run_sweep(KINDS, points, seed)
        result["full_disk"] = {**swept.as_json(), "seconds": time.monotonic() - began}
        failures += swept.failures
        claim = f"failed operations of {swept.tried.total()} without one message, exit 1, and a way on"
        bars.append(Bar(claim, len(swept.failures), 0, at_most=True))
    for failure in failures:
        console.print(failure, style="red", highlight=False)
    show_bars(console, bars)
    if store:
        result["bars"] = [bar.as_dict() for bar in bars]
        path = write_result("index-faults", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
