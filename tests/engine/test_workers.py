from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine import BatchFailure, Engine, run_batches
from gemb.engine.workers import ProcessEngine, WorkerBug, _Process
from gemb.errors import MachineError, UnavailableError
from gemb.text.batches import Batch
from tests.fakes import FakeEngine, fake_vector, open_broken_engine, open_fake_engine, open_fragile_engine

ROOT = Path(__file__).parents[2]


def batches(count: int, *, begin: int = 20) -> list[Batch]:
    return [
        Batch(
            ids=np.arange(begin + 8 * number, begin + 8 * number + 8, dtype=np.int32),
            lengths=np.array([5, 3], dtype=np.int32),
            rows=np.array([2 * number, 2 * number + 1], dtype=np.int64),
            prompt_tokens=0,
        )
        for number in range(count)
    ]


def check(pieces: Iterator[tuple[Batch, object]], count: int) -> None:
    found: dict[int, NDArray[np.float32]] = {}
    for batch, result in pieces:
        assert isinstance(result, np.ndarray), result
        found.update(zip(batch.rows.tolist(), result, strict=True))
    assert sorted(found) == list(range(2 * count))
    for number, batch in enumerate(batches(count)):
        np.testing.assert_array_equal(found[2 * number], fake_vector(batch.ids[:5]))
        np.testing.assert_array_equal(found[2 * number + 1], fake_vector(batch.ids[5:]))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ProcessEngine]]:
    monkeypatch.syspath_prepend(str(ROOT))  # the processes find this test's engines by it
    started: list[ProcessEngine] = []

    def start(open_engines: list[Callable[[], Engine]], notices: list[str] | None = None) -> ProcessEngine:
        names = [f"cpu {number}" for number in range(len(open_engines))]
        engine = ProcessEngine(open_engines, names, ([] if notices is None else notices).append)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()


def test_two_processes_give_the_vectors_of_one_engine(start: Callable[..., ProcessEngine]) -> None:
    engine = start([open_fake_engine, open_fake_engine])
    assert engine.dims == 8
    assert len(engine.process_ids) == 2
    assert os.getpid() not in engine.process_ids
    check(run_batches(engine, batches(60)), 60)


def test_a_killed_process_costs_only_the_batches_it_held(start: Callable[..., ProcessEngine]) -> None:
    notices: list[str] = []
    engine = start([open_fake_engine, open_fake_engine], notices)
    victim = engine.process_ids[0]

    def killing() -> Iterator[tuple[Batch, object]]:
        for number, piece in enumerate(run_batches(engine, batches(200))):
            if number == 20:
                os.kill(victim, signal.SIGKILL)
            yield piece

    check(killing(), 200)
    assert notices == ["the process of cpu 0 died (killed by SIGKILL); going on with 1"]
    assert engine.process_ids != []
    assert victim not in engine.process_ids


def test_a_signal_to_the_whole_group_is_the_parents_affair(start: Callable[..., ProcessEngine]) -> None:
    engine = start([open_fake_engine, open_fake_engine])
    for process in engine.process_ids:
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
    check(run_batches(engine, batches(60)), 60)
    assert len(engine.process_ids) == 2


def test_the_death_of_all_processes_is_a_machine_error(start: Callable[..., ProcessEngine]) -> None:
    notices: list[str] = []
    engine = start([open_fragile_engine, open_fragile_engine], notices)
    with pytest.raises(MachineError) as caught:
        list(run_batches(engine, batches(4, begin=13)))
    assert str(caught.value) == (
        "no process is left to compute (cpu 0: killed by SIGKILL; cpu 1: killed by SIGKILL); "
        "run the same command again"
    )


def test_threads_that_ask_at_once_hear_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    process = _Process(open_fake_engine, "cpu 0")
    process.wait_until_ready()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            endings = [pool.submit(process.ending) for _ in range(8)]
            os.kill(process.pid, signal.SIGKILL)
            assert {ending.result() for ending in endings} == {"killed by SIGKILL"}
    finally:
        sys.setswitchinterval(interval)
        process.end()


def test_a_bug_in_a_process_comes_with_the_traceback_it_had_there(
    start: Callable[..., ProcessEngine],
) -> None:
    engine = start([open_broken_engine])
    with pytest.raises(WorkerBug, match=r"(?s)Traceback .*in forward.*TypeError: a bug in the engine"):
        list(run_batches(engine, batches(3)))


def open_failing_engine() -> FakeEngine:
    return FakeEngine(fails=lambda ids: RuntimeError("no such token") if 24 in ids[:5] else None)


def test_a_failing_row_is_found_through_the_pipe_too(start: Callable[..., ProcessEngine]) -> None:
    engine = start([open_failing_engine])
    failures = [result for _, result in run_batches(engine, batches(5)) if isinstance(result, BatchFailure)]
    assert [(failure.rows.tolist(), failure.reason) for failure in failures] == [
        ([0], "cannot be computed: no such token")
    ]


def open_small_engine() -> FakeEngine:
    return FakeEngine(memory_tokens=6)


def test_out_of_memory_comes_through_the_pipe_and_lowers_the_budget(
    start: Callable[..., ProcessEngine],
) -> None:
    engine = start([open_small_engine])
    check(run_batches(engine, batches(5)), 5)
    assert engine.batch_tokens == 4


def refuse(message: str) -> Engine:
    raise UnavailableError(message)


def test_an_engine_that_cannot_be_opened_says_why_with_its_own_exit_code(
    start: Callable[..., ProcessEngine],
) -> None:
    with pytest.raises(UnavailableError, match=r"^no weights in enc$"):
        start([open_fake_engine, partial(refuse, "no weights in enc")])


def die() -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_dies_while_it_loads_is_a_machine_error(start: Callable[..., ProcessEngine]) -> None:
    with pytest.raises(MachineError) as caught:
        start([die])
    assert str(caught.value) == "the process of cpu 0 died while it loaded the model (killed by SIGKILL)"


def test_closing_ends_the_processes(start: Callable[..., ProcessEngine]) -> None:
    engine = start([open_fake_engine])
    (pid,) = engine.process_ids
    engine.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
    assert engine.process_ids == []
