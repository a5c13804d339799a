"""What is done to an index besides filling it: verify, compact, rebuild, upgrade, delete from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from gemb.device import available_threads
from gemb.errors import Exit, GembError, Interrupted
from gemb.files import os_errors_explained, readable_bytes
from gemb.jobs.interrupts import Interrupts
from gemb.report import Event, OnProgress, Report, counted, ignore
from gemb.store import Index, Step, Writer
from gemb.store.conditions import Condition
from gemb.store.rebuild import rebuild as rebuild_store
from gemb.store.upgrade import upgrade as upgrade_store
from gemb.store.verify import verify as verify_store
from gemb.store.where import parse
from gemb.store.writer import DEAD_SHARE

IDS_AT_ONCE = 4096
SHOWN_IDS = 5


def verify(path: Path, on_progress: OnProgress = ignore) -> Report:
    """Whether every byte and every row of the index is what was written; exit code 1 if not.

    Raises UnavailableError (7) if there is no index, GembError if it is none.
    """
    files = 0

    def on_file(file: Path) -> None:
        nonlocal files
        files += 1
        on_progress(Event("verifying", files, unit="files"))

    verdict = verify_store(path, on_file)
    passages = "" if verdict.rows == verdict.documents else f" in {counted(verdict.rows, 'passage')}"
    size = f"{counted(verdict.documents, 'document')}{passages}, {counted(verdict.files, 'file')}, "
    size += readable_bytes(verdict.bytes)
    faults = counted(len(verdict.faults), "fault")
    title = (
        f"{path}: sound; {size}" if verdict.is_sound else f"{path}: damaged, {faults}; run {verdict.remedy}"
    )
    return Report(
        title=title,
        rows=[
            *[("fault", f"{fault.file}: {fault.what}") for fault in verdict.faults],
            *[("note", note) for note in verdict.notes],
        ],
        data={
            "index": str(path),
            "sound": verdict.is_sound,
            "faults": [{"file": str(fault.file), "what": fault.what} for fault in verdict.faults],
            "notes": verdict.notes,
            "documents": verdict.documents,
            "rows": verdict.rows,
            "files": verdict.files,
            "bytes": verdict.bytes,
            "remedy": None if verdict.is_sound else verdict.remedy,
        },
        exit_code=Exit.DONE if verdict.is_sound else Exit.FAILED,
    )


def compact(
    path: Path,
    on_progress: OnProgress = ignore,
    *,
    full: bool = False,
    threads: int | None = None,
    wait_lock: float = 0.0,
) -> Report:
    """Merges parts of the index, drops dead rows and builds graphs where they are worth it.

    A few dead rows cost a search next to nothing, and a part must be written anew to be rid of them, its
    graph too; with `full` that is done for every part that has any.

    Raises Interrupted after a signal; what was merged by then stays. Other errors as `gemb index` does.
    """
    with (
        _steps(on_progress, f"interrupted; {path} is whole, run the same command again to go on") as on_step,
        _writer(path, on_progress, on_step, threads, wait_lock) as writer,
    ):
        before = _parts(writer)
        writer.compact(dead_share=0.0 if full else DEAD_SHARE)
        after = _parts(writer)
    changed = before != after
    shown = {"segments": "segments", "graphs": "with a graph", "rows": "rows in them", "dead": "dead rows"}
    rows = [(label, _from_to(before[name], after[name])) for name, label in shown.items()]
    if after["dead"]:
        rows.append(
            (
                "note",
                f"a part is rid of its dead rows where they are more than {DEAD_SHARE:.0%}, or by --full",
            )
        )
    return Report(
        title=f"{path}: compacted" if changed else f"{path}: nothing to compact",
        rows=rows,
        data={"index": str(path), "changed": changed, "before": before, "after": after},
        outputs=[path],
    )


def rebuild(path: Path, on_progress: OnProgress = ignore, *, threads: int | None = None) -> Report:
    """Makes a damaged index whole from what is intact; exit code 3 if documents were lost.

    Raises GembError as `gemb.store.rebuild` does.
    """
    with _steps(on_progress, f"interrupted; {path} is as it was") as on_step:
        rebuilt = rebuild_store(path, threads=threads or available_threads(), on_step=on_step)
    lost = f", {rebuilt.lost:,} lost" if rebuilt.lost else ""
    rows = [("before", f"kept in {rebuilt.damaged}; remove it when all is well")]
    if rebuilt.lost:
        rows.append(("lost", f"run the gemb index command that made {path} again to add them"))
    return Report(
        title=f"{path}: rebuilt with {counted(rebuilt.documents, 'document')}{lost}",
        rows=rows,
        data={**asdict(rebuilt), "index": str(path), "damaged": str(rebuilt.damaged)},
        outputs=[path],
        exit_code=Exit.REJECTED if rebuilt.lost else Exit.DONE,
    )


def upgrade(path: Path, on_progress: OnProgress = ignore, *, threads: int | None = None) -> Report:
    """Makes an index of an older gemb one of the present format; the old one is kept beside it.

    Raises GembError as `gemb.store.upgrade` does.
    """
    with _steps(on_progress, f"interrupted; {path} is as it was") as on_step:
        upgraded = upgrade_store(path, threads=threads or available_threads(), on_step=on_step)
    kept = upgraded.kept
    if kept is None:
        title = f"{path}: of the present format already; nothing has changed"
    else:
        title = f"{path}: upgraded, {counted(upgraded.documents, 'document')}"
    return Report(
        title=title,
        rows=[] if kept is None else [("before", f"kept in {kept}; remove it when all is well")],
        data={
            "index": str(path),
            "documents": upgraded.documents,
            "upgraded": kept is not None,
            "kept": None if kept is None else str(kept),
        },
        outputs=[path],
    )


def delete(
    path: Path,
    on_progress: OnProgress = ignore,
    *,
    ids: Sequence[str] = (),
    ids_from: Path | None = None,
    where: str | None = None,
    dry_run: bool = False,
    wait_lock: float = 0.0,
) -> Report:
    """Removes the documents with these ids, or those of which the filter is true; all together or none.

    `ids_from` is a file with an id a line, `-` is stdin. An id that is not there is counted, and no error.

    Raises GembError if neither ids nor a filter are given or the filter is no filter, else as `gemb index`.
    """
    if not ids and ids_from is None and where is None:
        raise GembError("nothing is named to be deleted; give ids, --ids-from FILE or --where EXPRESSION")
    if dry_run:
        with Index.open(path) as index:
            found, missing = 0, _Missing()
            for some in _wanted(index, ids, ids_from, where):
                known = some if where is not None else list(index.get(some))
                found += len(known)
                missing.add(some, set(known))
            return _deleted(path, found, missing, index.state.documents, dry_run=True)
    with (
        _steps(on_progress, f"interrupted; nothing was deleted from {path}") as on_step,
        # What the writer does after its commit must not be interrupted with that message.
        _writer(path, on_progress, lambda step: None, 1, wait_lock) as writer,
    ):
        missing = _Missing()
        # Opened behind the writer, so that both see the same documents; and closed before it.
        with Index.open(path) as index:
            for some in _wanted(index, ids, ids_from, where):
                missing.some(writer.delete(some))
                on_step(Step("deleting", writer.changes.removed, writer.documents + writer.changes.removed))
        writer.commit()
        removed, left = writer.changes.removed, writer.documents
    return _deleted(path, removed, missing, left, dry_run=False)


class _Missing:
    """Ids that are not in the index: how many, and the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def some(self, ids: Iterable[str]) -> None:
        """Counts ids that are missing."""
        for id_ in ids:
            self.count += 1
            if len(self.first) < SHOWN_IDS:
                self.first.append(id_)

    def add(self, wanted: Sequence[str], found: set[str]) -> None:
        """Counts those of `wanted` that are not among `found`."""
        self.some(id_ for id_ in dict.fromkeys(wanted) if id_ not in found)


def _wanted(
    index: Index, ids: Sequence[str], ids_from: Path | None, where: str | None
) -> Iterator[list[str]]:
    """The ids to delete, some at a time."""
    if where is not None:
        condition: Condition = parse(where, index.fields())
        if ids or ids_from is not None:
            raise GembError("--where and ids cannot be given together; run the command twice")
        for block in index.export(condition, block=IDS_AT_ONCE):
            yield [document.id for document in block.documents]
        return
    if ids:
        yield list(ids)
    if ids_from is not None:
        lines = _lines(ids_from)
        while some := list(islice(lines, IDS_AT_ONCE)):
            yield some


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, `-` is stdin, that are not empty."""
    with os_errors_explained(path, "read"):
        stream = sys.stdin.buffer if str(path) == "-" else path.open("rb")
        with stream:
            for number, line in enumerate(stream, 1):
                try:
                    id_ = line.rstrip(b"\r\n").decode()
                except UnicodeDecodeError as error:
                    raise GembError(f"{path}:{number}: the id is not UTF-8; write it again") from error
                if id_:
                    yield id_


def _deleted(path: Path, removed: int, missing: _Missing, documents: int, *, dry_run: bool) -> Report:
    rows = []
    if missing.count:
        shown = ", ".join(map(repr, missing.first)) + (" ..." if missing.count > len(missing.first) else "")
        rows.append(("not there", f"{missing.count:,}: {shown}"))
    done, total = ("would delete", documents) if dry_run else ("deleted", documents + removed)
    return Report(
        title=f"{path}: {done} {counted(removed, 'document')} of {total:,}",
        rows=rows,
        data={
            "index": str(path),
            "removed": removed,
            "missing": missing.count,
            "documents": documents,
            "dry_run": dry_run,
        },
        outputs=[] if dry_run else [path],
    )


@contextmanager
def _steps(on_progress: OnProgress, message: str) -> Iterator[Callable[[Step], None]]:
    """An on_step that tells progress and, after a signal, raises Interrupted with `message`."""
    with Interrupts(message) as interrupts:

        def tell(step: Step) -> None:
            if interrupts.exit_code is not None:
                raise Interrupted(message, interrupts.exit_code)
            on_progress(Event(step.name, step.done, step.total))

        yield tell


def _writer(
    path: Path,
    on_progress: OnProgress,
    on_step: Callable[[Step], None],
    threads: int | None,
    wait_lock: float,
) -> Writer:
    return Writer.open(
        path,
        threads=threads or available_threads(),
        wait_seconds=wait_lock,
        on_wait=lambda line: on_progress(Event("waiting", 0, note=line)),
        on_step=on_step,
    )


def _parts(writer: Writer) -> dict[str, int]:
    entries = writer.segments()
    return {
        "segments": len(entries),
        "graphs": sum(entry.record.has_graph for entry in entries),
        "rows": sum(entry.record.rows for entry in entries),
        "dead": sum(entry.record.rows - entry.live_rows for entry in entries),
    }


def _from_to(before: int, after: int) -> str:
    return f"{after:,}" if before == after else f"{before:,} -> {after:,}"
