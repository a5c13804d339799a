"""The last step of a job: finished files move from the work folder to their names.

The list of moves is on the disk before the first one is made; a crash between two moves is healed by
making the rest when the job is run again.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemb.errors import MachineError
from gemb.files import fsync_folder, os_errors_explained, read_json, write_json
from gemb.vectors.layout import OutputFile, check_replaceable

MOVES = "moves.json"
REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class Move:
    """A file or folder of the work folder, the name it is to have, and what must then be found there.

    `bytes` and `sha256` are those of the file; for a folder, those of its file `manifest`.
    """

    source: str
    target: str
    bytes: int
    sha256: str
    manifest: str | None = None


def publish(work: Path, folder: Path, moves: Sequence[Move]) -> list[OutputFile]:
    """Makes the moves from `work` into `folder`, in order, the main file last. Returns what is in place."""
    write_json(work / MOVES, {"moves": moves})
    return complete(work, folder)


def is_publishing(work: Path) -> bool:
    """Whether a run was cut off between its first and its last move."""
    return (work / MOVES).exists()


def complete(work: Path, folder: Path) -> list[OutputFile]:
    """Makes those of the noted moves that were not made yet, and returns all files that are in place."""
    files = []
    for move in (Move(**entry) for entry in read_json(work / MOVES)["moves"]):
        source, target = work / move.source, folder / move.target
        with os_errors_explained(target):
            if source.exists():
                if target.is_dir():
                    make_room(target, work)
                os.replace(source, target)
            main = target if move.manifest is None else target / move.manifest
            size = main.stat().st_size
        if size != move.bytes:
            raise MachineError(f"{main} has {size} bytes but {move.bytes} were written; check the disk")
        files.append(OutputFile(main, size, move.sha256))
    fsync_folder(folder)
    return files


def make_room(folder: Path, work: Path) -> None:
    """Moves an earlier output folder into the work folder; raises GembError if something else is in it."""
    check_replaceable(folder)
    shutil.rmtree(work / REPLACED, ignore_errors=True)
    os.replace(folder, work / REPLACED)
