"""`gemb distill`: a teacher and texts in, a smaller encoder out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.distill import DistillRecipe
from gemb.report import progress

from ._options import (
    DryRunOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    SetOption,
    VerboseOption,
    given,
    option,
)
from ._show import show


def distill(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a recipe of gemb."),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change, such as steps=500."),
    ] = None,
    output: Annotated[Path | None, option(DistillRecipe, "output")] = None,
    model: Annotated[str | None, option(DistillRecipe, "model")] = None,
    steps: Annotated[int | None, option(DistillRecipe, "steps")] = None,
    seed: Annotated[int | None, option(DistillRecipe, "seed")] = None,
    device: Annotated[str | None, option(DistillRecipe, "device")] = None,
    precision: Annotated[str | None, option(DistillRecipe, "precision")] = None,
    threads: Annotated[int | None, option(DistillRecipe, "threads")] = None,
    tensorboard: Annotated[bool | None, option(DistillRecipe, "tensorboard")] = None,
    fail_on_regression: Annotated[bool | None, option(DistillRecipe, "fail_on_regression")] = None,
    wait_lock: Annotated[float | None, option(DistillRecipe, "wait_lock")] = None,
    offline: Annotated[bool | None, option(DistillRecipe, "offline")] = None,
    overwrite: OverwriteOption = False,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Distil a model into a smaller one, resumable.

    Example: gemb distill distill_minilm -o runs/student

    The same command again goes on where it was stopped.
    """
    from gemb.jobs import distill as job

    wanted = recipes.load(
        recipe, DistillRecipe, [*(changes or ()), *(set_ or ())], given(DistillRecipe, locals())
    )
    if dry_run:
        show(job.plan(wanted, overwrite=overwrite), json=json, product=True)
        return
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress, overwrite=overwrite)
    show(report, json=json, quiet=quiet)
