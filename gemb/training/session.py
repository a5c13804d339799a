"""One run of `gemb train` on pairs of texts: gemb.training.run_session with the parts for that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemb.device import free_memory_bytes
from gemb.files import read_json, write_json
from gemb.model.trainable import TrainableEncoder
from gemb.model.trainable.parameters import UPDATE
from gemb.model.trainable.quantised import FakeQuantisation
from gemb.report import Report
from gemb.training.batches import TrainingBatch
from gemb.training.gradients import EmbeddingGradients, MemoryPlan, graph_bytes, plan_memory
from gemb.training.held_out import Measured
from gemb.training.loop import Batches, Computation, StepReport, total_parameters
from gemb.training.peak import matrix_peak, work_of_a_token
from gemb.training.qat import QuantisedGradients
from gemb.training.recipe import MatchingTerm, TrainRecipe
from gemb.training.record import make_report, record_of
from gemb.training.run_session import (
    NamedParameters,
    RunSession,
    as_json,
    from_json,
    state_bytes,
    trained_parameters,
)
from gemb.training.setup import Setup, evaluated
from gemb.training.teaching import Teaching, new_projection
from gemb.training.terms import Loss, Teacher
from gemb.training.verdict import Verdict

if TYPE_CHECKING:
    from gemb.training.watch import Watch

__all__ = ["MemoryPlanner", "Session", "load_encoder", "make_loss", "trained_parameters"]

_TO_TEACHER = "to_teacher"
_WITH_NEGATIVES = frozenset({"contrastive", "same_tower", "score_matching"})
"""Terms for which the other examples of a batch are candidates that a query has to tell from its own."""
_USUAL_CHUNK = {"cpu": 4096}
_USUAL_CHUNK_ELSEWHERE = 32768
_UNKNOWN_MEMORY = 4 * 2**30  # where nobody can tell what is free
_MEMORY_SHARE = 0.5
"""Of the free memory, for the graphs of a batch; the rest is for gradients, optimizer and the loss."""
_QAT_BYTES = 9
"""Of a weight under quantisation: what stands in for it, the gradient of that, and where it passes on."""


class Session(RunSession[Setup, TrainableEncoder, TrainingBatch]):
    """The training of a `Setup`."""

    _loss: Loss
    _quantisation: FakeQuantisation | None
    """Of a run that trains for an integer format."""

    def __init__(self, setup: Setup, watch: Watch) -> None:
        super().__init__(setup, watch)
        self.teacher: Measured | None = None
        """What the teacher of a distillation reaches itself."""
        self._peak = matrix_peak(setup.device)
        self._work_of_a_token = work_of_a_token(self.model.named_parameters())

    def _load(self) -> TrainableEncoder:
        encoder = load_encoder(self.setup)
        self._loss = make_loss(self.setup, encoder)
        qat = self.setup.recipe.qat
        self._quantisation = None if qat is None else encoder.quantisation(qat.format)
        return encoder

    def _table_name(self) -> str:
        return self.model.table_name

    def _learn(self, named: NamedParameters) -> Callable[[TrainingBatch, int], Computation]:
        loss = self._loss
        for member in self.setup.mixture.members:
            loss.check_kind(member.name, "scored" if member.prepared.shape == "scored" else "pairs")
        parameters = [parameter for _, parameter in named]
        plain = EmbeddingGradients(
            self.model, parameters, loss, self.setup.device.name, self.setup.ranks, self.model.summed
        )
        if self._quantisation is None:
            return plain
        return QuantisedGradients(plain, self._quantisation, self._is_quantised)

    def _only(self) -> Collection[str] | None:
        return trainable_names(self.model, self.setup.recipe)

    def _share_of_peak(self, report: StepReport) -> float | None:
        return None if self._peak is None else report.tokens_per_second * self._work_of_a_token / self._peak

    def _is_quantised(self) -> bool:
        """Whether the step at hand sees the quantised weights."""
        qat, progress = self.setup.recipe.qat, self.training.progress
        return qat is not None and self.setup.length.share(progress.step, progress.tokens) >= qat.start

    def _batches(self) -> Batches[TrainingBatch]:
        return self.setup.mixture

    def _plan_memory(self) -> MemoryPlan:
        return MemoryPlanner(self.setup, self.model).plan()

    def _evaluate_every(self) -> int | None:
        recipe = self.setup.recipe
        return recipe.evaluation.every if evaluated(recipe) else None

    def _evaluates(self) -> bool:
        return self.setup.evaluation is not None

    def _measured(self) -> Measured:
        if self.setup.evaluation is None:
            raise ValueError("nothing is evaluated")
        progress = self.training.progress
        # The first model is measured as it was given; all later ones as they will be exported, before the
        # start of the quantisation, too, so that scores within a run compare.
        is_exported = self._quantisation is not None and progress.step > 0
        seen = self._quantisation.applied() if self._quantisation and is_exported else nullcontext()
        with torch.no_grad(), seen:
            return self.setup.evaluation.measure(
                self.model, self.setup.device.name, progress.plan.tokens_per_chunk
            )

    def _about(self) -> str:
        """How many negatives a query sees; of a recipe whose terms use none, how many pairs a batch has."""
        members = self.setup.mixture.members
        pairs = sorted({member.pairs for member in members})
        own = max(one.negatives if member.prepared.with_negatives else 0
                  for one, member in zip(self.setup.data, members, strict=True))  # fmt: skip
        if not any(term.name in _WITH_NEGATIVES for term in self.setup.recipe.losses):
            return f"each batch has {' or '.join(f'{size:,}' for size in pairs)} pairs"
        shown = " or ".join(f"{size - 1:,}" for size in pairs)
        more = f" and up to {own} hard negatives of its own" if own else ""
        return f"each query has {shown} in-batch negatives{more}"

    def _before_the_first_step(self) -> None:
        """Measure the teacher, once a run, and get its vectors for the whole run where that is asked for."""
        setup, teaching = self.setup, self.setup.teaching
        file = setup.folder.run / "teacher.json"
        if (
            teaching is not None
            and setup.ranks.is_first
            and setup.evaluation is not None
            and not file.is_file()
        ):
            self._watch.stage("evaluating the teacher")
            if (measured := teaching.measure()) is not None:
                write_json(file, as_json(measured))
        if file.is_file():
            self.teacher = from_json(read_json(file))
        ahead = [one for one in (teaching, setup.finder) if one is not None and one.ahead]
        if not ahead:
            return
        self._watch.stage("asking the teacher")
        length, progress = setup.length, self.training.progress
        step, tokens = progress.step, progress.tokens
        with setup.reopened() as mixture:
            for batch in mixture:
                if length.share(step, tokens) >= 1.0:
                    break
                if step % setup.ranks.count == setup.ranks.index:
                    for one in ahead:
                        one.vectors(batch)
                step, tokens = step + 1, tokens + len(batch.ids)
        setup.ranks.wait()

    def _record(
        self,
        final: Measured | None,
        verdicts: Sequence[Verdict],
        losses: tuple[float | None, float | None],
        seconds: float,
    ) -> dict[str, Any]:
        means = {
            when: one.means()
            for when, one in (("before", self.baseline), ("after", final), ("teacher", self.teacher))
            if one is not None
        }
        return record_of(self.setup, self.training.progress, verdicts, means, losses, seconds)

    def _report(self, record: Mapping[str, Any]) -> Report:
        return make_report(self.setup, record)

    def _save(self, target: Path, record: Mapping[str, Any]) -> None:
        from gemb.training.card import declare, write_card

        self.model.save(target)
        declare(target, self.setup.recipe, self.setup.sizes)
        write_card(target, self.setup.recipe, record)


class MemoryPlanner:
    """Finds how batches are cut to fit the memory, before the first step."""

    def __init__(self, setup: Setup, encoder: TrainableEncoder) -> None:
        self._setup = setup
        self._encoder = encoder

    def plan(self) -> MemoryPlan:
        """The plan, the same on every rank. Raises MachineError if not even one longest text fits."""
        setup, batch = self._setup, self._setup.recipe.batch
        device, parameters = setup.device, list(self._encoder.parameters())
        longest = setup.tokeniser.max_tokens
        if batch.memory_gib is not None:
            budget = int(batch.memory_gib * 2**30)
        else:
            free = free_memory_bytes(device.name) or _UNKNOWN_MEMORY
            each = state_bytes(setup.ranks) + (0 if setup.recipe.qat is None else _QAT_BYTES)
            budget = int(max(0, free - each * total_parameters(parameters)) * _MEMORY_SHARE)
        lengths = np.full(4, longest, np.int32)
        with self._encoder.summed() as sums:
            graph = graph_bytes(self._encoder, [*parameters, *sums], lengths, device=device.name)
        usual = _USUAL_CHUNK.get(device.kind, _USUAL_CHUNK_ELSEWHERE)
        plan = plan_memory(graph / int(lengths.sum()), budget, longest, setup.recipe.batch_tokens, usual)
        ranks = setup.ranks
        return MemoryPlan(ranks.smallest(plan.tokens_per_chunk), ranks.smallest(plan.tokens_with_graph))


def load_encoder(setup: Setup) -> TrainableEncoder:
    """The trainable model of a setup, on its device."""
    given = setup.recipe.dropout
    dropout, attention_dropout = setup.model.dropout_rates if given is None else (given, 0.0)
    encoder = TrainableEncoder.load(
        setup.model,
        device=setup.device.name,
        precision=setup.device.precision,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    if (lora := setup.recipe.lora) is not None:
        encoder.train_low_rank(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=setup.recipe.seed)
    return encoder


def trainable_names(encoder: TrainableEncoder, recipe: TrainRecipe) -> Collection[str] | None:
    """The parameters that a recipe leaves to be trained: with lora its own, and a map to a teacher."""
    if recipe.lora is None:
        return None
    return [name for name, _ in encoder.named_parameters()
            if f".{UPDATE}." in name or name.startswith(f"{_TO_TEACHER}.")]  # fmt: skip


def make_loss(setup: Setup, encoder: TrainableEncoder) -> Loss:
    """The loss of a setup. A map to the teacher's space becomes a part of the encoder.

    There it is trained, moved and kept in the checkpoints with the rest; a saved model is without it.
    """
    terms, teaching, finder = setup.recipe.losses, setup.teaching, setup.finder
    projection = None
    if teaching is not None and any(isinstance(term, MatchingTerm) and term.projection for term in terms):
        projection = new_projection(encoder.dims, teaching.dims, setup.recipe.seed).to(setup.device.name)
        encoder.add_module(_TO_TEACHER, projection)

    def asked(source: Teaching | None) -> Teacher | None:
        if source is None:
            return None
        return lambda batch: torch.from_numpy(source.vectors(batch)).to(setup.device.name)

    teacher = asked(teaching)
    return Loss(
        terms,
        setup.sizes,
        setup.weights,
        teacher=teacher,
        finder=teacher if finder is teaching else asked(finder),
        projection=projection,
    )
