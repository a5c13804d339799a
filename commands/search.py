"""`gemb search`: the documents of an index nearest in meaning to a question."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.search import SearchRecipe
from gemb.report import progress

from ._options import JsonOption, QuietOption, RecipeOption, SetOption, option
from ._show import show

_K_HELP = f"{SearchRecipe.model_fields['k'].description}  [default: {SearchRecipe.model_fields['k'].default}]"


def search(
    index: Annotated[
        Path | None, typer.Argument(metavar="INDEX", help="The index folder that gemb index made.")
    ] = None,
    query: Annotated[str | None, typer.Argument(metavar="QUESTION", help="The question.")] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help=_K_HELP, show_default=False)] = None,
    as_: Annotated[str | None, option(SearchRecipe, "as_")] = None,
    model: Annotated[str | None, option(SearchRecipe, "model")] = None,
    device: Annotated[str | None, option(SearchRecipe, "device")] = None,
    precision: Annotated[str | None, option(SearchRecipe, "precision")] = None,
    threads: Annotated[int | None, option(SearchRecipe, "threads")] = None,
    offline: Annotated[bool | None, option(SearchRecipe, "offline")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search an index with a question.

    Example: gemb search docs.gemb "who wrote the first compiler?"

    A terminal gets a table, a pipe gets one JSON object a hit.
    """
    from gemb.jobs import search as job

    given: dict[str, object] = {
        "index": index,
        "query": query,
        "k": k,
        "as_": as_,
        "model": model,
        "device": device,
        "precision": precision,
        "threads": threads,
        "offline": offline,
    }
    wanted = recipes.load(recipe, SearchRecipe, set_ or (), given)
    with progress(quiet=quiet, json=json) as on_progress:
        report = job.run(wanted, on_progress)
    if json or sys.stdout.isatty():
        show(report, json=json, product=True)
    else:
        sys.stdout.write(job.json_lines([report]).decode())
