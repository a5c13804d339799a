"""Writers killed, files altered, disks full: the attacks of benchmarks/index_faults.py, in small."""

import multiprocessing
import os
import random
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import usearch.index  # noqa: F401  # before a process forks, so that none spends its life importing it

from benchmarks.index_damage import KINDS, DamageTrial, answers
from benchmarks.index_full_disk import run_sweep
from benchmarks.index_kills import Trial, Versions, compact, mark, planned, seen_state, sync
from gemb.errors import GembError
from gemb.store import Index, Writer
from gemb.store.verify import verify

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed"),
]


def test_no_kill_loses_or_tears_a_row_and_no_reader_sees_half_a_state(tmp_path: Path) -> None:
    kinds = ("build", "sync", "compact", "rebuild", "upgrade")
    result = Trial(tmp_path, seed=5).run(dict.fromkeys(kinds, 2))
    assert result.failures == []
    assert result.kills == dict.fromkeys(kinds, 2)
    assert result.looks > 20
    assert result.states_seen > 1


def test_the_trial_sees_a_row_that_is_lost(tmp_path: Path) -> None:
    """A negative control: what a kill left is worsened before it is looked at."""
    trial = Trial(tmp_path, seed=5, readers=0)
    check = trial._check

    def lose_one(kind: str, plan: list[Versions], told: int, where: str, **options: bool) -> None:
        with Writer.open(trial._path) as writer:
            assert not writer.delete(["d1"])
        check(kind, plan, told, where, **options)

    trial._check = lose_one  # type: ignore[assignment,method-assign]
    trial._prepare("build")
    trial._state = {}
    plan: list[Versions] = [{}, {0: 1, 1: 1}, {0: 1, 1: 1}]
    told, _ = trial._work("build", plan, None)
    assert told == 2
    trial._check("build", plan[-1:], 0, "here")
    assert trial.result.failures == ["here: state None of 1 after 0 were told"]


def test_every_alteration_of_a_file_is_detected_or_changes_no_answer(tmp_path: Path) -> None:
    result = DamageTrial(tmp_path, seed=3).run(2 * len(KINDS))
    assert result.failures == []
    assert len(result.cases) == 2 * len(KINDS)
    assert sum(case.outcome != "harmless" for case in result.cases) > len(KINDS)


def test_the_trial_sees_an_answer_that_changed_unseen(tmp_path: Path) -> None:
    """A negative control: a sound index with other documents in it."""
    trial = DamageTrial(tmp_path, seed=3)
    path = tmp_path / "other.gemb"
    shutil.copytree(trial._rest, path)
    before = answers(path)
    with Writer.open(path) as writer:
        writer.delete(["d9"])
    assert verify(path).faults == []
    assert answers(path) != before


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the disk that fails")
def test_any_operation_that_fails_ends_in_one_message_and_the_work_can_be_done_again(tmp_path: Path) -> None:
    result = run_sweep(("sync", "upgrade"), points=5, seed=2, offset=20)
    assert result.failures == []
    assert result.tried.total() == 20
    assert sum(result.messages.values()) > 10


@pytest.mark.slow
def test_many_kills_and_alterations(tmp_path: Path) -> None:
    (tmp_path / "kills").mkdir()
    (tmp_path / "damage").mkdir()
    assert Trial(tmp_path / "kills", seed=6).run({"build": 10, "sync": 15, "compact": 10}).failures == []
    assert DamageTrial(tmp_path / "damage", seed=4).run(90).failures == []


def test_an_index_answers_while_its_writer_is_stopped_for_good(tmp_path: Path) -> None:
    """A writer that hangs holds no reader up."""
    trial = Trial(tmp_path, seed=1, readers=0)
    trial._measure("build")
    with Writer.open(trial._path) as writer:
        writer.delete(["d1"])
        with Index.open(trial._path) as index:
            assert index.state.documents == writer.documents + 1


def write_all_the_time(path: Path, log: Path, seed: int) -> None:
    """One sync and compaction after the other; the marks of their states go to `log` beforehand."""
    draw = random.Random(seed)
    state: Versions = {}
    while True:
        plan = planned(state, draw)
        with log.open("a") as file:
            file.writelines(f"{mark(one)}\n" for one in plan)
        sync(path, plan, lambda: None)
        compact(path, plan[-1:], lambda: None)
        state = plan[-1]


def copy_slowly(source: Path, target: Path, draw: random.Random) -> None:
    """A copy of what is there when its turn comes, in no order, as a backup makes it."""
    target.mkdir()
    names = os.listdir(source) if source.exists() else []
    draw.shuffle(names)
    for name in names:
        time.sleep(draw.choice([0, 0, 0.01]))
        if (source / name).is_dir():
            copy_slowly(source / name, target / name, draw)
        else:
            with suppress(FileNotFoundError):
                shutil.copyfile(source / name, target / name)


def test_a_copy_made_while_a_writer_works_is_whole_or_found_to_be_none(tmp_path: Path) -> None:
    path, log, draw = tmp_path / "x.gemb", tmp_path / "log", random.Random(1)
    sync(path, planned({}, draw)[:1] * 2, lambda: None)
    log.write_text(f"{mark({})}\n")
    process = multiprocessing.get_context("fork").Process(target=write_all_the_time, args=(path, log, 1))
    process.start()
    refused = 0
    try:
        for number in range(12):
            copy = tmp_path / f"copy-{number}.gemb"
            copy_slowly(path, copy, draw)
            (copy / "writer.lock").unlink(missing_ok=True)
            try:
                with Index.open(copy) as index:
                    assert mark(seen_state(index)) in log.read_text().split()
                refused += bool(verify(copy).faults)  # what nobody has looked at yet, verify finds
            except GembError:
                refused += 1
                with suppress(GembError):  # no index at all, as its database was not copied
                    assert verify(copy).faults
    finally:
        process.kill()
        process.join()
    assert refused
