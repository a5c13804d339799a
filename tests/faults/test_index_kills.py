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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemb.errors import GembError
from gemb.store import Index
from gemb.store.verify import verify
from tests.fakes import fake_folder, words

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

    def start(self, *options: str, seconds_per_token: float = 0.0) -> subprocess.Popen[bytes]:
        command = ["index", "docs.jsonl", "-o", "docs.gemb", "-m", str(self.model), *options, "--json"]
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *command],
            cwd=self.folder,
            env={**self.environment, "FAKE_SECONDS_PER_TOKEN": str(seconds_per_token)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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
        r"gemb: interrupted; ([0-9,]+) documents were added or changed in docs\.gemb, "
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
