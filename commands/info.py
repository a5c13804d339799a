"""`gemb info`: what a model, an output or an index is."""

from typing import Annotated

import typer

from gemb.recipe import ComputeRecipe

from ._options import JsonOption, option
from ._show import show


def info(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model folder, a hub name, minilm, an output of gemb embed, or an index.",
        ),
    ] = None,
    device: Annotated[str, option(ComputeRecipe, "device")] = "auto",
    precision: Annotated[str, option(ComputeRecipe, "precision")] = "auto",
    threads: Annotated[int | None, option(ComputeRecipe, "threads")] = None,
    offline: Annotated[bool, option(ComputeRecipe, "offline")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a model or an index is, and what would run.

    Example: gemb info minilm
    """
    from gemb.jobs import info as job
    from gemb.report import progress

    with progress() as on_progress:
        report = job.run(
            what, on_progress, device=device, precision=precision, threads=threads, offline=offline
        )
    show(report, json=json, product=True)
