"""Scan or graph: processor time of a query by rows and by queries a call, on one thread.

The same rows lie in two indexes, one with a graph and one without. The constants GRAPH_ROWS
(gemb.store.writer), SCAN_QUERIES and SCAN_VALUES (gemb.store.candidates) are read off this table.

    python -m benchmarks.store.switch
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY
from benchmarks.store import vectors
from benchmarks.store.race import package_versions
from gemb.store import Document, Index, Settings, Writer, candidates

SIZES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
BATCHES = (1, 4, 16, 64, 256, 1000)
BATCH_SIZES = (20_000, 50_000, 100_000)
NEVER = 1 << 60
ENOUGH_QUERIES = 256
"""Asked one by one; larger calls ask them all at once."""


def index_of(rows: int, kind: str, *, graph: bool) -> Path:
    """An index over the first rows of a kind, with a graph or without."""
    at = vectors.folder() / "indexes" / f"switch-{kind}-{rows}{'-graph' if graph else ''}.gemb"
    if not at.exists():
        own = vectors.base_rows(rows, kind)
        with Writer.open(at, Settings(dims=own.shape[1], words=False)) as writer:
            for start in range(0, rows, 5_000):
                block = np.array(own[start : start + 5_000])
                writer.put([Document(str(start + row)) for row in range(len(block))], block, ready=True)
            writer.compact(graph_rows=1 if graph else NEVER)
    return at


def times_of(
    sizes: tuple[int, ...], batches: tuple[int, ...], kind: str, rounds: int
) -> list[dict[str, float]]:
    """CPU ms of a query for each size and batch, with the graph and by a scan: medians of rounds."""
    asked = vectors.queries(kind)
    found = []
    for rows in sizes:
        pair = [
            Index.open(index_of(rows, kind, graph=graph), cache=vectors.folder() / "cache")
            for graph in (True, False)
        ]
        for batch in batches:
            own = asked[: max(batch, ENOUGH_QUERIES)]
            laps: tuple[list[float], list[float]] = ([], [])
            for index in pair:
                index.nearest(own[:batch])
            for _ in range(rounds):
                for index, lap in zip(pair, laps, strict=True):
                    begun = time.process_time()
                    for start in range(0, len(own), batch):
                        index.nearest(own[start : start + batch])
                    lap.append((time.process_time() - begun) / len(own) * 1e3)
            graph_ms, scan_ms = (statistics.median(lap) for lap in laps)
            found.append({"rows": rows, "batch": batch, "graph_ms": graph_ms, "scan_ms": scan_ms})
        for index in pair:
            index.close()
    return found


def main(
    kind: Annotated[str, typer.Option(help="384 or 768.")] = "384",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Time scan and graph over rows and over queries a call."""
    console, machine = Console(width=110), this_machine()
    for text in machine.lines():
        console.print(text, highlight=False)
    candidates.SCAN_QUERIES = NEVER  # so that the index with a graph uses it for every batch
    lines = times_of(SIZES, (1,), kind, rounds) + times_of(BATCH_SIZES, BATCHES[1:], kind, rounds)
    table = Table(title=f"{kind}: CPU ms of a query, one thread", title_justify="left")
    for heading in ("rows", "queries a call", "graph", "scan", "scan / graph"):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            f"{line['rows']:,}",
            f"{line['batch']:,}",
            f"{line['graph_ms']:.3f}",
            f"{line['scan_ms']:.3f}",
            f"{line['scan_ms'] / line['graph_ms']:.2f}",
        )
    console.print(table)
    if store:
        result = {
            "settings": {"kind": kind, "rounds": rounds, "threads": 1, "k": 10},
            "vectors": vectors.describe(kind),
            "peers": package_versions(),
            "lines": lines,
        }
        path = write_result(f"store-switch-{kind}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
