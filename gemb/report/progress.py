"""Progress events of a long job, and their showing: a bar, a line now and then, JSON lines, or nothing."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol, TextIO

from gemb.report import terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 30.0  # cron mails and CI logs stay readable
SECONDS_BETWEEN_JSON_LINES = 1.0


@dataclass(frozen=True, slots=True)
class Event:
    """Where one stage of a job stands."""

    stage: str
    """A verb for people: `embedding`, `reading`, `downloading`."""
    done: int
    """Units finished, those of earlier runs included."""
    total: int | None = None
    """Units in all; None while nobody knows."""
    unit: str = "rows"
    tokens: int | None = None
    """Tokens computed so far by this run."""
    note: str = ""
    """What a person must know now (`out of memory; now 8,192 tokens a batch`): shown at once, on a line."""
    detail: str = ""
    """What else says how it goes (`loss 1.2345`): shown beside the count."""


OnProgress = Callable[[Event], None]
"""A job calls it from any thread, as often as it likes."""


def ignore(event: Event) -> None:
    """The `OnProgress` of a job that nobody watches."""


class _Renderer(Protocol):
    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


@contextmanager
def progress(
    *,
    quiet: bool = False,
    json: bool = False,
    verbose: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[OnProgress]:
    """Give the `OnProgress` for this run; what it shows is gone or complete when the block ends.

    On a terminal a bar; elsewhere a line every 30 s at most; nothing under `quiet`, nor under `json`
    except with `verbose`, which gives one JSON object a line and a second at most. All on stderr (`stream`).
    """
    stream = sys.stderr if stream is None else stream
    renderer: _Renderer
    if quiet or (json and not verbose):
        yield ignore
        return
    if json:
        renderer = _JsonLines(stream, clock)
    elif terminal.is_interactive(stream):
        renderer = _Bar(stream, clock)
    else:
        renderer = _Lines(stream, clock)
    lock = Lock()

    def on_progress(event: Event) -> None:
        with lock:
            renderer.show(event)

    try:
        yield on_progress
    finally:
        with lock:
            renderer.close()


class _Pace:
    """How fast a stage goes, measured from its first event, so that a resumed run is not flattered."""

    def __init__(self, event: Event, now: float) -> None:
        self.stage = event.stage
        self._start = now
        self._first_done = event.done
        self._first_tokens = event.tokens or 0

    def rate(self, event: Event, now: float) -> str:
        """`4,120 tokens/s`, or `35 rows/s` where no tokens are counted; empty before a second has passed."""
        seconds = now - self._start
        if seconds < 1.0:
            return ""
        if event.tokens is not None:
            return f"{(event.tokens - self._first_tokens) / seconds:,.0f} tokens/s"
        return f"{(event.done - self._first_done) / seconds:,.0f} {event.unit}/s"

    def left(self, event: Event, now: float) -> str:
        """`2:05 left`; empty while it cannot be known."""
        finished = event.done - self._first_done
        seconds = now - self._start
        if event.total is None or finished <= 0 or seconds < 1.0:
            return ""
        return f"{duration((event.total - event.done) * seconds / finished)} left"


def duration(seconds: float) -> str:
    """`0:41`, `12:05` or `3:20:00`: hours, minutes and seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(event: Event) -> str:
    """`1,200 of 5,000 rows`, or `12 of 500 steps, loss 1.2345`."""
    total = f" of {event.total:,}" if event.total is not None else ""
    detail = f", {event.detail}" if event.detail else ""
    return f"{event.done:,}{total} {event.unit}{detail}"


class _Lines:
    """One line every 30 s at most; notes at once."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._last = clock()
        self._pace: _Pace | None = None

    def show(self, event: Event) -> None:
        now = self._clock()
        if self._pace is None or self._pace.stage != event.stage:
            self._pace = _Pace(event, now)
        if event.note:
            self._write(event.note)
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        parts = [f"{event.stage} {_count(event)}", self._pace.rate(event, now), self._pace.left(event, now)]
        self._write(", ".join(part for part in parts if part))

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class _JsonLines:
    """Events as JSON, a line a second at most, the end of a stage and every note always."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._last = float("-inf")

    def show(self, event: Event) -> None:
        import orjson

        now = self._clock()
        finished = event.done == event.total
        if not (event.note or finished) and now - self._last < SECONDS_BETWEEN_JSON_LINES:
            return
        self._last = now
        self._stream.write(orjson.dumps(event).decode() + "\n")
        self._stream.flush()

    def close(self) -> None:
        pass


class _Bar:
    """A bar a stage on a terminal; it is wiped at the end, since the report follows."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._pace: _Pace | None = None

    def show(self, event: Event) -> None:
        now = self._clock()
        progress = self._started()
        if self._task is None or self._pace is None or self._pace.stage != event.stage:
            if self._task is not None:
                progress.remove_task(self._task)
            self._pace = _Pace(event, now)
            self._task = progress.add_task(event.stage, total=event.total, count="", rate="", left="")
        if event.note:
            progress.console.print(event.note, markup=False)
        progress.update(
            self._task,
            completed=event.done,
            total=event.total,
            count=_count(event),
            rate=self._pace.rate(event, now),
            left=self._pace.left(event, now),
        )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _started(self) -> "Progress":
        """The rich display, made when the first event comes: a job that fails early loads no rich."""
        if self._progress is None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}", markup=False),
                TextColumn("{task.fields[rate]}", markup=False, style="green"),
                TextColumn("{task.fields[left]}", markup=False, style="cyan"),
                console=terminal.console(self._stream),
                transient=True,
                redirect_stdout=False,  # rich would send the rows of `-o -` to the terminal
                refresh_per_second=5,  # more costs the embedding threads time and shows no one more
                expand=True,
            )
            self._progress.start()
        return self._progress
