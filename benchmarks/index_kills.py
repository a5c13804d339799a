"""Writers of an index killed with SIGKILL at random moments, while readers search it all the time.

The documents of a state are known, and each has a version in its text, metadata and vector. A writer tells
its parent after every commit that returned. After a kill the index must be in the last state that was told,
or in the one after it, to the last vector; nothing between. A reader counts what it sees as a whole, and
must never see a state that was not committed, nor an error.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.store import Document, Index, Settings, Writer
from gemb.store.rebuild import rebuild
from gemb.store.upgrade import upgrade
from gemb.store.verify import verify
from tests.store.old_layout import FINGERPRINT, write_old_index

DIMS = 32
DOCUMENTS = 240
CHUNKS = 3
GRAPH_ROWS = 60
SETTINGS = Settings(DIMS, "f32", encoder={"fingerprint": FINGERPRINT})
KINDS = ("build", "sync", "compact", "rebuild", "upgrade")
SCORE_ERROR = 1e-5
MISSING = ("there is no index", "is not finished", "is no index: it has no", "gemb index upgrade")
"""What a reader may be told while the first build or the upgrade is not done."""
_fork = multiprocessing.get_context("fork")

Versions = dict[int, int]
"""The version of each document, by its number."""
Acknowledge = Callable[[], None]


def document(number: int, version: int) -> Document:
    """A document that tells its version."""
    return Document(f"d{number}", f"text {number} in version {version}", f"title {number}")


def version_of(text: str) -> int:
    """The version that a document's text tells."""
    return int(text.rpartition(" ")[2])


@lru_cache(maxsize=100_000)
def vector(number: int, version: int) -> NDArray[np.float32]:
    """The unit vector[D] of a version of a document."""
    drawn = np.random.default_rng([number, version]).standard_normal(DIMS)
    unit: NDArray[np.float32] = (drawn / np.linalg.norm(drawn)).astype(np.float32)
    return unit


def mark(state: Versions) -> str:
    """16 hex digits that tell a state."""
    return blake2b(json.dumps(sorted(state.items())).encode(), digest_size=8).hexdigest()


def seen_state(index: Index) -> Versions:
    """The versions of all documents. Raises ValueError where one is torn."""
    state: Versions = {}
    for block in index.export():
        for found, own in zip(block.documents, block.vectors, strict=True):
            number, version = int(found.id[1:]), version_of(found.text)
            if number in state or found != document(number, version):
                raise ValueError(f"{found} is torn")
            cosine = float(own @ vector(number, version))
            if cosine < 1 - SCORE_ERROR:
                raise ValueError(f"the vector of {found.id} is not that of version {version}: {cosine:.3f}")
            state[number] = version
    return state


# ---------------------------------------------------------------- what is killed


def sync(path: Path, plan: Sequence[Versions], acknowledge: Acknowledge) -> None:
    """Brings an index from plan[0] to plan[-1] by way of the states between, each committed."""
    with Writer.open(path, SETTINGS) as writer:
        for before, after in itertools.pairwise(plan[:-1]):
            chunk = [document(*item) for item in after.items() if item not in before.items()]
            same = [document(*item) for item in after.items() if item in before.items()]
            needed = [chunk[place] for place in writer.compare(chunk).needed]
            if needed:
                writer.put(
                    needed, np.stack([vector(int(one.id[1:]), after[int(one.id[1:])]) for one in needed])
                )
            if after is plan[-2]:
                writer.compare([one for one in same if int(one.id[1:]) in plan[-1]])
            writer.commit()
            acknowledge()
        writer.prune()
    acknowledge()


def compact(path: Path, plan: Sequence[Versions], acknowledge: Acknowledge) -> None:
    """Makes one segment of all, with a graph where there is none."""
    with Writer.open(path) as writer:
        has_graph = any(entry.record.has_graph for entry in writer.segments())
        writer.compact(dead_share=0, graph_rows=10**6 if has_graph else GRAPH_ROWS)


def rebuild_whole(path: Path, plan: Sequence[Versions], acknowledge: Acknowledge) -> None:
    """Rebuilds an index in which nothing is damaged."""
    rebuild(path)


def upgrade_old(path: Path, plan: Sequence[Versions], acknowledge: Acknowledge) -> None:
    """Upgrades an index of version 0.1.0."""
    upgrade(path)


WORK: Mapping[str, Callable[[Path, Sequence[Versions], Acknowledge], None]] = {
    "build": sync,
    "sync": sync,
    "compact": compact,
    "rebuild": rebuild_whole,
    "upgrade": upgrade_old,
}


def planned(before: Versions, draw: random.Random) -> list[Versions]:
    """The states of a sync: a tenth changes, some come, some go; in chunks, the removal last."""
    target = {
        number: version + (draw.random() < 0.1) for number, version in before.items() if draw.random() < 0.95
    }
    for number in range(DOCUMENTS):
        if number not in target and draw.random() < 0.5:
            target[number] = before.get(number, 0) + 1
    states, numbers = [before], list(target)
    draw.shuffle(numbers)
    for chunk in range(CHUNKS):
        part = numbers[chunk::CHUNKS]
        states.append({**states[-1], **{number: target[number] for number in part}})
    return [*states, target]


# ---------------------------------------------------------------- who looks


def look(index: Index, draw: random.Random) -> str:
    """The mark of the state an index shows; searches it as well. Raises ValueError for a torn answer."""
    query = vector(draw.randrange(DOCUMENTS), draw.randrange(3))
    for exact in (False, True):
        for hit in index.search(query, words=["version"] if draw.random() < 0.3 else None, exact=exact)[0]:
            number, version = int(hit.id[1:]), version_of(hit.text)
            if hit.title != document(number, version).title:
                raise ValueError(f"{hit} is torn")
            cosine = float(query @ vector(number, version))
            if hit.score is None or abs(hit.score - cosine) > SCORE_ERROR:
                raise ValueError(
                    f"{hit.id} has the score {hit.score}, but its version {version} has {cosine}"
                )
    return mark(seen_state(index))


def look_all_the_time(board: Path, report: Path, stop: Event, seed: int) -> None:
    """A reader: looks at the index that is named on the board, and reports marks and failures at the end."""
    draw = random.Random(seed)
    marks: Counter[str] = Counter()
    failures: list[str] = []
    looks = not_there = 0
    index: Index | None = None
    while not stop.is_set():
        place, may_be_missing = json.loads(board.read_text())
        try:
            if index is None or str(index.folder) != place or draw.random() < 0.1:
                if index is not None:
                    index.close()
                    index = None
                index = Index.open(place)
            marks[look(index, draw)] += 1
            looks += 1
        except GembError as error:
            if may_be_missing and any(words in str(error) for words in MISSING):
                not_there += 1
            else:
                failures.append(f"{type(error).__name__}: {error}")
        except (ValueError, OSError) as error:
            failures.append(f"{type(error).__name__}: {error}")
    if index is not None:
        index.close()
    report.write_text(
        json.dumps({"marks": marks, "failures": failures, "looks": looks, "missing": not_there})
    )


# ---------------------------------------------------------------- the trial


@dataclass(slots=True)
class Killed:
    """What came of the kills; `failures` are what must not happen."""

    kills: Counter[str] = field(default_factory=Counter)
    early: Counter[str] = field(default_factory=Counter)
    """Runs that were done before their kill."""
    states_after: Counter[str] = field(default_factory=Counter)
    """By kind of work: how often the state was the last one told, or the one after it."""
    failures: list[str] = field(default_factory=list)
    looks: int = 0
    states_seen: int = 0

    def as_json(self) -> dict[str, object]:
        """For the result file."""
        return {
            "kills": dict(self.kills),
            "runs_done_before_their_kill": dict(self.early),
            "state_after_each_run": dict(self.states_after),
            "searches_of_readers": self.looks,
            "states_seen_by_readers": self.states_seen,
            "failures": self.failures,
        }


class Trial:
    """A folder in which indexes are made, changed and killed; `result` tells what came of it."""

    def __init__(self, folder: Path, seed: int, readers: int = 2) -> None:
        self.folder = folder
        self.result = Killed()
        self._draw = random.Random(seed)
        self._readers = readers
        self._board = folder / "board"
        self._legitimate = {mark({})}
        self._seconds: dict[str, float] = {}
        self._number = 0
        self._path = folder
        self._state: Versions = {}

    def run(self, kills: Mapping[str, int]) -> Killed:
        """Kills each kind of work so many times, in mixed order, with readers at work."""
        for kind in ("build", "sync", "compact", "rebuild", "upgrade"):
            if kind in kills or kind == "build":
                self._measure(kind)
        turns = [kind for kind, count in kills.items() for _ in range(count)]
        self._draw.shuffle(turns)
        with self._looking():
            for kind in turns:
                done = False
                while not done:
                    done = self._kill_once(kind)
        return self.result

    def _measure(self, kind: str) -> None:
        """How long the work takes that is left alone; twice, as the first run of a process is slow."""
        for _ in range(2):
            plan = self._prepare(kind)
            began = time.monotonic()
            self._work(kind, plan, None)
            self._seconds[kind] = time.monotonic() - began
            self._state = plan[-1]

    def _prepare(self, kind: str) -> list[Versions]:
        """The states that the work goes through; a new folder where it begins with one."""
        if kind == "build" or (kind == "upgrade"):
            self._number += 1
            self._path = self.folder / f"index-{self._number}.gemb"
            self._state = {}
        if kind == "upgrade":
            self._state = {number: 1 for number in range(DOCUMENTS)}
            documents = [document(number, 1) for number in self._state]
            write_old_index(self._path, documents, np.stack([vector(number, 1) for number in self._state]))
        states = planned(self._state, self._draw) if kind in ("build", "sync") else [self._state]
        self._legitimate |= {mark(state) for state in states}
        return states

    def _work(self, kind: str, plan: list[Versions], seconds: float | None) -> tuple[int, bool]:
        """States that were told, and whether the process was killed after `seconds`."""
        ours, theirs = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_in_child, args=(kind, self._path, plan, theirs))
        process.start()
        theirs.close()
        if seconds is not None:
            time.sleep(seconds)
            process.kill()
        process.join()
        told = 0
        with suppress(EOFError):
            while ours.recv() is not None:
                told += 1
        ours.close()
        if process.exitcode not in (0, -9):
            self.result.failures.append(f"{kind} ended with {process.exitcode}")
        return told, process.exitcode == -9

    def _kill_once(self, kind: str) -> bool:
        """Whether a kill hit the work; checks what it left, and lets the next writer go on."""
        plan = self._prepare(kind)
        self._show(may_be_missing=kind in ("build", "upgrade"))
        told, was_killed = self._work(kind, plan, self._draw.uniform(0, 1.1 * self._seconds[kind]))
        where = f"{kind} {self._path.name} (kill {self.result.kills.total() + 1})"
        (self.result.kills if was_killed else self.result.early)[kind] += 1
        self._check(kind, plan, told, where)
        try:  # the next writer goes on
            WORK[kind](self._path, plan, lambda: None)
            self._state = plan[-1]
            self._check(kind, plan[-1:], 0, f"{where}, continued", is_final=True)
        except (GembError, ValueError) as error:
            self.result.failures.append(f"{where}, continued: {type(error).__name__}: {error}")
        return was_killed

    def _check(
        self, kind: str, plan: Sequence[Versions], told: int, where: str, *, is_final: bool = False
    ) -> None:
        """Notes a failure where the index is in no state that it may be in, or is not sound."""
        try:
            with Index.open(self._path) as index:
                state = seen_state(index)
        except (GembError, ValueError) as error:
            is_early = kind in ("build", "upgrade") and not told and not is_final
            if not (is_early and any(words in str(error) for words in MISSING)):
                self.result.failures.append(f"{where}: {type(error).__name__}: {error}")
            return
        allowed = plan[told : told + 2]
        if state not in allowed:
            place = plan.index(state) if state in plan else None
            self.result.failures.append(f"{where}: state {place} of {len(plan)} after {told} were told")
        elif not is_final:
            self.result.states_after["as told" if state == allowed[0] else "one commit further"] += 1
        verdict = verify(self._path)
        for fault in verdict.faults:
            self.result.failures.append(f"{where}: verify: {fault.file}: {fault.what}")
        if is_final and verdict.notes:
            self.result.failures.append(f"{where}: {verdict.notes}")

    def _show(self, *, may_be_missing: bool) -> None:
        """Sends the readers to the index at hand."""
        new = self._board.with_suffix(".new")
        new.write_text(json.dumps([str(self._path), may_be_missing]))
        new.replace(self._board)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Readers look during the block; their reports count afterwards."""
        self._show(may_be_missing=False)
        stop = _fork.Event()
        reports = [self.folder / f"reader-{number}.json" for number in range(self._readers)]
        processes = [
            _fork.Process(target=look_all_the_time, args=(self._board, report, stop, number))
            for number, report in enumerate(reports)
        ]
        for process in processes:
            process.start()
        try:
            yield
        finally:
            stop.set()
            for process in processes:
                process.join(60)
        seen: set[str] = set()
        for process, report in zip(processes, reports, strict=True):
            if process.exitcode != 0:
                self.result.failures.append(f"a reader ended with {process.exitcode}")
                continue
            told = json.loads(report.read_text())
            self.result.looks += told["looks"]
            self.result.failures += [f"a reader: {failure}" for failure in told["failures"]]
            seen |= set(told["marks"])
        self.result.states_seen = len(seen)
        if strange := seen - self._legitimate:
            self.result.failures.append(f"readers saw {len(strange)} states that were never committed")


def _in_child(kind: str, path: Path, plan: Sequence[Versions], told: Connection) -> None:
    WORK[kind](path, plan, lambda: told.send(True))
