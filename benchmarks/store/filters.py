"""Search with a filter: recall against the exact answer, how many results come, time a query.

Filters keep 50, 10, 1 and 0.1 % of the rows, once drawn at random and once all on one side: the rows nearest
to one row, as a filter by language or topic would keep them. Most queries lie far from that side, where a
graph meets few rows that may be found.

    python -m benchmarks.store.filters
"""

import statistics
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY
from benchmarks.store import vectors
from benchmarks.store.race import package_versions
from gemb.store import Document, Index, Settings, Writer, where

SHARES = (0.5, 0.1, 0.01, 0.001)
K = 10
WANTED = 0.99
PARTS = 1000
BATCH = 8
"""Queries a call: the filter is evaluated once for all of them, and the graph is used."""


def main(
    rows: Annotated[int, typer.Option(help="Rows of the index.")] = 100_000,
    kind: Annotated[str, typer.Option(help="384 or 768.")] = "384",
    count: Annotated[int, typer.Option(help="Queries.")] = 300,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 3,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Search under filters that keep less and less."""
    console, machine = Console(width=110), this_machine()
    own = vectors.base_rows(rows, kind)
    # The rank of each row by its cosine with one of them, and a random number, both in 0..PARTS-1.
    ranks = np.argsort(np.argsort(-(np.asarray(own) @ np.asarray(own[0])), kind="stable"), kind="stable")
    parts = {
        "random": np.random.default_rng(vectors.SEED).permutation(rows) * PARTS // rows,
        "one side": ranks * PARTS // rows,
    }
    at = vectors.folder() / "indexes" / f"filters-{kind}-{rows}.gemb"
    if not at.exists():
        with Writer.open(at, Settings(dims=own.shape[1], words=False)) as writer:
            for start in range(0, rows, 5_000):
                block = np.array(own[start : start + 5_000])
                documents = [
                    Document(
                        str(row), metadata={"random": int(parts["random"][row]), "side": int(ranks[row])}
                    )
                    for row in range(start, start + len(block))
                ]
                writer.put(documents, block, ready=True)
            writer.compact()
    asked = vectors.queries(kind)[:count]
    lines: list[dict[str, object]] = []
    bars = []
    table = Table(title=f"{rows:,} x {kind}, {count} queries, {BATCH} a call", title_justify="left")
    for heading in ("rows kept", "of them", "recall@10", "with k results", "CPU ms"):
        table.add_column(heading, justify="right")
    with Index.open(at, cache=vectors.folder() / "cache") as index:
        for name, part in parts.items():
            for share in SHARES:
                limit = round(share * PARTS)
                text = f"random < {limit}" if name == "random" else f"side < {round(share * rows)}"
                condition = where.parse(text, index.fields())
                laps = []
                for _ in range(rounds):
                    begun = time.process_time()
                    found = [
                        index.nearest(asked[start : start + BATCH], K, where=condition).keys
                        for start in range(0, count, BATCH)
                    ]
                    laps.append((time.process_time() - begun) / count * 1e3)
                numbers = np.concatenate(found).astype(np.int64) - 1
                reached = vectors.recall(numbers, vectors.truth(rows, kind, where=part < limit)[:count])
                full = float((numbers >= 0).all(axis=1).mean())
                lines.append(
                    {
                        "filter": name,
                        "share": share,
                        "recall": reached,
                        "with_k_results": full,
                        "cpu_ms": statistics.median(laps),
                    }
                )
                table.add_row(
                    f"{share:.1%}", name, f"{reached:.4f}", f"{full:.0%}", f"{statistics.median(laps):.2f}"
                )
                bars.append(Bar(f"recall@10, {share:.1%} kept, {name}", reached, WANTED))
                bars.append(Bar(f"queries with k results, {share:.1%} kept, {name}", full, 1.0))
    console.print(table)
    show_bars(console, bars)
    if store:
        result = {
            "settings": {
                "rows": rows,
                "kind": kind,
                "queries": count,
                "queries_a_call": BATCH,
                "rounds": rounds,
                "threads": 1,
            },
            "vectors": vectors.describe(kind),
            "peers": package_versions(),
            "lines": lines,
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result(f"store-filters-{kind}-{rows}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
