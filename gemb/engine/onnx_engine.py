"""The engine that needs no torch: onnxruntime runs the graph of a model folder on the processor.

The graph stands in `onnx/` of the folder, where `gemb quantize --onnx` puts it, or in the user's cache, under
the fingerprint of the model. A graph is only taken if it says that it gives the vectors of this very model.

Texts of one length are computed together, so nothing is padded. On one thread, as here, onnxruntime sums each
row of a product in the same order whatever the number of rows, save for a lone row; the engine never lets it
have one. So vectors do not depend on their neighbours: to the bit on the processors we tried, and to 1e-6 by
promise, since onnxruntime promises nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemb.device import Device, pick
from gemb.engine import OutOfMemory
from gemb.errors import MachineError, UnavailableError
from gemb.files import file_digest, os_errors_explained
from gemb.model.folder import ModelFolder, fingerprint
from gemb.model.hub import cache_folder
from gemb.model.onnx import SAME_VECTORS, checksum_of_weights, entry, is_whole
from gemb.text.batches import Batch

if TYPE_CHECKING:
    import onnxruntime

PRECISION = "fp32 onnx"
"""What rows are recorded to be computed in: fp32, with sums in another order than torch has them."""
TOKENS = 1024
"""Tokens of a batch, as for torch on a CPU."""
FOLDER = "onnx"
"""Where a model folder has its graphs; transformers.js and TEI look there."""
FILES = ("model.onnx", "model_quantized.onnx", "model_q4.onnx")
"""Their names, the first of them preferred: it is the quickest."""
_LAYOUT = "1"  # of the graphs that gemb writes; raise it when it writes better ones
_LARGEST_GRAPH_BYTES = 64 << 20  # without the weights; ours are far smaller, those of others need not be read


class OnnxEngine:
    """One graph, ready to compute."""

    def __init__(
        self, session: onnxruntime.InferenceSession, device: Device, dims: int, batch_tokens: int
    ) -> None:
        self.dims = dims
        self.batch_tokens = batch_tokens
        self.workers = device.threads
        self.precision = PRECISION
        self.device_line = device.line
        self.notes: tuple[str, ...] = ()
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def load(
        cls, folder: ModelFolder, graph: Path, *, reason: str, threads: int | None, batch_tokens: int | None
    ) -> OnnxEngine:
        """The engine of `folder` whose `graph` was found; `reason` is why it is this engine, for people.

        Raises MachineError if onnxruntime cannot be imported, UnavailableError if the graph is damaged.
        """
        chosen = pick("cpu", "fp32", threads)
        device = Device(
            chosen.name, chosen.description, "fp32", chosen.threads, f"onnxruntime runs it: {reason}"
        )
        return cls(open_session(graph), device, folder.dims, batch_tokens or TOKENS)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """fp32 vectors[B, D] of a batch; may be called from `workers` threads."""
        session = self._session
        if session is None:
            raise RuntimeError("the engine is closed")
        ends = np.cumsum(batch.lengths)
        parts = []
        for length, group in groupby(range(len(batch.lengths)), key=lambda row: int(batch.lengths[row])):
            rows = list(group)
            ids = batch.ids[ends[rows[0]] - length : ends[rows[-1]]].reshape(len(rows), length)
            if ids.size == 1:  # a lone row of a product; see above
                ids = np.repeat(ids, 2, axis=0)
            parts.append(_run(session, ids.astype(np.int64))[: len(rows)])
        return np.concatenate(parts)

    def close(self) -> None:
        """Let go of the graph."""
        self._session = None


def _run(session: onnxruntime.InferenceSession, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors[B, D] of ids[B, L]."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        vectors: NDArray[np.float32]
        (vectors,) = session.run(
            ["sentence_embedding"], {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        )
    except (errors.Fail, errors.InvalidArgument, errors.RuntimeException, errors.EPFail) as error:
        if "Failed to allocate memory" in str(error):  # BFCArena and its kin
            raise OutOfMemory(str(error)) from error
        raise RuntimeError(str(error)) from error
    return vectors


def open_session(graph: Path) -> onnxruntime.InferenceSession:
    """The graph at `graph`, ready to run on one thread.

    Raises MachineError if onnxruntime cannot be imported or is too old for the graph, UnavailableError if the
    files are damaged.
    """
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors
    except ImportError as error:
        raise MachineError(
            f"onnxruntime cannot be imported ({error}); pip install 'gemb[onnx]', or pass --engine torch"
        ) from error
    with os_errors_explained(graph, "read"):
        content = graph.read_bytes()
    if not is_whole(content):
        raise _damaged(graph, f"its checksum is not the one in {graph.name}", graph)
    expected = checksum_of_weights(content)
    if expected is not None:
        _check_weights(graph, expected)
    options = onnxruntime.SessionOptions()
    # One thread a batch: the batches are the parallelism, and the order of sums stays what it is.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; they come as exceptions too
    try:
        return onnxruntime.InferenceSession(os.fspath(graph), options, providers=["CPUExecutionProvider"])
    except errors.InvalidProtobuf as error:
        raise _damaged(graph, "it is no ONNX graph, or is cut short", graph) from error
    except (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.NoSuchFile,
        errors.NotImplemented,
        errors.RuntimeException,
    ) as error:
        # What gemb wrote is whole here, so it is newer than this onnxruntime.
        raise MachineError(
            f"onnxruntime {onnxruntime.__version__} cannot run {graph}: it has operators or a layout that "
            "this version does not know; pip install -U onnxruntime, or pass --engine torch"
        ) from error


def _check_weights(graph: Path, expected: str) -> None:
    """Returns if the file of weights is what was written beside `graph`, of the checksum `expected`.

    It is not read again if size, times and inode are those of the last time; the user's cache remembers.
    Raises UnavailableError if it changed or is gone.
    """
    data = graph.with_name(f"{graph.name}_data")
    if not data.exists():
        raise _damaged(graph, f"its weights {data.name} are not beside it", graph)
    with os_errors_explained(data, "read"):
        state = data.stat()
        told = (data.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, expected)
        place = cache_folder() / "verified" / hashlib.sha256(repr(told).encode()).hexdigest()
        if place.exists():
            return
        if file_digest(data) != expected:
            raise _damaged(data, f"its checksum is not the one in {graph.name}", graph)
    with contextlib.suppress(OSError):  # then it is read again next time
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


def _damaged(file: Path, what: str, graph: Path) -> UnavailableError:
    return UnavailableError(
        f"{file} is damaged: {what}; remove {graph.parent} and make it again, or pass --engine torch"
    )


def is_installed() -> bool:
    """Whether onnxruntime is there; it is not imported."""
    return find_spec("onnxruntime") is not None


def find_graph(folder: ModelFolder) -> Path | None:
    """The graph that gives the vectors of `folder`: from its `onnx/`, or the cache; None if none does."""
    identity = fingerprint(folder)
    places = [*(folder.path / FOLDER / name for name in FILES), cached_graph(identity)]
    return next((place for place in places if _is_graph_of(place, identity)), None)


def cached_graph(identity: str) -> Path:
    """Where the cache has the graph of the model with this fingerprint, if it has."""
    return cache_folder() / FOLDER / f"{identity[:32]}-{_LAYOUT}" / FILES[0]


def write_cached_graph(folder: ModelFolder) -> Path:
    """The graph of `folder` in the cache, written now if it is not there; whole or not at all.

    Raises MismatchError for a family that no graph is written for, MachineError if onnx is not installed, or
    the disk fails.
    """
    identity = fingerprint(folder)
    place = cached_graph(identity)
    if _is_graph_of(place, identity):
        return place
    try:
        from gemb.model.onnx.encoder import write_graph
    except ImportError as error:
        raise MachineError(
            f"a graph cannot be written ({error}); pip install 'gemb[onnx]', or pass --engine torch"
        ) from error
    with os_errors_explained(place.parent):
        place.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=place.parent.parent) as unfinished:
            whole = Path(unfinished) / "whole"
            whole.mkdir()
            write_graph(folder, whole / FILES[0])
            shutil.rmtree(place.parent, ignore_errors=True)  # what is there is no graph of this model
            try:
                whole.rename(place.parent)
            except OSError:
                if not _is_graph_of(place, identity):  # else another process was quicker
                    raise
    return place


def _is_graph_of(graph: Path, identity: str) -> bool:
    """Whether the metadata of a graph file says that it gives the vectors of the model `identity`."""
    try:
        small = graph.stat().st_size <= _LARGEST_GRAPH_BYTES
        return small and entry(SAME_VECTORS, identity) in graph.read_bytes()
    except OSError:
        return False
