"""Files that are whole or absent: atomic writes, checksums, locks, the journal of a resumable job.

Everything here is for POSIX systems. An `OSError` leaves this module as a `GembError` that names the
path and the next step; only `BrokenPipeError` passes, because a closed pipe is nobody's mistake.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from gemb.errors import GembError, LockedError, MachineError

MACHINE_FAILURES = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew past a size limit",
    errno.EIO: "input/output error",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on this machine",
}
MACHINE_REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space or raise the quota, then run the same command again",
    errno.EFBIG: "raise it (ulimit -f) or write smaller parts to a folder, then run the same command again",
    errno.EIO: "check the disk or the network drive, then run the same command again",
    errno.EMFILE: "raise the limit (ulimit -n), then run the same command again",
    errno.ENFILE: "close other programs, then run the same command again",
}
USER_MISTAKES = {
    errno.EACCES: "permission denied; change its mode or choose another path",
    errno.EPERM: "not permitted; change its mode or choose another path",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "it is a folder, not a file; check the path",
    errno.ENOTEMPTY: "the folder is not empty; choose another path",
    errno.EEXIST: "it exists; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "its symbolic links go round in a circle; check the path",
    errno.EXDEV: "it is on another file system; choose a path on the same one",
    errno.EBUSY: "it is in use, maybe a mount point; choose another path",
}
LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
CHUNK_BYTES = 1 << 20


def readable_bytes(count: int) -> str:
    """A size for people: `812 B`, `3.1 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def explain_os_error(error: OSError, path: Path | str, action: str = "write") -> GembError:
    """The one message for a failed system call on `path`; `action` is the verb: read, write, lock.

    A `MachineError` where the machine failed (disk full, quota, input/output error), a plain
    `GembError` where the user can choose differently (no permission, read-only, no such folder).
    """
    number = error.errno
    if number in MACHINE_FAILURES:
        what = MACHINE_FAILURES[number]
        if number == errno.ENOSPC:
            with contextlib.suppress(OSError):
                what += f" ({readable_bytes(free_bytes(path))} free)"
        return MachineError(f"cannot {action} {path}: {what}; {MACHINE_REMEDIES[number]}")
    if number in USER_MISTAKES:
        return GembError(f"cannot {action} {path}: {USER_MISTAKES[number]}")
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    return MachineError(f"cannot {action} {path}: {reason}; check the disk, then run the same command again")


@contextlib.contextmanager
def os_errors_explained(path: Path | str, action: str = "write") -> Iterator[None]:
    """Turns an `OSError` of the block into what `explain_os_error` says; a closed pipe passes."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise explain_os_error(error, path, action) from error


def existing_ancestor(path: Path | str) -> Path:
    """The path itself where it exists, else its nearest folder that does."""
    found = Path(os.path.abspath(path))
    while not found.exists() and found != found.parent:
        found = found.parent
    return found


def free_bytes(path: Path | str) -> int:
    """Bytes that this user may still write on the file system of `path`, which need not exist yet."""
    return shutil.disk_usage(existing_ancestor(path)).free


def check_writable(path: Path | str, needs_bytes: int = 0) -> None:
    """Raises unless `path` can be made and holds `needs_bytes`; to ask before the expensive part.

    A file is really made and removed beside `path` (in its nearest folder that exists): mode bits
    tell nothing about root, access lists and read-only mounts.

    Raises GembError without permission, MachineError where the space is too small.
    """
    with os_errors_explained(path):
        ancestor = existing_ancestor(path)
        folder = ancestor if ancestor != Path(os.path.abspath(path)) else ancestor.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if ancestor.is_file() and not os.access(ancestor, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = free_bytes(folder)
    if needs_bytes > free:
        raise MachineError(
            f"{path} needs about {readable_bytes(needs_bytes)}, but {readable_bytes(free)} is free; "
            "free some space or choose another path"
        )


def sync_to_disk(descriptor: int) -> None:
    """Returns once the file's bytes are on the disk itself."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync on macOS stops at the drive's own cache
    else:
        os.fsync(descriptor)


def fsync_folder(folder: Path | str) -> None:
    """Returns once the names in `folder` (new, renamed, removed files) are on the disk.

    File systems that cannot sync a folder (some network drives) are left to their own promises.
    """
    with os_errors_explained(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}:
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, whole and on the disk.

    Until then `path` is untouched, and after an error too. The mode bits of an existing file are
    kept, a new one follows the umask; a symbolic link is followed, not replaced.
    """
    target = Path(os.path.realpath(path))
    # 200: leaves room for the ending within the 255 bytes of a name
    temporary = target.with_name(f".{os.fsdecode(os.fsencode(target.name)[:200])}.{secrets.token_hex(4)}.tmp")
    with os_errors_explained(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                with contextlib.suppress(FileNotFoundError):
                    os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
                yield file
                file.flush()
                sync_to_disk(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(target.parent)


def write_json(path: Path | str, value: object) -> None:
    """Writes `value` as indented JSON (UTF-8, a newline at the end), atomically; dataclasses are objects."""
    with atomic_write(path) as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises GembError where it cannot be read, is no JSON (with the line) or no object.
    """
    with os_errors_explained(path, "read"):
        content = Path(path).read_bytes()
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise GembError(
            f"{path}:{error.lineno}: not JSON ({error.msg.lower()}); is the file cut off?"
        ) from error
    if not isinstance(value, dict):
        raise GembError(f"{path}: a JSON {type(value).__name__}, not an object; is it the right file?")
    return value


def file_digest(path: Path | str, algorithm: str = "sha256") -> str:
    """The checksum of a file's bytes as hexadecimal text, read as a stream; "sha256" or "blake2b"."""
    with os_errors_explained(path, "read"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


class Lock:
    """One holder at a time of a path, across processes; the lock goes with the process, however it ends.

    The lock is the kernel's (flock), not the file's being there: a file left by a killed process is
    no obstacle. The file tells process, host, start and command to whoever is refused.

        with Lock(Path("docs.npy.lock"), "docs.npy"):
            ...

    `subject` is what the message calls the locked thing. `wait_seconds` is how long to wait for
    another holder; `on_wait` is told once who that is.

    Raises LockedError (exit code 6) where another holder stays, MachineError on a drive without locks.
    """

    POLL_SECONDS = 0.2

    def __init__(
        self,
        path: Path | str,
        subject: str,
        wait_seconds: float = 0.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.subject = subject
        self.wait_seconds = wait_seconds
        self.on_wait = on_wait
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Returns when the lock is held; raises LockedError after `wait_seconds`."""
        if self._descriptor is not None:
            raise ValueError(f"{self.path} is held already by this object")
        deadline = time.monotonic() + self.wait_seconds
        told = False
        while True:
            with os_errors_explained(self.path, "lock"):
                if self._try():
                    return
                holder = self._holder()
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockedError(
                    f"{self.subject} is held by {holder}; wait for it, or pass --wait-lock SECONDS"
                )
            if self.on_wait is not None and not told:
                self.on_wait(f"waiting up to {self.wait_seconds:g} s for {self.subject}, held by {holder}")
                told = True
            time.sleep(min(self.POLL_SECONDS, left))

    def release(self) -> None:
        """Gives the lock back and removes its file; nothing happens where it is not held."""
        if self._descriptor is None:
            return
        # Removed while held: a process that opened this file before will find, once it has the lock,
        # that the path no longer leads to it, and start again with the new file.
        # What lies at the path of a folder that was moved meanwhile is another holder's.
        try:
            mine = os.fstat(self._descriptor)
            with contextlib.suppress(OSError):  # a file that stays is no obstacle to anyone
                on_path = self.path.stat()
                if (on_path.st_dev, on_path.st_ino) == (mine.st_dev, mine.st_ino):
                    self.path.unlink()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _try(self) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in LOCKS_UNSUPPORTED:
                    raise
                raise MachineError(
                    f"cannot lock {self.path}: this drive has no file locks; write to a local disk"
                ) from error
            try:
                on_path = self.path.stat()
            except FileNotFoundError:
                return self._try()
            mine = os.fstat(descriptor)
            if (on_path.st_dev, on_path.st_ino) != (mine.st_dev, mine.st_ino):
                return self._try()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._card(), 0)
            self._descriptor, descriptor = descriptor, -1
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @staticmethod
    def _card() -> bytes:
        return orjson.dumps(
            {
                "process": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
                "command": shlex.join(sys.argv),
            }
        )

    def _holder(self) -> str:
        try:
            card = orjson.loads(self.path.read_bytes())
            place = "" if card["host"] == socket.gethostname() else f" on {card['host']}"
            return f"process {card['process']}{place} since {card['since']}"
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
            return "another process"  # it holds the lock but has not written its card yet


class Journal:
    """An append-only file of JSON objects, one a line, each on the disk before `append` returns.

    Every line carries a CRC-32 over itself and all lines before it, so a line that is changed, lost
    or out of order is found. A last line that a crash left half-written is cut off when the
    journal is opened; it was never promised to anyone.

    Raises GembError where a line before the last one is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.count = 0
        self.last: dict[str, Any] | None = None
        self._crc = 0
        self._size = 0
        with os_errors_explained(self.path):
            is_new = not self.path.exists()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                for entry, crc, size in self._read():
                    self.last, self._crc, self._size = entry, crc, size
                    self.count += 1
                os.ftruncate(self._descriptor, self._size)
                sync_to_disk(self._descriptor)
            except BaseException:
                self.close()
                raise
            if is_new:
                fsync_folder(self.path.parent)

    def append(self, entry: Mapping[str, object]) -> None:
        """Adds one object (not empty; dataclasses inside are objects) and returns once it is on the disk."""
        body = orjson.dumps(entry)
        if body == b"{}" or "crc32" in entry:
            raise ValueError("a journal entry has keys, and none of them is crc32")
        crc = zlib.crc32(body, self._crc)
        line = b'%b,"crc32":"%08x"}\n' % (body[:-1], crc)
        with os_errors_explained(self.path):
            write_fully(self._descriptor, memoryview(line), self._size)
            sync_to_disk(self._descriptor)
        self._size += len(line)
        self._crc = crc
        self.count += 1
        self.last = orjson.loads(body)

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries from the first on, read from the file again, so that memory stays constant."""
        for entry, _, end in self._read():
            if end > self._size:
                return
            yield entry

    def close(self) -> None:
        """Closes the file; the entries are on the disk already."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Yields each sound entry with the checksum and the file size up to and with it."""
        crc = size = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                # ...,"crc32":"89abcdef"}\n
                body, tail = line[:-21] + b"}", line[-21:]
                crc = zlib.crc32(body, crc)
                if tail != b',"crc32":"%08x"}\n' % crc:
                    if file.read(1):
                        raise GembError(
                            f"{self.path}:{number}: the checksum does not match; "
                            f"remove {self.path.parent} to start again"
                        )
                    return
                size += len(line)
                yield orjson.loads(body), crc, size


def write_fully(descriptor: int, content: memoryview, offset: int) -> None:
    """Writes all of `content` (contiguous) at `offset`, however many system calls it takes."""
    view = content.cast("B") if content.nbytes else content
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]
