"""`gemb mine`: pairs in, the same pairs with hard negatives out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.mine import MineRecipe
from gemb.report import progress

from ._options import (
    DryRunOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    SetOption,
    VerboseOption,
    option,
)
from ._show import show


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
    relative_margin: Annotated[float | None, option(MineRecipe, "relative_margin")] = None,
    absolute_margin: Annotated[float | None, option(MineRecipe, "absolute_margin")] = None,
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

    given: dict[str, object] = {
        "pairs": tuple(pairs) if pairs else None,
        "corpus": corpus,
        "output": output,
        "model": model,
        "negatives": negatives,
        "first_rank": first_rank,
        "last_rank": last_rank,
        "relative_margin": relative_margin,
        "absolute_margin": absolute_margin,
        "min_score": min_score,
        "max_score": max_score,
        "pick": pick,
        "seed": seed,
        "second": second,
        "scores": scores,
        "graph": graph,
        "query_as": query_as,
        "passage_as": passage_as,
        "dims": dims,
        "max_tokens": max_tokens,
        "cache": cache,
        "shape": shape,
        "split": split,
        "limit": limit,
        "device": device,
        "precision": precision,
        "threads": threads,
        "batch_tokens": batch_tokens,
        "wait_lock": wait_lock,
        "offline": offline,
    }
    wanted = recipes.load(recipe, MineRecipe, set_ or (), given)
    if dry_run:
        show(job.plan(wanted), json=json, product=True)
        return
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress, overwrite=overwrite)
    show(report, json=json, quiet=quiet)
