"""A damaged index made whole from what is intact.

Documents whose row in the catalogue, row keys and vectors all match their checksums go into a new index
beside the old one, the vectors byte for byte; codes, graphs and words are made anew. Files that were cut off
are read up to there. The new index is
verified before it takes the old one's place; the old one is kept under another name.
"""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import Lock, os_errors_explained
from gemb.store import catalogue as catalogues
from gemb.store.blocks import BLOCK_BYTES, DamagedError
from gemb.store.catalogue import Catalogue, Settings, advice
from gemb.store.documents import StoredDocument
from gemb.store.replacement import free_name, put_in_place, settle, settle_missing
from gemb.store.segments import ROWS, VECTORS, spread
from gemb.store.verify import verify_new
from gemb.store.writer import OnStep, Step, Writer

ENDING = "damaged"
DOCUMENTS_A_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """How a rebuild went: documents kept and lost, and where the damaged index was put.

    Where the catalogue no longer tells how many documents there were, `lost` is at most so many.
    """

    documents: int
    lost: int
    damaged: Path


def rebuild(folder: Path | str, *, threads: int = 1, on_step: OnStep = lambda step: None) -> Rebuilt:
    """Makes the index at `folder` whole from what is intact; `gemb index` adds again what was lost.

    Killed at any moment, the damaged or the new index is at `folder`.

    Raises DamagedError where the catalogue tells nothing any more, MachineError where there is no room.
    """
    folder = Path(folder)
    fresh = catalogues.replacement_of(folder, "rebuild")
    settle_missing(fresh, folder)
    catalogues.check_is_index(folder)
    with Lock(folder / catalogues.LOCK, str(folder)) as lock:
        settle(fresh, folder, lambda: free_name(folder, ENDING))
        try:
            documents, lost = _save_intact(folder, fresh, threads, on_step)
            verify_new(fresh, documents)
        except GembError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        damaged = free_name(folder, ENDING)
        put_in_place(fresh, folder, damaged, lock)
    return Rebuilt(documents, lost, damaged)


def _save_intact(folder: Path, fresh: Path, threads: int, on_step: OnStep) -> tuple[int, int]:
    """Writes the new index; returns how many documents it has, and how many were lost."""
    with contextlib.ExitStack() as stack:
        try:
            catalogue = Catalogue.open_damaged(folder)
            stack.callback(catalogue.close)
            settings = catalogue.settings()
        except DamagedError as error:
            reason = str(error).removesuffix(f"; {advice(folder)}")
            raise DamagedError(
                f"nothing can be saved: {reason}; make it anew with gemb index INPUT -o {folder} --overwrite"
            ) from error
        segments = _saved_segments(catalogue, settings)
        committed = _committed(catalogue, segments)
        with Writer.open(fresh, settings, threads=threads, on_step=on_step) as writer:
            for segment in segments:
                for documents, stored in _intact(catalogue, segment):
                    writer.put_stored(documents, stored)
                    on_step(Step("saving documents", writer.documents, committed))
            writer.commit()
            writer.compact()
            return writer.documents, max(0, committed - writer.documents)


@dataclass(frozen=True, slots=True)
class _Saved:
    """What is left of a segment: keys[N] and stored[N, W], of which those rows count that are `whole`[N].

    Dead rows are among them; their documents are not in the catalogue any more.
    """

    keys: NDArray[np.uint64]
    stored: NDArray[Any]
    whole: NDArray[np.bool_]


def _saved_segments(catalogue: Catalogue, settings: Settings) -> list[_Saved]:
    """What is left of each segment, by their keys; its end and its entry in the catalogue may be lost."""
    layout = settings.layout()
    found = []
    for name, checksums in catalogue.readable_checksums().items():
        folder = catalogue.folder / catalogues.SEGMENTS / name
        paths = [folder / ROWS, folder / VECTORS[layout.dtype]]
        if not all(path.name in checksums and path.is_file() and path.stat().st_size for path in paths):
            continue  # without keys or vectors there is nothing to save
        with os_errors_explained(folder, "read"):
            contents = [np.memmap(path, np.uint8, "r") for path in paths]
        count = min(len(contents[0]) // 8, len(contents[1]) // layout.row_bytes)
        whole = np.ones(count, dtype=bool)
        for path, content, row_bytes in zip(paths, contents, (8, layout.row_bytes), strict=True):
            _strike(whole, content, checksums[path.name], row_bytes)
        keys = contents[0][: count * 8].view("<u8")
        stored = contents[1][: count * layout.row_bytes].view(layout.stored_dtype)
        found.append(_Saved(keys, stored.reshape(count, layout.stored_width), whole))
    return sorted((one for one in found if one.whole.any()), key=lambda one: int(one.keys[one.whole][0]))


def _strike(
    whole: NDArray[np.bool_], content: NDArray[np.uint8], checksums: NDArray[np.uint32], row_bytes: int
) -> None:
    """Takes out the rows that have a byte in a block which is not what was written."""
    for start in range(0, len(content), BLOCK_BYTES):
        block = start // BLOCK_BYTES
        end = start + BLOCK_BYTES
        if block >= len(checksums) or zlib.crc32(content[start:end].data) != int(checksums[block]):
            whole[start // row_bytes : -(-end // row_bytes)] = False


def _committed(catalogue: Catalogue, segments: Sequence[_Saved]) -> int:
    """How many documents there were; where no place tells it any more, at most how many."""
    with contextlib.suppress(DamagedError):
        return catalogue.state().documents
    with contextlib.suppress(DamagedError):
        return catalogue.count_documents()[0]
    return sum(len(np.unique(segment.keys)) for segment in segments)


def _intact(
    catalogue: Catalogue, segment: _Saved
) -> Iterator[tuple[list[StoredDocument], NDArray[np.generic]]]:
    """The documents of a segment that are whole, with their stored rows, block by block."""
    places = np.flatnonzero(segment.whole)
    own, first = np.unique(segment.keys[places], return_index=True)
    stops = np.append(first[1:], len(places))
    for start in range(0, len(own), DOCUMENTS_A_BLOCK):
        part = slice(start, start + DOCUMENTS_A_BLOCK)
        found = _readable(catalogue, own[part].tolist())
        counts = (stops[part] - first[part]).tolist()
        whole = [
            place
            for place, (key, rows) in enumerate(zip(own[part].tolist(), counts, strict=True))
            if key in found and found[key].rows == rows
        ]
        if whole:
            chosen = start + np.array(whole)
            rows = places[spread(first[chosen], stops[chosen])]
            yield [found[int(key)] for key in own[chosen]], segment.stored[rows]


def _readable(catalogue: Catalogue, keys: Sequence[int]) -> dict[int, StoredDocument]:
    """The documents that can be read and match their checksums; a damaged one is looked for by halves."""
    try:
        return catalogue.documents(keys)
    except GembError:
        if len(keys) == 1:
            return {}
    half = len(keys) // 2
    return _readable(catalogue, keys[:half]) | _readable(catalogue, keys[half:])
