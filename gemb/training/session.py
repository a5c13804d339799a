"""One run of `gemb train`: the parts put together, trained, and finished as a model folder."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.device import free_memory_bytes
from gemb.errors import GembError
from gemb.files import read_json, write_json
from gemb.model.trainable import TrainableEncoder
from gemb.report import Report
from gemb.training.batches import TrainingBatch
from gemb.training.checkpoints import Checkpoints
from gemb.training.gradients import MemoryPlan, graph_bytes, plan_memory
from gemb.training.held_out import Measured
from gemb.training.loop import Hooks, Progress, StepReport, Training, total_parameters
from gemb.training.metrics import Metrics, tensorboard
from gemb.training.optimizers import MovingAverage, clip_gradients, make_optimizer
from gemb.training.random_numbers import seeded
from gemb.training.recipe import MatchingTerm
from gemb.training.record import make_report, record_of
from gemb.training.schedules import schedule
from gemb.training.setup import evaluated
from gemb.training.teaching import new_projection
from gemb.training.terms import Loss
from gemb.training.verdict import Verdict, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemb.training.setup import Setup
    from gemb.training.watch import Watch

_USUAL_CHUNK = {"cpu": 4096}
_USUAL_CHUNK_ELSEWHERE = 32768
_UNKNOWN_MEMORY = 4 * 2**30  # where nobody can tell what is free
_MEMORY_SHARE = 0.5
"""Of the free memory, for the graphs of a batch; the rest is for gradients, optimizer and the loss."""
_MOST_STEPS_BETWEEN_CHECKPOINTS = 1000
_STATE_BYTES = 12  # a parameter's gradient and two moments, fp32


class Session:
    """The training of a `Setup`; `open`, then `train`, then `finish`, and `close` however it ended."""

    def __init__(self, setup: Setup, watch: Watch) -> None:
        self.setup = setup
        self.encoder = load_encoder(setup)
        self.average: MovingAverage | None = None
        self.training: Training
        self.baseline: Measured | None = None
        self.teacher: Measured | None = None
        """What the teacher of a distillation reaches itself."""
        self._watch = watch
        self._opened = ExitStack()
        self._tokens_before = 0
        self._first_loss: float | None = None
        self._last_loss: float | None = None

    def close(self) -> None:
        """Close the metrics, and give the caller its random numbers back."""
        self._opened.close()

    def open(self) -> None:
        """Put the parts together, go back to the last checkpoint, and measure what was not measured yet."""
        setup, recipe = self.setup, self.setup.recipe
        loss = make_loss(setup, self.encoder)
        named = trained_parameters(self.encoder, recipe.freeze)
        for member in setup.mixture.members:
            loss.check_kind(member.name, "scored" if member.prepared.shape == "scored" else "pairs")
        checkpoints = Checkpoints(setup.folder.checkpoints, keep=recipe.checkpoint.keep)
        steps = checkpoints.steps()
        progress = (
            Progress.from_json(checkpoints.state(steps[-1])) if steps else Progress(self._memory_plan())
        )
        optimizer = recipe.optimizer
        if recipe.ema is not None:
            self.average = MovingAverage(named, recipe.ema)
        metrics = None
        if setup.ranks.is_first:
            also = tensorboard(setup.folder.tensorboard) if recipe.tensorboard else None
            metrics = self._opened.enter_context(Metrics(setup.folder.metrics, progress.metrics_bytes, also))
        self.training = Training(
            encoder=self.encoder,
            parameters=[parameter for _, parameter in named],
            optimizer=make_optimizer(
                named,
                optimizer.name,
                learning_rate=optimizer.learning_rate,
                weight_decay=optimizer.weight_decay,
                betas=(optimizer.beta1, optimizer.beta2),
                epsilon=optimizer.epsilon,
                tables=(self.encoder.table_name,),
            ),
            loss=loss,
            batches=setup.mixture,
            length=setup.length,
            rate=schedule(recipe.schedule.name, warmup=recipe.schedule.warmup, floor=recipe.schedule.floor),
            clip=lambda parameters: clip_gradients(parameters, optimizer.clip_norm),
            checkpoints=checkpoints,
            metrics=metrics,
            progress=progress,
            average=self.average,
            device=setup.device.name,
            ranks=setup.ranks,
            evaluate_every=recipe.evaluation.every if evaluated(recipe) else None,
            checkpoint_every=self._checkpoint_every(),
            hooks=Hooks(
                on_step=self._on_step,
                note=self._watch.note,
                evaluate=self._evaluate,
                on_checkpoint=lambda progress: self._draw(),
            ),
        )
        self._tokens_before = progress.tokens
        self._watch.total_steps = setup.total_steps
        # Before the checkpoint is put back: the weights are those of the first model still.
        self.baseline = self._baseline()
        self._meet_teacher()
        self._opened.enter_context(seeded(recipe.seed, setup.device.name))
        if steps:
            self.training.restore(steps[-1])
            self._watch.note(f"going on at step {steps[-1]:,}")
        self._watch.note(self._negatives())

    def train(self, stop: threading.Event) -> bool:
        """Train to the end; False where `stop` was set, and the state is saved."""
        return self.training.run(stop)

    def finish(self, seconds: float) -> Report:
        """Choose the weights, measure them, and put the model folder in place; gives the report."""
        setup, training = self.setup, self.training
        with self._result_weights():
            final = self._measure()
            verdicts = _verdicts(self.baseline, final)
            if final is not None:
                self._log(final)
                write_json(setup.folder.run / "final.json", _as_json(final))
            if not setup.ranks.is_first:
                setup.ranks.wait()
                return Report(title="trained")
            self._draw(verdicts)
            losses = (self._first_loss, self._last_loss)
            means = {
                when: one.means()
                for when, one in (("before", self.baseline), ("after", final), ("teacher", self.teacher))
                if one is not None
            }
            record = record_of(setup, training.progress, verdicts, means, losses, seconds)
            setup.folder.finish(
                lambda target: self._save(target, record),
                record,
                keep_checkpoints=setup.recipe.checkpoint.keep_after,
            )
        setup.ranks.wait()
        return make_report(setup, record)

    def _save(self, target: Path, record: Mapping[str, Any]) -> None:
        from gemb.training.card import declare, write_card

        self.encoder.save(target)
        declare(target, self.setup.recipe, self.setup.sizes)
        write_card(target, self.setup.recipe, record)

    @contextmanager
    def _result_weights(self) -> Iterator[None]:
        """The model has the weights of the result within the block."""
        training = self.training
        best = training.progress.best_step
        if self.setup.recipe.checkpoint.result == "best" and best is not None:
            training.restore(best)
        with self.average.applied() if self.average is not None else nullcontext():
            yield

    def _memory_plan(self) -> MemoryPlan:
        """How batches are cut: found once a run, since the last digits of the weights depend on it."""
        file = self.setup.folder.memory
        if file.is_file():
            return MemoryPlan(**read_json(file))
        plan = MemoryPlanner(self.setup, self.encoder).plan()
        if self.setup.ranks.is_first:
            write_json(file, plan)
        return plan

    def _checkpoint_every(self) -> int:
        wanted = self.setup.recipe.checkpoint.every
        if wanted is not None:
            return wanted
        steps = self.setup.total_steps or 10 * _MOST_STEPS_BETWEEN_CHECKPOINTS
        return max(1, min(_MOST_STEPS_BETWEEN_CHECKPOINTS, steps // 10))

    def _negatives(self) -> str:
        """How many negatives a query sees."""
        members = self.setup.mixture.members
        pairs = sorted({member.pairs for member in members})
        own = max(one.negatives if member.prepared.with_negatives else 0
                  for one, member in zip(self.setup.data, members, strict=True))  # fmt: skip
        shown = " or ".join(f"{size - 1:,}" for size in pairs)
        more = f" and up to {own} hard negatives of its own" if own else ""
        return f"each query has {shown} in-batch negatives{more}"

    def _on_step(self, report: StepReport) -> None:
        if self._first_loss is None:
            self._first_loss = report.loss
        self._last_loss = report.loss
        self._watch.step(report.progress.step, report.progress.tokens - self._tokens_before, report.loss)

    def _baseline(self) -> Measured | None:
        """The scores of the first model, measured once a run."""
        file = self.setup.folder.baseline
        if not self.setup.ranks.is_first or self.setup.evaluation is None:
            return None
        if file.is_file():
            return _from_json(read_json(file))
        measured = self._measure()
        if measured is not None:
            write_json(file, _as_json(measured))
            if self.training.metrics is not None:
                self._log(measured)
                self.training.progress.metrics_bytes = self.training.metrics.position
        return measured

    def _meet_teacher(self) -> None:
        """Measure the teacher, once a run, and get its vectors for the whole run where that is asked for."""
        setup, teaching = self.setup, self.setup.teaching
        if teaching is None:
            return
        file = setup.folder.run / "teacher.json"
        if setup.ranks.is_first and setup.evaluation is not None and not file.is_file():
            self._watch.stage("evaluating the teacher")
            if (measured := teaching.measure()) is not None:
                write_json(file, _as_json(measured))
        if file.is_file():
            self.teacher = _from_json(read_json(file))
        if not teaching.ahead:
            return
        self._watch.stage("asking the teacher")
        length, progress = setup.length, self.training.progress
        step, tokens = progress.step, progress.tokens
        with setup.reopened() as mixture:
            for batch in mixture:
                if length.share(step, tokens) >= 1.0:
                    break
                if step % setup.ranks.count == setup.ranks.index:
                    teaching.vectors(batch)
                step, tokens = step + 1, tokens + len(batch.ids)
        setup.ranks.wait()

    def _evaluate(self, step: int) -> float | None:
        """The mean of the scores at full width, on all ranks."""
        with self.average.applied() if self.average is not None else nullcontext():
            measured = self._measure()
        score = float("-inf")
        if measured is not None:
            self._log(measured)
            score = measured.main()
        return self.setup.ranks.first(score)

    def _measure(self) -> Measured | None:
        """The scores of the model as it is; None where nothing is evaluated, or on another rank."""
        if self.setup.evaluation is None:
            return None
        self._watch.stage("evaluating")
        self.encoder.eval()
        chunk = self.training.progress.plan.tokens_per_chunk
        measured = self.setup.evaluation.measure(self.encoder, self.setup.device.name, chunk)
        self.encoder.train()
        return measured

    def _log(self, measured: Measured) -> None:
        if self.training.metrics is not None:
            means = {f"eval/{name}": value for name, value in measured.means().items()}
            self.training.metrics.write({"step": self.training.progress.step, **means})

    def _draw(self, verdicts: Sequence[Verdict] = ()) -> None:
        """Write report.html anew."""
        if self.setup.ranks.is_first:
            from gemb.training.page import write_page

            write_page(self.setup.folder.run, self.setup.model_name, verdicts)


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
            budget = int(max(0, free - _STATE_BYTES * total_parameters(parameters)) * _MEMORY_SHARE)
        lengths = np.full(4, longest, np.int32)
        each = graph_bytes(self._encoder, parameters, lengths, device=device.name)
        usual = _USUAL_CHUNK.get(device.kind, _USUAL_CHUNK_ELSEWHERE)
        plan = plan_memory(each / int(lengths.sum()), budget, longest, setup.recipe.batch_tokens, usual)
        ranks = setup.ranks
        return MemoryPlan(ranks.smallest(plan.tokens_per_chunk), ranks.smallest(plan.tokens_with_graph))


def load_encoder(setup: Setup) -> TrainableEncoder:
    """The trainable model of a setup, on its device."""
    return TrainableEncoder.load(
        setup.model,
        device=setup.device.name,
        precision=setup.device.precision,
        dropout=setup.recipe.dropout,
    )


def make_loss(setup: Setup, encoder: TrainableEncoder) -> Loss:
    """The loss of a setup. A map to the teacher's space becomes a part of the encoder.

    There it is trained, moved and kept in the checkpoints with the rest; a saved model is without it.
    """
    terms, teaching = setup.recipe.losses, setup.teaching
    if teaching is None:
        return Loss(terms, setup.sizes, setup.weights)
    projection = None
    if any(isinstance(term, MatchingTerm) and term.projection for term in terms):
        projection = new_projection(encoder.dims, teaching.dims, setup.recipe.seed).to(setup.device.name)
        encoder.add_module("to_teacher", projection)

    def taught(batch: TrainingBatch) -> Tensor:
        return torch.from_numpy(teaching.vectors(batch)).to(setup.device.name)

    return Loss(terms, setup.sizes, setup.weights, teacher=taught, projection=projection)


def trained_parameters(encoder: TrainableEncoder, patterns: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name; those that match a pattern are frozen.

    Raises GembError for a pattern that matches none, and if all are frozen.
    """
    names = [name for name, _ in encoder.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise GembError(
                f"freeze: no parameter is called {pattern}; the names are such as "
                f"{', '.join(names[:3])}, and * stands for anything"
            )
        frozen.update(matching)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name not in frozen)
    trained = [(name, one) for name, one in encoder.named_parameters() if name not in frozen]
    if not trained:
        raise GembError("freeze: all parameters are frozen, so there is nothing to train")
    return trained


def _verdicts(before: Measured | None, after: Measured | None) -> list[Verdict]:
    if before is None or after is None:
        return []
    return [compare(name, before.scores[name], values) for name, values in after.scores.items()]


def _as_json(measured: Measured) -> dict[str, Any]:
    return {
        "numbers": dict(measured.numbers),
        "scores": {name: values.tolist() for name, values in measured.scores.items()},
        "histograms": {name: counts.tolist() for name, counts in measured.histograms.items()},
    }


def _from_json(values: Mapping[str, Any]) -> Measured:
    scores: dict[str, NDArray[np.float64]] = {
        name: np.array(one, np.float64) for name, one in values["scores"].items()
    }
    counts = {name: np.array(one, np.int64) for name, one in values["histograms"].items()}
    return Measured(scores, counts, values["numbers"])
