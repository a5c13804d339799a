"""A damaged index made whole from what is intact.

Documents whose row in the catalogue, row keys and vectors all match their checksums go into a new index
beside the old one, the vectors byte for byte; codes, graphs and words are made anew. The new index is
verified before it takes the old one's place; the old one is kept under another name.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import Lock
from gemb.store import catalogue as catalogues
from gemb.store.blocks import BLOCK_BYTES, CheckedFile, DamagedError
from gemb.store.catalogue import Catalogue, SegmentEntry, Settings, advice
from gemb.store.documents import StoredDocument
from gemb.store.replacement import free_name, put_in_place, settle, settle_missing
from gemb.store.segments import ROWS, VECTORS, spread
from gemb.store.verify import verify_new
from gemb.store.writer import OnStep, Step, Writer

ENDING = "damaged"
DOCUMENTS_A_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """How a rebuild went: documents kept and lost, and where the damaged index was put."""

    documents: int
    lost: int
    damaged: Path


def rebuild(folder: Path | str, *, threads: int = 1, on_step: OnStep = lambda step: None) -> Rebuilt:
    """Makes the index at `folder` whole from what is intact; `gemb index` adds again what was lost.

    Raises DamagedError where the catalogue tells nothing any more, MachineError where there is no room.
    """
    folder = Path(folder)
    fresh = catalogues.replacement_of(folder, "rebuild")
    settle_missing(fresh, folder)
    catalogues.check_is_index(folder)
    with Lock(folder / catalogues.LOCK, str(folder)) as lock:
        settle(fresh, folder, lambda: free_name(folder, ENDING))
        try:
            documents, committed = _save_intact(folder, fresh, threads, on_step)
            verify_new(fresh, documents)
        except GembError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        damaged = free_name(folder, ENDING)
        put_in_place(fresh, folder, damaged, lock)
    return Rebuilt(documents, max(0, committed - documents), damaged)


def _save_intact(folder: Path, fresh: Path, threads: int, on_step: OnStep) -> tuple[int, int]:
    """Writes the new index; returns how many documents it has, and how many were committed to the old one."""
    with contextlib.ExitStack() as stack:
        try:
            catalogue = Catalogue.open_for_reading(folder, is_complete=False)
            stack.callback(catalogue.close)
            settings, entries = catalogue.settings(), catalogue.segments()
        except DamagedError as error:
            reason = str(error).removesuffix(f"; {advice(folder)}")
            raise DamagedError(
                f"nothing can be saved: {reason}; make it anew with gemb index INPUT -o {folder} --overwrite"
            ) from error
        committed = _committed(catalogue)
        with Writer.open(fresh, settings, threads=threads, on_step=on_step) as writer:
            for entry in entries:
                for documents, stored in _intact(catalogue, settings, entry):
                    writer.put_stored(documents, stored)
                    on_step(Step("saving documents", writer.documents, committed))
            writer.commit()
            writer.compact()
            return writer.documents, committed


def _committed(catalogue: Catalogue) -> int:
    """How many documents the last commit had; those that are listed where that is not known any more."""
    try:
        return catalogue.state().documents
    except DamagedError:
        with contextlib.suppress(DamagedError):
            return catalogue.count_documents()[0]
    return 0


def _intact(
    catalogue: Catalogue, settings: Settings, entry: SegmentEntry
) -> Iterator[tuple[list[StoredDocument], NDArray[np.generic]]]:
    """The documents of a segment that are whole, with their stored rows, block by block."""
    record = entry.record
    layout = settings.layout()
    folder = catalogue.folder / catalogues.SEGMENTS / record.name
    try:
        checksums = catalogue.checksums(record)
        files = [
            CheckedFile(folder / name, checksums[name], record.files[name], advice(catalogue.folder))
            for name in (ROWS, VECTORS[layout.dtype])
        ]
    except (GembError, KeyError):
        return  # without keys or vectors there is nothing to save here
    rows_file, vectors_file = files
    try:
        keys: NDArray[np.uint64] = rows_file.array("<u8")
        stored = vectors_file.array(layout.stored_dtype, layout.stored_width)
        live = np.ones(record.rows, dtype=bool)
        dead = entry.dead_rows()
        if dead is not None:
            live &= ~dead
        _strike(live, rows_file, 8)
        _strike(live, vectors_file, layout.row_bytes)
        own, first = np.unique(keys[live], return_index=True)
        places = np.flatnonzero(live)
        stops = np.append(first[1:], len(places))
        for start in range(0, len(own), DOCUMENTS_A_BLOCK):
            part = slice(start, start + DOCUMENTS_A_BLOCK)
            found = _readable(catalogue, own[part].tolist())
            whole = [
                place
                for place, (key, rows) in enumerate(
                    zip(own[part].tolist(), (stops[part] - first[part]).tolist(), strict=True)
                )
                if key in found and found[key].rows == rows
            ]
            if whole:
                chosen = start + np.array(whole)
                rows = places[spread(first[chosen], stops[chosen])]
                yield [found[int(key)] for key in own[chosen]], stored[rows]
    finally:
        for file in files:
            file.close()


def _strike(live: NDArray[np.bool_], file: CheckedFile, row_bytes: int) -> None:
    """Takes out the rows that have a byte in a damaged block."""
    for block in file.damaged_blocks().tolist():
        begin, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
        live[begin // row_bytes : -(-end // row_bytes)] = False


def _readable(catalogue: Catalogue, keys: Sequence[int]) -> dict[int, StoredDocument]:
    """The documents that can be read and match their checksums; a damaged one is looked for by halves."""
    try:
        return catalogue.documents(keys)
    except GembError:
        if len(keys) == 1:
            return {}
    half = len(keys) // 2
    return _readable(catalogue, keys[:half]) | _readable(catalogue, keys[half:])
