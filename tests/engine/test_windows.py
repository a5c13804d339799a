"""How much goes into a window; what windows become is tested with the job, in tests/jobs/test_embed.py."""

from __future__ import annotations

import numpy as np
import pytest

from gemb.engine import windows
from gemb.engine.windows import FIRST_CHARACTERS, GROWTH, WINDOW_SECONDS, Pace, Window
from gemb.text.tokenisation import Encoded


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(windows, "time", clock)
    return clock


def window(work: float, begun: float) -> Window:
    nothing = np.empty(0, dtype=np.int64)
    numbers = nothing.astype(np.int32)
    return Window(
        start=0,
        end=0,
        records=0,
        ids=[],
        places=[],
        text_of_row=nothing,
        encoded=Encoded(numbers, numbers, numbers, nothing.astype(np.bool_), 0),
        refusals=[],
        empty_skipped=0,
        long_skipped=0,
        chunked=0,
        work=work,
        known={},
        keys=[],
        begun=begun,
    )


def test_windows_do_not_grow_before_the_first_is_measured() -> None:
    pace = Pace()
    assert [pace.next() for _ in range(5)] == [FIRST_CHARACTERS] * 5


def test_a_fast_model_gets_larger_windows_step_by_step(clock: Clock) -> None:
    pace = Pace()
    pace.next()
    clock.now += 0.01
    pace.finished(window(FIRST_CHARACTERS, begun=100.0))
    assert [pace.next() for _ in range(3)] == [FIRST_CHARACTERS * GROWTH**step for step in (1, 2, 3)]


def test_a_window_is_no_more_than_the_seconds_of_work_that_were_asked_for(clock: Clock) -> None:
    pace = Pace(seconds=2.0)
    assert pace.next() == FIRST_CHARACTERS * 2.0 / WINDOW_SECONDS  # nothing is measured yet
    clock.now += 16.0
    pace.finished(window(FIRST_CHARACTERS, begun=100.0))
    assert [pace.next() for _ in range(3)] == [FIRST_CHARACTERS / 8] * 3
