"""The contestants of `pretrain`: the same token rows, loss and optimizer, by gemb and by transformers.

Each lives in a process of its own and talks as those of `trainers` do. FILE is a list of [source, whole]:
the token ids that the encoder reads, none for a decoder, and those that the decoder reads and predicts, each
token from those before it. What is timed is the loop: packing or padding, forward, backward, clipping, AdamW.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trainers import (
    CLIP_NORM,
    LEARNING_RATE,
    Trainer,
    TrainerSettings,
    batches_of,
    serve,
    timed_pass,
)

TokenRow = tuple[list[int], list[int]]
_NO_TARGET = -100


class Gemb:
    """gemb's own parts, put together as the training loop does."""

    def __init__(self, settings: TrainerSettings) -> None:
        import torch

        from gemb.model.trainable.language_model import TrainableLanguageModel

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._settings = settings
        self._model = TrainableLanguageModel.load(Path(settings.folder)).train()
        self._parameters = list(self._model.parameters())

    def train(self, rows: Sequence[TokenRow], /) -> tuple[float, float, list[float]]:
        """One pass, with an optimizer that begins anew, as its peer's does."""
        from gemb.training.optimizers import make_optimizer

        self._optimizer = make_optimizer(
            self._model.named_parameters(),
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            tables=[self._model.table_name],
        )
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [self._step(batch) for batch in batches_of(rows, self._settings.batch_size)]
        return time.perf_counter() - wall, time.process_time() - cpu, losses

    def _step(self, rows: Sequence[TokenRow]) -> float:
        from gemb.model.trainable.language_model import LanguageBatch
        from gemb.training.optimizers import clip_gradients

        batch = LanguageBatch(
            ids=_packed([whole[:-1] for _, whole in rows]),
            lengths=np.array([len(whole) - 1 for _, whole in rows], dtype=np.int32),
            targets=_packed([whole[1:] for _, whole in rows]),
            source_ids=_packed([source for source, _ in rows]),
            source_lengths=np.array([len(source) for source, _ in rows if source], dtype=np.int32),
        )
        found = self._model.loss(batch)
        loss = found.total / found.tokens
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(self._parameters, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def _packed(parts: Sequence[Sequence[int]]) -> Any:  # noqa: ANN401  # int32[T]
    return np.array([token for part in parts for token in part], dtype=np.int32)


class Transformers:
    """Seq2SeqTrainer or Trainer of transformers, on batches padded to their longest row."""

    def __init__(self, settings: TrainerSettings) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._settings = settings
        config = AutoConfig.from_pretrained(settings.folder)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        self._model = auto.from_pretrained(settings.folder, dtype=torch.float32)

    def train(self, rows: Sequence[TokenRow], /) -> tuple[float, float, list[float]]:
        """One pass; setting the trainer up is not timed."""
        from torch.utils.data import SequentialSampler
        from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        class InOrder(Seq2SeqTrainer):
            """The same batches as everybody's; it trains decoders as Trainer does."""

            def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:  # noqa: ANN401
                return SequentialSampler(rows)

        return timed_pass(
            InOrder,
            partial(Seq2SeqTrainingArguments, remove_unused_columns=False),
            self._settings.batch_size,
            model=self._model,
            train_dataset=list(rows),
            data_collator=self._padded,
        )

    def _padded(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """A batch as the model takes it; a decoder shifts the labels itself."""
        wholes = [whole for _, whole in rows]
        if not self._model.config.is_encoder_decoder:
            ids, mask = _with_mask(wholes)
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": ids.masked_fill(mask == 0, _NO_TARGET),
            }
        source_ids, source_mask = _with_mask([source for source, _ in rows])
        ids, mask = _with_mask([whole[:-1] for whole in wholes])
        targets, _ = _with_mask([whole[1:] for whole in wholes])
        return {
            "input_ids": source_ids,
            "attention_mask": source_mask,
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
            "labels": targets.masked_fill(mask == 0, _NO_TARGET),
        }


def _with_mask(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """int64[R, L] of token ids padded on the right, and 1 where they are."""
    import torch

    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask


ENGINES: Mapping[str, Callable[[TrainerSettings], Trainer]] = {"gemb": Gemb, "transformers": Transformers}

if __name__ == "__main__":
    serve(ENGINES)
