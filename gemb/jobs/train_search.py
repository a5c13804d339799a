"""`gemb train RECIPE --search search.yaml`: one run of `gemb train` for each mixture, the best ones listed.

    OUTPUT/
      search.json     what was asked for
      trials.jsonl    the mixtures and their scores: all that a search remembers
      trial-000/      the model of each run, or trial-000.partial while it is trained
      best.json       when it is done: the best runs, for gemb merge

`gemb.training.search` chooses the mixtures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from gemb.errors import GembError
from gemb.files import Lock, check_writable, fsync_folder, os_errors_explained, read_json, write_json
from gemb.jobs import train
from gemb.recipe import resolved
from gemb.report import OnProgress, Plan, Report, Table, counted, ignore
from gemb.training.examples import name_of
from gemb.training.recipe import TrainRecipe, flat
from gemb.training.run_folder import RunFolder
from gemb.training.search import SearchRecipe, Trial, best_first, given_weights, search
from gemb.training.watch import Watch

__all__ = ["SearchRecipe", "plan", "run"]

_VERSION = 1
_BUDGET = frozenset({"trials", "best"})
"""Settings that may differ when a search is continued."""


def plan(recipe: TrainRecipe, settings: SearchRecipe) -> Plan:
    """What `run` would do, from the plan of its first run. Raises GembError as `run` does before that."""
    output, first = _checked(recipe)
    one = train.plan(_recipe_of(recipe, Trial(0, "given", first), output))
    seconds = one.data.get("seconds")
    runs = counted(settings.trials, "run")
    return replace(
        one,
        title=f"would search a mixture with {runs} in {output}; the first one:",
        outputs=[output],
        data={**one.data, "trials": settings.trials, "all_seconds": _times(seconds, settings.trials)},
        rows=[("search", f"{runs}: {_stages(settings)}"), *one.rows],
    )


def run(
    recipe: TrainRecipe,
    settings: SearchRecipe,
    on_progress: OnProgress = ignore,
    *,
    overwrite: bool = False,
) -> Report:
    """Train with one mixture after the other, or go on where an earlier search was stopped.

    A trial's score is the mean of its evaluation's measures at full width. `overwrite` drops an earlier
    search of the output.

    Raises GembError for a recipe that cannot be searched, a folder of another search, and as
    `gemb.jobs.train.run` does; Interrupted after SIGINT or SIGTERM.
    """
    output, _ = _checked(recipe)
    watch = Watch(on_progress)
    check_writable(output)
    with os_errors_explained(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with Lock(output.with_name(output.name + ".lock"), str(output), recipe.wait_lock, watch.note):
        _begin(output, recipe, settings, overwrite=overwrite)
        names = [name_of(one) for one in recipe.data]

        def tell(trial: Trial) -> None:
            watch.note(
                f"run {trial.number + 1} of {settings.trials} ({trial.origin}): {_shown(names, trial)}"
            )

        def score_of(trial: Trial) -> float:
            return _score(train.run(_recipe_of(recipe, trial, output), on_progress).data)

        trials = search(settings, recipe.data, output / "trials.jsonl", score_of, tell)
        best = best_first(trials)
        runs = [_as_json(output, names, one) for one in best[: settings.best]]
        write_json(output / "best.json", {"runs": runs})
    return _report(output, names, best, settings.best)


def _checked(recipe: TrainRecipe) -> tuple[Path, tuple[float, ...]]:
    """The output and the recipe's mixture. Raises GembError for a recipe whose runs cannot be compared."""
    if recipe.output is None:
        raise GembError("no output given; pass -o runs/search")
    if not (recipe.evaluation.pairs or recipe.evaluation.sets):
        raise GembError(
            "a search compares runs, but nothing is evaluated; give evaluation.pairs or evaluation.sets"
        )
    if recipe.steps is None and recipe.tokens is None:
        raise GembError("a search compares runs of one length; give steps or tokens, not epochs")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise GembError("a search trains one run after the other in one process; start it without torchrun")
    return recipe.output, given_weights(recipe.data)


def _recipe_of(recipe: TrainRecipe, trial: Trial, output: Path) -> TrainRecipe:
    data = tuple(
        one.model_copy(update={"weight": weight})
        for one, weight in zip(recipe.data, trial.weights, strict=True)
    )
    # A run that became worse is a score like any other.
    return recipe.model_copy(
        update={"data": data, "output": output / trial.folder, "fail_on_regression": False}
    )


def _begin(output: Path, recipe: TrainRecipe, settings: SearchRecipe, *, overwrite: bool) -> None:
    """Make the folder of the search, or compare it with what was asked for before."""
    wanted = {f"search.{name}": value for name, value in resolved(settings).items() if name not in _BUDGET}
    values = {**flat(resolved(recipe)), **wanted}
    request: Mapping[str, Any] = {
        "version": _VERSION,
        "recipe": orjson.loads(orjson.dumps(values)),  # so that it compares equal to what is read back
        "model": {"name": recipe.model},
    }
    file = output / "search.json"
    if file.is_file() and overwrite:
        with os_errors_explained(output):
            shutil.rmtree(output)
    if file.is_file():
        RunFolder.refuse_differences(read_json(file), request, f"{output} holds another search")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GembError(f"{output} exists and is no search; choose another output")
    with os_errors_explained(output):
        output.mkdir(exist_ok=True)
        fsync_folder(output.absolute().parent)
    write_json(file, request)


def _score(record: Mapping[str, Any]) -> float:
    """The mean of the measures of a finished run at full width."""
    from gemb.training.held_out import is_full_size

    values = [value for name, value in record["measures"]["after"].items() if is_full_size(name)]
    return float(sum(values) / len(values))


def _report(output: Path, names: list[str], best: list[Trial], listed: int) -> Report:
    first = next(one for one in best if one.number == 0)
    top = best[:listed]
    scores = f"score {top[0].score:.4f}; the recipe's mixture {first.score:.4f}"
    rows = [
        ("best", f"{output / top[0].folder}, {scores}"),
        ("to merge", " ".join(str(output / one.folder) for one in top)),
    ]
    return Report(
        title=f"searched a mixture of {counted(len(names), 'data set')} with {counted(len(best), 'run')}",
        rows=rows,
        data={
            "best": [_as_json(output, names, one) for one in top],
            "trials": [_as_json(output, names, one) for one in sorted(best, key=lambda one: one.number)],
        },
        outputs=[output],
        tables=[
            Table(
                ("run", "origin", "score", *names),
                [
                    (one.folder, one.origin, f"{one.score:.4f}", *(f"{weight:.3f}" for weight in one.weights))
                    for one in best
                ],
                right_aligned=("score", *names),
            )
        ],
    )


def _as_json(output: Path, names: list[str], trial: Trial) -> dict[str, object]:
    return {
        "model": str(output / trial.folder),
        "origin": trial.origin,
        "score": trial.score,
        "weights": dict(zip(names, trial.weights, strict=True)),
    }


def _stages(settings: SearchRecipe) -> str:
    drawn = min(settings.random, settings.trials - 1)
    return f"the recipe's mixture, {drawn} drawn at random, {settings.trials - 1 - drawn} proposed"


def _shown(names: list[str], trial: Trial) -> str:
    return ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, trial.weights, strict=True))


def _times(seconds: object, runs: int) -> float | None:
    return round(seconds * runs, 3) if isinstance(seconds, float | int) else None
