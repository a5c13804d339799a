"""Search for the mixture of data sets that trains best (EmbeddingGemma, arXiv 2509.20354).

The paper trains one model a mixture: that of an earlier search, ten drawn from a Dirichlet distribution, and
those that Bayesian optimisation then proposes; the mean of the best ones' weights is the final model. Its
concentration, surrogate and number of trials are not published: 1, a tree-structured Parzen estimator
(Optuna's) and 20 are ours.

W weights of the data sets, with the sum 1; U the same as a point of the unit cube, one dimension less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from pydantic import Field

from gemb.errors import GembError, UnavailableError
from gemb.files import Journal
from gemb.recipe import Recipe
from gemb.training.data_recipe import DataSet
from gemb.training.examples import name_of

Origin = Literal["given", "dirichlet", "bayesian"]
"""Where a mixture comes from: the recipe, a random draw, or a proposal from the trials before it."""

_DECIMALS = 6  # of a weight: as many as people can read, and far below what a run can tell apart


class SearchRecipe(Recipe):
    """How `gemb train --search` looks for a mixture of the recipe's data sets."""

    kind = "mixture_search"

    trials: int = Field(default=20, ge=1)
    """Runs in all, that of the recipe's own mixture counted; may be raised later to go on."""
    random: int = Field(default=10, ge=0)
    """Mixtures drawn from a Dirichlet distribution after the recipe's own, before the first proposal."""
    concentration: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of the Dirichlet distribution: 1 draws from all mixtures alike, less prefers few data sets, more even
    shares; not published for EmbeddingGemma, 1 is ours."""
    best: int = Field(default=3, ge=1)
    """Best runs that are listed to be merged."""
    seed: int = Field(default=42, ge=0, lt=2**31)
    """What the draws and the proposals follow from; the runs have the recipe's."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One mixture, and how good the model is that was trained with it."""

    number: int
    origin: Origin
    weights: tuple[float, ...]
    """One for each data set of the recipe, in its order."""
    score: float | None = None
    """The mean of the evaluation's measures at full width; None until the run is done."""

    @property
    def folder(self) -> str:
        """The name of its run's folder."""
        return f"trial-{self.number:03d}"


def given_weights(data: Sequence[DataSet]) -> tuple[float, ...]:
    """The mixture of a recipe, with the sum 1.

    Raises GembError if there are not two data sets, or one has no weight or the name of another.
    """
    names = [name_of(one) for one in data]
    if len(names) < 2:
        raise GembError(f"a search mixes data sets, but the recipe has {len(names)}; give at least 2")
    if twice := [name for name in names if names.count(name) > 1]:
        raise GembError(f"two data sets are called {twice[0]}; give each its own name")
    weights = [one.weight for one in data]
    for name, weight in zip(names, weights, strict=True):
        if weight is None:
            raise GembError(f"data set {name} has no weight; a search begins with the weights of the recipe")
    found = np.array(weights, np.float64)
    return tuple((found / found.sum()).tolist())


def search(
    settings: SearchRecipe,
    data: Sequence[DataSet],
    ledger: Path,
    score_of: Callable[[Trial], float],
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """All trials of a search, in their order; those that the ledger holds are not done again.

    `ledger` is a journal of two lines a trial, one when its mixture is chosen and one when its score is
    known. Whenever a search is killed, the next one goes on with the same mixture, and chooses later ones as
    if nothing had happened. `score_of` trains and measures; `on_trial` hears of a trial before it.

    Raises GembError as `given_weights` does, and for a score that is not finite; UnavailableError without
    Optuna.
    """
    given = given_weights(data)
    names = [name_of(one) for one in data]
    if settings.trials > 1 + settings.random:
        _optuna()  # rather now than after eleven runs
    with Journal(ledger) as journal:
        trials = _read(journal, names)
        while len(done := [one for one in trials if one.score is not None]) < settings.trials:
            if len(done) == len(trials):
                trial = propose(settings, given, trials)
                journal.append({
                    "trial": trial.number,
                    "origin": trial.origin,
                    "weights": dict(zip(names, trial.weights, strict=True)),
                })  # fmt: skip
                trials.append(trial)
            trial = trials[-1]
            on_trial(trial)
            began = time.monotonic()
            score = score_of(trial)
            if not math.isfinite(score):
                raise GembError(f"{trial.folder}: its score is {score}; look at the evaluation's data")
            seconds = round(time.monotonic() - began, 3)
            journal.append({"trial": trial.number, "score": score, "seconds": seconds})
            trials[-1] = Trial(trial.number, trial.origin, trial.weights, score)
    return trials


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with a score, the best one first; of equals the earlier one."""
    scored = [(one, one.score) for one in trials if one.score is not None]
    return [one for one, _ in sorted(scored, key=lambda pair: (-pair[1], pair[0].number))]


def propose(settings: SearchRecipe, given: Sequence[float], past: Sequence[Trial]) -> Trial:
    """The next trial after those of `past`, which all have scores. It follows from the arguments alone."""
    number = len(past)
    if number == 0:
        return Trial(number, "given", tuple(given))
    if number <= settings.random:
        generator = np.random.default_rng([settings.seed, number])
        drawn: list[float] = generator.dirichlet([settings.concentration] * len(given)).tolist()
        return Trial(number, "dirichlet", _rounded(drawn))
    optuna = _optuna()
    names = [f"u{place}" for place in range(len(given) - 1)]
    point = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    # A fresh sampler for every proposal, told all that is known: it then has no state that a kill could lose.
    sampler = optuna.samplers.TPESampler(seed=settings.seed + number, n_startup_trials=1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([
        optuna.trial.create_trial(
            params=dict(zip(names, to_cube(one.weights), strict=True)), distributions=point, value=one.score
        )
        for one in past
    ])  # fmt: skip
    asked = study.ask(point)
    return Trial(number, "bayesian", _rounded(from_cube([asked.params[name] for name in names])))


def to_cube(weights: Sequence[float]) -> list[float]:
    """The point U of the mixture W: `from_cube` backwards."""
    left, point = 1.0, []
    for place, weight in enumerate(weights[:-1]):
        broken = min(1.0, weight / left) if left > 0 else 0.0
        point.append(1 - (1 - broken) ** (len(weights) - 1 - place))
        left -= weight
    return point


def from_cube(point: Sequence[float]) -> list[float]:
    """The mixture W of a point U of the unit cube; all mixtures are reached, each by one point.

    A stick of length 1 is broken once for each coordinate, at the Beta(1, rest) quantile of it: points drawn
    evenly from the cube give mixtures drawn evenly, Dirichlet(1), so that the optimiser has no bias of ours.
    """
    left, weights = 1.0, []
    for place, coordinate in enumerate(point):
        broken = 1 - (1 - coordinate) ** (1 / (len(point) - place))
        weights.append(left * broken)
        left *= 1 - broken
    return [*weights, left]


def _rounded(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(weight, _DECIMALS) for weight in weights)


def _read(journal: Journal, names: Sequence[str]) -> list[Trial]:
    """The trials of a ledger; at most the last one has no score."""
    trials: list[Trial] = []
    for entry in journal.entries():
        if "weights" in entry:
            weights: Mapping[str, float] = entry["weights"]
            trials.append(Trial(entry["trial"], entry["origin"], tuple(weights[name] for name in names)))
        else:
            last = trials[-1]
            trials[-1] = Trial(last.number, last.origin, last.weights, entry["score"])
    return trials


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UnavailableError(
            "optuna is not installed, which proposes mixtures; pip install 'gemb[tune]', "
            "or give no more trials than 1 + random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    module: ModuleType = optuna
    return module
