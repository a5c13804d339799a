"""The gradients of a batch of rows: chunk by chunk, since the loss of a row depends on no other row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from gemb.model.trainable.language_model import LanguageBatch, LanguageLoss, TeacherStates
from gemb.training.gradients import Gradients, MemoryPlan, Stopped, chunks, together
from gemb.training.pretrain_batches import PretrainBatch
from gemb.training.ranks import Ranks


class LanguageModel(Protocol):
    """What is asked of a model here."""

    def loss(self, batch: LanguageBatch, *, teacher: TeacherStates | None = None) -> LanguageLoss:
        """Sums over the targets of a batch, with a graph."""
        ...


Teacher = Callable[[LanguageBatch], TeacherStates]
"""What a teacher thinks of the targets of the batch that it reads."""


@dataclass(frozen=True, slots=True)
class LanguageGradients:
    """The way from rows to gradients, for the loop: those of the mean loss over all targets of a batch."""

    model: LanguageModel
    parameters: Sequence[tuple[str, nn.Parameter]]
    """Those that are trained, by name."""
    alone_at_first: Collection[str] = ()
    """Names of those that learn alone in the first steps."""
    steps_alone: int = 0
    """How many steps these are; afterwards all learn (T5Gemma, arXiv 2504.06225, section 3)."""
    teacher: Teacher | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def __call__(self, batch: PretrainBatch, step: int) -> Callable[[MemoryPlan, threading.Event], Gradients]:
        """The computation of a batch at a step, counted from 0."""
        for name, parameter in self.parameters:
            parameter.requires_grad_(step >= self.steps_alone or name in self.alone_at_first)
        return lambda plan, stop: self._compute(batch, plan, stop)

    def _compute(self, batch: PretrainBatch, plan: MemoryPlan, stop: threading.Event) -> Gradients:
        lengths, targets = batch.lengths, batch.targets
        rows = self.ranks.rows(lengths)
        loss = cross_entropy = correct = 0.0
        with together(self.ranks):
            for chunk in chunks(lengths[rows], plan.tokens_per_chunk):
                if stop.is_set():
                    raise Stopped
                found = self._loss(batch, rows[chunk].tolist())
                share: Tensor = found.total / targets
                share.backward()  # type: ignore[no-untyped-call]
                loss += float(share.detach())
                cross_entropy += found.cross_entropy
                correct += found.correct
        self.ranks.sum_gradients([parameter for _, parameter in self.parameters])
        loss, cross_entropy, correct = self.ranks.total((loss, cross_entropy, correct))
        measures = {"accuracy": correct / targets}
        if self.teacher is not None:
            measures["cross_entropy"] = cross_entropy / targets
        return Gradients(loss, {}, encoded_twice=False, measures=measures)

    def _loss(self, batch: PretrainBatch, rows: Sequence[int]) -> LanguageLoss:
        taught = self.teacher(batch.for_teacher(rows)) if self.teacher is not None else None
        return self.model.loss(batch.take(rows), teacher=taught)
