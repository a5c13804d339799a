"""`gemb mine`: pairs in, the same pairs with hard negatives out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.mine import MineRecipe

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
from ._show import plan_or_run, show


def mine(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(metavar="PAIRS...", help="Files of queries and positives, or one BEIR folder."),
    ] = None,
    corpus: Annotated[str | None, option(MineRecipe, "corpus")] = None,
    output: Annotated[Path | None, option(MineRecipe, "output")] = None,
    model: Annotated[str | None, option(MineRecipe, "model")] = None,
    negatives: Annotated[int | None, option(MineRecipe, "negatives")] = None,
    first_rank: Annotated[int | None, option(MineRecipe, "first_rank")] = None,
    last_rank: Annotated[int | None, option(MineRecipe, "last_rank")] = None,
    relative_margin: Annotated[
        str | None, option(MineRecipe, "relative_margin", metavar="<float>|none")
    ] = None,
    absolute_margin: Annotated[
        str | None, option(MineRecipe, "absolute_margin", metavar="<float>|none")
    ] = None,
    min_score: Annotated[float | None, option(MineRecipe, "min_score")] = None,
    max_score: Annotated[float | None, option(MineRecipe, "max_score")] = None,
    pick: Annotated[str | None, option(MineRecipe, "pick")] = None,
    seed: Annotated[int | None, option(MineRecipe, "seed")] = None,
    second: Annotated[str | None, option(MineRecipe, "second")] = None,
    scores: Annotated[str | None, option(MineRecipe, "scores")] = None,
    graph: Annotated[bool | None, option(MineRecipe, "graph")] = None,
    query_as: Annotated[str | None, option(MineRecipe, "query_as")] = None,
    passage_as: Annotated[str | None, option(MineRecipe, "passage_as")] = None,
    dims: Annotated[int | None, option(MineRecipe, "dims")] = None,
    max_tokens: Annotated[int | None, option(MineRecipe, "max_tokens")] = None,
    cache: Annotated[Path | None, option(MineRecipe, "cache")] = None,
    shape: Annotated[str | None, option(MineRecipe, "shape")] = None,
    split: Annotated[str | None, option(MineRecipe, "split")] = None,
    limit: Annotated[int | None, option(MineRecipe, "limit")] = None,
    device: Annotated[str | None, option(MineRecipe, "device")] = None,
    precision: Annotated[str | None, option(MineRecipe, "precision")] = None,
    threads: Annotated[int | None, option(MineRecipe, "threads")] = None,
    batch_tokens: Annotated[int | None, option(MineRecipe, "batch_tokens")] = None,
    wait_lock: Annotated[float | None, option(MineRecipe, "wait_lock")] = None,
    offline: Annotated[bool | None, option(MineRecipe, "offline")] = None,
    overwrite: OverwriteOption = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Mine hard negatives for pairs of queries and positives, resumable.

    Example: gemb mine pairs.jsonl --corpus docs.jsonl -o mined.jsonl -m minilm

    The same command again goes on where it was stopped.
    """
    from gemb.jobs import mine as job

    margins = ("relative_margin", "absolute_margin")
    keys = {
        key: _number(value) if key in margins else value for key, value in given(MineRecipe, locals()).items()
    }
    keys["pairs"] = tuple(pairs) if pairs else None
    wanted = recipes.load(recipe, MineRecipe, set_ or (), keys)
    if dry_run:
        show(job.plan(wanted, overwrite=overwrite), json=json, product=True)
        return
    plan_or_run(job, wanted, dry_run=False, json=json, quiet=quiet, verbose=verbose, overwrite=overwrite)


def _number(text: object) -> object:
    """The number in a text; another text as it is, for the recipe knows none and refuses the rest."""
    try:
        return float(str(text))
    except ValueError:
        return text
