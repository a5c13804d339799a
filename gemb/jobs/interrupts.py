"""SIGINT and SIGTERM of a long job: the first asks it to stop tidily, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from gemb.errors import Exit, Interrupted

EXIT_CODES = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}


class Interrupts:
    """While entered, from the main thread, the signals set `stop` instead of ending the process.

    In a block of `at_once` there is nothing to save yet, so the first signal raises Interrupted there.
    In any other thread than the main one the signals are left alone, and `stop` is the caller's to set.
    """

    def __init__(self, nothing_done: str) -> None:
        self.stop = threading.Event()
        self.exit_code: Exit | None = None
        """Set by the first signal."""
        self._nothing_done = nothing_done
        self._raising = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends at once, with Interrupted."""
        if self.exit_code is not None:
            raise Interrupted(self._nothing_done, self.exit_code)
        self._raising += 1
        try:
            yield
        finally:
            self._raising -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.exit_code is not None:  # the second one: the journal holds all that is promised
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        self.stop.set()
        if self._raising:
            raise Interrupted(self._nothing_done, self.exit_code)
