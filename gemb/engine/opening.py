"""An engine for a model folder on the device, or the devices, that the user names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from gemb.device import all_devices, pick
from gemb.engine import Engine
from gemb.engine.workers import ProcessEngine
from gemb.model.folder import ModelFolder


def open_engine(
    folder: ModelFolder,
    *,
    device: str,
    precision: str,
    threads: int | None,
    batch_tokens: int | None,
    notice: Callable[[str], None],
) -> Engine:
    """A torch engine in this process; for several devices, with commas between, one process for each.

    On a CPU the threads are divided among its processes. `notice` hears of a process that died.
    """
    names = all_devices(device)
    if len(names) == 1:
        return open_here(folder, names[0], precision, threads, batch_tokens)
    processes_on_cpu = sum(name == "cpu" for name in names)
    each = pick("cpu", "fp32", threads).threads // max(1, processes_on_cpu)
    return ProcessEngine(
        [
            partial(open_here, folder, name, precision, max(1, each) if name == "cpu" else None, batch_tokens)
            for name in names
        ],
        names,
        notice,
    )


def open_here(
    folder: ModelFolder, device: str, precision: str, threads: int | None, batch_tokens: int | None
) -> Engine:
    """A torch engine in this process."""
    from gemb.engine.torch_engine import TorchEngine

    return TorchEngine.load(
        folder, device=device, precision=precision, threads=threads, batch_tokens=batch_tokens
    )


@contextmanager
def stdout_guarded() -> Iterator[None]:
    """While a model loads, what libraries write to file descriptor 1 goes to stderr: stdout is data."""
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started the program: nothing to guard
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
