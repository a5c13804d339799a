"""Progress: bars on a terminal, a line now and then elsewhere, JSON lines when asked, else nothing."""

import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from gemb.report import Event, OnProgress, ignore, progress
from gemb.report.progress import duration


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    events: list[tuple[float, Event]], *, json: bool = False, quiet: bool = False, verbose: int = 0
) -> str:
    stream, clock = io.StringIO(), Clock()
    with progress(json=json, quiet=quiet, verbose=verbose, stream=stream, clock=clock) as on_progress:
        for seconds, event in events:
            clock.now = seconds
            on_progress(event)
    return stream.getvalue()


def every_second(seconds: int) -> list[tuple[float, Event]]:
    return [
        (float(second), Event("embedding", 10 * second, 2_000, tokens=1_000 * second))
        for second in range(seconds + 1)
    ]


def test_without_a_terminal_there_is_a_line_every_30_seconds() -> None:
    assert run(every_second(100)).splitlines() == [
        "embedding 300 of 2,000 rows, 1,000 tokens/s, 2:50 left",
        "embedding 600 of 2,000 rows, 1,000 tokens/s, 2:20 left",
        "embedding 900 of 2,000 rows, 1,000 tokens/s, 1:50 left",
    ]


def test_a_detail_stands_beside_the_count() -> None:
    events = [(0.0, Event("training", 0, 500, "steps")), (40.0, Event("training", 8, 500, "steps"))]
    told = [(when, replace(event, detail="loss 1.2345")) for when, event in events]
    assert run(told) == "training 8 of 500 steps, loss 1.2345, 0 steps/s, 41:00 left\n"


def test_a_short_job_writes_no_line() -> None:
    assert run(every_second(29)) == ""


def test_a_resumed_job_is_not_flattered_by_earlier_rows() -> None:
    events = [(0.0, Event("embedding", 1_000, 2_000)), (40.0, Event("embedding", 1_400, 2_000))]
    assert run(events) == "embedding 1,400 of 2,000 rows, 10 rows/s, 1:00 left\n"


def test_a_total_that_nobody_knows_gives_no_time_left() -> None:
    events = [(0.0, Event("reading", 0, unit="bytes")), (31.0, Event("reading", 62, unit="bytes"))]
    assert run(events) == "reading 62 bytes, 2 bytes/s\n"


def test_a_note_is_told_at_once_with_or_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    event = Event("embedding", 0, 5, note="out of memory; now 4,096 tokens a batch [/x]")
    assert run([(0.0, event)]) == event.note + "\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with progress(stream=stream) as on_progress:
        on_progress(event)
    assert event.note in stream.getvalue()


def test_quiet_and_json_say_nothing() -> None:
    events = [*every_second(100), (101.0, Event("embedding", 5, note="note"))]
    assert run(events, quiet=True) == ""
    assert run(events, json=True) == ""
    assert run(events, json=True, quiet=True, verbose=1) == ""


def test_json_with_verbose_is_an_object_a_second_and_the_end_of_every_stage() -> None:
    events = [(tenth / 10, Event("embedding", tenth, 25)) for tenth in range(26)]
    lines = [json.loads(line) for line in run(events, json=True, verbose=1).splitlines()]
    assert [line["done"] for line in lines] == [0, 10, 20, 25]
    assert lines[0] == {
        "stage": "embedding",
        "done": 0,
        "total": 25,
        "unit": "rows",
        "tokens": None,
        "note": "",
        "detail": "",
    }


def test_a_terminal_gets_a_bar_with_rows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with progress(stream=stream, clock=clock) as on_progress:
        on_progress(Event("reading", 1, 1))
        on_progress(Event("embedding", 0, 100, tokens=0))
        clock.now = 10.0
        on_progress(Event("embedding", 50, 100, tokens=5_000))
    shown = stream.getvalue()
    for text in ("embedding", "50 of 100 rows", "500 tokens/s", "0:10 left", "━"):
        assert text in shown
    assert shown.endswith("\x1b[2K")  # wiped: the report follows


def test_a_bar_leaves_stdout_to_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stdout = sys.stdout
    with progress(stream=Terminal()) as on_progress:
        on_progress(Event("embedding", 0, 100))
        assert sys.stdout is stdout


def test_events_may_come_from_many_threads() -> None:
    class OneAtATime(io.StringIO):
        """A stream that notices two threads in it."""

        busy = False

        def write(self, text: str) -> int:
            assert not self.busy
            self.busy = True
            time.sleep(0.001)
            self.busy = False
            return super().write(text)

    stream = OneAtATime()
    with progress(stream=stream) as on_progress, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: on_progress(Event("embedding", n, note=f"note {n}")), range(100)))
    assert sorted(stream.getvalue().splitlines()) == sorted(f"note {n}" for n in range(100))


def test_ignore_is_an_on_progress() -> None:
    on_progress: OnProgress = ignore
    on_progress(Event("embedding", 1))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (41.4, "0:41"), (59.6, "1:00"), (725, "12:05"), (12_000, "3:20:00")]
)
def test_durations_are_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text
