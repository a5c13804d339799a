"""Stand-ins for what is slow or rare: an engine without a model, deterministic to the bit, and its folder."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gemb.engine import OutOfMemory
from gemb.text.batches import Batch


def fake_vector(ids: NDArray[np.int32], dims: int = 8) -> NDArray[np.float32]:
    """The vector [dims] of one text: unit length, and different for different ids."""
    waves = np.sin(np.outer(ids.astype(np.float64) + 1, np.arange(1, dims + 1) * 0.7))  # [L, dims]
    vector = (waves * np.linspace(1, 2, len(ids))[:, None]).sum(axis=0)
    unit: NDArray[np.float32] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


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
        self.precision = "fp32"
        self.device_line = "fake"
        self.notes: tuple[str, ...] = ()
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


WORDS = 400
"""The tokenizer of `fake_folder` knows `w0` to `w399`; anything else is `[UNK]`."""


def fake_folder(place: Path, *, max_tokens: int = 16, seed: int = 1, **declared: object) -> Path:
    """A model folder as far as `FakeEngine` needs one: a tokenizer of words, 8 dims, no real weights.

    `declared` goes into config_sentence_transformers.json. Another `seed` gives another fingerprint.
    """
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(WORDS))]
    tokenizer = Tokenizer(
        models.WordLevel({word: id_ for id_, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    place.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(place / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "config.json": {
            "model_type": "bert",
            "hidden_size": 8,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 512,
        },
        "sentence_bert_config.json": {"max_seq_length": max_tokens},
        "config_sentence_transformers.json": declared,
        "1_Pooling/config.json": {"pooling_mode": "mean", "embedding_dimension": 8},
        "modules.json": [
            {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    }
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content), "utf-8")
    save_file({"weight": np.full((2, 2), seed, dtype=np.float32)}, place / "model.safetensors")
    return place


def words(*numbers: int) -> str:
    """The text of these words."""
    return " ".join(f"w{number}" for number in numbers)


def expected(*numbers: int, dims: int = 8) -> NDArray[np.float32]:
    """The vector that `FakeEngine` gives for `words(*numbers)` with the tokenizer of `fake_folder`."""
    return fake_vector(np.array([2, *(number + 4 for number in numbers), 3], dtype=np.int32), dims)
