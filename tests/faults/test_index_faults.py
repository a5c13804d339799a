"""Writers killed, files altered, disks full: the attacks of benchmarks/index_faults.py, in small."""

import shutil
import sys
from pathlib import Path

import pytest
import usearch.index  # noqa: F401  # before a process forks, so that none spends its life importing it

from benchmarks.index_damage import KINDS, DamageTrial, answers
from benchmarks.index_full_disk import run_sweep
from benchmarks.index_kills import Trial, Versions
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
