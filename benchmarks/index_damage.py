"""Files of an index altered behind the program's back: one flipped bit, or an end cut off.

Every alteration must be detected, by a search that refuses to answer or by `verify`, or be harmless: the
answers to every kind of question are those of the index before. Each look is a process of its own, so that a
crash is seen. What a rebuild saves is compared with what was there.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.store import Document, Index, Settings, Writer
from gemb.store.rebuild import rebuild
from gemb.store.verify import verify
from gemb.store.where import parse

DIMS = 24
DOCUMENTS = 420
KINDS = (
    "index.db",
    "index.db-wal, no reader",
    "index.db-wal, a reader holds it",
    "index.db-committed",
    "rows.u64",
    "vectors.f16",
    "codes.i8",
    "graph.usearch",
    "slots.u32",
)
WORDS = ("river", "café naïve", "stone of river", "number 17")
CONDITIONS = ("n < 40", "n >= 390 and even = true", "lang in ('de', 'fr')")
TIMEOUT_SECONDS = 60.0
_CUT_SHARE = 0.2
"""How many alterations cut an end off; the others flip a bit."""
_PAGE_BYTES, _FRAME_HEAD_BYTES, _JOURNAL_HEAD_BYTES = 4096, 24, 32
_fork = multiprocessing.get_context("fork")

Contents = dict[str, str]
"""A digest of each document with its vectors, by id."""


def make_sound(folder: Path) -> tuple[Path, Path]:
    """An index at rest, and one whose writer was killed: its last commit is in the journal alone."""
    rest, alive, killed = (folder / name for name in ("rest.gemb", "alive.gemb", "killed.gemb"))
    random_numbers = np.random.default_rng(7)
    vectors = random_numbers.standard_normal((DOCUMENTS + 40, DIMS)).astype(np.float32)
    documents = [_document(number) for number in range(DOCUMENTS + 40)]
    with Writer.open(rest, Settings(DIMS), threads=4) as writer:
        writer.put(documents[:300], vectors[:300])
        for graph_rows in (200, 10**6) * 50:  # threads leave slots.u32 where they overtake one another
            writer.compact(graph_rows=graph_rows)
            if next(rest.rglob("slots.u32"), None) is not None:
                break
        spans: list[list[tuple[int, int]] | None] = [[(0, 6), (3, 12)], *[None] * 119]
        writer.put(documents[300:DOCUMENTS], vectors[[300, *range(300, DOCUMENTS)]], spans)
        writer.commit()
        writer.delete(["d3", "d310"])
    shutil.copytree(rest, alive)
    with Writer.open(alive) as writer:
        writer.put(documents[DOCUMENTS:], vectors[DOCUMENTS:])
        writer.delete(["d5"])
        writer.commit()
        shutil.copytree(alive, killed)
    shutil.rmtree(alive)
    (killed / "index.db-shm").unlink()
    (killed / "writer.lock").unlink()
    return rest, killed


def _document(number: int) -> Document:
    kinds = ("a river runs by", "a stone lies here, naïve", "the café at the river", "nothing much")
    return Document(
        f"d{number}",
        f"{kinds[number % 4]}, number {number}",
        f"title {number % 9}",
        {"n": number, "even": number % 2 == 0, "lang": ("de", "en", "fr")[number % 3]},
    )


# ---------------------------------------------------------------- looking


def answers(path: Path) -> str:
    """A digest of what an index answers to every kind of question."""
    digest = blake2b()
    queries = np.random.default_rng(3).standard_normal((6, DIMS)).astype(np.float32)
    with Index.open(path) as index:
        fields = index.fields()
        told: list[object] = [index.settings, index.state, sorted(fields.items())]
        told += [index.search(queries, exact=exact) for exact in (False, True)]
        told += [index.search(words=[words], k=20) for words in WORDS]
        told += [index.search(queries[:1], words=[words], k=5) for words in WORDS]
        for text in CONDITIONS:
            condition = parse(text, fields)
            told += [
                index.search(queries, where=condition, k=20),
                index.search(words=["river"], where=condition),
            ]
        told += [index.like("d7"), sorted(index.get([f"d{number}" for number in range(DOCUMENTS)]).items())]
    digest.update(repr(told).encode())
    digest.update(repr(contents(path)).encode())
    return digest.hexdigest()


def contents(path: Path) -> Contents:
    """What an index holds."""
    found = {}
    with Index.open(path) as index:
        for block in index.export():
            bounds = np.cumsum([0, *block.counts])
            for place, document in enumerate(block.documents):
                own: NDArray[np.float32] = block.vectors[bounds[place] : bounds[place + 1]]
                digest = blake2b(repr((document, block.spans[place])).encode() + own.tobytes())
                found[document.id] = digest.hexdigest()
    return found


@dataclass(slots=True)
class Look:
    """How one look at an index ended: "done", "refused" (a GembError), or a failure of the program."""

    how: str
    told: Any


def look(question: Callable[[], Any]) -> Look:
    """The answer of a question that is asked in a process of its own."""
    ours, theirs = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_ask, args=(question, theirs))
    process.start()
    theirs.close()
    try:
        found = Look(*ours.recv()) if ours.poll(TIMEOUT_SECONDS) else Look("hung", "")
    except EOFError:
        process.join()
        found = Look("crashed", f"ended with {process.exitcode}")
    if process.is_alive():
        process.join(1)
        process.kill()
    process.join()
    ours.close()
    return found


def _ask(question: Callable[[], Any], told: Connection) -> None:
    try:
        told.send(("done", question()))
    except GembError as error:
        told.send(("refused", f"{type(error).__name__}: {error}"))
    except BaseException:
        told.send(("failed", traceback.format_exc()))


# ---------------------------------------------------------------- altering


@dataclass(slots=True)
class Case:
    """One alteration and what came of it; `wrong` says what must not have come of it, else empty."""

    file: str
    alteration: str
    search: str = ""
    verify: str = ""
    outcome: str = ""
    rebuild: str = ""
    message: str = ""
    wrong: str = ""


@dataclass(slots=True)
class Damaged:
    """All cases, and how often each outcome came by file."""

    cases: list[Case] = field(default_factory=list)

    @property
    def failures(self) -> list[Case]:
        """The cases that went wrong."""
        return [case for case in self.cases if case.wrong]

    @property
    def outcomes(self) -> dict[str, dict[str, int]]:
        """How often each outcome came, by file."""
        return {
            kind: dict(Counter(case.outcome for case in self.cases if case.file == kind)) for kind in KINDS
        }

    @property
    def rebuilds(self) -> dict[str, dict[str, int]]:
        """What a rebuild saved of the damaged ones, by file."""
        return {
            kind: dict(Counter(case.rebuild for case in self.cases if case.file == kind and case.rebuild))
            for kind in KINDS
        }

    def as_json(self) -> dict[str, object]:
        """For the result file."""
        return {
            "outcomes": self.outcomes,
            "rebuilds": self.rebuilds,
            "cases": [asdict(case) for case in self.cases],
        }


class DamageTrial:
    """A folder with sound indexes, of which copies are altered one after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.result = Damaged()
        self._draw = random.Random(seed)
        self._rest, self._killed = make_sound(folder)
        self._sound: dict[Path, str] = {}
        self._contents: dict[Path, Contents] = {}
        for path in (self._rest, self._killed):
            copy = folder / "sound.gemb"
            shutil.copytree(path, copy)
            self._contents[path] = contents(copy)
            self._sound[path] = answers(copy)
            shutil.rmtree(copy)

    def run(self, count: int, kinds: tuple[str, ...] = KINDS) -> Damaged:
        """Alters `count` times, the kinds of files in turn."""
        for number in range(count):
            self.result.cases.append(self.alter_once(kinds[number % len(kinds)]))
        return self.result

    def alter_once(self, kind: str) -> Case:
        """What comes of one alteration of such a file."""
        source = self._killed if kind.startswith("index.db-") else self._rest
        path = self.folder / "altered.gemb"
        shutil.copytree(source, path)
        stop = _fork.Event()
        reader = None
        try:
            if kind.endswith("holds it"):
                ready = _fork.Event()
                reader = _fork.Process(target=_hold, args=(path, ready, stop))
                reader.start()
                ready.wait(TIMEOUT_SECONDS)
            file = self._draw.choice(sorted(path.rglob(kind.partition(",")[0])))
            case = Case(kind, self._alter(file))
            self._judge(case, path, source, file, reader, stop)
            return case
        finally:
            stop.set()
            if reader is not None:
                reader.join()
            for left in self.folder.glob("altered.gemb*"):
                shutil.rmtree(left)

    def _judge(
        self,
        case: Case,
        path: Path,
        source: Path,
        file: Path,
        reader: BaseProcess | None,
        stop: Event,
    ) -> None:
        first = look(lambda: answers(path))
        case.search = self._in_words(first, source)
        checked = look(lambda: [(str(fault.file), fault.what) for fault in verify(path).faults])
        stop.set()
        if reader is not None:
            reader.join()
        # A flipped number of the format is that of a newer gemb for all that verify can tell, and refused.
        faults: list[tuple[str, str]] = (
            checked.told if checked.how == "done" else [(str(path), str(checked.told))]
        )
        case.verify = f"{len(faults)} faults" if checked.how == "done" else checked.how
        later = self._in_words(look(lambda: answers(path)), source)
        case.message = (
            faults[0][1] if faults else str(first.told) if first.how == "refused" else ""
        ).replace(str(self.folder), "")[:200]
        if first.how not in ("done", "refused") or checked.how not in ("done", "refused"):
            case.wrong = f"search {first.how}, verify {checked.how}: {first.told} {checked.told}"
        elif not faults and (case.search, later) != ("same answers", "same answers"):
            case.wrong = f"verify finds nothing, but search: {case.search}, then {later}"
        case.outcome = (
            "harmless"
            if not faults
            else "refused by search, found by verify"
            if case.search == "refused"
            else f"found by verify, search gave {case.search}"
        )
        if faults and not case.wrong:
            self._rebuild(case, path, source)

    def _rebuild(self, case: Case, path: Path, source: Path) -> None:
        done = look(lambda: (lambda rebuilt: (rebuilt.documents, rebuilt.lost))(rebuild(path)))
        if done.how == "refused":
            case.rebuild = "refused"
            if "make it anew" not in done.told:
                case.wrong = f"rebuild does not say what is left to do: {done.told}"
            return
        if done.how != "done":
            case.wrong = f"rebuild {done.how}: {done.told}"
            return
        saved = look(lambda: (contents(path), len(verify(path).faults)))
        if saved.how != "done" or saved.told[1]:
            case.wrong = f"the rebuilt index is not sound: {saved.told}"
            return
        found: Contents = saved.told[0]
        known = [self._contents[self._rest], self._contents[source]]
        wrong = [id_ for id_, digest in found.items() if digest not in [each.get(id_) for each in known]]
        if wrong:
            case.wrong = f"rebuild saved {len(wrong)} documents that are not what they were: {wrong[:3]}"
        whole = found == self._contents[source]
        case.rebuild = "all saved" if whole else "some lost" if found else "nothing saved"
        if not whole and not done.told[1] and source == self._rest:
            case.wrong = "rebuild lost documents and did not say so"

    def _in_words(self, found: Look, source: Path) -> str:
        if found.how != "done":
            return found.how
        return "same answers" if found.told == self._sound[source] else "other answers"

    def _alter(self, file: Path) -> str:
        """Flips a bit or cuts the end off; says which."""
        size = file.stat().st_size
        if self._draw.random() < _CUT_SHARE:
            length = self._draw.randrange(size)
            os.truncate(file, length)
            return f"cut to {length} of {size} bytes"
        place, bit = self._place(file, size), self._draw.randrange(8)
        with file.open("r+b") as opened:
            opened.seek(place)
            (old,) = opened.read(1)
            opened.seek(place)
            opened.write(bytes([old ^ 1 << bit]))
        return f"bit {bit} of byte {place} of {size}"

    def _place(self, file: Path, size: int) -> int:
        """Anywhere, but every second time where a page or frame of SQLite has its numbers."""
        if self._draw.random() < 0.5 or not file.name.startswith("index.db"):
            return self._draw.randrange(size)
        if file.name == "index.db":
            page = self._draw.randrange(size // _PAGE_BYTES)
            return page * _PAGE_BYTES + self._draw.randrange(100 if not page else 40)
        frames = (size - _JOURNAL_HEAD_BYTES) // (_PAGE_BYTES + _FRAME_HEAD_BYTES)
        if frames < 1 or self._draw.random() < 0.1:
            return self._draw.randrange(min(size, _JOURNAL_HEAD_BYTES))
        frame = self._draw.randrange(frames) * (_PAGE_BYTES + _FRAME_HEAD_BYTES)
        return _JOURNAL_HEAD_BYTES + frame + self._draw.randrange(_FRAME_HEAD_BYTES)


def _hold(path: Path, ready: Event, stop: Event) -> None:
    with Index.open(path):
        ready.set()
        stop.wait(TIMEOUT_SECONDS)
