"""The training loop: step by step to the end, the same to the bit however often it is killed on a CPU.

What a step does depends only on the weights, the optimizer, the random numbers, the place in the data and
the memory plan; a checkpoint holds all five.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from gemb.device import release_cache
from gemb.errors import MachineError
from gemb.training.checkpoints import Checkpoints, flatten_state, restore_state
from gemb.training.gradients import Gradients, MemoryPlan, Stopped
from gemb.training.metrics import Metrics
from gemb.training.random_numbers import RandomState
from gemb.training.ranks import Ranks

MOST_BAD_STEPS = 3
"""Steps in a row whose loss or gradient is not finite, after which a run is given up."""


class Trainable(Protocol):
    """A model: what the loop asks of it. How its gradients come about is not the loop's business."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, trained or not."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The weights by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Take the weights that `state_dict` gave."""
        ...

    def train(self, mode: bool = True) -> object:
        """Turn dropout on or off."""
        ...


class Optimizer(Protocol):
    """What the loop asks of an optimizer, as torch.optim has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters in groups, each with its learning rate `lr`, which may be changed."""
        ...

    def step(self) -> object:
        """Change the weights by their gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts in dictionaries and lists."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        ...


class Average(Protocol):
    """A running average of the weights."""

    def update(self) -> None:
        """Take in the weights as they are now."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        ...


class Batch(Protocol):
    """The examples of one step: what the loop asks of them."""

    @property
    def dataset(self) -> str:
        """The name of the data set that they are from."""
        ...

    @property
    def pairs(self) -> int:
        """How many examples there are."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of all of them."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest text, which has to fit the memory by itself."""
        ...

    @property
    def measures(self) -> Mapping[str, object]:
        """What metrics.jsonl says of the batch besides."""
        ...


B = TypeVar("B", bound=Batch)
BatchCo = TypeVar("BatchCo", bound=Batch, covariant=True)

Computation = Callable[[MemoryPlan, threading.Event], Gradients]
"""Adds the gradients of one batch to the parameters, within a plan; raises as `batch_gradients` does."""


class Batches(Protocol[BatchCo]):
    """The stream of batches; `position` is the place after the last one given, as JSON values."""

    @property
    def position(self) -> Any:  # noqa: ANN401
        """The place after the last batch given."""
        ...

    def __iter__(self) -> Iterator[BatchCo]:
        """The batches from the place on that the stream was opened at."""
        ...


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is: so many steps, or so many tokens."""

    steps: int | None = None
    tokens: int | None = None

    def share(self, step: float, tokens: float) -> float:
        """How much of the run is done, 0 to 1."""
        done, total = (step, self.steps) if self.steps is not None else (tokens, self.tokens)
        return min(1.0, done / total) if total else 1.0


@dataclass(slots=True)
class Progress:
    """Where a run is. All of it goes into the checkpoints."""

    plan: MemoryPlan
    step: int = 0
    tokens: int = 0
    """Of all batches so far."""
    pairs: int = 0
    """Examples of all batches so far."""
    seconds: float = 0.0
    """Spent in steps, by all runs of the command."""
    bad_in_row: int = 0
    bad_steps: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What the losses counted in all steps, by name."""
    position: Any = None
    """The place in the data after `step` steps; None is its beginning."""
    metrics_bytes: int = 0
    best_step: int | None = None
    best_score: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For state.json; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """What `as_json` gave; other keys are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "plan": MemoryPlan(**values["plan"])})


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    progress: Progress
    loss: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Hooks:
    """What happens around the steps; each is called on every rank, and writes on the first one alone."""

    on_step: Callable[[StepReport], None] = lambda report: None
    note: Callable[[str], None] = lambda line: None
    evaluate: Callable[[int], float | None] = lambda step: None
    """Measures the model after a step; gives the score by which checkpoints are compared, if there is one."""
    on_checkpoint: Callable[[Progress], None] = lambda progress: None


@dataclass(slots=True)
class Training(Generic[B]):
    """A run: its parts, and where it is.

    `learn` gives the computation of a batch's gradients at a step; what is asked of others for it, such as a
    teacher's vectors, is asked once, and the computation may be done again. `rate` gives the learning rate's
    share of its largest at a share of the run. `clip` cuts the gradients of the parameters to its norm and
    gives the norm before.
    """

    model: Trainable
    parameters: Sequence[nn.Parameter]
    """Those that are trained."""
    optimizer: Optimizer
    learn: Callable[[B, int], Computation]
    batches: Batches[B]
    length: Length
    rate: Callable[[float], float]
    clip: Callable[[Sequence[nn.Parameter]], float]
    checkpoints: Checkpoints
    metrics: Metrics | None
    """None on all ranks but the first."""
    progress: Progress
    average: Average | None = None
    average_every: int = 1
    """Steps from one update of the average to the next."""
    device: str = "cpu"
    ranks: Ranks = field(default_factory=Ranks)
    evaluate_every: int | None = None
    checkpoint_every: int = 1000
    hooks: Hooks = field(default_factory=Hooks)

    def run(self, stop: threading.Event) -> bool:
        """Train to the end; whether it was reached. Where `stop` was set, the state is saved and it is not.

        Raises MachineError after three bad steps in a row, or where one text does not fit the memory; the
        last checkpoint then holds the last good state.
        """
        self.model.train()
        batches = iter(self.batches)
        while self.length.share(self.progress.step, self.progress.tokens) < 1.0:
            if self.ranks.any(stop.is_set()):
                self.save()
                return False
            batch = next(batches, None)
            if batch is None:
                break
            # In the middle of the step: the first step of a warm-up does something, and so does the last one.
            rate = self.rate(
                self.length.share(self.progress.step + 0.5, self.progress.tokens + batch.tokens / 2)
            )
            for group in self.optimizer.param_groups:
                # The largest rate is kept in the group, as torch's schedulers do, and so in the checkpoints.
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
            try:
                self._step(batch, stop)
            except Stopped:
                self.save()
                return False
            self._after_step()
        self.save()
        return True

    def _step(self, batch: B, stop: threading.Event) -> None:
        """One optimizer step; Stopped leaves everything as it was before."""
        began = time.monotonic()
        found = self._gradients(batch, stop)
        norm = self.clip(self.parameters)
        is_bad = not (math.isfinite(found.loss) and math.isfinite(norm))
        progress = self.progress
        if not is_bad:
            self.optimizer.step()
            if self.average is not None and (self.progress.step + 1) % self.average_every == 0:
                self.average.update()
        self._clear()
        seconds = time.monotonic() - began
        progress.step += 1
        progress.tokens += batch.tokens
        progress.pairs += batch.pairs
        progress.seconds += seconds
        progress.position = self.batches.position
        progress.bad_in_row = progress.bad_in_row + 1 if is_bad else 0
        progress.bad_steps += is_bad
        for name, count in found.counts.items():
            progress.counts[name] = progress.counts.get(name, 0) + count
        speed = batch.tokens / max(seconds, 1e-9)
        if self.metrics is not None:
            self.metrics.write({
                "step": progress.step,
                "dataset": batch.dataset,
                "loss": found.loss,
                **{f"loss/{name}": value for name, value in found.terms.items()},
                **found.measures,
                "grad_norm": norm,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "tokens": progress.tokens,
                "tokens_per_second": round(speed, 1),
                **batch.measures,
                **found.counts,
                **({"encoded_twice": True} if found.encoded_twice else {}),
                **({"skipped": True} if is_bad else {}),
            })  # fmt: skip
            progress.metrics_bytes = self.metrics.position
        self.hooks.on_step(StepReport(progress, found.loss, speed))
        if is_bad:
            self._bad_step(batch, found.loss, norm)

    def _gradients(self, batch: B, stop: threading.Event) -> Gradients:
        """The gradients of a batch, with smaller chunks each time the memory runs out."""
        before = RandomState.of(self.device)
        compute = self.learn(batch, self.progress.step)
        while True:
            try:
                return compute(self.progress.plan, stop)
            except Stopped:
                self._clear()
                before.restore()
                raise
            except MemoryError as error:
                self._clear()
                before.restore()
                release_cache(self.device)
                plan = self.progress.plan
                if plan.tokens_per_chunk <= batch.longest:
                    raise MachineError(
                        f"out of memory at one text of {batch.longest:,} tokens on {self.device}; "
                        "lower max_tokens, or choose a smaller model"
                    ) from error
                self.progress.plan = replace(plan.halved())
                self.hooks.note(
                    f"out of memory at {plan.tokens_per_chunk:,} tokens a chunk; "
                    f"now {self.progress.plan.tokens_per_chunk:,}"
                )

    def _bad_step(self, batch: B, loss: float, norm: float) -> None:
        """Tell of a step that changed nothing, or give up."""
        progress = self.progress
        what = f"loss {loss:g}" if not math.isfinite(loss) else f"gradient norm {norm:g}"
        if progress.bad_in_row < MOST_BAD_STEPS:
            self.hooks.note(f"step {progress.step:,} ({batch.dataset}): {what}; the step was left out")
            return
        saved = self.checkpoints.steps()
        kept = f"the checkpoint of step {saved[-1]:,} is kept" if saved else "there is no checkpoint yet"
        raise MachineError(
            f"step {progress.step:,} ({batch.dataset}): {what}, as in the {MOST_BAD_STEPS - 1} steps before; "
            f"{kept}; lower optimizer.learning_rate, or look for broken texts in the data"
        )

    def _after_step(self) -> None:
        """Evaluation and checkpoint where they are due."""
        progress = self.progress
        is_last = self.length.share(progress.step, progress.tokens) >= 1.0
        if self.evaluate_every and progress.step % self.evaluate_every == 0 and not is_last:
            self.evaluate()
        if progress.step % self.checkpoint_every == 0 and progress.bad_in_row == 0:
            self.save()

    def evaluate(self) -> None:
        """Measure the model as it is; the best one so far is saved."""
        score = self.hooks.evaluate(self.progress.step)
        if self.metrics is not None:
            self.progress.metrics_bytes = self.metrics.position
        best = self.progress.best_score
        if score is not None and (best is None or score > best):
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self.save()
        self.model.train()

    def save(self) -> None:
        """Write a checkpoint of the state now, on the first rank."""
        # Every rank gives its part of these.
        optimizer = self.optimizer.state_dict()
        average = self.average.state_dict() if self.average is not None else None
        if self.ranks.is_first:
            if self.metrics is not None:
                self.metrics.sync()
            tensors, layout = flatten_state(optimizer)
            files = {
                "weights": self._changing_weights(),
                "optimizer": tensors,
                "random": RandomState.of(self.device).tensors(),
            }
            if average is not None:
                files["average"] = average
            state = {**self.progress.as_json(), "optimizer": layout}
            self.checkpoints.save(self.progress.step, files, state, self.progress.best_step)
        self.ranks.wait()
        self.hooks.on_checkpoint(self.progress)

    def restore(self, step: int) -> None:
        """Put weights, optimizer and random numbers back to what they were after `step`.

        The progress is that of the caller, who opens the data and the metrics where it says.
        """
        state = self.checkpoints.state(step)
        saved = self.checkpoints.tensors(step, "weights")
        self.model.load_state_dict({**self.model.state_dict(), **saved})
        tensors = self.checkpoints.tensors(step, "optimizer")
        self.optimizer.load_state_dict(restore_state(tensors, state["optimizer"]))
        if self.average is not None:
            self.average.load_state_dict(self.checkpoints.tensors(step, "average"))
        random = self.checkpoints.tensors(step, "random")
        RandomState.from_tensors(random, self.device).restore()

    def _changing_weights(self) -> dict[str, Any]:
        """The weights without those that are frozen: these stay what the first model has."""
        frozen = {name for name, one in self.model.named_parameters() if not one.requires_grad}
        return {name: one for name, one in self.model.state_dict().items() if name not in frozen}

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def total_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters)


__all__ = [
    "MOST_BAD_STEPS",
    "Average",
    "Batch",
    "Batches",
    "Computation",
    "Hooks",
    "Length",
    "Optimizer",
    "Progress",
    "StepReport",
    "Trainable",
    "Training",
    "total_parameters",
]
