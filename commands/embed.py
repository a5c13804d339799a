"""`gemb embed`: texts in, vectors out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.embed import EmbedRecipe, is_stdout, split_words
from gemb.report import progress

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
from ._show import show

DEVICE_OPTION = option(EmbedRecipe, "device")
DEVICE_OPTION.param_decls = (*DEVICE_OPTION.param_decls, "--devices")  # for lists, the same thing


def embed(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders or patterns of texts, - for stdin; or one recipe file and KEY=VALUE words.",
        ),
    ] = None,
    output: Annotated[Path | None, option(EmbedRecipe, "output")] = None,
    model: Annotated[str | None, option(EmbedRecipe, "model")] = None,
    as_: Annotated[str | None, option(EmbedRecipe, "as_")] = None,
    text_field: Annotated[str | None, option(EmbedRecipe, "text_field")] = None,
    title_field: Annotated[str | None, option(EmbedRecipe, "title_field")] = None,
    id_field: Annotated[str | None, option(EmbedRecipe, "id_field")] = None,
    input_format: Annotated[str | None, option(EmbedRecipe, "input_format")] = None,
    dims: Annotated[int | None, option(EmbedRecipe, "dims")] = None,
    normalise: Annotated[bool | None, option(EmbedRecipe, "normalise")] = None,
    dtype: Annotated[str | None, option(EmbedRecipe, "dtype")] = None,
    encoding: Annotated[str | None, option(EmbedRecipe, "encoding")] = None,
    max_tokens: Annotated[int | None, option(EmbedRecipe, "max_tokens")] = None,
    on_long: Annotated[str | None, option(EmbedRecipe, "on_long")] = None,
    empty: Annotated[str | None, option(EmbedRecipe, "empty")] = None,
    on_error: Annotated[str | None, option(EmbedRecipe, "on_error")] = None,
    max_rejects: Annotated[str | None, option(EmbedRecipe, "max_rejects")] = None,
    limit_rows: Annotated[int | None, option(EmbedRecipe, "limit_rows")] = None,
    max_seconds: Annotated[float | None, option(EmbedRecipe, "max_seconds")] = None,
    device: Annotated[str | None, DEVICE_OPTION] = None,
    precision: Annotated[str | None, option(EmbedRecipe, "precision")] = None,
    engine: Annotated[str | None, option(EmbedRecipe, "engine")] = None,
    threads: Annotated[int | None, option(EmbedRecipe, "threads")] = None,
    batch_tokens: Annotated[int | None, option(EmbedRecipe, "batch_tokens")] = None,
    shard: Annotated[str | None, option(EmbedRecipe, "shard")] = None,
    join: Annotated[bool | None, option(EmbedRecipe, "join")] = None,
    cache: Annotated[Path | None, option(EmbedRecipe, "cache")] = None,
    force: Annotated[bool | None, option(EmbedRecipe, "force")] = None,
    wait_lock: Annotated[float | None, option(EmbedRecipe, "wait_lock")] = None,
    offline: Annotated[bool | None, option(EmbedRecipe, "offline")] = None,
    overwrite: OverwriteOption = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Embed texts: files in, vectors out, resumable.

    Example: gemb embed docs.jsonl -o docs.npy

    The same command again goes on where it was stopped.
    """
    from gemb.jobs import embed as job

    source, overrides, inputs = split_words(inputs or [], recipe)
    keys = {
        **given(EmbedRecipe, locals()),
        "inputs": tuple(inputs) or None,
    }
    wanted = recipes.load(source, EmbedRecipe, [*overrides, *(set_ or ())], keys)
    if dry_run:
        show(job.plan(wanted), json=json, product=True)
        return
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress, overwrite=overwrite)
    show(report, json=json, quiet=quiet, stdout_taken=is_stdout(wanted))
