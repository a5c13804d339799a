"""Whether an index is what was written, byte by byte and row by row.

Every block of every file is compared with its checksum, every document with its own; documents, rows and
counts with each other; codes with the vectors they were made from; graphs with the rows they must find.
What is found is listed, all of it at once. Files of nobody are no fault: a killed writer leaves them, and
the next one sweeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemb.errors import GembError, LockedError, MachineError, MismatchError
from gemb.files import Lock
from gemb.store import catalogue as catalogues
from gemb.store.blocks import BLOCK_BYTES, DamagedError
from gemb.store.catalogue import Catalogue, SegmentEntry, Settings, advice
from gemb.store.segments import (
    CODES,
    GRAPH,
    PASS_ROWS,
    ROWS,
    VECTORS,
    Segment,
    codes_of,
)
from gemb.vectors import bad_rows

SELF_RECALL_ROWS = 256
SELF_RECALL = 0.9
"""The share of a graph's own rows that it must find again; a sound one finds 0.99 of them."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it was written: the file, and what is wrong in it."""

    file: Path
    what: str


@dataclass(slots=True)
class Verdict:
    """What a verification looked at and found; `notes` are no faults."""

    folder: Path
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    documents: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    @property
    def remedy(self) -> str:
        """What to run, where something is wrong."""
        return f"gemb index rebuild {self.folder}"


def verify(folder: Path | str, on_file: Callable[[Path], None] = lambda path: None) -> Verdict:
    """Everything that is wrong with the index at `folder`; `on_file` hears of each file before it is read.

    Raises UnavailableError if there is no index, GembError where it is none at all, and MachineError where
    the disk is too full or too broken to look.
    """
    folder = Path(folder)
    catalogues.check_is_index(folder)
    verdict = Verdict(folder)
    with _catalogue(folder, verdict) as catalogue:
        if catalogue is not None:
            _check_all(catalogue, verdict, on_file)
    return verdict


def verify_new(folder: Path, documents: int) -> None:
    """Returns if the index just written to `folder` is sound and has so many documents.

    Raises MachineError if not; the files are then of no use.
    """
    verdict = verify(folder)
    if not verdict.is_sound:
        fault = verdict.faults[0]
        raise MachineError(f"{fault.file} is damaged as soon as it is written: {fault.what}; check the disk")
    if verdict.documents != documents:
        raise MachineError(
            f"{folder} has {verdict.documents:,} documents after {documents:,} were written; check the disk"
        )


@contextlib.contextmanager
def _catalogue(folder: Path, verdict: Verdict) -> Iterator[Catalogue | None]:
    """The catalogue of an index, for writing where that is possible: the words can only be checked so."""
    path = folder / catalogues.DATABASE
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Lock(folder / catalogues.LOCK, str(folder)))
            catalogue = Catalogue.open_for_writing(folder)
            stack.callback(catalogue.close_writing)
            if catalogue.settings().words:
                problem = catalogue.words_problem()
                if problem is not None:
                    verdict.faults.append(Fault(path, f"the words do not fit the texts: {problem}"))
        except LockedError:
            verdict.notes.append("a writer is at work; its last commit is looked at, without the words")
            catalogue = None
        except GembError:
            catalogue = None  # read-only, or damaged: the reader tells which
        if catalogue is None:
            try:
                catalogue = Catalogue.open_for_reading(folder)
            except GembError as error:
                if isinstance(error, MismatchError):
                    raise  # another format is no fault
                if isinstance(error, MachineError) and not isinstance(error, DamagedError):
                    raise  # a disk that is full or fails says nothing about the index
                verdict.faults.append(_fault(folder, path, error))
                yield None
                return
            stack.callback(catalogue.close)
        yield catalogue


def _check_all(catalogue: Catalogue, verdict: Verdict, on_file: Callable[[Path], None]) -> None:
    on_file(catalogue.path)
    verdict.files += 1
    verdict.bytes += catalogue.path.stat().st_size
    try:
        catalogue.begin_snapshot()
        for problem in catalogue.schema_problems() + catalogue.integrity_problems():
            verdict.faults.append(Fault(catalogue.path, problem))
        settings, entries = catalogue.settings(), catalogue.segments()
        _check_documents(catalogue, verdict)
    except GembError as error:
        verdict.faults.append(_fault(catalogue.folder, catalogue.path, error))
        return
    try:
        for entry in entries:
            _check_segment(catalogue, settings, entry, verdict, on_file)
        _check_rows(catalogue, settings, entries, verdict)
        _note_orphans(catalogue, entries, verdict)
    except GembError as error:
        verdict.faults.append(_fault(catalogue.folder, catalogue.path, error))
    finally:
        catalogue.roll_back()


def _fault(folder: Path, path: Path, error: GembError) -> Fault:
    """What an error says of a file, or of one in the folder `path`, without the advice to verify."""
    what = str(error).removesuffix(f"; {advice(folder)}")
    if what.startswith(f"{path}/"):
        name, _, what = what.removeprefix(f"{path}/").partition(" ")
        path = path / name
    return Fault(path, what.removeprefix(f"{path} ").removeprefix("is damaged: "))


def _check_documents(catalogue: Catalogue, verdict: Verdict) -> None:
    state = catalogue.state()
    damaged, counts = catalogue.audit()
    if damaged:
        shown = ", ".join(damaged[:3]) + (" ..." if len(damaged) > 3 else "")
        verdict.faults.append(
            Fault(catalogue.path, f"{len(damaged):,} documents do not match their checksums: {shown}")
        )
    verdict.documents, verdict.rows = catalogue.count_documents()
    if (verdict.documents, verdict.rows) != (state.documents, state.rows):
        verdict.faults.append(
            Fault(
                catalogue.path,
                f"{verdict.documents:,} documents with {verdict.rows:,} rows, "
                f"but {state.documents:,} with {state.rows:,} were committed",
            )
        )
    kept = catalogue.field_counts()
    if not damaged and {name: count for name, count in kept.items() if count} != dict(counts):
        verdict.faults.append(Fault(catalogue.path, "the counts of metadata fields do not fit the documents"))


def _check_segment(
    catalogue: Catalogue,
    settings: Settings,
    entry: SegmentEntry,
    verdict: Verdict,
    on_file: Callable[[Path], None],
) -> None:
    """Files first, block by block; what is in them only where all of them are whole."""
    folder = catalogue.folder / catalogues.SEGMENTS / entry.record.name
    try:
        checksums = catalogue.checksums(entry.record)
        segment = Segment(
            folder, entry.record, checksums, settings.layout(), advice=advice(catalogue.folder), cache=None
        )
    except GembError as error:
        verdict.faults.append(_fault(catalogue.folder, folder, error))
        return
    try:
        is_whole = True
        for file in segment.files.values():
            on_file(file.path)
            verdict.files += 1
            verdict.bytes += file.bytes
            for block in file.damaged_blocks().tolist():
                is_whole = False
                begin = block * BLOCK_BYTES
                verdict.faults.append(
                    Fault(
                        file.path, f"bytes {begin:,} to {min(begin + BLOCK_BYTES, file.bytes):,} are damaged"
                    )
                )
        if is_whole:
            verdict.faults += [Fault(folder / name, what) for name, what in _wrong_content(segment)]
    finally:
        segment.close()


def _wrong_content(segment: Segment) -> Iterator[tuple[str, str]]:
    """File and fault where whole files do not fit together."""
    record, layout = segment.record, segment.layout
    keys = segment.keys
    vectors_name = VECTORS[layout.dtype]
    if len(keys) != record.rows or (keys[1:] < keys[:-1]).any():
        yield ROWS, f"{len(keys):,} keys, not {record.rows:,} ascending ones"
    elif (int(keys[0]), int(keys[-1])) != (record.first_key, record.last_key):
        yield (
            ROWS,
            f"keys {keys[0]} to {keys[-1]}, but the catalogue says {record.first_key} to {record.last_key}",
        )
    codes_name = GRAPH if CODES not in segment.files else CODES
    wrong_codes = 0
    for start in range(0, record.rows, PASS_ROWS):
        stop = min(record.rows, start + PASS_ROWS)
        stored = segment.stored_block(start, stop)
        bad = bad_rows(layout.load(stored))
        if bad.size:
            yield vectors_name, f"row {start + int(bad[0]):,} has no direction: NaN, infinity or zeros"
        codes, _ = codes_of(stored, layout, record.code_dims, record.code_step)
        own = segment.codes(np.arange(start, stop))
        wrong_codes += int(np.count_nonzero((own != codes).any(axis=1)))
        segment.let_go(start, stop)
    if wrong_codes:
        yield codes_name, f"{wrong_codes:,} codes are not those of their vectors"
    if record.has_graph:
        share = self_recall(segment)
        if share < SELF_RECALL:
            yield GRAPH, f"the graph finds only {share:.0%} of its own rows"


def self_recall(segment: Segment) -> float:
    """The share of rows, of some spread over a segment, whose own code the graph finds nearest."""
    count = min(segment.rows, SELF_RECALL_ROWS)
    rows = np.linspace(0, segment.rows - 1, count).astype(np.int64)
    codes = segment.codes(rows)
    expansion = (segment.record.graph or {}).get("expansion_search", 0)
    found = segment.graph().nearest(codes, 1, expansion, 1)[:, 0]
    hits = segment.codes(np.maximum(found, 0))
    return float(np.mean((hits == codes).all(axis=1) & (found >= 0))) if count else 1.0


def _check_rows(
    catalogue: Catalogue, settings: Settings, entries: list[SegmentEntry], verdict: Verdict
) -> None:
    """Whether each document has its rows in one segment, and each live row its document."""
    behind = 0
    homeless = 0
    for entry in entries:
        record = entry.record
        if record.first_key <= behind:
            verdict.faults.append(
                Fault(catalogue.path, f"the keys of segment {record.name} overlap those before it")
            )
            return
        homeless += len(catalogue.rows_of_keys(behind + 1, record.first_key - 1)[0])
        behind = record.last_key
        folder = catalogue.folder / catalogues.SEGMENTS / record.name
        try:
            checksums = catalogue.checksums(record)
            segment = Segment(folder, record, checksums, settings.layout(), advice="", cache=None)
        except GembError:
            continue  # listed already
        try:
            keys = segment.keys
            dead = entry.dead_rows()
            live, counts = np.unique(keys if dead is None else keys[~dead], return_counts=True)
        except GembError:
            continue
        finally:
            segment.close()
        wanted, rows = catalogue.rows_of_keys(record.first_key, record.last_key)
        if not (np.array_equal(live, wanted) and np.array_equal(counts, rows)):
            lost, extra = len(np.setdiff1d(wanted, live)), len(np.setdiff1d(live, wanted))
            verdict.faults.append(
                Fault(
                    folder / ROWS,
                    f"{lost:,} documents have no row, {extra:,} documents of rows are gone, "
                    f"{len(wanted) - lost:,} were compared",
                )
            )
    homeless += len(catalogue.rows_of_keys(behind + 1, 2**63 - 1)[0])
    if homeless:
        verdict.faults.append(Fault(catalogue.path, f"{homeless:,} documents have no row in any segment"))


def _note_orphans(catalogue: Catalogue, entries: list[SegmentEntry], verdict: Verdict) -> None:
    folder = catalogue.folder / catalogues.SEGMENTS
    known = {entry.record.name: set(entry.record.files) for entry in entries}
    orphans = sorted(path.name for path in folder.iterdir() if path.name not in known)
    for name, files in known.items():
        if (folder / name).is_dir():
            orphans += sorted(
                f"{name}/{path.name}" for path in (folder / name).iterdir() if path.name not in files
            )
    if orphans:
        verdict.notes.append(
            f"{len(orphans)} leftovers in {catalogues.SEGMENTS}/ ({', '.join(orphans[:3])}); "
            "the next gemb index removes them"
        )
