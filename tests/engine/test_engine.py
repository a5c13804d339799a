from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine import BatchFailure, Engine, halves, run_batches
from gemb.errors import MachineError
from gemb.text.batches import Batch
from tests.fakes import FakeEngine, fake_vector


def batch_of(texts: Sequence[Sequence[int]], first_row: int = 0) -> Batch:
    return Batch(
        ids=np.concatenate([np.array(text, dtype=np.int32) for text in texts]),
        lengths=np.array([len(text) for text in texts], dtype=np.int32),
        rows=np.arange(first_row, first_row + len(texts), dtype=np.int64),
        prompt_tokens=0,
    )


def some_batches(count: int, rows: int = 6, seed: int = 5) -> tuple[list[Batch], list[list[int]]]:
    random = np.random.default_rng(seed)
    texts = [random.integers(20, 999, random.integers(1, 12)).tolist() for _ in range(count * rows)]
    return [batch_of(texts[first : first + rows], first) for first in range(0, len(texts), rows)], texts


def gather(engine: Engine, batches: Sequence[Batch]) -> tuple[dict[int, NDArray[np.float32]], dict[int, str]]:
    vectors: dict[int, NDArray[np.float32]] = {}
    failures: dict[int, str] = {}
    for batch, result in run_batches(engine, batches):
        for position, row in enumerate(batch.rows.tolist()):
            assert row not in vectors
            assert row not in failures
            if isinstance(result, BatchFailure):
                failures[row] = result.reason
            else:
                vectors[row] = result[position]
    return vectors, failures


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_row_gets_the_vector_of_its_text_with_any_number_of_workers(workers: int) -> None:
    batches, texts = some_batches(40)
    vectors, failures = gather(FakeEngine(workers=workers), batches)
    assert failures == {}
    assert sorted(vectors) == list(range(len(texts)))
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(vectors[row], fake_vector(np.array(text, dtype=np.int32)))


def test_several_workers_compute_at_the_same_time() -> None:
    batches, _ = some_batches(8)
    together = threading.Barrier(2, timeout=10)

    class Meeting(FakeEngine):
        def forward(self, batch: Batch) -> NDArray[np.float32]:
            together.wait()  # breaks, and fails the test, unless two are here at once
            return super().forward(batch)

    vectors, failures = gather(Meeting(workers=2), batches)
    assert len(vectors) == 48
    assert failures == {}


def test_halves_are_cut_where_the_tokens_are_nearest_to_half() -> None:
    first, second = halves(batch_of([[1] * 9, [2] * 4, [3] * 3, [4] * 2]))
    assert first.lengths.tolist() == [9]
    assert second.lengths.tolist() == [4, 3, 2]
    assert second.ids.tolist() == [2] * 4 + [3] * 3 + [4] * 2
    assert second.rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize("lengths", [[9, 1], [1, 9], [5, 5], [1, 1, 9], [3, 3, 3]])
def test_both_halves_of_a_batch_have_rows(lengths: list[int]) -> None:
    first, second = halves(batch_of([[number] * length for number, length in enumerate(lengths)]))
    assert len(first.rows) >= 1
    assert len(second.rows) >= 1
    assert first.rows.tolist() + second.rows.tolist() == list(range(len(lengths)))
    assert len(first.ids) == first.lengths.sum()
    assert len(second.ids) == second.lengths.sum()


def test_out_of_memory_gives_the_same_vectors_from_smaller_batches_and_is_told_once() -> None:
    batches, texts = some_batches(20)
    plain, _ = gather(FakeEngine(), batches)
    engine = FakeEngine(batch_tokens=100, memory_tokens=14)
    notices: list[str] = []
    small: dict[int, NDArray[np.float32]] = {}
    for batch, result in run_batches(engine, batches, notice=notices.append):
        assert not isinstance(result, BatchFailure)
        small.update(zip(batch.rows.tolist(), result, strict=True))
    assert sorted(small) == list(range(len(texts)))
    for row, vector in plain.items():
        np.testing.assert_array_equal(small[row], vector)
    assert len(notices) == 1
    assert notices[0].startswith(
        f"out of memory at {len(batches[0].ids)} tokens a batch on fake; going on with"
    )


def test_the_budget_stays_lowered_so_that_later_batches_are_cut_before_they_fail() -> None:
    batches, _ = some_batches(30)
    engine = FakeEngine(batch_tokens=1000, memory_tokens=14)
    list(run_batches(engine, batches))
    assert engine.batch_tokens <= 14
    late = engine.calls[len(engine.calls) // 2 :]
    assert max(late) <= 14  # nothing too big was tried again


def test_one_text_that_does_not_fit_the_memory_alone_is_a_machine_error() -> None:
    with pytest.raises(MachineError) as caught:
        gather(FakeEngine(memory_tokens=3), [batch_of([[30, 31], [30, 31, 32, 33]])])
    assert str(caught.value) == (
        "out of memory on fake with one text of 4 tokens alone: 4 tokens do not fit; "
        "pass a smaller --max-tokens, or another --device"
    )


def fail_at_13(ids: NDArray[np.int32]) -> BaseException | None:
    return RuntimeError("bad\n  token 13") if 13 in ids else None


def test_a_failing_batch_is_narrowed_down_to_its_bad_rows() -> None:
    texts = [[20 + number] * 3 for number in range(11)]
    texts[4] = [13]
    texts[9] = [40, 13, 41]
    vectors, failures = gather(FakeEngine(fails=fail_at_13), [batch_of(texts)])
    assert failures == dict.fromkeys([4, 9], "cannot be computed: bad token 13")
    assert sorted(vectors) == [row for row in range(11) if row not in (4, 9)]
    np.testing.assert_array_equal(vectors[10], fake_vector(np.array(texts[10], dtype=np.int32)))


def test_a_batch_whose_rows_all_fail_alone_is_the_machines_fault() -> None:
    with pytest.raises(MachineError) as caught:
        gather(FakeEngine(fails=fail_at_13), [batch_of([[13, row] for row in range(8)])])
    assert str(caught.value) == "all 8 rows of a batch failed, each alone, on fake: bad token 13"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "its vector is not finite"),
        (float("-inf"), "its vector is not finite"),
        (0.0, "its vector is zero"),
    ],
)
def test_a_vector_that_is_none_fails_its_row_only(value: float, reason: str) -> None:
    texts = [[20, 21], [13], [22]]
    vectors, failures = gather(FakeEngine(spoils=lambda ids: value if 13 in ids else None), [batch_of(texts)])
    assert failures == {1: reason}
    assert sorted(vectors) == [0, 2]
    np.testing.assert_array_equal(vectors[2], fake_vector(np.array([22], dtype=np.int32)))


def test_a_bug_in_a_worker_comes_through_with_its_traceback() -> None:
    def bug(ids: NDArray[np.int32]) -> BaseException:
        return TypeError("a bug")

    batches, _ = some_batches(5)
    with pytest.raises(TypeError, match="a bug") as caught:
        gather(FakeEngine(fails=bug), batches)
    assert "forward" in [entry.name for entry in caught.traceback]


def test_an_exception_of_the_batches_comes_through() -> None:
    def broken() -> Iterator[Batch]:
        yield batch_of([[20]])
        raise LookupError("the batches end badly")

    with pytest.raises(LookupError, match="end badly"):
        list(run_batches(FakeEngine(workers=2), broken()))


def test_no_batches_give_nothing() -> None:
    assert list(run_batches(FakeEngine(workers=2), [])) == []


def test_stop_finishes_the_batches_in_flight_and_begins_no_other() -> None:
    batches, _ = some_batches(50)
    engine = FakeEngine(workers=2)
    stop = threading.Event()
    done = 0
    for _batch, _result in run_batches(engine, batches, stop=stop):
        done += 1
        stop.set()
    assert done == len(engine.calls) < 20


def test_batches_are_read_lazily() -> None:
    taken: list[int] = []

    def watched() -> Iterator[Batch]:
        for number, batch in enumerate(some_batches(100)[0]):
            taken.append(number)
            yield batch

    pieces = run_batches(FakeEngine(workers=2), watched())
    next(pieces)
    time.sleep(0.3)
    assert len(taken) < 15
    assert len(list(pieces)) == 99


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    pieces = run_batches(FakeEngine(workers=3), some_batches(50)[0])
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # an Iterator that is a generator
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before
