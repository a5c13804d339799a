"""Quantisation-aware training in a run: from a share of it on, steps see the weights that the export has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from gemb.model.trainable.quantised import FakeQuantisation
from gemb.training.batches import TrainingBatch
from gemb.training.gradients import EmbeddingGradients, Gradients, MemoryPlan


@dataclass(frozen=True, slots=True)
class QuantisedGradients:
    """Gradients for the loop: those of `plain`, at the quantised weights once `has_begun` says so.

    The weights are quantised once a step, however many chunks the batch is cut into, and their gradients are
    summed over the ranks before they are passed on to the parameters. A run that goes on after a kill asks
    `has_begun` with the step of its checkpoint, so it is the uninterrupted one to the bit.
    """

    plain: EmbeddingGradients
    quantisation: FakeQuantisation
    has_begun: Callable[[], bool]

    def __call__(self, batch: TrainingBatch, step: int) -> Callable[[MemoryPlan, threading.Event], Gradients]:
        """The computation of a batch."""
        compute = self.plain(batch, step)
        if not self.has_begun():
            return compute

        def compute_quantised(plan: MemoryPlan, stop: threading.Event) -> Gradients:
            with self.quantisation.applied() as stand_ins:
                found = compute(plan, stop)
                self.plain.ranks.sum_gradients(stand_ins)
            return replace(found, measures={**found.measures, "quantised": True})

        return compute_quantised
