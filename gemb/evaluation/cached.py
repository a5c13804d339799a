"""An engine in front of which a cache stands: texts that were embedded before cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.engine import Engine
from gemb.engine.cache import ARITHMETIC, VectorCache
from gemb.engine.encoder import Encoder, load_tokeniser
from gemb.engine.opening import EngineName, arithmetic, open_engine
from gemb.errors import GembError
from gemb.model.folder import fingerprint, read_folder
from gemb.model.hub import find_model
from gemb.text.batches import Batch
from gemb.vectors import bad_rows


def load_cached(
    model: str,
    cache: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    offline: bool = False,
    engine: EngineName = "auto",
) -> Encoder:
    """What `Encoder.load` gives, with a cache folder in front of its engine.

    Raises GembError as `Encoder.load` does, and where the folder cannot be a cache.
    """
    folder = read_folder(find_model(model, offline=offline))
    if max_tokens is not None and max_tokens > folder.max_tokens:
        raise GembError(f"max_tokens is {max_tokens:,}, but {model} takes {folder.max_tokens:,} at most")
    tokeniser = load_tokeniser(folder, max_tokens)
    context = [fingerprint(folder), *arithmetic(device, precision, engine), str(ARITHMETIC)]
    VectorCache(cache, context=context, dims=folder.dims).close()  # a folder that cannot be one shows now
    opened = open_engine(
        folder,
        device=device,
        precision=precision,
        threads=threads,
        batch_tokens=batch_tokens,
        notice=lambda _: None,
        engine=engine,
    )
    return Encoder(folder, tokeniser, CachedEngine(opened, cache, context))


class CachedEngine:
    """Gives the vectors that the cache knows, and computes and keeps the others.

    The keys are those of `gemb embed --cache`: what one command embedded, the other finds.
    """

    def __init__(self, engine: Engine, folder: Path, context: Sequence[str]) -> None:
        """`context` is what a vector depends on besides its token ids, see `VectorCache`."""
        self._engine = engine
        self._folder = folder
        self._context = context
        self.dims = engine.dims
        self.workers = engine.workers
        self.precision = engine.precision
        self.device_line = engine.device_line
        self.notes = engine.notes

    @property
    def batch_tokens(self) -> int:
        """That of the engine behind."""
        return self._engine.batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, tokens: int) -> None:
        self._engine.batch_tokens = tokens

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Vectors [B, D], from the cache where it has them. Raises as the engine and the cache do."""
        ends = np.cumsum(batch.lengths, dtype=np.int64)
        texts = np.split(batch.ids, ends[:-1])
        # SQLite's connections belong to a thread, and this may be any of several: it opens its own.
        with closing(VectorCache(self._folder, context=self._context, dims=self.dims)) as cache:
            keys = [cache.key(ids, batch.prompt_tokens) for ids in texts]
            known = cache.find(keys)
            is_new = np.array([key not in known for key in keys])
            vectors = np.empty((len(keys), self.dims), np.float32)
            for row in np.flatnonzero(~is_new).tolist():
                vectors[row] = known[keys[row]]
            if is_new.any():
                vectors[is_new] = self._engine.forward(_only(batch, is_new))
                # What is no vector is refused by `run_batches`, and is not to be remembered.
                bad = set(bad_rows(vectors).tolist())
                cache.add(
                    (keys[row], vectors[row]) for row in np.flatnonzero(is_new).tolist() if row not in bad
                )
        return vectors

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()


def _only(batch: Batch, rows: NDArray[np.bool_]) -> Batch:
    """The rows of a batch where rows[B] is True."""
    tokens = np.repeat(rows, batch.lengths)
    return Batch(batch.ids[tokens], batch.lengths[rows], batch.rows[rows], batch.prompt_tokens)
