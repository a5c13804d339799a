"""`gemb train`: pairs in, a fine-tuned encoder out; or texts in, a pretrained language model out."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.errors import GembError
from gemb.jobs.train import PretrainRecipe, TrainRecipe
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
from ._show import plan_or_run, show


def train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a recipe of gemb."),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change, such as steps=500."),
    ] = None,
    output: Annotated[Path | None, option(TrainRecipe, "output")] = None,
    model: Annotated[str | None, option(TrainRecipe, "model")] = None,
    steps: Annotated[int | None, option(TrainRecipe, "steps")] = None,
    seed: Annotated[int | None, option(TrainRecipe, "seed")] = None,
    device: Annotated[str | None, option(TrainRecipe, "device")] = None,
    precision: Annotated[str | None, option(TrainRecipe, "precision")] = None,
    threads: Annotated[int | None, option(TrainRecipe, "threads")] = None,
    tensorboard: Annotated[bool | None, option(TrainRecipe, "tensorboard")] = None,
    fail_on_regression: Annotated[bool | None, option(TrainRecipe, "fail_on_regression")] = None,
    wait_lock: Annotated[float | None, option(TrainRecipe, "wait_lock")] = None,
    offline: Annotated[bool | None, option(TrainRecipe, "offline")] = None,
    overwrite: OverwriteOption = False,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    check: Annotated[
        bool, typer.Option("--check", help="Show what is in the data - repeats, lengths, leaks - and stop.")
    ] = False,
    search: Annotated[
        str | None,
        typer.Option(
            "--search", metavar="FILE", help="Search the best mixture of the data sets, as FILE says."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Train an encoder on pairs of texts, or a language model, resumable.

    Example: gemb train quickstart -o runs/first

    The same command again goes on where it was stopped. A recipe with an objective pretrains.
    """
    from gemb.jobs import train as job

    wanted = recipes.load_one_of(
        recipe, job.recipe_for, [*(changes or ()), *(set_ or ())], given(TrainRecipe, locals())
    )
    if isinstance(wanted, PretrainRecipe):
        if check or search is not None:
            raise GembError("--check and --search are for recipes of pairs; this one has an objective")
        _pretrain(wanted, dry_run=dry_run, overwrite=overwrite, json=json, quiet=quiet, verbose=verbose)
        return
    if search is not None:
        _search(wanted, search, dry_run=dry_run, overwrite=overwrite, json=json, quiet=quiet, verbose=verbose)
        return
    if dry_run:
        show(job.plan(wanted, overwrite=overwrite), json=json, product=True)
        return
    if check:
        show(job.check(wanted), json=json, product=True)
        return
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress, overwrite=overwrite)
    show(report, json=json, quiet=quiet)


def _pretrain(
    wanted: PretrainRecipe, *, dry_run: bool, overwrite: bool, json: bool, quiet: bool, verbose: int
) -> None:
    """Train a language model on texts."""
    from gemb.jobs import pretrain as job

    plan_or_run(job, wanted, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose, overwrite=overwrite)


def _search(
    wanted: TrainRecipe, file: str, *, dry_run: bool, overwrite: bool, json: bool, quiet: bool, verbose: int
) -> None:
    """Train once for each mixture that is tried."""
    from gemb.jobs import train_search as job

    settings = recipes.load(file, job.SearchRecipe)
    plan_or_run(
        job, wanted, settings, dry_run=dry_run, json=json, quiet=quiet, verbose=verbose, overwrite=overwrite
    )
