"""Engines side by side: each in its own process on one thread, interleaved rounds, medians."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import end
from benchmarks.machine import thread_environment
from benchmarks.models import REPOSITORY, cache_folder

PEERS = ("chromadb==1.5.9", "lancedb==0.40.0")
"""In an environment of their own: what they pin is no business of gemb's."""


def package_versions() -> dict[str, str]:
    """The versions of what takes part, "not installed" where it is missing."""
    found = {}
    for name in ("usearch", "numkong", "faiss-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {name: number for name, _, number in (peer.partition("==") for peer in PEERS)}


class EngineFailed(RuntimeError):
    """An engine's process ended; the message ends with what it wrote to stderr."""


def peers_python() -> str:
    """The Python of the environment with the peers, made when first asked for."""
    folder = cache_folder() / "store-peers"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True)
        (folder / "complete").touch()
    return str(python)


class Process:
    """An engine in its own process with `threads` threads; a context manager that ends it."""

    def __init__(self, engine: str, *, threads: int = 1) -> None:
        self.engine = engine
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        python = peers_python() if engine in ("chroma", "lancedb") else sys.executable
        environment = thread_environment(threads)
        # LanceDB's Rust runtimes.
        environment |= {"LANCE_CPU_THREADS": str(threads), "TOKIO_WORKER_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.store.contestant", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )

    def ask(self, do: str, **command: object) -> dict[str, Any]:
        """The answer to a command; paths may be given as they are.

        Raises EngineFailed if the process ends.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the process has no pipes")
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}, default=str) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is on stderr, read below
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            tail = "".join(self._stderr.readlines()[-15:])
            raise EngineFailed(f"{self.engine} ended with {self._process.returncode}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._process)
        self._stderr.close()


def build(engine: str, rows: Path, count: int, at: Path, **options: object) -> dict[str, Any]:
    """What building took: seconds, peak bytes, bytes on the disk; remembered beside the index."""
    known = at.with_name(at.name + ".build.json")
    request = {"engine": engine, "rows": str(rows), "count": count, **options}
    if known.exists() and at.exists():
        content: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        if content["request"] == request:
            return content
    with Process(engine) as process:
        answer = process.ask("build", rows=rows, count=count, at=at, **options)
    known.write_text(json.dumps({"request": request, **answer}), encoding="utf-8")
    return {"request": request, **answer}


@dataclass(slots=True)
class Runner:
    """One line of a race: an engine, its index, how it is asked, and what the rounds took."""

    name: str
    engine: str
    at: Path
    batch: int = 1
    open_options: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    threads: int = 1
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    opened: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    found: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))

    def cpu_milliseconds(self, queries: int) -> float:
        """Processor time of one query, the median round."""
        return statistics.median(self.cpu_seconds) / queries * 1e3

    def wall_milliseconds(self, queries: int) -> float:
        """Wall time of one query, the median round."""
        return statistics.median(self.wall_seconds) / queries * 1e3


def race(runners: list[Runner], queries: NDArray[np.float32], *, k: int = 10, rounds: int = 5) -> None:
    """Fills in the runners: one round to warm up, which is checked for recall, then interleaved rounds."""
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        asked = Path(scratch) / "queries.npy"
        np.save(asked, queries)
        processes: list[Process] = []
        try:
            for runner in runners:
                process = Process(runner.engine, threads=runner.threads)
                processes.append(process)
                runner.opened = process.ask("open", at=runner.at, **runner.open_options)
                found = Path(scratch) / "found.npy"
                runner.after = process.ask(
                    "search", queries=asked, k=k, batch=runner.batch, found=found, **runner.options
                )
                runner.found = np.load(found)
            for _ in range(rounds):
                for runner, process in zip(runners, processes, strict=True):
                    lap = process.ask("search", queries=asked, k=k, batch=runner.batch, **runner.options)
                    runner.cpu_seconds.append(lap["cpu_seconds"])
                    runner.wall_seconds.append(lap["wall_seconds"])
        finally:
            for process in processes:
                process.__exit__(None, None, None)
