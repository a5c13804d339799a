import errno
import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemb import files
from gemb.errors import Exit, GembError, LockedError, MachineError
from gemb.files import (
    Journal,
    Lock,
    atomic_write,
    check_writable,
    explain_os_error,
    file_digest,
    free_bytes,
    os_errors_explained,
    read_json,
    readable_bytes,
    write_json,
)

HOLDER = """
import sys
import tempfile
from pathlib import Path
from gemb.files import Lock
with Lock(Path(sys.argv[1]), "docs.npy"):
    print("held", flush=True)
    sys.stdin.readline()
"""


class Holder:
    """Another process that holds a lock until it is told to let go, or killed."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def let_go(self) -> None:
        self.process.communicate(b"\n", timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


@pytest.fixture
def small_file_limit() -> Iterator[int]:
    """No file of this process can grow past so many bytes: a full disk that needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Atomic writes


def test_an_atomic_write_is_whole_or_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "docs.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:  # noqa: PT012  # the block is the claim
        file.write(b"half of the n")
        assert path.read_bytes() == b"old"
        raise KeyError
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["docs.json"]


def test_an_atomic_write_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")

    def renamed(source: Any, target: Any) -> None:  # noqa: ANN401  # as in os
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_write(tmp_path / "docs.json") as file:
        file.write(b"new")
    assert steps == ["file", "rename", "folder"]


def test_an_atomic_write_keeps_mode_bits_and_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "docs.json"
    before = os.umask(0o027)
    try:
        with atomic_write(path):
            pass
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        with atomic_write(path):
            pass
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o604


def test_an_atomic_write_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "docs.json"
    link.symlink_to("elsewhere/real.json")
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "real.json").read_bytes() == b"new"


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127 + "x")
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.faults
def test_a_write_past_the_size_limit_is_one_message_and_leaves_nothing(
    tmp_path: Path, small_file_limit: int
) -> None:
    path = tmp_path / "docs.json"
    with pytest.raises(MachineError) as caught, atomic_write(path) as file:
        file.write(bytes(small_file_limit + 1))
    assert str(caught.value) == (
        f"cannot write {path}: the file grew past a size limit; raise it (ulimit -f) "
        "or write smaller parts to a folder, then run the same command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"model": "minilm", "grüße": [1, 2.5, None], "nested": {"empty": {}}}
    write_json(tmp_path / "job.json", value)
    assert read_json(tmp_path / "job.json") == value
    assert (tmp_path / "job.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n"b"', "{path}:2: not JSON (unexpected end of data); is the file cut off?"),
        (b"[1]", "{path}: a JSON list, not an object; is it the right file?"),
    ],
)
def test_a_damaged_json_file_is_told_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(content)
    with pytest.raises(GembError) as caught:
        read_json(path)
    assert str(caught.value) == message.format(path=path)


def test_a_missing_json_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        read_json(tmp_path / "job.json")
    assert str(caught.value) == f"cannot read {tmp_path}/job.json: no such file or folder; check the path"


def test_a_digest_is_that_of_the_standard_tools(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1; RFC 7693, appendix A
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(path, "blake2b").startswith("ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b7")


# Errors of the system


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EDQUOT, MachineError, "the disk quota is used up; free some space or raise the quota, "),
        (errno.EIO, MachineError, "input/output error; check the disk or the network drive, "),
        (errno.EROFS, GembError, "the file system is read-only; choose another path"),
        (errno.EACCES, GembError, "permission denied; change its mode or choose another path"),
        (errno.ENOENT, GembError, "no such file or folder; check the path"),
        (errno.ETXTBSY, MachineError, "text file busy; check the disk, "),
    ],
)
def test_an_error_of_the_system_is_told_with_the_next_step(
    number: int, kind: type[GembError], message: str
) -> None:
    told = explain_os_error(OSError(number, os.strerror(number)), Path("out/docs.npy"))
    assert type(told) is kind
    if message.endswith(", "):
        message += "then run the same command again"
    assert str(told) == f"cannot write out/docs.npy: {message}"
    assert told.exit_code == (Exit.FAILED if kind is MachineError else Exit.USAGE)


def test_a_full_disk_is_told_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 12 << 10)
    told = explain_os_error(OSError(errno.ENOSPC, ""), tmp_path / "docs.npy")
    assert str(told) == (
        f"cannot write {tmp_path}/docs.npy: no space left (12.0 KiB free); "
        "free some space, then run the same command again"
    )


def test_a_closed_pipe_passes_unexplained() -> None:
    with pytest.raises(BrokenPipeError), os_errors_explained("stdout"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_writability_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "first" / "docs.npy", needs_bytes=1)
    assert list(tmp_path.iterdir()) == []
    assert free_bytes(tmp_path / "runs" / "first") > 0


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 30)
    with pytest.raises(MachineError) as caught:
        check_writable(tmp_path / "docs.npy", needs_bytes=3 << 30)
    assert str(caught.value) == (
        f"{tmp_path}/docs.npy needs about 3.0 GiB, but 1.0 GiB is free; "
        "free some space or choose another path"
    )


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"")
    with pytest.raises(GembError) as caught:
        check_writable(tmp_path / "runs" / "docs.npy")
    assert str(caught.value) == (
        f"cannot write {tmp_path}/runs/docs.npy: a part of the path is a file, not a folder; check the path"
    )


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may write everywhere, so for the length of a test the process is nobody, if it is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def kept_folder() -> Iterator[Path]:
    """A folder that everyone may read and nobody may write."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "kept"
        folder.mkdir(mode=0o555)
        Path(parent).chmod(0o755)
        yield folder


@pytest.mark.usefixtures("as_nobody")
def test_a_folder_without_write_permission_is_told(kept_folder: Path) -> None:
    for target in (kept_folder / "docs.npy", kept_folder / "runs" / "docs.npy"):
        with pytest.raises(GembError) as caught:
            check_writable(target)
        assert str(caught.value) == (
            f"cannot write {target}: permission denied; change its mode or choose another path"
        )


# Locks


def test_a_lock_held_by_another_process_is_refused_with_its_number_and_start(tmp_path: Path) -> None:
    path = tmp_path / "docs.npy.lock"
    holder = Holder(path)
    with pytest.raises(LockedError) as caught:
        Lock(path, "docs.npy").acquire()
    assert re.fullmatch(
        rf"docs\.npy is held by process {holder.process.pid} since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d; "
        r"wait for it, or pass --wait-lock SECONDS",
        str(caught.value),
    )
    assert caught.value.exit_code == Exit.LOCKED
    holder.let_go()
    assert not path.exists()
    with Lock(path, "docs.npy"):
        assert read_json(path)["process"] == os.getpid()
    assert not path.exists()


def test_the_file_of_a_killed_holder_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "docs.npy.lock"
    holder = Holder(path)
    holder.kill()
    assert path.exists()
    with Lock(path, "docs.npy"):
        assert read_json(path)["process"] == os.getpid()


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "docs.npy.lock"
    holder = Holder(path)
    told: list[str] = []

    def on_wait(message: str) -> None:
        told.append(message)
        holder.let_go()

    with Lock(path, "docs.npy", wait_seconds=60, on_wait=on_wait):
        pass
    assert len(told) == 1
    assert told[0].startswith(f"waiting up to 60 s for docs.npy, held by process {holder.process.pid} since ")


def test_waiting_for_a_lock_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lock, "POLL_SECONDS", 0.01)
    path = tmp_path / "docs.npy.lock"
    with Lock(path, "docs.npy"), pytest.raises(LockedError, match=f"held by process {os.getpid()} since"):
        Lock(path, "docs.npy", wait_seconds=0.05).acquire()


@pytest.mark.parametrize("another", [False, True], ids=["no file", "another file"])
def test_a_lock_on_a_removed_file_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    # The first holder lets go between our opening the file and our locking it.
    path = tmp_path / "docs.npy.lock"
    first = Lock(path, "docs.npy")
    first.acquire()
    inode = path.stat().st_ino
    (tmp_path / "keeps the number of the removed file from being used again").hardlink_to(path)
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if path.exists() and first.path.stat().st_ino == inode:
            first.release()
            if another:
                path.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Lock(path, "docs.npy")
    second.acquire()
    assert path.exists()
    with pytest.raises(LockedError):
        Lock(path, "docs.npy").acquire()
    second.release()


def test_a_drive_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(MachineError) as caught:
        Lock(tmp_path / "docs.npy.lock", "docs.npy").acquire()
    assert str(caught.value) == (
        f"cannot lock {tmp_path}/docs.npy.lock: this drive has no file locks; write to a local disk"
    )


def test_a_holder_on_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docs.npy.lock"
    with Lock(path, "docs.npy"):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on \S+ since"):
            Lock(path, "docs.npy").acquire()


# The journal


def test_a_journal_gives_back_its_entries_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    entries = [{"rows": number, "note": "ä" * number} for number in range(5)]
    with Journal(path) as journal:
        assert journal.last is None
        for entry in entries:
            journal.append(entry)
        assert list(journal.entries()) == entries
    with Journal(path) as journal:
        assert (journal.count, journal.last) == (5, entries[-1])
        journal.append({"rows": 5})
        assert list(journal.entries()) == [*entries, {"rows": 5}]


def test_a_journal_cut_at_any_byte_keeps_the_whole_lines_and_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    with Journal(whole) as journal:
        for number in range(3):
            journal.append({"rows": number})
    content = whole.read_bytes()
    for size in range(len(content)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        complete = content[:size].count(b"\n")
        with Journal(path) as journal:
            assert journal.count == complete
            for number in range(complete, 3):
                journal.append({"rows": number})
        assert path.read_bytes() == content


def test_a_journal_that_ends_in_zeros_is_cut_off_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"rows": 1})
    content = path.read_bytes()
    path.write_bytes(content + bytes(4096))  # what a crash leaves where size was kept and content was not
    with Journal(path) as journal:
        assert journal.last == {"rows": 1}
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["flip", "drop", "swap"])
def test_a_changed_line_in_the_middle_of_a_journal_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(4):
            journal.append({"rows": number})
    lines = path.read_bytes().splitlines(keepends=True)
    match damage:
        case "flip":
            lines[1] = lines[1].replace(b'"rows":1', b'"rows":7')
        case "drop":
            del lines[1]
        case "swap":
            lines[1], lines[2] = lines[2], lines[1]
    path.write_bytes(b"".join(lines))
    with pytest.raises(GembError) as caught:
        Journal(path)
    assert str(caught.value) == f"{path}:2: the checksum does not match; remove {tmp_path} to start again"


@pytest.mark.faults
def test_a_journal_goes_on_after_a_full_disk(tmp_path: Path, small_file_limit: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"rows": 1})
        with pytest.raises(MachineError):
            journal.append({"note": "x" * small_file_limit})
        journal.append({"rows": 2})
    with Journal(path) as journal:
        assert list(journal.entries()) == [{"rows": 1}, {"rows": 2}]


def test_a_file_limit_ends_no_process() -> None:
    # SIGXFSZ would kill us before the error could be told; Python ignores it from the start.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
