"""Stand-ins for what is slow or rare: an engine without a model, deterministic to the bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemb.engine import OutOfMemory
from gemb.text.batches import Batch


def fake_vector(ids: NDArray[np.int32], dims: int = 8) -> NDArray[np.float32]:
    """The vector [dims] of one text: unit length, and different for different ids."""
    waves = np.sin(np.outer(ids.astype(np.float64) + 1, np.arange(1, dims + 1) * 0.7))  # [L, dims]
    vector = (waves * np.linspace(1, 2, len(ids))[:, None]).sum(axis=0)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class FakeEngine:
    """An engine whose vectors are those of `fake_vector`.

    `memory_tokens`: more tokens in a batch than that are OutOfMemory. `fails`, called with a text's ids:
    an exception to raise for any batch that holds it. `spoils`: a value to write into its vector.
    `seconds_per_token` slows it down.
    """

    def __init__(
        self,
        *,
        dims: int = 8,
        batch_tokens: int = 64,
        workers: int = 1,
        memory_tokens: int | None = None,
        fails: Callable[[NDArray[np.int32]], BaseException | None] | None = None,
        spoils: Callable[[NDArray[np.int32]], float | None] | None = None,
        seconds_per_token: float = 0.0,
    ) -> None:
        self.dims = dims
        self.batch_tokens = batch_tokens
        self.workers = workers
        self.device_line = "fake"
        self.closed = False
        self.calls: list[int] = []
        """Tokens of every batch that was begun."""
        self.rows = 0
        """Texts that were computed."""
        self._memory_tokens = memory_tokens
        self._fails = fails
        self._spoils = spoils
        self._seconds_per_token = seconds_per_token
        self._lock = threading.Lock()

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        with self._lock:
            self.calls.append(len(batch.ids))
        if self._memory_tokens is not None and len(batch.ids) > self._memory_tokens:
            raise OutOfMemory(f"{len(batch.ids)} tokens do not fit")
        if self._seconds_per_token:
            time.sleep(self._seconds_per_token * len(batch.ids))
        vectors = np.empty((len(batch.rows), self.dims), dtype=np.float32)
        texts = np.split(batch.ids, np.cumsum(batch.lengths)[:-1])
        for row, ids in enumerate(texts):
            if self._fails and (error := self._fails(ids)) is not None:
                raise error
            vectors[row] = fake_vector(ids, self.dims)
            if self._spoils and (value := self._spoils(ids)) is not None:
                vectors[row] = value
        with self._lock:
            self.rows += len(batch.rows)
        return vectors

    def close(self) -> None:
        self.closed = True


def open_fake_engine() -> FakeEngine:
    """A fake engine for a process of its own."""
    return FakeEngine(seconds_per_token=0.0002)


def open_fragile_engine() -> FakeEngine:
    """An engine whose process is killed by any text that begins with token 13."""

    def kill(ids: NDArray[np.int32]) -> None:
        if ids[0] == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    return FakeEngine(fails=kill)


def open_broken_engine() -> FakeEngine:
    """An engine with a bug."""

    def bug(ids: NDArray[np.int32]) -> BaseException:
        return TypeError("a bug in the engine")

    return FakeEngine(fails=bug)
