from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import Queue

import pytest

from gemb.engine.ahead import ReadAhead


def read_ahead(items: Iterator[int], depth: int = 2, stop: threading.Event | None = None) -> ReadAhead[int]:
    return ReadAhead(items, depth=depth, stop=stop or threading.Event(), name="test")


def test_items_come_in_order() -> None:
    assert list(read_ahead(iter(range(50)))) == list(range(50))
    assert list(read_ahead(iter(()))) == []


def test_no_more_than_the_depth_is_in_hand() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    ahead = read_ahead(items(), depth=2)
    time.sleep(0.2)
    assert len(made) == 3  # two in hand, one that waits for a place
    assert list(ahead) == list(range(10))


def test_an_exception_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(LookupError, match="no more"):
        next(ahead)
    assert list(ahead) == []


def test_stop_ends_the_iteration_and_the_thread() -> None:
    stop = threading.Event()
    before = threading.active_count()
    ahead = read_ahead(iter(range(1000)), stop=stop)
    assert next(ahead) == 0
    stop.set()
    assert list(ahead) == []
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_a_generator_is_closed_by_the_thread_that_ran_it() -> None:
    opened: list[threading.Thread] = []
    closed: Queue[threading.Thread] = Queue()

    def items() -> Iterator[int]:
        opened.append(threading.current_thread())
        try:
            yield from range(100)
        finally:
            closed.put(threading.current_thread())

    ahead = ReadAhead(items(), depth=1, stop=threading.Event(), name="test")
    assert next(ahead) == 0
    ahead.close()
    assert closed.get(timeout=5) is opened[0]


def test_a_slow_item_is_no_item_yet() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait(10)
        yield 7

    ahead = read_ahead(items())
    assert ahead.take(0.05) is None
    gate.set()
    assert next(ahead) == 7
