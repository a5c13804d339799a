"""How far a job of `gemb embed` is, told to whoever watches it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from gemb.jobs.writing import Counts
from gemb.report import Event, OnProgress
from gemb.text.inputs import InputFile

BLOCK_BYTES = 1 << 20
STAGE = "embedding"


class Watch:
    """The progress of a job: records written, and texts that are computed and on their way."""

    def __init__(self, on_progress: OnProgress, stage: str = STAGE) -> None:
        self._on_progress = on_progress
        self._stage = stage
        self._lock = threading.Lock()
        self._total: int | None = None
        self._records = 0
        self._texts = self._texts_written = 0
        self._tokens = 0

    def begin(
        self, counts: Counts, inputs: Sequence[InputFile], shards: int = 1, *, total: int | None = None
    ) -> None:
        """Start from what earlier runs did; the inputs are counted meanwhile, where that is cheap.

        Of `shards` that divide the input, this job does one. With a known `total` nothing is counted.
        """
        self._records = counts.records
        self._texts = self._texts_written = counts.computed_texts
        self._total = total
        if total is None and all(_has_a_record_a_line(file) for file in inputs):
            arguments = (inputs, shards)
            threading.Thread(target=self._count, args=arguments, name="gemb-counter", daemon=True).start()
        self._show()

    def computed(self, texts: int, tokens: int) -> None:
        """So many texts and tokens were just computed."""
        with self._lock:
            self._texts += texts
            self._tokens += tokens
        self._show()

    def written(self, counts: Counts) -> None:
        """A window was written."""
        with self._lock:
            self._records = counts.records
            self._texts_written = counts.computed_texts
        self._show()

    def note(self, line: str) -> None:
        """Tell people one line at once."""
        self._show(line)

    def _show(self, note: str = "") -> None:
        with self._lock:
            done = self._records + max(0, self._texts - self._texts_written)
            if self._total is not None:
                done = min(done, self._total)
            event = Event(self._stage, done, self._total, tokens=self._tokens, note=note)
        self._on_progress(event)

    def _count(self, inputs: Sequence[InputFile], shards: int) -> None:
        try:
            lines = sum(_lines_in(file.path) for file in inputs if file.path is not None)
        except OSError:
            return  # the job itself tells of a file that cannot be read; there is only no total
        self._total = -(-lines // shards)


def _lines_in(path: Path) -> int:
    """The lines of a file, each a record unless it is blank, so that it may be a few too many."""
    lines = 0
    last = b"\n"
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK_BYTES):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def _has_a_record_a_line(file: InputFile) -> bool:
    return file.format in ("jsonl", "text") and file.compression == "none" and not file.is_stream
