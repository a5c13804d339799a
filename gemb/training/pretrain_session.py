"""One run of pretraining: gemb.training.run_session with rows of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemb.device import free_memory_bytes
from gemb.errors import MismatchError
from gemb.model.trainable.language_model import LanguageBatch, TeacherStates, TrainableLanguageModel
from gemb.report import Report
from gemb.text.denoising import Row
from gemb.training.gradients import MemoryPlan, plan_memory, saved_bytes
from gemb.training.held_out import Measured
from gemb.training.loop import Batches, Computation, total_parameters
from gemb.training.pretrain_batches import PretrainBatch, packed
from gemb.training.pretrain_gradients import LanguageGradients, Teacher
from gemb.training.pretrain_record import make_report, record_of, write_card
from gemb.training.pretrain_setup import PretrainSetup
from gemb.training.run_session import NamedParameters, RunSession, state_bytes
from gemb.training.verdict import Verdict

_USUAL_CHUNK = {"cpu": 2048}
_USUAL_CHUNK_ELSEWHERE = 32768
_UNKNOWN_MEMORY = 4 * 2**30  # where nobody can tell what is free
_MEMORY_SHARE = 0.5
"""Of the free memory, for the graphs of a chunk; the rest is for gradients, optimizer and the loss."""


class PretrainSession(RunSession[PretrainSetup, TrainableLanguageModel, PretrainBatch]):
    """The training of a `PretrainSetup`."""

    def _load(self) -> TrainableLanguageModel:
        return load_model(self.setup)

    def _table_name(self) -> str:
        return self.model.table_name

    def _learn(self, named: NamedParameters) -> Callable[[PretrainBatch, int], Computation]:
        return gradients_of(self.setup, self.model, named)

    def _batches(self) -> Batches[PretrainBatch]:
        return self.setup.batches

    def _plan_memory(self) -> MemoryPlan:
        return plan_chunks(self.setup, self.model)

    def _evaluate_every(self) -> int | None:
        recipe = self.setup.recipe
        return recipe.evaluation.every if recipe.evaluation.texts else None

    def _evaluates(self) -> bool:
        return self.setup.evaluation is not None

    def _measured(self) -> Measured:
        if self.setup.evaluation is None:
            raise ValueError("nothing is evaluated")
        return self.setup.evaluation.measure(self.model)

    def _score(self, measured: Measured) -> float:
        """The mean log likelihood of a token, over the texts."""
        return next(
            float(values.mean()) for name, values in measured.scores.items() if name.endswith("likelihood")
        )

    def _about(self) -> str:
        """What a step holds."""
        tokens, row = self.setup.recipe.batch.tokens, self.setup.maker.row_tokens
        return f"a step has up to {tokens:,} tokens of text, in packed rows of at most {row:,}"

    def _record(
        self,
        final: Measured | None,
        verdicts: Sequence[Verdict],
        losses: tuple[float | None, float | None],
        seconds: float,
    ) -> dict[str, Any]:
        means = {
            when: one.means()
            for when, one in (("before", self.baseline), ("after", final))
            if one is not None
        }
        return record_of(self.setup, self.training.progress, verdicts, means, losses, seconds)

    def _report(self, record: Mapping[str, Any]) -> Report:
        return make_report(self.setup, record)

    def _save(self, target: Path, record: Mapping[str, Any]) -> None:
        self.model.save(target)
        write_card(target, self.setup.recipe, record)
        evaluation, samples = self.setup.evaluation, self.setup.recipe.evaluation.samples
        if evaluation is not None and samples and self.setup.recipe.objective.name != "mntp":
            from gemb.training.pretrain_samples import write_samples

            self._watch.stage("generating samples")
            write_samples(self.setup, target, evaluation.pieces[:samples])


def load_model(setup: PretrainSetup) -> TrainableLanguageModel:
    """The trainable model of a setup, on its device."""
    return TrainableLanguageModel.load(
        setup.model.path,
        device=setup.device.name,
        precision=setup.device.precision,
        dropout=setup.recipe.dropout,
        attention=setup.attention,
    )


def gradients_of(
    setup: PretrainSetup, model: TrainableLanguageModel, named: NamedParameters
) -> LanguageGradients:
    """The way from the rows of a setup to gradients.

    Raises MismatchError for a warm-up of the cross-attention of a model that has none of its own, and a
    teacher of another vocabulary.
    """
    recipe = setup.recipe
    alone = model.cross_attention_names & {name for name, _ in named}
    if recipe.cross_attention_only and not alone:
        raise MismatchError(
            f"cross_attention_only: {setup.model_name} ({setup.model.family}) has no cross-attention of its "
            "own that is trained; leave it out"
        )
    return LanguageGradients(
        model, named, alone, recipe.cross_attention_only, _teacher(setup, model), setup.ranks
    )


def _teacher(setup: PretrainSetup, model: TrainableLanguageModel) -> Teacher | None:
    settings = setup.recipe.teacher
    if settings is None or setup.teacher is None:
        return None
    teacher = TrainableLanguageModel.load(
        setup.teacher, device=setup.device.name, precision=setup.device.precision, attention="causal"
    )
    teacher.requires_grad_(False).eval()
    if teacher.vocabulary != model.vocabulary:
        raise MismatchError(
            f"teacher.model: {settings.model} has {teacher.vocabulary:,} tokens, but the model has "
            f"{model.vocabulary:,}; both need the same tokenizer"
        )

    def asked(batch: LanguageBatch) -> TeacherStates:
        return teacher.teacher_states(batch, temperature=settings.temperature, share=settings.weight)

    return asked


def plan_chunks(setup: PretrainSetup, model: TrainableLanguageModel) -> MemoryPlan:
    """How many tokens are computed at once, the same on every rank.

    Raises MachineError if not even one longest row fits.
    """
    batch, device, parameters = setup.recipe.batch, setup.device, list(model.parameters())
    if batch.memory_gib is not None:
        budget = int(batch.memory_gib * 2**30)
    else:
        free = free_memory_bytes(device.name) or _UNKNOWN_MEMORY
        budget = int(max(0, free - state_bytes(setup.ranks) * total_parameters(parameters)) * _MEMORY_SHARE)
    ids = np.zeros(setup.max_tokens, np.int32)
    source = ids if model.is_encoder_decoder else ids[:0]
    rows = packed([Row(ids, ids, source)] * 2)
    longest = len(ids) + len(source)
    each = saved_bytes(lambda: model.loss(rows).total, parameters, device.name)
    usual = _USUAL_CHUNK.get(device.kind, _USUAL_CHUNK_ELSEWHERE)
    plan = plan_memory(each / (2 * longest), budget, longest, setup.recipe.batch_tokens, usual)
    # Rows are computed once, in chunks; there is no batch whose graphs are all kept.
    chunk = setup.ranks.smallest(plan.tokens_per_chunk)
    return MemoryPlan(chunk, chunk)
