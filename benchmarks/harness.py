"""Races between processes: interleaved rounds, medians, one JSON file a race.

Every contestant lives in a process of its own, so that threads, memory and imports are its own. A
round lets each of them embed the same texts once, one after the other (A B C A B C ...): what else
the machine does then hits all of them, and a ratio is taken inside a round. One thread is judged by
processor time, which a busy neighbour hardly moves; two threads by the clock, which needs a quiet
machine.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import Machine, thread_environment, versions
from benchmarks.models import REPOSITORY
from benchmarks.peers import Contestant

RESULTS = Path(__file__).parent / "results"
CONTESTANT_COMMAND = (sys.executable, "-m", "benchmarks.contestant")
MINIMUM_ROUNDS = 5
"""Of a published figure; fewer rounds are for looking, and the file says how many there were."""


def end(process: subprocess.Popen[str]) -> None:
    """Let a process that reads commands end by itself, or kill it after ten seconds."""
    if process.stdin and process.stdout:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.stdout.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class Lap:
    """What one command of one contestant took."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    anonymous_rss_bytes: int

    def seconds(self, threads: int) -> float:
        """The time that counts: of the processor for one thread, of the clock for more."""
        return self.cpu_seconds if threads == 1 else self.wall_seconds


class ContestantFailed(RuntimeError):
    """A contestant's process ended; the message ends with what it wrote to stderr."""


class Process:
    """A contestant in its own process; a context manager that ends it."""

    def __init__(self, contestant: Contestant, instructions: str = "native") -> None:
        self.contestant = contestant
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            CONTESTANT_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=REPOSITORY,
            env=thread_environment(contestant.threads, instructions),
        )

    def load(self) -> Lap:
        """Import the engine and read the model."""
        return self._ask(do="load", contestant=asdict(self.contestant))

    def run(self, texts: Path, vectors: Path | None = None, batch_size: int | None = None) -> Lap:
        """Embed the JSON list of texts in `texts`; save the vectors as `.npy` if asked to."""
        return self._ask(
            do="run", texts=str(texts), vectors=str(vectors) if vectors else None, batch_size=batch_size
        )

    def _ask(self, **command: object) -> Lap:
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the process has no pipes")
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is on stderr, read below
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._stderr.seek(0)
            tail = "".join(self._stderr.readlines()[-15:])
            raise ContestantFailed(f"{self.contestant.name} ended with {self._process.returncode}:\n{tail}")
        return Lap(**json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._process)
        self._stderr.close()


@dataclass(slots=True)
class Track:
    """All laps of one contestant in a race, and the vectors of its first."""

    contestant: Contestant
    load: Lap
    laps: list[Lap] = field(default_factory=list)
    vectors: NDArray[np.float32] | None = None

    def seconds(self) -> list[float]:
        """The time that counts of each round."""
        return [lap.seconds(self.contestant.threads) for lap in self.laps]

    def median_seconds(self) -> float:
        """The median round."""
        return statistics.median(self.seconds())

    def peak_rss_bytes(self) -> int:
        """The highest resident memory of the process, loading included."""
        return max(lap.peak_rss_bytes for lap in [self.load, *self.laps])

    def anonymous_rss_bytes(self) -> int:
        """The highest resident memory after a round that no file backs: mapped weights aside."""
        return max(lap.anonymous_rss_bytes for lap in self.laps)

    def speed_against(self, other: "Track") -> float:
        """How many times faster this is than `other`: the median of the ratios of the rounds."""
        return statistics.median(
            theirs / ours for ours, theirs in zip(self.seconds(), other.seconds(), strict=True)
        )

    def cosines_with(self, reference: "Track") -> tuple[float, float]:
        """The lowest and the mean cosine between this one's vectors and the reference's, in float64."""
        if self.vectors is None or reference.vectors is None:
            raise ValueError("the race kept no vectors")
        ours, theirs = self.vectors.astype(np.float64), reference.vectors.astype(np.float64)
        products = (ours * theirs).sum(axis=1)
        cosines = products / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
        return float(cosines.min()), float(cosines.mean())


def race(
    contestants: Sequence[Contestant], texts: Sequence[str], *, rounds: int, instructions: str = "native"
) -> dict[str, Track]:
    """Tracks by name after `rounds` interleaved rounds over `texts`; all warm up on an eighth of it first.

    Raises ContestantFailed if one of them dies.
    """
    with (
        tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch,
        _started(contestants, instructions) as processes,
    ):
        whole, part = _texts_in(Path(scratch), texts)
        tracks: dict[str, Track] = {}
        for process in processes:
            tracks[process.contestant.name] = Track(process.contestant, process.load())
            process.run(part)
        for round_index in range(rounds):
            for process in processes:
                track = tracks[process.contestant.name]
                path = Path(scratch) / f"{process.contestant.name}.npy" if round_index == 0 else None
                track.laps.append(process.run(whole, path))
                if path:
                    track.vectors = np.load(path)
        return tracks


def best_batch_size(
    contestant: Contestant,
    texts: Sequence[str],
    sizes: Sequence[int],
    *,
    rounds: int = 1,
    instructions: str = "native",
) -> tuple[int, dict[int, float]]:
    """The batch size of `sizes` that embeds `texts` fastest, and the best seconds of each."""
    with (
        tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch,
        Process(contestant, instructions) as process,
    ):
        whole, part = _texts_in(Path(scratch), texts)
        process.load()
        process.run(part)
        seconds: dict[int, float] = {}
        for _ in range(rounds):
            for size in sizes:
                lap = process.run(whole, batch_size=size).seconds(contestant.threads)
                seconds[size] = min(lap, seconds.get(size, lap))
    return min(seconds, key=lambda size: seconds[size]), seconds


def _texts_in(folder: Path, texts: Sequence[str]) -> tuple[Path, Path]:
    """Files with all texts, and with every eighth for warming up."""
    whole, part = folder / "texts.json", folder / "warm-up.json"
    whole.write_text(json.dumps(list(texts)), encoding="utf-8")
    part.write_text(json.dumps(list(texts)[::8]), encoding="utf-8")
    return whole, part


@contextmanager
def _started(contestants: Sequence[Contestant], instructions: str) -> Iterator[list[Process]]:
    """One process a contestant; all ended at the end."""
    processes: list[Process] = []
    try:
        for contestant in contestants:
            processes.append(Process(contestant, instructions))
        yield processes
    finally:
        for process in processes:
            process.__exit__(None, None, None)


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise of the project and what this machine measured; `None` where it says nothing here."""

    claim: str
    measured: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """True if the figure is on the right side of the bound."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values, verdict included."""
        return {
            "claim": self.claim,
            "measured": self.measured,
            "bound": f"{'<=' if self.at_most else '>='} {self.bound:g}",
            "verdict": "PASS" if self.met else "FAIL",
        }


def write_result(name: str, machine: Machine, result: Mapping[str, object], folder: Path = RESULTS) -> Path:
    """The path `folder`/NAME-PROCESSOR.json of a result stored with the machine and versions behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{machine.slug}.json"
    content = {"benchmark": name, "machine": machine.as_dict(), "versions": versions(), **result}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
