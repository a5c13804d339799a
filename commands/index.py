"""`gemb index`: a folder of documents that can be searched."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.index import IndexRecipe
from gemb.report import progress

from ._options import JsonOption, OverwriteOption, QuietOption, RecipeOption, SetOption, VerboseOption, option
from ._show import show


def index(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...", help="Files, folders or patterns of documents.")
    ] = None,
    output: Annotated[Path | None, option(IndexRecipe, "output")] = None,
    model: Annotated[str | None, option(IndexRecipe, "model")] = None,
    text_field: Annotated[str | None, option(IndexRecipe, "text_field")] = None,
    title_field: Annotated[str | None, option(IndexRecipe, "title_field")] = None,
    id_field: Annotated[str | None, option(IndexRecipe, "id_field")] = None,
    empty: Annotated[str | None, option(IndexRecipe, "empty")] = None,
    on_error: Annotated[str | None, option(IndexRecipe, "on_error")] = None,
    device: Annotated[str | None, option(IndexRecipe, "device")] = None,
    precision: Annotated[str | None, option(IndexRecipe, "precision")] = None,
    threads: Annotated[int | None, option(IndexRecipe, "threads")] = None,
    batch_tokens: Annotated[int | None, option(IndexRecipe, "batch_tokens")] = None,
    offline: Annotated[bool | None, option(IndexRecipe, "offline")] = None,
    wait_lock: Annotated[float | None, option(IndexRecipe, "wait_lock")] = None,
    overwrite: OverwriteOption = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Build a searchable index of documents.

    Example: gemb index docs.jsonl -o docs.gemb
    """
    from gemb.jobs import index as job

    given: dict[str, object] = {
        "inputs": tuple(inputs) if inputs else None,
        "output": output,
        "model": model,
        "text_field": text_field,
        "title_field": title_field,
        "id_field": id_field,
        "empty": empty,
        "on_error": on_error,
        "device": device,
        "precision": precision,
        "threads": threads,
        "batch_tokens": batch_tokens,
        "offline": offline,
        "wait_lock": wait_lock,
    }
    wanted = recipes.load(recipe, IndexRecipe, set_ or (), given)
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress, overwrite=overwrite)
    show(report, json=json, quiet=quiet)
