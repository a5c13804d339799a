"""Whatever kills a replacement, one whole index is there, and the next call ends what was begun."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from gemb.errors import UnavailableError
from gemb.files import Lock, fsync_folder
from gemb.store import catalogue, replacement
from gemb.store.catalogue import LOCK, REPLACES
from gemb.store.replacement import free_name, put_in_place, settle, settle_missing

KILLED = 77
Result = TypeVar("Result")


def folders(root: Path) -> tuple[Path, Path, Path]:
    fresh, folder, kept = root / "x.gemb.rebuilding", root / "x.gemb", root / "x.gemb.damaged"
    for path, content in ((fresh, "new"), (folder, "old")):
        path.mkdir()
        (path / "index.db").write_text(content)
    return fresh, folder, kept


def no_swap(one: Path, other: Path) -> bool:
    return False


def replace(root: Path) -> None:
    fresh, folder, kept = (root / name for name in ("x.gemb.rebuilding", "x.gemb", "x.gemb.damaged"))
    with Lock(folder / LOCK, str(folder)) as lock:
        put_in_place(fresh, folder, kept, lock)


def replace_and_die(root: Path, step: int, swaps: bool) -> None:
    """Ends the process before its step-th operation on a name."""
    left = step

    def counted(function: Callable[..., Result]) -> Callable[..., Result]:
        def call(*arguments: object, **options: object) -> Result:
            nonlocal left
            if left == 0:
                os._exit(KILLED)
            left -= 1
            return function(*arguments, **options)

        return call

    setattr(replacement, "_swap", counted(replacement._swap) if swaps else no_swap)  # noqa: B010
    setattr(replacement, "fsync_folder", counted(fsync_folder))  # noqa: B010
    for owner, name in ((os, "rename"), (Path, "touch"), (Path, "unlink")):
        setattr(owner, name, counted(getattr(owner, name)))
    replace(root)
    os._exit(0)


@pytest.mark.faults
@pytest.mark.parametrize("swaps", [True, False], ids=["one step", "two renames"])
def test_a_kill_before_any_step_leaves_a_whole_index_that_is_found(tmp_path: Path, swaps: bool) -> None:
    fork = multiprocessing.get_context("fork")
    code: int | None = KILLED
    step = 0
    while code == KILLED:
        root = tmp_path / str(step)
        root.mkdir()
        fresh, folder, kept = folders(root)
        process = fork.Process(target=replace_and_die, args=(root, step, swaps))
        process.start()
        process.join()
        code = process.exitcode
        if swaps:
            assert (folder / "index.db").exists(), "the name leads nowhere"
        settle_missing(fresh, folder)
        with Lock(folder / LOCK, str(folder)):
            settle(fresh, folder, lambda kept=kept: kept)  # type: ignore[misc]
        there = (folder / "index.db").read_text()
        assert not fresh.exists()
        assert not (folder / REPLACES).exists()
        if there == "new":
            assert (kept / "index.db").read_text() == "old"
        else:
            assert not kept.exists()
        step += 1
    assert code == 0
    assert step > 8


@pytest.mark.parametrize("swaps", [True, False], ids=["one step", "two renames"])
def test_new_and_old_change_places_and_no_lock_stays(
    tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(replacement, "_swap", no_swap)
    _, folder, kept = folders(tmp_path)
    replace(tmp_path)
    assert (folder / "index.db").read_text() == "new"
    assert (kept / "index.db").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "index.db",
        "index.db",
        "x.gemb",
        "x.gemb.damaged",
    ]


def test_a_drive_that_cannot_swap_is_told_from_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def renameat2(self, *_: object) -> int:
            return -1

        renameatx_np = renameat2

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Library())
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EINVAL)
    assert not replacement._swap(tmp_path, tmp_path)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        replacement._swap(tmp_path, tmp_path)


def test_the_gap_between_two_renames_is_told_with_what_to_run(tmp_path: Path) -> None:
    fresh, folder, kept = folders(tmp_path)
    (fresh / REPLACES).touch()
    folder.rename(kept)
    with pytest.raises(UnavailableError) as error:
        catalogue.check_is_index(folder)
    assert str(error.value) == (
        f"there is no index {folder}: it was being replaced by {fresh}, which is whole; "
        f"run gemb index rebuild {folder} to put it there"
    )


def test_names_that_are_there_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "x.gemb"
    assert free_name(folder, "old").name == "x.gemb.old"
    (tmp_path / "x.gemb.old").mkdir()
    (tmp_path / "x.gemb.old-2").symlink_to("nowhere")
    assert free_name(folder, "old").name == "x.gemb.old-3"
