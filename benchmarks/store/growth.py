"""One hundredth more rows: what adding them costs beside the build, what lies where then, and the recall.

A copy of the benchmark's index is opened, new rows are put and published, and the index is compacted as
`gemb index` does it. The rows' texts and vectors are ready; the build's time is that of the search benchmark.

    python -m benchmarks.store.growth --rows 1000000
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
from gemb.store import Document, Index, Writer


def main(
    rows: Annotated[int, typer.Option(help="Rows of the index.")] = 1_000_000,
    kind: Annotated[str, typer.Option(help="384 or 768.")] = "384",
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Add one hundredth to an index and search it."""
    console, machine = Console(width=110), this_machine()
    more = rows // 100
    own = vectors.base_rows(rows + more, kind)
    source, at = vectors.folder() / f"rows-{kind}.npy", index_path("gemb", kind, rows)
    built = build("gemb", source, rows, at, **build_options("gemb", kind))
    copy = at.with_name(f"growth-{kind}.gemb")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(at, copy)
    new = np.array(own[rows : rows + more])
    documents = [Document(str(row), TEXT.format(row=row)) for row in range(rows, rows + more)]
    wall, cpu = time.perf_counter(), time.process_time()
    with Writer.open(copy) as writer:
        for start in range(0, more, 1000):
            writer.compare(documents[start : start + 1000], new[start : start + 1000])
            writer.put(documents[start : start + 1000], new[start : start + 1000], ready=True)
        writer.compact()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    asked = vectors.queries(kind)
    with Index.open(copy, cache=at.parent / "cache") as index:
        segments = [
            {"rows": count, "live_rows": live, "graph": graph} for _, count, live, graph in index.segments()
        ]
        index.nearest(asked[:100])
        begun = time.process_time()
        found = np.concatenate([index.nearest(query).keys for query in asked]).astype(np.int64) - 1
        milliseconds = (time.process_time() - begun) / len(asked) * 1e3
    reached = vectors.recall(found, vectors.truth(rows + more, kind))
    shutil.rmtree(copy)
    bars = [
        Bar("adding 1 % over the build, CPU", cpu / built["cpu_seconds"], 0.03, at_most=True),
        Bar("adding 1 % over the build, wall", wall / built["wall_seconds"], 0.03, at_most=True),
        Bar("recall@10 afterwards", reached, 0.99),
    ]
    console.print(f"{rows:,} + {more:,} x {kind}: {cpu:.1f} CPU s; {segments}; {milliseconds:.2f} ms a query")
    show_bars(console, bars)
    if store:
        result = {
            "settings": {"rows": rows, "new_rows": more, "kind": kind, "threads": 1},
            "vectors": vectors.describe(kind),
            "peers": package_versions(),
            "build": {key: value for key, value in built.items() if key != "request"},
            "adding": {"cpu_seconds": cpu, "wall_seconds": wall},
            "segments": segments,
            "cpu_ms_a_query": milliseconds,
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result(f"store-growth-{kind}-{rows}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
