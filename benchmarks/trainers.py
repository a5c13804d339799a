"""The contestants of `train`: the same pairs, loss and optimizer, by gemb and by sentence-transformers.

Each lives in a process of its own and answers JSON lines on stdin with JSON lines on stdout:

    {"do": "load", "trainer": {...}}   -> laps of loading
    {"do": "train", "rows": FILE}      -> the laps of one pass over the rows, and the loss of each step

FILE is a JSON list of [query, passage], cut into batches in its order. A pass begins with the weights that
the last one left. What is timed is the loop: tokenising, forward, backward, clipping, AdamW.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.contestant import memory_bytes

LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
TEMPERATURE = 0.05  # sentence-transformers' scale of 20
Pair = tuple[str, str]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """One row of a result table."""

    name: str
    engine: str
    folder: str
    batch_size: int
    sizes: tuple[int, ...]
    """Matryoshka sizes, largest first."""
    tokens_with_graph: int = 1 << 30
    """gemb: a batch with more tokens is encoded twice (GradCache)."""
    tokens_per_chunk: int = 4096
    """gemb: tokens encoded at once."""
    cached: bool = False
    """sentence-transformers: the Cached loss, which is GradCache, at its own mini-batch size."""


class Trainer(Protocol):
    """A model in training."""

    def train(self, pairs: Sequence[tuple[Any, Any]], /) -> tuple[float, float, list[float]]:
        """(wall seconds, processor seconds, loss of each step) of one pass over the pairs."""
        ...


class Gemb:
    """gemb's own parts, put together as the training loop does."""

    def __init__(self, settings: TrainerSettings) -> None:
        import torch

        from gemb.model.folder import read_folder
        from gemb.model.trainable import TrainableEncoder
        from gemb.text.tokenisation import Tokeniser

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        folder = read_folder(Path(settings.folder))
        self._settings = settings
        self._tokeniser = Tokeniser.load(folder.tokenizer_folder, max_tokens=folder.max_tokens)
        self._encoder = TrainableEncoder.load(folder).train()
        self._parameters = list(self._encoder.parameters())

    def train(self, pairs: Sequence[Pair]) -> tuple[float, float, list[float]]:
        """One pass, with an optimizer that begins anew, as its peer's does."""
        from gemb.training.optimizers import make_optimizer

        self._optimizer = make_optimizer(
            self._encoder.named_parameters(),
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            tables=[self._encoder.table_name],
        )
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [self._step(batch) for batch in batches_of(pairs, self._settings.batch_size)]
        return time.perf_counter() - wall, time.process_time() - cpu, losses

    def _step(self, pairs: Sequence[Pair]) -> float:
        from torch import Tensor

        from gemb.losses import contrastive
        from gemb.training.batches import TrainingBatch
        from gemb.training.gradients import MemoryPlan, batch_gradients
        from gemb.training.optimizers import clip_gradients

        count, settings = len(pairs), self._settings
        texts = [query for query, _ in pairs] + [passage for _, passage in pairs]
        encoded = self._tokeniser.encode(texts)
        none = np.zeros(0, dtype=np.int64)
        batch = TrainingBatch(
            dataset="pairs",
            kind="pairs",
            ids=encoded.ids,
            lengths=encoded.lengths,
            prompt_tokens=np.zeros_like(encoded.lengths),
            pairs=count,
            owner=none,
            hashes=np.arange(2 * count),
            scores=None,
            texts=None,
        )

        def loss(vectors: Tensor) -> tuple[Tensor, dict[str, float]]:
            terms = contrastive(
                vectors[:count], vectors[count:], temperature=TEMPERATURE, sizes=settings.sizes
            )
            return terms.sum(), {}

        plan = MemoryPlan(settings.tokens_per_chunk, settings.tokens_with_graph)
        found = batch_gradients(self._encoder, self._parameters, batch, loss, plan)
        clip_gradients(self._parameters, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return found.loss


class SentenceTransformers:
    """SentenceTransformerTrainer with MatryoshkaLoss around one of its two ranking losses."""

    def __init__(self, settings: TrainerSettings) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import (
            CachedMultipleNegativesRankingLoss,
            MatryoshkaLoss,
            MultipleNegativesRankingLoss,
        )

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._settings = settings
        self._model = SentenceTransformer(
            settings.folder, device="cpu", model_kwargs={"dtype": torch.float32}, local_files_only=True
        )
        ranking = CachedMultipleNegativesRankingLoss if settings.cached else MultipleNegativesRankingLoss
        self._loss = MatryoshkaLoss(self._model, ranking(self._model), matryoshka_dims=list(settings.sizes))

    def train(self, pairs: Sequence[Pair]) -> tuple[float, float, list[float]]:
        """One pass; setting the trainer up is not timed."""
        from datasets import Dataset  # type: ignore[import-untyped]
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from torch.utils.data import BatchSampler, SequentialSampler

        class InOrder(SentenceTransformerTrainer):
            """The same batches as everybody's."""

            def get_batch_sampler(self, dataset: Any, batch_size: int, *_: Any, **__: Any) -> BatchSampler:  # noqa: ANN401
                return BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)

        queries, passages = zip(*pairs, strict=True)
        return timed_pass(
            InOrder,
            SentenceTransformerTrainingArguments,
            self._settings.batch_size,
            model=self._model,
            train_dataset=Dataset.from_dict({"anchor": list(queries), "positive": list(passages)}),
            loss=self._loss,
        )


def timed_pass(
    trainer: Callable[..., Any], arguments: Callable[..., Any], batch_size: int, **parts: object
) -> tuple[float, float, list[float]]:
    """(wall seconds, processor seconds, loss of each step) of one epoch of a Trainer of transformers.

    `trainer` and `arguments` are its class and that of its arguments, or of what is derived from it; `parts`
    are its model, data and whatever else it takes.
    """
    import tempfile

    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        """The time from the begin of training to its end, and the losses."""

        def __init__(self) -> None:
            self.began = self.took = (0.0, 0.0)
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            self.began = time.perf_counter(), time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            self.took = time.perf_counter() - self.began[0], time.process_time() - self.began[1]

        def on_log(self, *_: Any, **given: Any) -> None:  # noqa: ANN401
            if "loss" in given["logs"]:
                self.losses.append(given["logs"]["loss"])

    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        settings = arguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP_NORM,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        made = trainer(args=settings, callbacks=[clock], **parts)
        made.remove_callback(PrinterCallback)
        made.train()
    return *clock.took, clock.losses


ENGINES: dict[str, Callable[[TrainerSettings], Trainer]] = {
    "gemb": Gemb,
    "sentence-transformers": SentenceTransformers,
}


def batches_of(pairs: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """The pairs, so many at a time."""
    for first in range(0, len(pairs), size):
        yield pairs[first : first + size]


def serve(engines: Mapping[str, Callable[[TrainerSettings], Trainer]]) -> None:
    """Answer commands until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")  # theirs
    trainers: list[Trainer] = []
    for line in sys.stdin:
        command = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        losses: list[float] = []
        if command["do"] == "load":
            fields = command["trainer"]
            settings = TrainerSettings(**{**fields, "sizes": tuple(fields["sizes"])})
            trainers.append(engines[settings.engine](settings))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        else:
            rows = json.loads(Path(command["rows"]).read_text(encoding="utf-8"))
            wall, cpu, losses = trainers[0].train([(first, second) for first, second in rows])
        peak, anonymous = memory_bytes()
        answer = {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "peak_rss_bytes": peak,
            "anonymous_rss_bytes": anonymous,
            "losses": losses,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(ENGINES)
