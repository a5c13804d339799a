"""A nightly sync of an index in which one row of a hundred changed, beside its full build.

The store alone, with ready vectors: every document is compared by its content's hash, the changed ones are
put, what is gone is pruned, and the index is compacted. A build that embeds costs that much more, a sync only
for the changed rows, so the share is smaller there.

    python -m benchmarks.store.nightly
"""

import shutil
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY
from benchmarks.store import vectors
from benchmarks.store.contestant import TEXT
from benchmarks.store.race import build, package_versions
from benchmarks.store.search import build_options, index_path
from gemb.store import Document, Writer

CHANGED = 100
"""One row of so many."""
BLOCK_ROWS = 5_000


def main(
    rows: Annotated[int, typer.Option(help="Rows of the index.")] = 100_000,
    kind: Annotated[str, typer.Option(help="384 or 768.")] = "384",
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Sync a copy of the benchmark's index."""
    console, machine = Console(width=110), this_machine()
    own = vectors.base_rows(rows, kind)
    source, at = vectors.folder() / f"rows-{kind}.npy", index_path("gemb", kind, rows)
    built = build("gemb", source, rows, at, **build_options("gemb", kind))
    copy = at.with_name(f"nightly-{kind}.gemb")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(at, copy)
    wall, cpu = time.perf_counter(), time.process_time()
    needed = 0
    with Writer.open(copy) as writer:
        for start in range(0, rows, BLOCK_ROWS):
            block = np.array(own[start : start + BLOCK_ROWS])
            block[::CHANGED] = -block[::CHANGED]
            documents = [
                Document(str(row), TEXT.format(row=row), metadata={"part": row % 1000})
                for row in range(start, start + len(block))
            ]
            places = writer.compare(documents, block).needed
            needed += len(places)
            writer.put([documents[place] for place in places], block[places], ready=True)
        pruned = writer.prune()
        writer.compact()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    shutil.rmtree(copy)
    bars = [
        Bar(
            "sync with 1 % changed over the build, ready vectors, CPU", cpu / built["cpu_seconds"], 0.03, True
        )
    ]
    console.print(f"{rows:,} x {kind}: {needed:,} changed, {pruned} pruned, {cpu:.2f} CPU s, {wall:.2f} s")
    show_bars(console, bars)
    if store:
        result = {
            "settings": {"rows": rows, "changed": needed, "kind": kind, "threads": 1},
            "vectors": vectors.describe(kind),
            "peers": package_versions(),
            "build": {key: value for key, value in built.items() if key != "request"},
            "sync": {"cpu_seconds": cpu, "wall_seconds": wall},
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result(f"store-nightly-{kind}-{rows}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
