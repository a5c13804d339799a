"""Every operation of an index's work on the disk made to fail, one after the other.

A library that is loaded before the C library (failing_disk.c) counts what is done to files, and lets the
disk be full from operation n on, or lets operation n alone fail with EIO, for each n. The work must then end
well, or with one message and exit code 1; the index must be sound and in a state that was committed; and the
same work, run again, must reach its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.index_damage import look
from benchmarks.index_kills import (
    DOCUMENTS,
    MISSING,
    WORK,
    Versions,
    document,
    planned,
    seen_state,
    sync,
    vector,
)
from gemb.errors import Exit, GembError
from gemb.store import Index
from gemb.store.verify import verify
from tests.store.old_layout import write_old_index

SOURCE = Path(__file__).with_name("failing_disk.c")
WORKER = (sys.executable, "-m", "benchmarks.index_full_disk")
MODES = ("full disk", "one error")
_TEXTS = {"full disk": ("no space left",), "one error": ("input/output error", "i/o error", "disk")}


@dataclass(slots=True)
class FullDisk:
    """How the work ended, by kind and mode; `failures` are what must not happen."""

    operations: dict[str, int] = field(default_factory=dict)
    """How many operations a whole run of the work has."""
    tried: Counter[str] = field(default_factory=Counter)
    ended_well: Counter[str] = field(default_factory=Counter)
    """Runs that did not need the operation that failed."""
    messages: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """For the result file."""
        return {
            "operations": self.operations,
            "tried": dict(self.tried),
            "ended_well": dict(self.ended_well),
            "messages": dict(self.messages.most_common()),
            "failures": self.failures,
        }


def run_sweep(kinds: Sequence[str], points: int, seed: int, offset: int = 0) -> FullDisk:
    """Sweeps in a process of its own, with the library loaded; at most `points` operations of each work.

    Raises FileNotFoundError where there is no C compiler.
    """
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        library = Path(scratch) / "failing_disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
        done = subprocess.run(
            [*WORKER, scratch, ",".join(kinds), str(points), str(seed), str(offset)],
            env={**os.environ, "LD_PRELOAD": str(library), "FAILING_DISK": str(library)},
            stdout=subprocess.PIPE,
            check=True,
        )
    told = json.loads(done.stdout)
    return FullDisk(
        told["operations"],
        Counter(told["tried"]),
        Counter(told["ended_well"]),
        Counter(told["messages"]),
        told["failures"],
    )


class Sweep:
    """A folder with an index before each kind of work, copied for every run."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.result = FullDisk()
        self._draw = random.Random(seed)
        self._library = ctypes.CDLL(os.environ["FAILING_DISK"])
        self._library.failing_disk_count.restype = ctypes.c_long

    def run(self, kind: str, points: int, offset: int) -> None:
        """Fails operations of one kind of work that are spread over the whole of it, in both modes."""
        before, plan = self._prepare(kind)
        for mode, name in enumerate(MODES):
            path = self._copy(before)
            count = look(partial(self._work, kind, path, plan, 0, mode)).told
            if not isinstance(count, int):
                raise RuntimeError(f"{kind} without any failure: {count}")
            self.result.operations[f"{kind}, {name}"] = count
            numbers = np.unique(np.linspace(1 + offset, count, min(points, count)).astype(int))
            for number in numbers.tolist():
                self._fail(kind, self._copy(before), plan, number, mode)

    def _prepare(self, kind: str) -> tuple[Path, list[Versions]]:
        """The folder as it is before the work, and the states that the work goes through."""
        before = self.folder / f"before-{kind}"
        before.mkdir()
        path = before / "x.gemb"
        whole = {number: 1 for number in range(DOCUMENTS)}
        if kind == "upgrade":
            rows = np.stack([vector(number, 1) for number in whole])
            write_old_index(path, [document(number, 1) for number in whole], rows)
        elif kind != "build":
            sync(path, [{}, dict(list(whole.items())[:150]), whole, whole], lambda: None)
        plan = planned({} if kind == "build" else whole, self._draw) if kind in ("build", "sync") else [whole]
        return before, plan

    def _copy(self, before: Path) -> Path:
        target = self.folder / "disk"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(before, target)
        return target / "x.gemb"

    def _work(self, kind: str, path: Path, plan: list[Versions], number: int, mode: int) -> int:
        """Does the work while operation `number` fails; the count of operations."""
        self._library.failing_disk_arm(os.fsencode(path.parent), number, mode)
        WORK[kind](path, plan, lambda: None)
        return int(self._library.failing_disk_count())

    def _fail(self, kind: str, path: Path, plan: list[Versions], number: int, mode: int) -> None:
        name = f"{kind}, {MODES[mode]}"
        where = f"{name} at {number}"
        self.result.tried[name] += 1

        def work() -> tuple[str, int] | None:
            try:
                self._work(kind, path, plan, number, mode)
            except GembError as error:
                return str(error), int(error.exit_code)
            return None

        found = look(work)
        if found.how != "done":
            self.result.failures.append(f"{where}: {found.how}: {found.told}")
        elif found.told is None:
            self.result.ended_well[name] += 1
        else:
            message, code = found.told
            self.result.messages[message.replace(str(path.parent), "").split(" (")[0][:160]] += 1
            fits = any(text in message.lower() for text in _TEXTS[MODES[mode]])
            if code != Exit.FAILED or not fits or "\n" in message:
                self.result.failures.append(f"{where}: exit {code}: {message}")
        self._check(kind, path, plan, where)
        again = look(lambda: WORK[kind](path, plan, lambda: None))
        if again.how != "done":
            self.result.failures.append(f"{where}, run again: {again.how}: {again.told}")
        else:
            self._check(kind, path, plan[-1:], f"{where}, run again", is_final=True)

    def _check(
        self, kind: str, path: Path, plan: list[Versions], where: str, *, is_final: bool = False
    ) -> None:
        try:
            with Index.open(path) as index:
                if seen_state(index) not in plan:
                    self.result.failures.append(f"{where}: a state that was not committed")
            for fault in verify(path).faults:
                self.result.failures.append(f"{where}: verify: {fault.what}")
        except (GembError, ValueError) as error:
            is_early = kind in ("build", "upgrade") and not is_final
            if not (is_early and any(words in str(error) for words in MISSING)):
                self.result.failures.append(f"{where}: {type(error).__name__}: {error}")


def _main(scratch: str, kinds: str, points: str, seed: str, offset: str) -> None:
    import usearch.index  # noqa: F401  # here, so that no child imports it

    sweep = Sweep(Path(scratch), int(seed))
    for kind in kinds.split(","):
        sweep.run(kind, int(points), int(offset))
    sys.stdout.write(json.dumps(sweep.result.as_json()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
