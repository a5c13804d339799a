"""`gemb index` killed, interrupted and doubled: what was committed is there, and the next run does it all."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemb.errors import GembError
from gemb.store import Index
from gemb.store.verify import verify
from tests.fakes import fake_folder, words
from tests.faults.test_embed_faults import obey_modes

PROGRAM = Path(__file__).with_name("fake_gemb.py")
ROWS = 1200

pytestmark = pytest.mark.faults


class Place:
    """A working folder with documents, a model, and processes that index them there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.index = self.folder / "docs.gemb"
        self.model = fake_folder(folder / "model")
        self.environment = {
            **os.environ,
            "GEMB_CACHE": str(folder / "user-cache"),
            "FAKE_WINDOW_SECONDS": "0.05",
            "FAKE_COMMIT_SECONDS": "0.05",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def write(self, first: int, last: int, year: int = 2000) -> None:
        """Documents first to last, one in five in passages; another year makes every other text another."""
        with (self.folder / "docs.jsonl").open("w") as file:
            for row in range(first, last):
                number = (row + year * (row % 2)) % 400
                text = words(number, *range(row % 7, row % 7 + (30 if row % 5 == 0 else row % 9)))
                file.write(json.dumps({"id": f"d{row}", "text": text, "year": year}) + "\n")

    def start(
        self, *options: str, seconds_per_token: float = 0.0, obeys_modes: bool = False
    ) -> subprocess.Popen[bytes]:
        command = ["index", "docs.jsonl", "-o", "docs.gemb", "-m", str(self.model), *options, "--json"]
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *command],
            cwd=self.folder,
            env={**self.environment, "FAKE_SECONDS_PER_TOKEN": str(seconds_per_token)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=obey_modes if obeys_modes else None,
        )
        self.processes.append(process)
        return process

    def run(self, *options: str) -> dict[str, Any]:
        """The report."""
        out, err = self.start(*options).communicate(timeout=120)
        report: dict[str, Any] = json.loads(out or b"{}")
        assert report, err.decode()
        return report

    def generation(self) -> int:
        """How many commits there are."""
        try:
            with Index.open(self.index) as index:
                return index.state.generation
        except GembError:  # not there, or only begun
            return 0

    def wait_for_commits(self, count: int, process: subprocess.Popen[bytes]) -> None:
        """Return when there are so many more commits than now, or the process has ended."""
        wanted, deadline = self.generation() + count, time.monotonic() + 60
        while self.generation() < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def content(self) -> dict[str, tuple[object, ...]]:
        """Text, metadata, spans and vectors by id; nothing of an index that is not there yet."""
        found: dict[str, tuple[object, ...]] = {}
        if not self.generation():
            return found
        with Index.open(self.index) as index:
            for block in index.export():
                rows = iter(block.vectors.tolist())
                for document, spans, count in zip(block.documents, block.spans, block.counts, strict=True):
                    vectors = [next(rows) for _ in range(count)]
                    found[document.id] = (document.text, dict(document.metadata), spans, vectors)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for process in place.processes:
        process.kill()
        process.communicate()


def test_runs_killed_at_any_moment_end_with_the_index_of_one_that_was_not(place: Place) -> None:
    """A new index, then a sync that adds, changes and removes; each is killed three times."""
    draw = random.Random(7)
    expected = {}
    for name, first, last, year in (("build", 0, ROWS, 2000), ("sync", 200, ROWS + 300, 2001)):
        place.write(first, last, year)
        whole = place.index
        place.index = place.folder / "whole.gemb"
        place.run("-o", "whole.gemb", "--prune")
        expected[name], place.index = place.content(), whole
    committed = 0
    for name, first, last, year in (("build", 0, ROWS, 2000), ("sync", 200, ROWS + 300, 2001)):
        place.write(first, last, year)
        for commits in (1, 2, 3):
            before = place.content()
            process = place.start("--prune", seconds_per_token=0.0004)
            place.wait_for_commits(commits, process)
            time.sleep(draw.random() * 0.05)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            after = place.content()
            committed += after != before
            for id_, document in after.items():
                # Each document is as it was, or as it is to be: none is torn.
                assert document in (before.get(id_), expected[name].get(id_))
            assert before.keys() <= after.keys(), "a sync that is not at its end removes nothing"
        have, report = place.content(), place.run("--prune")
        assert report["unchanged"] >= sum(have.get(id_) == one for id_, one in expected[name].items())
        assert place.content() == expected[name]
        assert verify(place.index).faults == []
        assert sorted(path.name for path in place.index.iterdir()) == ["index.db", "segments"]
    assert committed >= 3


def test_an_overwrite_killed_at_any_moment_leaves_the_old_index_until_the_new_one_is_whole(
    place: Place,
) -> None:
    place.write(0, 100)
    place.run()
    old = place.content()
    place.write(50, 600, 2001)
    for _ in range(3):
        process = place.start("--overwrite", seconds_per_token=0.0004)
        beside = Place.__new__(Place)
        beside.index = place.folder / "docs.gemb.building"
        beside.wait_for_commits(1, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert place.content() == old
        assert verify(place.index).faults == []
    report = place.run("--overwrite")
    assert report["unchanged"] > 0  # of what the killed runs had committed
    assert {document[1]["year"] for document in place.content().values()} == {2001}  # type: ignore[index]
    assert len(place.content()) == 550
    assert sorted(path.name for path in place.folder.iterdir()) == ["docs.gemb", "docs.jsonl"]


def test_an_interrupted_run_says_what_is_done_and_the_same_command_goes_on(place: Place) -> None:
    place.write(0, ROWS)
    process = place.start(seconds_per_token=0.0004)
    place.wait_for_commits(2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    message = err.decode().splitlines()[-1]
    done = re.fullmatch(
        r"gemb: interrupted; ([0-9,]+) documents added or changed in docs\.gemb, "
        "run the same command again to go on",
        message,
    )
    assert done, message
    assert len(place.content()) == int(done[1].replace(",", ""))
    report = place.run()
    assert report["added"] + report["unchanged"] == ROWS
    assert report["unchanged"] == int(done[1].replace(",", ""))


def test_a_second_run_is_refused_and_one_that_waits_comes_after_the_first(place: Place) -> None:
    place.write(0, ROWS)
    first = place.start(seconds_per_token=0.002)
    place.wait_for_commits(1, first)
    second = place.start()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 6
    assert err.decode().startswith(f"gemb: docs.gemb is held by process {first.pid} since ")
    assert err.decode().endswith("; wait for it, or pass --wait-lock SECONDS\n")
    third = place.start("--wait-lock", "60")
    time.sleep(0.5)
    first.terminate()
    assert first.wait(timeout=30) == 143
    out, _ = third.communicate(timeout=60)
    report = json.loads(out)
    assert report["added"] + report["unchanged"] == ROWS
    assert report["unchanged"] > 0


@pytest.fixture
def small_disk(place: Place) -> Iterator[Callable[[str], None]]:
    """`disk` in the working folder is a disk of its own; the function gives it another size."""
    disk = place.folder / "disk"
    disk.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.decode().strip()}")

    mount("size=320k")
    yield lambda size: mount(f"remount,size={size}")
    for process in place.processes:
        process.wait(timeout=10)
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_message_and_the_next_run_goes_on_when_there_is_room(
    place: Place, small_disk: Callable[[str], None]
) -> None:
    place.write(0, ROWS)
    place.index = place.folder / "disk/docs.gemb"
    process = place.start("-o", "disk/docs.gemb")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    message = err.decode().splitlines()[-1]
    assert message.startswith("gemb: cannot write disk/docs.gemb/")
    assert "no space left" in message
    assert message.endswith("; free some space, then run the same command again")
    kept = place.content()
    # A disk that is full at the first commit leaves no index.
    assert not place.index.exists() or verify(place.index).faults == []
    small_disk("8m")
    report = place.run("-o", "disk/docs.gemb")
    assert (report["unchanged"], report["added"]) == (len(kept), ROWS - len(kept))
    assert verify(place.index).faults == []


def test_a_folder_that_is_moved_meanwhile_ends_the_run_with_what_was_committed(place: Place) -> None:
    place.write(0, ROWS)
    process = place.start(seconds_per_token=0.001)
    place.wait_for_commits(1, process)
    place.index = place.index.rename(place.folder / "moved.gemb")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.decode().splitlines()[-1] == (
        "gemb: docs.gemb was moved or replaced while it was written; what was committed before is with it, "
        "run the command again"
    )
    assert not (place.folder / "docs.gemb").exists()
    kept = place.content()
    assert 0 < len(kept) < ROWS
    assert place.run("-o", "moved.gemb")["unchanged"] == len(kept)


def test_a_folder_that_may_not_be_written_is_told_before_the_model_is_loaded(place: Place) -> None:
    place.write(0, 10)
    place.run()
    modes = {path: path.stat().st_mode for path in [place.folder, place.index, *place.index.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    try:
        process = place.start(obeys_modes=True)
        out, err = process.communicate(timeout=60)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert (process.returncode, out) == (2, b"")
    assert err.decode() == (
        "gemb: cannot write docs.gemb: permission denied; change its mode or choose another path\n"
    )
