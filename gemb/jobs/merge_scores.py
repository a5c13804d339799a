"""How good merged models are: their scores on data sets, a verdict, and the searches for weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from gemb.engine.encoder import Encoder
from gemb.engine.opening import stdout_guarded
from gemb.evaluation import Comparison, Score, Task, compare, evaluate
from gemb.files import Journal, file_digest
from gemb.jobs.merge_recipe import MergeRecipe
from gemb.report import Event, OnProgress

MIXES = 0.5
"""The share of a search's budget that is drawn at random before the best mixture is refined."""


@dataclass(frozen=True)
class Scored:
    """A model on every data set."""

    name: str
    scores: Sequence[Score]

    @property
    def mean(self) -> float:
        """The mean of the main metrics."""
        return float(np.mean([score.value for score in self.scores]))

    def against(self, other: Scored, seed: int) -> Comparison:
        """The difference from another model, by the paired bootstrap."""
        return compare(self.scores, other.scores, seed=seed)


@dataclass(frozen=True)
class Trial:
    """Weights that were tried, and the mean of the main metrics that they reached."""

    weights: tuple[float, ...]
    score: float
    origin: Literal["model", "recipe", "greedy", "drawn", "refined"]


def scored(
    name: str, folder: Path, tasks: Sequence[Task], recipe: MergeRecipe, on_progress: OnProgress
) -> Scored:
    """The scores of the model in `folder`, at full width. Raises GembError as evaluation does."""

    def tell(task: Task, done: int, total: int) -> None:
        on_progress(Event(f"embedding {task.name} by {name}", done, total))

    with stdout_guarded():
        encoder = Encoder.load(
            str(folder), device=recipe.device, threads=recipe.threads, precision="fp32", offline=True
        )
    try:
        return Scored(name, [result.score for result in evaluate(encoder, tasks, on_texts=tell)])
    finally:
        encoder.close()


class ScoreLog:
    """Scores of merged weights on the disk, so that a search that was killed goes on where it was.

    `asked` tells what else a score depends on; scores of other wishes are left alone.

    Raises GembError where the log is damaged.
    """

    def __init__(self, path: Path, asked: str) -> None:
        self._journal = Journal(path)
        self._asked = asked
        self._scores = {
            tuple(entry["weights"]): float(entry["score"])
            for entry in self._journal.entries()
            if entry["asked"] == asked
        }

    @property
    def known(self) -> int:
        """How many scores there are."""
        return len(self._scores)

    def score(self, weights: tuple[float, ...], compute: Callable[[tuple[float, ...]], float]) -> float:
        """The score of the weights, computed and kept if it is not there."""
        if weights not in self._scores:
            score = self._scores[weights] = compute(weights)
            self._journal.append({"asked": self._asked, "weights": weights, "score": score})
        return self._scores[weights]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()


def data_digest(path: Path) -> str:
    """What tells a data set, a file or a folder of files, from a changed one."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file_digest(file, 'blake2b')}\0".encode())
    return digest.hexdigest()


def greedy(
    alone: Sequence[float], score_of: Callable[[tuple[float, ...]], float], budget: int
) -> Iterator[Trial]:
    """The trials of a greedy soup (model soups, arXiv 2203.05482, recipe 1), the models alone first.

    From the best model on, `alone` being their scores, each is added in order and kept unless the soup gets
    worse. The last trial that did not is the soup; `budget` bounds the trials of more than one model.
    """
    count = len(alone)
    for model, score in enumerate(alone):
        yield Trial(tuple(float(each == model) for each in range(count)), score, "model")
    order = sorted(range(count), key=lambda model: -alone[model])
    kept, best = {order[0]}, alone[order[0]]
    for model in order[1 : 1 + budget]:
        weights = tuple(float(each in kept or each == model) for each in range(count))
        score = score_of(weights)
        yield Trial(weights, score, "greedy")
        if score >= best:
            kept, best = kept | {model}, score


def mixtures(
    first: tuple[float, ...],
    score_of: Callable[[tuple[float, ...]], float],
    budget: int,
    seed: int,
) -> Iterator[Trial]:
    """The trials of a search for weights: the recipe's, some drawn evenly from all mixtures, then steps.

    A step doubles or halves one weight of the best mixture so far; it ends where none of them helps. Weights
    are kept at the sum of the first ones.
    """
    total = sum(first)
    best = Trial(first, score_of(first), "recipe")
    yield best
    seen = {_rounded(first)}
    random = np.random.default_rng(seed)
    for _ in range(int((budget - 1) * MIXES)):
        drawn = tuple(float(weight) for weight in random.dirichlet(np.ones(len(first))) * total)
        trial = Trial(drawn, score_of(drawn), "drawn")
        seen.add(_rounded(drawn))
        yield trial
        best = max(best, trial, key=lambda one: one.score)
    left = budget - 1 - int((budget - 1) * MIXES)
    while left:
        steps = [step for step in _steps(best.weights, total) if _rounded(step) not in seen]
        if not steps:
            return
        trial = Trial(steps[0], score_of(steps[0]), "refined")
        seen.add(_rounded(steps[0]))
        left -= 1
        yield trial
        best = max(best, trial, key=lambda one: one.score)


def chosen(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest score; of equals the one with the most models, then the first."""
    return max(trials, key=lambda trial: (trial.score, sum(weight != 0 for weight in trial.weights)))


def _steps(weights: Sequence[float], total: float) -> Iterator[tuple[float, ...]]:
    for factor in (2.0, 0.5):
        for place in range(len(weights)):
            changed = [weight * factor if at == place else weight for at, weight in enumerate(weights)]
            scale = total / sum(changed) if sum(changed) else 1.0
            yield tuple(weight * scale for weight in changed)


def _rounded(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(weight, 6) for weight in weights)
