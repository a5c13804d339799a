"""A file that grows at its end and can be cut back to any end it once had.

The end (bytes after the header, and a CRC-32 over them) is a value that the caller keeps, so that
a write which did not complete leaves nothing to repair: the next one starts at the same end.
"""

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemb.errors import GembError, MachineError
from gemb.files import CHUNK_BYTES, os_errors_explained, sync_to_disk, write_fully


class End(NamedTuple):
    """Where content ends: its length without the header, and the CRC-32 over it."""

    bytes: int = 0
    crc32: int = 0


NOTHING = End()


def damaged(path: Path, work: Path) -> MachineError:
    """The error for a file of a job's folder `work` whose content is not what was written."""
    return MachineError(
        f"{path} does not hold what was written to it; check the disk, then remove {work} to start again"
    )


class AppendFile:
    """A header of fixed size, then content up to an `End`.

    Opening cuts off what lies after `end`, and checks what lies before it. `work` is the folder of the
    whole job, which a damaged file makes useless.

    Raises GembError where the file is shorter than `end`, or its content is not what was written.
    """

    def __init__(self, path: Path, work: Path, header: bytes = b"", end: End = NOTHING) -> None:
        self.path = path
        self.work = work
        self._offset = len(header)
        with os_errors_explained(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if os.fstat(self._descriptor).st_size < self._offset + end.bytes and end.bytes:
                    raise GembError(f"{path} is shorter than it was; remove {work} to start again")
                os.ftruncate(self._descriptor, self._offset + end.bytes)
                write_fully(self._descriptor, memoryview(header), 0)
                self._check(end)
            except BaseException:
                self.close()
                raise

    def write(self, end: End, *buffers: memoryview) -> End:
        """Puts the buffers after `end` and returns the new end; nothing else changes if it fails."""
        size, crc = end
        with os_errors_explained(self.path):
            for view in buffers:
                write_fully(self._descriptor, view, self._offset + size)
                size += view.nbytes
                crc = zlib.crc32(view, crc)
        return End(size, crc)

    def sync(self) -> None:
        """Returns once all that was written is on the disk."""
        with os_errors_explained(self.path):
            sync_to_disk(self._descriptor)

    def cut(self, end: End) -> None:
        """Ends the file at `end`; what a failed write left behind it goes."""
        with os_errors_explained(self.path):
            os.ftruncate(self._descriptor, self._offset + end.bytes)

    def seal(self, end: End, header: bytes = b"") -> str:
        """Ends the file at `end`, under the final header (of the same length), on the disk; reads it back.

        Returns the SHA-256 of the whole file. Raises MachineError if it is not what was written.
        """
        if len(header) != self._offset:
            raise ValueError(f"the header had {self._offset} bytes, now {len(header)}")
        with os_errors_explained(self.path):
            self.cut(end)
            write_fully(self._descriptor, memoryview(header), 0)
            sync_to_disk(self._descriptor)
            digest = hashlib.sha256(header)
            self._check(end, digest.update)
            return digest.hexdigest()

    def _check(self, end: End, also: Callable[[bytes], None] | None = None) -> None:
        """Reads the content up to `end` and compares its CRC-32; `also` sees every chunk."""
        crc = 0
        position = self._offset
        last = self._offset + end.bytes
        while position < last:
            chunk = os.pread(self._descriptor, min(CHUNK_BYTES, last - position), position)
            if not chunk:
                break
            if also is not None:
                also(chunk)
            crc = zlib.crc32(chunk, crc)
            position += len(chunk)
        if position != last or crc != end.crc32:
            raise damaged(self.path, self.work)

    def close(self) -> None:
        """Closes the file; what was synced stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
