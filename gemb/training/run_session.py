"""One run of training, whatever is learned: the parts put together, trained, and finished as a model folder.

`gemb.training.session` learns from pairs of texts, `gemb.training.pretrain_session` from texts.
"""

from __future__ import annotations

import fnmatch
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gemb.errors import GembError
from gemb.files import read_json, write_json
from gemb.report import Report
from gemb.training import recipe as recipes
from gemb.training.checkpoints import Checkpoints
from gemb.training.gradients import MemoryPlan
from gemb.training.held_out import Measured
from gemb.training.loop import B, Batches, Computation, Hooks, Length, Progress, StepReport, Training
from gemb.training.metrics import Metrics, tensorboard
from gemb.training.optimizers import LastAverage, MovingAverage, clip_gradients, make_optimizer
from gemb.training.random_numbers import seeded
from gemb.training.schedules import schedule
from gemb.training.sharding import ShardedAverage, ShardedOptimizer, Shards
from gemb.training.verdict import Resampled, Verdict, compare, compare_resampled

if TYPE_CHECKING:
    from gemb.device import Device
    from gemb.training.ranks import Ranks
    from gemb.training.recipe import RunRecipe
    from gemb.training.run_folder import RunFolder
    from gemb.training.watch import Watch

_MOST_STEPS_BETWEEN_CHECKPOINTS = 1000

NamedParameters = list[tuple[str, nn.Parameter]]


class RunSetup(Protocol):
    """What a session asks of the setup of its recipe."""

    @property
    def recipe(self) -> RunRecipe:
        """What is asked for."""
        ...

    @property
    def folder(self) -> RunFolder:
        """Where the run is."""
        ...

    @property
    def ranks(self) -> Ranks:
        """This process among others."""
        ...

    @property
    def device(self) -> Device:
        """Where it computes."""
        ...

    @property
    def model_name(self) -> str:
        """What the user calls the model."""
        ...

    @property
    def length(self) -> Length:
        """How long the run is."""
        ...


S = TypeVar("S", bound=RunSetup)
M = TypeVar("M", bound=nn.Module)


class RunSession(ABC, Generic[S, M, B]):
    """The training of a setup; `open`, then `train`, then `finish`, and `close` however it ended."""

    def __init__(self, setup: S, watch: Watch) -> None:
        self.setup = setup
        self.model = self._load()
        self.average: ShardedAverage | None = None
        self.training: Training[B]
        self.baseline: Measured | None = None
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
        named = trained_parameters(self.model, recipe.freeze, self._only())
        learn = self._learn(named)
        checkpoints = Checkpoints(setup.folder.checkpoints, keep=recipe.checkpoint.keep)
        steps = checkpoints.steps()
        progress = (
            Progress.from_json(checkpoints.state(steps[-1])) if steps else Progress(self._memory_plan())
        )
        optimizer = recipe.optimizer
        whole = make_optimizer(
            named,
            optimizer.name,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.beta1, optimizer.beta2),
            epsilon=optimizer.epsilon,
            tables=(self._table_name(),),
        )
        shards = Shards(named, whole.param_groups, setup.ranks)
        self.average = _average_of(recipe.averaging, shards)
        metrics = None
        if setup.ranks.is_first:
            also = None
            if recipe.tensorboard:
                events = tensorboard(setup.folder.tensorboard, progress.step)
                also = self._opened.enter_context(events)
            metrics = self._opened.enter_context(Metrics(setup.folder.metrics, progress.metrics_bytes, also))
        self.training = Training(
            model=self.model,
            parameters=[parameter for _, parameter in named],
            optimizer=ShardedOptimizer(whole, shards),
            learn=learn,
            batches=self._batches(),
            length=setup.length,
            rate=schedule(recipe.schedule.name, warmup=recipe.schedule.warmup, floor=recipe.schedule.floor),
            clip=lambda parameters: clip_gradients(parameters, optimizer.clip_norm),
            checkpoints=checkpoints,
            metrics=metrics,
            progress=progress,
            average=self.average,
            average_every=self._average_every(),
            device=setup.device.name,
            ranks=setup.ranks,
            evaluate_every=self._evaluate_every(),
            checkpoint_every=self._checkpoint_every(),
            hooks=Hooks(
                on_step=self._on_step,
                note=self._watch.note,
                evaluate=self._evaluate,
                on_checkpoint=lambda progress: self._draw(),
            ),
        )
        self._tokens_before = progress.tokens
        self._watch.total_steps = setup.length.steps
        # Before the checkpoint is put back: the weights are those of the first model still.
        self.baseline = self._baseline()
        self._before_the_first_step()
        self._opened.enter_context(seeded(recipe.seed, setup.device.name))
        if steps:
            self.training.restore(steps[-1])
            self._watch.note(f"going on at step {steps[-1]:,}")
        self._watch.note(self._about())

    def train(self, stop: threading.Event) -> bool:
        """Train to the end; False where `stop` was set, and the state is saved."""
        return self.training.run(stop)

    def finish(self, seconds: float) -> Report:
        """Choose the weights, measure them, and put the model folder in place; gives the report."""
        setup = self.setup
        with self._result_weights():
            final = _resampled(self._measure())
            verdicts = _verdicts(self.baseline, final)
            if final is not None:
                self._log(final)
                write_json(setup.folder.run / "final.json", as_json(final))
            report = Report(title="trained")
            if setup.ranks.is_first:
                self._draw(verdicts)
                record = self._record(final, verdicts, (self._first_loss, self._last_loss), seconds)
                setup.folder.finish(
                    lambda target: self._save(target, record),
                    record,
                    keep_checkpoints=setup.recipe.checkpoint.keep_after,
                )
                report = self._report(record)
        setup.ranks.wait()
        return report

    @abstractmethod
    def _load(self) -> M:
        """The model of the setup, on its device."""

    @abstractmethod
    def _table_name(self) -> str:
        """The name of the model's table of token vectors."""

    @abstractmethod
    def _learn(self, named: NamedParameters) -> Callable[[B, int], Computation]:
        """How gradients come about; `named` are the parameters that are trained."""

    @abstractmethod
    def _batches(self) -> Batches[B]:
        """The batches, from where the last checkpoint is."""

    @abstractmethod
    def _plan_memory(self) -> MemoryPlan:
        """How batches are cut to fit the memory, the same on every rank."""

    @abstractmethod
    def _evaluate_every(self) -> int | None:
        """Steps from one evaluation to the next; None where there is none between."""

    @abstractmethod
    def _evaluates(self) -> bool:
        """Whether this rank has anything to measure."""

    @abstractmethod
    def _measured(self) -> Measured:
        """The scores of the model as it is, while it is not in training."""

    @abstractmethod
    def _about(self) -> str:
        """A line about the batches."""

    @abstractmethod
    def _record(
        self,
        final: Measured | None,
        verdicts: Sequence[Verdict],
        losses: tuple[float | None, float | None],
        seconds: float,
    ) -> dict[str, Any]:
        """What gemb.json says of the finished run."""

    @abstractmethod
    def _report(self, record: Mapping[str, Any]) -> Report:
        """What people and programs are told at the end."""

    @abstractmethod
    def _save(self, target: Path, record: Mapping[str, Any]) -> None:
        """Write the model folder."""

    def _only(self) -> Collection[str] | None:
        """The names of the parameters that may be trained at all; None where all may."""
        return None

    def _share_of_peak(self, report: StepReport) -> float | None:
        """How much of what the device can do a step did; None where nobody knows."""
        return None

    def _before_the_first_step(self) -> None:
        """What else has to be known by then."""

    def _score(self, measured: Measured) -> float:
        """What checkpoints are compared by, higher being better."""
        return measured.main()

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
        plan = self._plan_memory()
        if self.setup.ranks.is_first:
            write_json(file, plan)
        return plan

    def _checkpoint_every(self) -> int:
        wanted = self.setup.recipe.checkpoint.every
        if wanted is not None:
            return wanted
        return self._usually_every()

    def _average_every(self) -> int:
        """Not that of the checkpoints: how often those are written changes no weights."""
        average = self.setup.recipe.averaging
        return (average.every or self._usually_every()) if isinstance(average, recipes.LastAverage) else 1

    def _usually_every(self) -> int:
        steps = self.setup.length.steps or 10 * _MOST_STEPS_BETWEEN_CHECKPOINTS
        return max(1, min(_MOST_STEPS_BETWEEN_CHECKPOINTS, steps // 10))

    def _on_step(self, report: StepReport) -> None:
        if self._first_loss is None:
            self._first_loss = report.loss
        self._last_loss = report.loss
        tokens = report.progress.tokens - self._tokens_before
        self._watch.step(report.progress.step, tokens, report.loss, self._share_of_peak(report))

    def _baseline(self) -> Measured | None:
        """The scores of the first model, measured once a run."""
        file = self.setup.folder.baseline
        if not self.setup.ranks.is_first:
            return None
        known = read_json(file) if file.is_file() else {}
        # What an older gemb measured has no resamples, so it is measured again.
        measured = from_json(known) if "resamples" in known else _resampled(self._measure())
        if measured is None:
            return None
        write_json(file, as_json(measured))
        progress = self.training.progress
        # Also where a run was killed before its first checkpoint, whose metrics begin anew.
        if self.training.metrics is not None and progress.step == 0:
            self._log(measured)
            progress.metrics_bytes = self.training.metrics.position
        return measured

    def _evaluate(self, step: int) -> float | None:
        """The score of the model as it is, on all ranks."""
        with self.average.applied() if self.average is not None else nullcontext():
            measured = self._measure()
        score = float("-inf")
        if measured is not None:
            self._log(measured)
            score = self._score(measured)
        return self.setup.ranks.first(score)

    def _measure(self) -> Measured | None:
        """The scores of the model as it is; None where nothing is evaluated, or on another rank."""
        if not self._evaluates():
            return None
        self._watch.stage("evaluating")
        self.model.eval()
        measured = self._measured()
        self.model.train()
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


def trained_parameters(
    model: nn.Module, patterns: Iterable[str], only: Collection[str] | None = None
) -> NamedParameters:
    """The parameters that are trained, by name; those that match a pattern, or are not in `only`, are frozen.

    Raises GembError for a pattern that matches none, and if all are frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set() if only is None else set(names).difference(only)
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise GembError(
                f"freeze: no parameter is called {pattern}; the names are such as "
                f"{', '.join(names[:3])}, and * stands for anything"
            )
        frozen.update(matching)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    trained = [(name, one) for name, one in model.named_parameters() if name not in frozen]
    if not trained:
        raise GembError("freeze: all parameters are frozen, so there is nothing to train")
    return trained


def state_bytes(ranks: Ranks) -> float:
    """Of a parameter besides itself, fp32: its gradient, and a rank's share of the two moments."""
    return 4 + 8 / ranks.count


def as_json(measured: Measured) -> dict[str, Any]:
    """What was measured, for a file; `from_json` reads it back."""
    return {
        "numbers": dict(measured.numbers),
        "scores": {name: values.tolist() for name, values in measured.scores.items()},
        "resamples": {
            name: {"value": one.value, "draws": one.draws.tolist(), "items": one.items}
            for name, one in measured.resamples.items()
        },
        "histograms": {name: counts.tolist() for name, counts in measured.histograms.items()},
    }


def from_json(values: Mapping[str, Any]) -> Measured:
    """What `as_json` gave."""
    scores: dict[str, NDArray[np.float64]] = {
        name: np.array(one, np.float64) for name, one in values["scores"].items()
    }
    counts = {name: np.array(one, np.int64) for name, one in values["histograms"].items()}
    resamples = {
        name: Resampled(one["value"], np.array(one["draws"], np.float64), one["items"])
        for name, one in values.get("resamples", {}).items()
    }
    return Measured(scores, counts, values["numbers"], resamples=resamples)


def _average_of(
    settings: recipes.EmaAverage | recipes.LastAverage | None, shards: Shards
) -> ShardedAverage | None:
    if settings is None:
        return None
    pieces = shards.pieces.items()
    if isinstance(settings, recipes.EmaAverage):
        return ShardedAverage(MovingAverage(pieces, settings.decay), shards)
    return ShardedAverage(LastAverage(pieces, settings.checkpoints), shards)


def _verdicts(before: Measured | None, after: Measured | None) -> list[Verdict]:
    if before is None or after is None:
        return []
    return [
        *(compare(name, before.scores[name], values) for name, values in after.scores.items()),
        *(compare_resampled(name, before.resamples[name], one) for name, one in after.resamples.items()),
    ]


def _resampled(measured: Measured | None) -> Measured | None:
    return None if measured is None else measured.resampled()
