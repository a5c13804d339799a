"""`gemb demo`: real documents embedded and searched on this machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemb.recipe import ComputeRecipe

from ._options import JsonOption, OverwriteOption, QuietOption, option
from ._show import show


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the texts and their index.")
    ] = Path("demo"),
    everything: Annotated[
        bool, typer.Option("--all", help="Take all docstrings, those of private names and of tests too.")
    ] = False,
    model: Annotated[str | None, option(ComputeRecipe, "model")] = None,
    offline: Annotated[bool, option(ComputeRecipe, "offline")] = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Embed and search the docstrings of the Python standard library.

    Example: gemb demo
    """
    from gemb.jobs import demo as job
    from gemb.report import progress

    with progress(quiet=quiet, json=json) as on_progress:
        demonstration = job.run(
            output, on_progress, everything=everything, model=model, offline=offline, overwrite=overwrite
        )
    if not json:
        demonstration.write_answers(sys.stdout)
    show(demonstration.summary, json=json, product=True)
