import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.harness import Bar, ContestantFailed, Lap, Track, best_batch_size, race, write_result
from benchmarks.machine import this_machine
from benchmarks.peers import Contestant

TEXTS = [f"text {'x' * number}" for number in range(16)]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake contestants note their calls."""
    fake = Path(__file__).parent / "fake_contestant.py"
    # The folder of the script, not of the project, is first on the path of `python SCRIPT`.
    program = f"import runpy; runpy.run_path({str(fake)!r}, run_name='__main__')"
    monkeypatch.setattr(harness, "CONTESTANT_COMMAND", (sys.executable, "-c", program))
    return tmp_path / "calls.txt"


def contestant(name: str, calls: Path, batch_size: int = 1) -> Contestant:
    return Contestant(name, "fake", str(calls), "fp32", batch_size=batch_size)


def track(seconds: list[float], threads: int = 1, vectors: list[list[float]] | None = None) -> Track:
    laps = [
        Lap(wall_seconds=2 * cpu, cpu_seconds=cpu, peak_rss_bytes=10, anonymous_rss_bytes=5)
        for cpu in seconds
    ]
    result = Track(Contestant("name", "fake", "", "fp32", threads), Lap(1, 1, 30, 1), laps)
    if vectors is not None:
        result.vectors = np.array(vectors, dtype=np.float32)
    return result


def test_rounds_are_interleaved_after_a_warm_up_on_an_eighth(calls: Path) -> None:
    race([contestant("a", calls), contestant("b", calls)], TEXTS, rounds=2)
    assert calls.read_text().splitlines() == ["a 2 1", "b 2 1", "a 16 1", "b 16 1", "a 16 1", "b 16 1"]


def test_vectors_come_back_in_the_order_of_the_texts(calls: Path) -> None:
    tracks = race([contestant("a", calls)], TEXTS, rounds=1)
    vectors = tracks["a"].vectors
    assert vectors is not None
    assert vectors[:, 0].tolist() == [len(text) for text in TEXTS]


def test_a_contestant_that_dies_is_told_with_its_stderr(calls: Path) -> None:
    with pytest.raises(ContestantFailed, match=r"^a ended with 1:\nthe fake died as it was told\n$"):
        race([contestant("a", calls)], ["die"], rounds=1)


def test_the_best_batch_size_is_the_fastest(calls: Path) -> None:
    best, seconds = best_batch_size(contestant("a", calls), TEXTS, (32, 1, 8))
    assert best == 1
    assert seconds[1] < seconds[8] < seconds[32]


def test_speed_is_the_median_of_the_ratios_of_the_rounds_and_not_the_ratio_of_the_medians() -> None:
    ours, theirs = track([1.0, 2.0, 4.0]), track([3.0, 2.0, 8.0])
    assert ours.speed_against(theirs) == 2.0  # of 3, 1, 2; the medians give 1.5


def test_one_thread_is_judged_by_processor_time_and_two_by_the_clock() -> None:
    assert track([1.0]).median_seconds() == 1.0
    assert track([1.0], threads=2).median_seconds() == 2.0


def test_peak_memory_counts_loading() -> None:
    assert track([1.0]).peak_rss_bytes() == 30


def test_cosines_ignore_length_and_see_the_worst_row() -> None:
    ours = track([1.0], vectors=[[2, 0], [3, 3]])
    theirs = track([1.0], vectors=[[1, 0], [1, 0]])
    lowest, mean = ours.cosines_with(theirs)
    assert lowest == pytest.approx(0.5**0.5)
    assert mean == pytest.approx((1 + 0.5**0.5) / 2)


@pytest.mark.parametrize(
    ("measured", "at_most", "verdict"),
    [(1.5, False, "PASS"), (1.49, False, "FAIL"), (1.5, True, "PASS"), (1.51, True, "FAIL")],
)
def test_a_bar_is_met_on_its_side_of_the_bound(measured: float, at_most: bool, verdict: str) -> None:
    assert Bar("claim", measured, 1.5, at_most).as_dict()["verdict"] == verdict


def test_a_result_names_the_machine_and_the_versions(tmp_path: Path) -> None:
    machine = this_machine()
    path = write_result("name", machine, {"figure": 1}, folder=tmp_path)
    content = json.loads(path.read_text())
    assert path.name == f"name-{machine.slug}.json"
    assert content["figure"] == 1
    assert content["machine"]["flags"] == list(machine.flags)
    assert content["versions"]["numpy"] == np.__version__
