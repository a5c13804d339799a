"""Flat files with a CRC-32 per block of 256 KiB: written once, mapped, checked when first read.

A block that is damaged is found before a number of it is used; a search pays only for the blocks that it
touches. CRC-32 finds every flipped bit and every run of up to 32 damaged ones.
"""

import mmap
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemb.errors import MachineError
from gemb.files import os_errors_explained, sync_to_disk

BLOCK_BYTES = 1 << 18  # 0.1 ms to check; a rescoring that touches 50 blocks of a cold index pays 6 ms


class DamagedError(MachineError):
    """A file of an index is not what was written; the message names it and what to run."""


class MissingFileError(DamagedError):
    """A file of an index is not there."""


class BlockWriter:
    """A new file that is only appended to; the checksums of its blocks come with it.

    Raises GembError where the file cannot be made or written (disk full, no permission).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._checksums: list[int] = []
        self._crc = 0
        with os_errors_explained(path):
            self._file = path.open("xb", buffering=BLOCK_BYTES)

    def append(self, array: NDArray[Any]) -> None:
        """Adds the bytes of an array, in C order."""
        content = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        with os_errors_explained(self.path):
            self._file.write(content)
        place = 0
        while place < len(content):
            step = min(BLOCK_BYTES - self.bytes % BLOCK_BYTES, len(content) - place)
            self._crc = zlib.crc32(content[place : place + step], self._crc)
            self.bytes += step
            place += step
            if self.bytes % BLOCK_BYTES == 0:
                self._checksums.append(self._crc)
                self._crc = 0

    def finish(self) -> NDArray[np.uint32]:
        """The checksum of each block, once the file is whole and on the disk."""
        with os_errors_explained(self.path):
            self._file.flush()
            sync_to_disk(self._file.fileno())
            self._file.close()
        if self.bytes % BLOCK_BYTES:
            self._checksums.append(self._crc)
            self._crc = 0
        return np.array(self._checksums, dtype="<u4")

    def close(self) -> None:
        """Closes an unfinished file, whose content is then worth nothing."""
        try:
            self._file.close()
        except OSError:
            pass  # what could not be flushed is about to be removed


def block_checksums(path: Path) -> NDArray[np.uint32]:
    """The checksum of each block of a file, which is on the disk afterwards."""
    with os_errors_explained(path), path.open("rb") as file:
        checksums = []
        while block := file.read(BLOCK_BYTES):
            checksums.append(zlib.crc32(block))
        sync_to_disk(file.fileno())
    return np.array(checksums, dtype="<u4")


class CheckedFile:
    """A read-only mapped file whose blocks are compared with their checksums when first read.

    `advice` tells the damage's remedy. Size and times are asked again by `refresh`, so that a file which is
    cut off or written to while it is mapped is found before its bytes are read.

    Raises DamagedError where the file is missing or has another size.
    """

    def __init__(self, path: Path, checksums: NDArray[np.uint32], size: int, advice: str) -> None:
        self.path = path
        self.bytes = size
        self._checksums = checksums
        self._advice = advice
        self._unchecked = np.ones(len(checksums), dtype=bool)
        self._left = len(checksums)
        with os_errors_explained(path, "read"):
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise MissingFileError(f"{path} is missing; {advice}") from error
        self._state = self._asked_state()
        try:
            if self._state[0] != size or -(-size // BLOCK_BYTES) != len(checksums):
                raise self._damaged(f"{self._state[0]:,} bytes, but the catalogue says {size:,}")
            with os_errors_explained(path, "read"):
                self._map = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ) if size else None
        except BaseException:
            os.close(self._descriptor)
            raise
        self.content = memoryview(self._map if self._map is not None else b"")
        """The mapped bytes, not yet checked."""

    def array(self, dtype: np.dtype[Any] | str, width: int | None = None, offset: int = 0) -> NDArray[Any]:
        """The file's numbers from byte `offset` on, [n] or [rows, width], mapped and not yet checked."""
        numbers = (
            np.frombuffer(self.content, dtype=dtype, offset=offset) if self.bytes else np.empty(0, dtype)
        )
        return numbers if width is None else numbers.reshape(-1, width)

    def check(self, start: int, stop: int) -> None:
        """Returns if the bytes start..stop are what was written. Raises DamagedError if not."""
        if self._left and start < stop:
            first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
            if self._unchecked[first:last].any():
                self._check_blocks(first + np.flatnonzero(self._unchecked[first:last]))

    def check_rows(self, rows: NDArray[np.int64], row_bytes: int, offset: int = 0) -> None:
        """Returns if the rows are what was written; row r begins at byte offset + r * row_bytes."""
        if not self._left or not rows.size:
            return
        begins = rows * row_bytes + offset
        touched = np.concatenate([begins // BLOCK_BYTES, (begins + row_bytes - 1) // BLOCK_BYTES])
        if row_bytes > BLOCK_BYTES:  # rows that span more than two blocks
            for begin in begins.tolist():
                self.check(begin, begin + row_bytes)
            return
        touched = touched[self._unchecked[touched]]
        if touched.size:
            self._check_blocks(np.unique(touched))

    def check_all(self) -> None:
        """Returns if every byte is what was written. Raises DamagedError if not."""
        self.check(0, self.bytes)

    def damaged_blocks(self) -> NDArray[np.int64]:
        """The numbers of all blocks that are not what was written, read anew."""
        found = [
            block
            for block, wanted in enumerate(self._checksums.tolist())
            if zlib.crc32(self.content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) != wanted
        ]
        return np.array(found, dtype=np.int64)

    def refresh(self) -> bool:
        """Whether the file is untouched since it was opened; a touched one is checked again when read.

        Raises DamagedError if its size changed.
        """
        state = self._asked_state()
        if state == self._state:
            return True
        if state[0] != self.bytes:
            raise self._damaged(f"it was {self.bytes:,} bytes long and is now {state[0]:,}")
        self._state = state
        self._unchecked[:] = True
        self._left = len(self._unchecked)
        return False

    @property
    def identity(self) -> tuple[int, int, int, int, int]:
        """Size, modification and change time (ns), device and inode: what tells that it is the same file."""
        return self._state

    def let_go(self, start: int, stop: int) -> None:
        """Gives back the memory of the pages among the bytes start..stop; they are read again if needed."""
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Lets go of the file; the mapping goes with the last array over it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_blocks(self, blocks: NDArray[np.int64]) -> None:
        for block in blocks.tolist():
            content = self.content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if zlib.crc32(content) != int(self._checksums[block]):
                raise self._damaged(f"the checksum of block {block} does not match")
            self._unchecked[block] = False
            self._left -= 1

    def _asked_state(self) -> tuple[int, int, int, int, int]:
        with os_errors_explained(self.path, "read"):
            state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self.path} is damaged: {what}; {self._advice}")
