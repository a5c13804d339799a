"""`gemb eval`: how good a model is on your data."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.eval import EvalRecipe
from gemb.report import progress

from ._options import JsonOption, QuietOption, RecipeOption, SetOption, VerboseOption, given, option
from ._show import show


def eval(  # shadows the builtin, which nobody here needs
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL DATA...", help="The model, then folders and files to evaluate it on."),
    ] = None,
    against: Annotated[str | None, option(EvalRecipe, "against")] = None,
    dims: Annotated[str | None, option(EvalRecipe, "dims")] = None,
    dtype: Annotated[str | None, option(EvalRecipe, "dtype")] = None,
    task: Annotated[str | None, option(EvalRecipe, "task")] = None,
    split: Annotated[str | None, option(EvalRecipe, "split")] = None,
    positive: Annotated[str | None, option(EvalRecipe, "positive")] = None,
    samples: Annotated[int | None, option(EvalRecipe, "samples")] = None,
    draws: Annotated[int | None, option(EvalRecipe, "draws")] = None,
    seed: Annotated[int | None, option(EvalRecipe, "seed")] = None,
    max_tokens: Annotated[int | None, option(EvalRecipe, "max_tokens")] = None,
    output: Annotated[Path | None, option(EvalRecipe, "output")] = None,
    plot: Annotated[Path | None, option(EvalRecipe, "plot")] = None,
    space: Annotated[Path | None, option(EvalRecipe, "space")] = None,
    cache: Annotated[Path | None, option(EvalRecipe, "cache")] = None,
    fail_on_regression: Annotated[bool | None, option(EvalRecipe, "fail_on_regression")] = None,
    fail_under: Annotated[
        tuple[str, float] | None, option(EvalRecipe, "fail_under", metavar="METRIC VALUE")
    ] = None,
    device: Annotated[str | None, option(EvalRecipe, "device")] = None,
    precision: Annotated[str | None, option(EvalRecipe, "precision")] = None,
    engine: Annotated[str | None, option(EvalRecipe, "engine")] = None,
    threads: Annotated[int | None, option(EvalRecipe, "threads")] = None,
    batch_tokens: Annotated[int | None, option(EvalRecipe, "batch_tokens")] = None,
    offline: Annotated[bool | None, option(EvalRecipe, "offline")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Evaluate a model on your data: retrieval, similarity, labels and more.

    Example: gemb eval minilm scifact/ sts.jsonl --dims 384,128

    A terminal gets a table, a pipe gets one JSON object.
    """
    from gemb.jobs import eval as job

    model, data = (words[0], words[1:]) if words else (None, [])
    keys = {
        **given(EvalRecipe, locals()),
        "data": tuple(data) if data else None,
        "dims": None if dims is None else _numbers(dims),
        "dtype": None if dtype is None else tuple(dtype.split(",")),
    }
    wanted = recipes.load(recipe, EvalRecipe, set_ or (), keys)
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress)
    show(report, json=json or not sys.stdout.isatty(), quiet=quiet, product=True)


def _numbers(text: str) -> tuple[object, ...]:
    """The sizes between commas; what is no number stays as it is, for the recipe to refuse."""
    return tuple(int(part) if part.strip().isdigit() else part for part in text.split(","))
