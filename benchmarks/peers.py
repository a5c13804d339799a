"""The contestants: gemb and what people use today, each as "texts in, unit vectors out".

An engine is loaded and run inside a process of its own (`contestant`), so each imports only itself.
What every engine does with a text is the same: no prompt unless the contestant names one, cut at the
folder's maximum length, float32 rows back in the order of the texts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks import models

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of a result table: which engine, on which folder, how."""

    name: str
    engine: str
    folder: str
    precision: str
    threads: int = 1
    batch_size: int = 32
    """Texts a batch; gemb ignores it, its batches are token budgets."""
    prompt: str = "none"
    """The name of a prompt of the folder, or "none"."""


class Engine(Protocol):
    """A loaded model; `embed` gives vectors[B, D] in the order of the texts."""

    batch_size: int

    def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors of the texts."""
        ...


class Gemb:
    """gemb's Python API as a user calls it."""

    def __init__(self, contestant: Contestant) -> None:
        from gemb import Encoder

        self.batch_size = contestant.batch_size
        self._prompt = contestant.prompt
        self._encoder = Encoder.load(
            contestant.folder, precision=contestant.precision, threads=contestant.threads
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`Encoder.embed`, prompt named."""
        return self._encoder.embed(list(texts), as_=self._prompt)


class SentenceTransformers:
    """sentence-transformers `encode` as it comes: sorted by characters, padded."""

    def __init__(self, contestant: Contestant) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(contestant.threads)
        precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[contestant.precision]
        self.batch_size = contestant.batch_size
        self._prompt = models.prompt_text(Path(contestant.folder), contestant.prompt)
        self._model = SentenceTransformer(
            contestant.folder, device="cpu", model_kwargs={"torch_dtype": precision}
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`encode` to a float32 array."""
        # numpy knows no bf16, so a bf16 model's vectors come as tensors, as its users have to take them.
        tensor = self._model.encode(
            list(texts),
            batch_size=self.batch_size,
            prompt=self._prompt or None,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        vectors: Vectors = tensor.float().numpy()
        return vectors


class OnnxRuntime:
    """onnxruntime on the exported graph, texts sorted by tokens, batches padded to their longest text."""

    sorted_by_tokens = True

    def __init__(self, contestant: Contestant) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        folder = Path(contestant.folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = contestant.threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            models.onnx_graph(folder, int8=contestant.precision == "int8"),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.batch_size = contestant.batch_size
        self._prompt = models.prompt_text(folder, contestant.prompt)
        settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(int(settings["max_seq_length"]))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Mean over the text's own tokens, then unit length."""
        ids = [
            encoding.ids for encoding in self._tokenizer.encode_batch([self._prompt + text for text in texts])
        ]
        order = list(range(len(ids)))
        if self.sorted_by_tokens:
            order.sort(key=lambda row: -len(ids[row]))
        rows: list[Vectors] = []
        for start in range(0, len(order), self.batch_size):
            rows.append(self._forward([ids[row] for row in order[start : start + self.batch_size]]))
        vectors = np.empty((len(ids), rows[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(rows)
        return vectors

    def _forward(self, batch: Sequence[Sequence[int]]) -> Vectors:
        longest = max(map(len, batch))
        ids = np.zeros((len(batch), longest), np.int64)  # [B, L]
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        states: Vectors = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]  # [B, L, D]
        weights = mask[:, None, :].astype(np.float32)  # [B, 1, L]
        sums: Vectors = (weights @ states)[:, 0]  # [B, D]
        unit: Vectors = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return unit


class FastembedWay(OnnxRuntime):
    """What fastembed does with the same graph: batches of 256 in the order of the input."""

    sorted_by_tokens = False


ENGINES: Mapping[str, Callable[[Contestant], Engine]] = {
    "gemb": Gemb,
    "sentence-transformers": SentenceTransformers,
    "onnxruntime": OnnxRuntime,
    "fastembed-way": FastembedWay,
}


def contestants(
    model: models.Model, precisions: Sequence[str], threads: int, prompt: str = "none"
) -> list[Contestant]:
    """Everyone who can run `model`: gemb and sentence-transformers in each precision, then the others.

    sentence-transformers fp32 at batch 32, the reference of speed and of exactness, is called
    `st-fp32` and always there. The onnxruntime peers run MiniLM only.
    """
    folder = str(model.folder())

    def make(name: str, engine: str, precision: str, batch_size: int = 32) -> Contestant:
        return Contestant(name, engine, folder, precision, threads, batch_size, prompt)

    chosen = [make(REFERENCE, "sentence-transformers", "fp32")]
    chosen += [
        make(f"st-{precision}", "sentence-transformers", precision)
        for precision in precisions
        if precision != "fp32"
    ]
    chosen += [make(f"gemb-{precision}", "gemb", precision) for precision in precisions]
    if model.name == "minilm":
        chosen.append(make("ort-fp32", "onnxruntime", "fp32"))
        chosen.append(make("ort-int8", "onnxruntime", "int8"))
        chosen.append(make("fastembed-way", "fastembed-way", "fp32", batch_size=256))
    return chosen


REFERENCE = "st-fp32"
"""The contestant that the bars are relative to: sentence-transformers, fp32, batch 32."""


def attributes(contestant: Contestant) -> dict[str, Any]:
    """The fields of a contestant as JSON values, without the folder, which is this machine's."""
    return {
        "engine": contestant.engine,
        "precision": contestant.precision,
        "threads": contestant.threads,
        "batch_size": contestant.batch_size,
        "prompt": contestant.prompt,
    }
