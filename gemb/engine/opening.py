"""An engine for a model folder on the device, or the devices, that the user names.

torch runs everything. For a few texts onnxruntime is there sooner, where a graph of the model is at hand:
importing torch alone takes longer than such a search.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from gemb.device import all_devices, pick
from gemb.engine import Engine
from gemb.engine.onnx_engine import PRECISION as ONNX_PRECISION
from gemb.engine.onnx_engine import OnnxEngine, find_graph, is_installed, write_cached_graph
from gemb.engine.workers import ProcessEngine
from gemb.errors import GembError, MachineError, UnavailableError
from gemb.model.folder import ModelFolder

EngineName: TypeAlias = Literal["auto", "torch", "onnx"]


def open_engine(
    folder: ModelFolder,
    *,
    device: str,
    precision: str,
    threads: int | None,
    batch_tokens: int | None,
    notice: Callable[[str], None],
    engine: EngineName = "auto",
    few_texts: bool = False,
) -> Engine:
    """An engine in this process; for several devices, with commas between, one process with torch for each.

    On a CPU the threads are divided among its processes. `notice` hears of a process that died, and of a
    graph that is written. `engine` auto is onnx for `few_texts` where nothing else is asked of device and
    precision and a graph is there, else torch. onnx writes the graph if there is none.

    Raises GembError if `engine` is onnx and does not go with the rest.
    """
    found = _open_onnx(folder, engine, device, precision, threads, batch_tokens, notice, few_texts=few_texts)
    if found is not None:
        return found
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


def _open_onnx(
    folder: ModelFolder,
    engine: EngineName,
    device: str,
    precision: str,
    threads: int | None,
    batch_tokens: int | None,
    notice: Callable[[str], None],
    *,
    few_texts: bool,
) -> Engine | None:
    """The engine without torch; None where torch is to run the model."""
    if engine == "onnx":
        device = _asked(device)
        for option, value, choices in (
            ("--device", device, ("auto", "cpu")),
            ("--precision", precision, ("auto", "fp32")),
        ):
            if value not in choices:
                raise GembError(
                    f"--engine onnx computes in fp32 on the cpu, not with {option} {value}; "
                    "leave one of them out"
                )
        graph = find_graph(folder)
        if graph is None:
            notice(f"writing the ONNX graph of {folder.path} into the cache, once")
            graph = write_cached_graph(folder)
        return OnnxEngine.load(
            folder, graph, reason="--engine onnx asks for it", threads=threads, batch_tokens=batch_tokens
        )
    graph = graph_for_few_texts(folder, device, precision) if few_texts and engine == "auto" else None
    if graph is None:
        return None
    try:
        return OnnxEngine.load(
            folder,
            graph,
            reason="for a few texts it is there before torch is",
            threads=threads,
            batch_tokens=batch_tokens,
        )
    except (UnavailableError, MachineError) as error:  # a damaged graph, or onnxruntime does not start
        notice(f"torch runs the model instead: {error}")
        return None


def graph_for_few_texts(folder: ModelFolder, device: str, precision: str) -> Path | None:
    """The graph with which `auto` runs a few texts; None where torch runs them as well."""
    asks_for_more = _asked(device) not in ("auto", "cpu") or precision not in ("auto", "fp32")
    return None if asks_for_more or not is_installed() else find_graph(folder)


def _asked(device: str) -> str:
    """`device`, and what the environment asks for where it is auto."""
    return (os.environ.get("GEMB_DEVICE") or "auto") if device == "auto" else device


def arithmetic(device: str, precision: str, engine: EngineName) -> list[str]:
    """What vectors of one model may differ by, for the key of a cache of them.

    With a cache `auto` never means onnx: its rows stand for both kinds of run, of few texts and of many.
    """
    if engine == "onnx":
        return ["cpu", ONNX_PRECISION]
    chosen = pick(all_devices(device)[0], precision)
    return [chosen.kind, chosen.precision]


def options_of(precision: str) -> str:
    """The options that compute in what an engine calls its `precision`, for messages."""
    if precision == ONNX_PRECISION:
        return "--engine onnx"
    # fp32 is what onnx computes in, too, and auto may choose it.
    return f"--engine torch --precision {precision}" if precision == "fp32" else f"--precision {precision}"


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
