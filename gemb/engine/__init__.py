"""The narrow line between text and tensors: packed token ids in, vectors out.

An `Engine` computes one batch; `run_batches` drives it from worker threads and deals with what can go
wrong: too little memory (smaller batches), a batch that fails (down to the row), vectors that are no
vectors (not finite, or zero). Nothing here knows torch; `gemb.engine.torch_engine`, the processes of
`gemb.engine.workers` and, without torch, `gemb.engine.onnx_engine` stand behind the protocol.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from queue import Full, Queue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemb.errors import MachineError
from gemb.text.batches import Batch
from gemb.vectors import bad_rows

HOPELESS_ROWS = 8  # so many rows of one batch, each failing alone: the machine is broken, not the rows


class OutOfMemory(Exception):
    """The batch did not fit into the memory of the device; a smaller one may."""


class Engine(Protocol):
    """Computes vectors of packed token ids.

    `forward` may be called from `workers` threads at a time, and a row's vector does not depend on
    the other rows of its batch (bitwise on a CPU).
    """

    dims: int
    """Width D of the vectors."""
    batch_tokens: int
    """Tokens a batch should hold; `run_batches` lowers it when the device runs out of memory."""
    workers: int
    """Threads that may call `forward` at the same time."""
    precision: str
    """What it computes in: fp32, bf16, or `fp32 onnx`; with a + between, where several devices differ."""
    device_line: str
    """What runs where and why, as it is shown to people."""
    notes: tuple[str, ...]
    """What runs otherwise than it could, one sentence each; shown too."""

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Vectors [B, D] of the rows of a batch, in the order of the batch.

        Raises OutOfMemory if the batch is too big for the device, RuntimeError or ValueError if it
        cannot be computed.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; it computes nothing afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class BatchFailure:
    """Rows without a vector, and why."""

    rows: NDArray[np.int64]
    """[B], `Batch.rows` of the rows concerned."""
    reason: str
    """For people: "not finite", "zero vector", or the message of the engine."""


Result = tuple[Batch, NDArray[np.float32] | BatchFailure]


def run_batches(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    stop: threading.Event | None = None,
    notice: Callable[[str], None] | None = None,
) -> Iterator[Result]:
    """Vectors of every row of `batches`, in pieces, as they are ready.

    A piece is a part of one batch with either its vectors [B, D], finite and of non-zero norm, or a
    `BatchFailure`; each row is in exactly one piece. Pieces come in no particular order, but their
    vectors do not depend on it.

    `batches` is read lazily, from the worker threads, one thread at a time, at most one batch ahead of
    each worker. When `stop` is set, batches in flight are finished and yielded and no further one is
    begun. Closing the iterator, or an exception in the thread that reads it, waits for the batches in
    flight and drops them. `notice` hears, once, that memory ran out.

    Raises MachineError if one row alone does not fit the device, or every row of a batch fails alone;
    whatever else `forward` or `batches` raises comes through with its traceback.
    """
    run = _Run(engine, iter(batches), stop or threading.Event(), notice or _say_nothing)
    return run.results()


def _say_nothing(message: str) -> None:
    """Drop a notice nobody asked for."""


class _Run:
    """One call of `run_batches`: the threads, what they share, and the queue that they fill."""

    def __init__(
        self, engine: Engine, batches: Iterator[Batch], stop: threading.Event, notice: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._batches = batches
        self._stop = stop
        self._notice = notice
        self._cancelled = threading.Event()
        self._reading = threading.Lock()  # held while `batches` is advanced
        self._shrinking = threading.Lock()
        self._lowered = False  # memory ran out once; later batches are held to the lowered budget
        self._idle = threading.Condition()
        self._computing = 0
        # Two pieces a worker: enough that no worker waits for the reader, few enough to stay small.
        self._pieces: Queue[Result | BaseException | None] = Queue(maxsize=2 * engine.workers + 1)

    def results(self) -> Iterator[Result]:
        threads = [
            threading.Thread(target=self._work, name=f"gemb-engine-{number}", daemon=True)
            for number in range(self._engine.workers)
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                piece = self._pieces.get()
                if piece is None:
                    running -= 1
                elif isinstance(piece, BaseException):
                    raise piece
                else:
                    yield piece
        finally:
            self._cancelled.set()
            with self._idle:  # a thread that still waits for `batches` holds nothing; it ends by itself
                self._idle.wait_for(lambda: self._computing == 0)

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                for piece in self._compute(batch):
                    if not self._give(piece):
                        return
        except BaseException as error:  # raised again in the thread that reads
            self._give(error)
        else:
            self._give(None)

    def _next(self) -> Batch | None:
        with self._reading:
            if self._stop.is_set() or self._cancelled.is_set():
                return None
            batch = next(self._batches, None)
            # Asked again, because `batches` may have waited long for its next one.
            return None if self._stop.is_set() or self._cancelled.is_set() else batch

    def _give(self, piece: Result | BaseException | None) -> bool:
        """Whether the piece was taken; False when nobody reads any more."""
        while not self._cancelled.is_set():
            try:
                self._pieces.put(piece, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def _compute(self, batch: Batch) -> Iterator[Result]:
        waiting = [batch]
        alone = 0  # rows of this batch that failed alone
        while waiting:
            part = waiting.pop()
            rows = len(part.rows)
            if self._lowered and rows > 1 and len(part.ids) > self._engine.batch_tokens:
                waiting.extend(reversed(halves(part)))
                continue
            try:
                vectors = self._forward(part)
            except OutOfMemory as error:
                self._shrink(part, error)
                waiting.extend(reversed(halves(part)))
            except (RuntimeError, ValueError) as error:
                if rows > 1:
                    waiting.extend(reversed(halves(part)))
                    continue
                alone += 1
                if alone == len(batch.rows) >= HOPELESS_ROWS:
                    raise MachineError(
                        f"all {alone} rows of a batch failed, each alone, on {self._engine.device_line}: "
                        f"{_one_line(error)}"
                    ) from error
                yield part, BatchFailure(part.rows, f"cannot be computed: {_one_line(error)}")
            else:
                yield from _checked(part, vectors)

    def _forward(self, batch: Batch) -> NDArray[np.float32]:
        with self._idle:
            self._computing += 1
        try:
            return self._engine.forward(batch)
        finally:
            with self._idle:
                self._computing -= 1
                self._idle.notify_all()

    def _shrink(self, batch: Batch, error: OutOfMemory) -> None:
        tokens = len(batch.ids)
        if len(batch.rows) == 1:
            raise MachineError(
                f"out of memory on {self._engine.device_line} with one text of {tokens:,} tokens alone: "
                f"{_one_line(error)}; pass a smaller --max-tokens, or another --device"
            ) from error
        with self._shrinking:
            self._engine.batch_tokens = min(self._engine.batch_tokens, max(1, tokens // 2))
            told, self._lowered = self._lowered, True
        if not told:
            self._notice(
                f"out of memory at {tokens:,} tokens a batch on {self._engine.device_line}; "
                f"going on with {self._engine.batch_tokens:,}"
            )


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Both halves of a batch of two rows or more, cut where the tokens are nearest to half."""
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    row = int(np.searchsorted(ends, ends[-1] / 2, side="right"))
    row = min(max(row, 1), len(ends) - 1)
    token = int(ends[row - 1])
    first = replace(batch, ids=batch.ids[:token], lengths=batch.lengths[:row], rows=batch.rows[:row])
    second = replace(batch, ids=batch.ids[token:], lengths=batch.lengths[row:], rows=batch.rows[row:])
    return first, second


def _checked(batch: Batch, vectors: NDArray[np.float32]) -> Iterator[Result]:
    """The batch with its good vectors, and one failure for each kind of bad ones."""
    bad = bad_rows(vectors)
    if not len(bad):
        yield batch, vectors
        return
    keep = np.ones(len(batch.rows), dtype=bool)
    keep[bad] = False
    for row in bad.tolist():
        reason = "its vector is zero" if np.isfinite(vectors[row]).all() else "its vector is not finite"
        alone = _rows_of(batch, np.arange(len(batch.rows)) == row)
        yield alone, BatchFailure(alone.rows, reason)
    if keep.any():
        yield _rows_of(batch, keep), vectors[keep]


def _rows_of(batch: Batch, keep: NDArray[np.bool_]) -> Batch:
    """The batch with only the rows where `keep`[B] is True."""
    tokens = np.repeat(keep, batch.lengths)
    return replace(batch, ids=batch.ids[tokens], lengths=batch.lengths[keep], rows=batch.rows[keep])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
