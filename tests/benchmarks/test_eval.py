import json
import sys

import pytest

from benchmarks.eval import BARS, Evaluation, bars, ndcg_of
from benchmarks.machine import thread_environment


def evaluation(name: str, ndcg: float, cpu_seconds: list[float]) -> Evaluation:
    return Evaluation(name, (), [2 * seconds for seconds in cpu_seconds], cpu_seconds, ndcg)


def test_a_number_and_the_object_of_gemb_are_read() -> None:
    assert ndcg_of("peer", "0.5\n") == 0.5
    output = json.dumps({"results": [{"metrics": {"nDCG@10": 0.25}}]})
    assert ndcg_of("gemb", output) == 0.25


@pytest.mark.parametrize("output", ["", "[]", '{"results": []}', "null"])
def test_an_output_without_a_figure_is_told(output: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ndcg_of("gemb", output)
    assert str(caught.value) == f"gemb printed no nDCG@10: {output!r}"


def test_the_processor_time_of_the_whole_process_counts() -> None:
    program = (
        "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint(0.5)"
    )
    run = Evaluation("busy", [sys.executable, "-c", program])
    run.run(thread_environment(1))
    assert run.ndcg == 0.5
    assert 0.2 <= run.cpu_seconds[0] < 2
    assert run.wall_seconds[0] >= 0.2


def test_a_run_that_fails_is_told_with_its_stderr_and_counts_for_nothing() -> None:
    run = Evaluation("broken", [sys.executable, "-c", "raise SystemExit('no such data')"])
    with pytest.raises(RuntimeError, match=r"^broken ended with 1:\nno such data\n$"):
        run.run(thread_environment(1))
    assert run.cpu_seconds == []


def test_bars_are_judged_by_the_median_ratio_of_the_rounds() -> None:
    reference = evaluation("reference", 0.5, [10, 20, 10])
    ours = evaluation("ours", 0.50005, [6, 10, 9])
    half = evaluation("bf16", 0.4, [5, 5, 7])
    same, fp32, bf16 = bars("nl2bash", [reference, ours, half])
    assert (same.met, fp32.met, bf16.met) == (True, True, True)
    assert (fp32.measured, fp32.bound, bf16.measured) == (0.6, BARS["nl2bash"], 0.5)
    assert not bars("nl2bash", [reference, evaluation("ours", 0.51, [6, 6, 6])])[0].met
    assert len(bars("time", [reference, ours])) == 1
