"""A whole index put in the place of another one, so that no kill leaves less than one of them there.

The new index is made beside the old one, as `fresh`. A mark in it says that it is whole. Then the two change
their names, in one step where the system has one (Linux, macOS), so that the name never leads nowhere; else
in two renames. `settle` ends what a killed process left, and tells by the mark which of the two is which.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from gemb.files import Lock, fsync_folder, os_errors_explained
from gemb.store.catalogue import LOCK, REPLACES

_SWAP_FLAG = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_NO_SWAP = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def put_in_place(fresh: Path, folder: Path, kept: Path, lock: Lock) -> None:
    """When this returns, what was at `fresh` is at `folder`, and what was there is at `kept`, on the disk.

    All three lie in one folder. `lock` is that of the old index, whose file goes with it; the new one is
    locked too until all is done.
    """
    with os_errors_explained(folder), Lock(fresh / LOCK, str(folder)) as own:
        (fresh / REPLACES).touch()
        fsync_folder(fresh)
        if _swap(fresh, folder):
            own.path, lock.path = folder / LOCK, fresh / LOCK
            fsync_folder(folder.absolute().parent)
            os.rename(fresh, kept)
            lock.path = kept / LOCK
        else:
            os.rename(folder, kept)
            lock.path = kept / LOCK
            os.rename(fresh, folder)
            own.path = folder / LOCK
        fsync_folder(folder.absolute().parent)
        (folder / REPLACES).unlink()


def settle(fresh: Path, folder: Path, kept: Callable[[], Path]) -> Path | None:
    """Ends a replacement that was killed; returns where the old index was put, if that was still to do.

    A new index that is not whole is removed; `kept` gives the name for the old one. The caller holds the
    writer's lock of `folder`.
    """
    with os_errors_explained(folder):
        if not fresh.exists():
            (folder / REPLACES).unlink(missing_ok=True)
            return None
        if not (folder / REPLACES).exists():
            shutil.rmtree(fresh)
            return None
        place = kept()
        os.rename(fresh, place)
        fsync_folder(folder.absolute().parent)
        (folder / REPLACES).unlink()
        return place


def settle_missing(fresh: Path, folder: Path) -> None:
    """Puts a whole new index in its place where a kill between two renames left nothing there."""
    if not folder.exists() and (fresh / REPLACES).exists():
        with os_errors_explained(folder), contextlib.suppress(FileNotFoundError):  # another one was quicker
            os.rename(fresh, folder)
            fsync_folder(folder.absolute().parent)


def free_name(folder: Path, ending: str) -> Path:
    """The first of NAME.ending, NAME.ending-2, NAME.ending-3, ... that is not there."""
    found, number = folder.with_name(f"{folder.name}.{ending}"), 1
    while found.exists() or found.is_symlink():
        number += 1
        found = folder.with_name(f"{folder.name}.{ending}-{number}")
    return found


def _swap(one: Path, other: Path) -> bool:
    """Whether the two changed their names, in one step; False where the system or the drive cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = [os.fsencode(path) for path in (one, other)]
    here = -100 if sys.platform == "linux" else -2  # AT_FDCWD
    swap = getattr(library, "renameat2" if sys.platform == "linux" else "renameatx_np", None)
    if swap is None:
        return False
    if swap(here, names[0], here, names[1], ctypes.c_uint(_SWAP_FLAG)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_SWAP:
        return False
    raise OSError(number, os.strerror(number))
