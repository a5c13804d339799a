"""`gemb merge`: models of one shape in, one model out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.merge import MergeRecipe

from ._options import (
    DryRunOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    SetOption,
    VerboseOption,
    given,
    option,
)
from ._show import plan_or_run


def merge(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Models to merge; a first word may be a recipe, of gemb or of mergekit.",
        ),
    ] = None,
    output: Annotated[Path | None, option(MergeRecipe, "output")] = None,
    merge_method: Annotated[str | None, option(MergeRecipe, "merge_method", metavar="METHOD")] = None,
    base_model: Annotated[str | None, option(MergeRecipe, "base_model")] = None,
    weights: Annotated[str | None, option(MergeRecipe, "weights", metavar="1,2,...")] = None,
    variant: Annotated[str | None, option(MergeRecipe, "variant")] = None,
    dtype: Annotated[str | None, option(MergeRecipe, "dtype")] = None,
    last: Annotated[int | None, option(MergeRecipe, "last")] = None,
    decay: Annotated[float | None, option(MergeRecipe, "decay")] = None,
    data: Annotated[list[str] | None, option(MergeRecipe, "data")] = None,
    choose: Annotated[str | None, option(MergeRecipe, "choose")] = None,
    budget: Annotated[int | None, option(MergeRecipe, "budget")] = None,
    fail_on_regression: Annotated[bool | None, option(MergeRecipe, "fail_on_regression")] = None,
    max_memory: Annotated[float | None, option(MergeRecipe, "max_memory", metavar="GIB")] = None,
    seed: Annotated[int | None, option(MergeRecipe, "seed")] = None,
    device: Annotated[str | None, option(MergeRecipe, "device")] = None,
    threads: Annotated[int | None, option(MergeRecipe, "threads")] = None,
    offline: Annotated[bool | None, option(MergeRecipe, "offline")] = None,
    recipe: RecipeOption = None,
    overwrite: OverwriteOption = False,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Merge models of one shape: soups, SLERP, TIES, DARE and more.

    Example: gemb merge runs/a runs/b runs/c -o soup

    A recipe of mergekit with whole models is read as it is: gemb merge ties.yaml -o merged
    """
    from gemb.jobs import merge as job

    source, models = job.split_words(words or [], recipe)
    keys = {
        **given(MergeRecipe, locals()),
        "models": tuple(models) or None,
        "weights": None if weights is None else _numbers(weights),
        "data": None if data is None else tuple(data),
    }
    wanted = recipes.load(source, MergeRecipe, set_ or (), keys)
    plan_or_run(job, wanted, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose, overwrite=overwrite)


def _numbers(text: str) -> tuple[object, ...]:
    """The numbers between commas; what is none stays as it is, for the recipe to refuse."""
    return tuple(_number(part.strip()) for part in text.split(","))


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text
