"""The engine that runs a model folder through torch: packed, on a CPU, a GPU or an Apple GPU.

On a CPU every worker thread computes whole batches by itself, with no barrier between threads; so vectors
do not depend on the number of threads. A GPU has one worker.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemb.device import Device, is_out_of_memory, one_thread, pick, release_cache
from gemb.engine import OutOfMemory
from gemb.errors import GembError
from gemb.model.folder import ModelFolder, fingerprint
from gemb.text.batches import Batch

if TYPE_CHECKING:
    from gemb.model.encoder import PackedEncoder

CPU_TOKENS = 1024
"""Fewer read the weights more often, more spill the activations (MiniLM and a 300M Gemma, fp32 and bf16)."""
GPU_TOKENS = 32_768


class TorchEngine:
    """One model on one device, ready to compute."""

    def __init__(self, encoder: PackedEncoder, device: Device, dims: int, batch_tokens: int) -> None:
        self.dims = dims
        self.batch_tokens = batch_tokens
        self.workers = device.threads
        self.precision: str = device.precision
        self.device_line = device.line
        self.notes: tuple[str, ...] = tuple(encoder.notes)
        """What runs otherwise than it could, one sentence each."""
        self._encoder: PackedEncoder | None = encoder
        self._device = device
        self._prepared = threading.local()

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        batch_tokens: int | None = None,
    ) -> TorchEngine:
        """The engine of a model folder; see `gemb.device.pick` for `device`, `precision` and `threads`.

        `batch_tokens` is what a batch should hold; None chooses by device and width.
        Raises GembError for a choice that cannot be had, UnavailableError for damaged weights, MismatchError
        if the model cannot be run or is causal though it declares to be bidirectional.
        """
        chosen = pick(device, precision, threads)
        if batch_tokens is not None and batch_tokens < 1:
            raise GembError(f"--batch-tokens is {batch_tokens}, but at least 1 is needed")
        fingerprint(folder)  # which also proves that every weight is a finite number
        import torch

        from gemb.model.encoder import PackedEncoder
        from gemb.model.kernels import Kernels
        from gemb.model.proof import prove_bidirectional

        dtype = torch.bfloat16 if chosen.precision == "bf16" else torch.float32
        # On one thread: two that wait for each other at every tensor take three times as long to pack them.
        with one_thread():
            encoder = PackedEncoder(folder, Kernels(chosen.name, dtype))
            proof = prove_bidirectional(encoder)
        tokens = batch_tokens or (CPU_TOKENS if chosen.kind == "cpu" else GPU_TOKENS)
        engine = cls(encoder, chosen, folder.dims, tokens)
        if proof.is_collapsed or (proof.neighbour_difference and chosen.kind == "cpu"):
            engine.notes += (str(proof),)
        return engine

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """fp32 vectors[B, D] of a batch; may be called from `workers` threads."""
        if self._encoder is None:
            raise RuntimeError("the engine is closed")
        self._prepare_thread()
        try:
            vectors = self._encoder.forward(batch.ids, batch.lengths, batch.prompt_tokens)
            return vectors.float().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release_cache(self._device.name)
            raise OutOfMemory(str(error)) from error

    def close(self) -> None:
        """Let go of the model."""
        self._encoder = None
        release_cache(self._device.name)

    def _prepare_thread(self) -> None:
        """Let torch compute on the calling thread alone, once a thread: the batches are the parallelism."""
        if self._device.kind == "cpu" and not getattr(self._prepared, "done", False):
            import torch

            torch.set_num_threads(1)
            self._prepared.done = True
