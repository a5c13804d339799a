"""The default search against its peers: recall, time a query, memory, build, bytes on the disk.

Every engine is judged at the recall of gemb's default search or above: what it may look at per query is set
to the smallest of a few numbers that reaches this on queries kept for choosing; figures are then measured on
the others. faiss is HNSW over float32 with gemb's links a node and candidates while adding.

    python -m benchmarks.store.search                             100,000 x 384, all peers
    python -m benchmarks.store.search --rows 1000000 --peers faiss-hnsw
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY
from benchmarks.store import vectors
from benchmarks.store.race import Process, Runner, build, package_versions, race

FAISS = {"links": 16, "expansion_add": 128}
"""As gemb's graph is built."""
EXPANSIONS = (128, 160, 176, 192, 208, 224, 256, 320, 384, 512)
LANCE_INDEX = "IVF_HNSW_SQ"
LANCE_REFINE = 5
WANTED = 0.99
BATCH = 32
ALL_PEERS = "faiss-hnsw,faiss-flat,chroma,lancedb"


@dataclass(slots=True)
class Line:
    """What was measured of one way to ask one engine."""

    name: str
    recall: float
    cpu_ms: float
    wall_ms: float
    spread: float
    anonymous_mib: float
    file_mib: float
    options: dict[str, object]

    @classmethod
    def of(cls, runner: Runner, rows: int, kind: str, *, tune: bool = False) -> "Line":
        """A finished runner's figures."""
        count = len(runner.found)
        return cls(
            runner.name,
            vectors.recall(runner.found, vectors.truth(rows, kind, tune=tune)),
            runner.cpu_milliseconds(count),
            runner.wall_milliseconds(count),
            max(runner.cpu_seconds) / min(runner.cpu_seconds) - 1,
            runner.after["anonymous_bytes"] / 2**20,
            runner.after["file_bytes"] / 2**20,
            dict(runner.options),
        )


def index_path(engine: str, kind: str, rows: int) -> Path:
    """Where the benchmark's index of an engine lies."""
    folder = vectors.folder() / "indexes"
    folder.mkdir(exist_ok=True)
    return folder / f"{engine}-{kind}-{rows}{'.gemb' if engine == 'gemb' else ''}"


def build_options(engine: str, kind: str) -> dict[str, object]:
    """What an engine is told when it builds; faiss and Chroma get gemb's graph, LanceDB its nearest index."""
    if engine == "gemb":
        return {"code_dims": 256} if kind == "768m" else {}
    told: dict[str, dict[str, object]] = {
        "faiss-hnsw": {**FAISS},
        "faiss-flat": {},
        "chroma": {**FAISS, "expansion": 128},
        "lancedb": {"index": LANCE_INDEX},
    }
    return told[engine]


def expansion_for(engine: str, rows: int, kind: str, wanted: float) -> dict[str, object]:
    """The smallest of EXPANSIONS that reaches a recall on the queries for choosing, else the largest."""
    asked, truth = vectors.queries(kind, tune=True), vectors.truth(rows, kind, tune=True)
    runner = _runner(engine, engine, rows, kind, {})
    options: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        asked_at, found_at = Path(scratch) / "queries.npy", Path(scratch) / "found.npy"
        np.save(asked_at, asked)
        for expansion in EXPANSIONS:
            options = {"expansion": expansion}
            if engine == "lancedb":
                options["refine"] = LANCE_REFINE
            # A process each: Chroma takes a new expansion only when it reads its index anew.
            for do in range(2 if engine == "chroma" else 1):
                with Process(engine) as process:
                    process.ask("open", at=runner.at, **options)
                    if do == 0 and engine == "chroma":
                        continue
                    process.ask("search", queries=asked_at, batch=1, found=found_at, **options)
            if vectors.recall(np.load(found_at), truth) >= wanted:
                break
    return options


def _runner(
    name: str, engine: str, rows: int, kind: str, options: dict[str, object], batch: int = 1
) -> Runner:
    at = index_path("gemb" if engine.startswith("gemb") else engine, kind, rows)
    # Chroma keeps this one with the collection, so it is told when it is opened.
    return Runner(name, engine, at, batch, options if engine == "chroma" else {}, options)


def run(rows: int, kind: str, peers: list[str], rounds: int, console: Console) -> dict[str, Any]:
    """Build what is not there, choose, race, print; the result as JSON values."""
    vectors.base_rows(rows, kind)
    source = vectors.folder() / f"rows-{kind}.npy"
    builds = {
        engine: build(engine, source, rows, index_path(engine, kind, rows), **build_options(engine, kind))
        for engine in ["gemb", *peers]
    }
    own = _runner("gemb", "gemb-keys", rows, kind, {})
    race([own], vectors.queries(kind, tune=True), rounds=0)
    reached = vectors.recall(own.found, vectors.truth(rows, kind, tune=True))
    singles = [
        _runner("gemb search", "gemb", rows, kind, {}),
        _runner("gemb keys", "gemb-keys", rows, kind, {}),
    ]
    batches = [_runner(f"gemb keys, {BATCH} a call", "gemb-keys", rows, kind, {}, BATCH)]
    for engine in peers:
        if engine == "faiss-flat":
            continue
        wanted = reached if engine.startswith("faiss") else WANTED
        options = expansion_for(engine, rows, kind, wanted)
        singles.append(_runner(engine, engine, rows, kind, options))
        if engine == "faiss-hnsw":
            batches.append(_runner(f"{engine}, {BATCH} a call", engine, rows, kind, options, BATCH))
    asked = vectors.queries(kind)
    race(singles, asked, rounds=rounds)
    race(batches, asked, rounds=rounds)
    exact: list[Runner] = []
    if "faiss-flat" in peers:
        exact = [
            _runner("gemb exact, 1000 a call", "gemb-keys", rows, kind, {"exact": True}, 1000),
            _runner("gemb, 1000 a call", "gemb-keys", rows, kind, {}, 1000),
            _runner("faiss-flat, 1000 a call", "faiss-flat", rows, kind, {}, 1000),
        ]
        race(exact, asked, rounds=rounds)
    lines = [Line.of(runner, rows, kind) for runner in [*singles, *batches, *exact]]
    _show(console, f"{rows:,} x {kind}, one thread", lines)
    bars = _bars(rows, kind, {line.name: line for line in lines}, builds)
    show_bars(console, bars)
    return {
        "settings": {
            "rows": rows,
            "kind": kind,
            "queries": len(asked),
            "k": 10,
            "rounds": rounds,
            "threads": 1,
        },
        "vectors": vectors.describe(kind),
        "peers": package_versions(),
        "lines": [asdict(line) for line in lines],
        "builds": {
            engine: {key: value for key, value in answer.items() if key != "request"}
            for engine, answer in builds.items()
        },
        "bars": [bar.as_dict() for bar in bars],
    }


def _bars(rows: int, kind: str, lines: dict[str, Line], builds: dict[str, dict[str, Any]]) -> list[Bar]:
    ours, keys = lines["gemb search"], lines["gemb keys"]
    bars = [Bar("recall@10 of the default search", ours.recall, WANTED)]
    dims = int(kind.rstrip("m"))
    segments = index_path("gemb", kind, rows) / "segments"
    stored = sum(file.stat().st_size for file in segments.rglob("*") if file.is_file())
    limit = 2.7 if kind == "768m" else 3.3
    if dims == 768:
        bars.append(
            Bar("vectors and graph, bytes a row over dims", stored / rows / dims, limit, at_most=True)
        )
    if faiss := lines.get("faiss-hnsw"):
        pair = lines[f"gemb keys, {BATCH} a call"], lines[f"faiss-hnsw, {BATCH} a call"]
        hnsw = builds["faiss-hnsw"]
        bars += [
            Bar("queries/s over faiss HNSW's, one query a call", faiss.cpu_ms / keys.cpu_ms, 0.7),
            Bar(f"the same, {BATCH} queries a call", pair[1].cpu_ms / pair[0].cpu_ms, 0.7),
            Bar(
                "anonymous memory over faiss HNSW's",
                keys.anonymous_mib / faiss.anonymous_mib,
                0.5,
                at_most=True,
            ),
            Bar(
                "build CPU over faiss HNSW's, catalogue included",
                builds["gemb"]["cpu_seconds"] / hnsw["cpu_seconds"],
                1.0,
                at_most=True,
            ),
        ]
    for name in ("chroma", "lancedb"):
        if peer := lines.get(name):
            bars.append(Bar(f"queries/s over {name}'s, ids and texts", peer.cpu_ms / ours.cpu_ms, 3.0))
    if flat := lines.get("faiss-flat, 1000 a call"):
        exact = lines["gemb exact, 1000 a call"]
        bars.append(Bar("exact batch of 1,000 over faiss IndexFlatIP", flat.cpu_ms / exact.cpu_ms, 1.0))
    if rows >= 1_000_000:
        bars.append(Bar("anonymous MiB of a search process", keys.anonymous_mib, 150, at_most=True))
        if "input" in builds["gemb"]:  # an older build mapped its input, which then counts as memory
            peak = builds["gemb"]["peak_bytes"] / 2**20
            bars.append(Bar("peak MiB of the build", peak, 1.5 * 1024, at_most=True))
    return bars


def _show(console: Console, title: str, lines: list[Line]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("", "recall@10", "CPU ms", "wall ms", "spread", "anon MiB", "file MiB", "options"):
        table.add_column(heading, justify="left" if heading in ("", "options") else "right")
    for line in lines:
        table.add_row(
            line.name,
            f"{line.recall:.4f}",
            f"{line.cpu_ms:.3f}",
            f"{line.wall_ms:.3f}",
            f"{line.spread:.0%}",
            f"{line.anonymous_mib:.0f}",
            f"{line.file_mib:.0f}",
            " ".join(f"{key}={value}" for key, value in line.options.items()),
        )
    console.print(table)


def main(
    rows: Annotated[int, typer.Option(help="Rows of the index.")] = 100_000,
    kind: Annotated[str, typer.Option(help="384, 768 or 768m; see benchmarks.store.vectors.")] = "384",
    peers: Annotated[str, typer.Option(help="Which of the peers, separated by commas.")] = ALL_PEERS,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Race the default search against its peers."""
    console, machine = Console(width=130), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(rows, kind, [name for name in peers.split(",") if name], rounds, console)
    if store:
        path = write_result(f"store-search-{kind}-{rows}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
