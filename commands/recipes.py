"""`gemb recipes`: the recipes that gemb ships."""

from pathlib import Path
from typing import Annotated

import typer

from ._groups import Group
from ._options import JsonOption, OverwriteOption, QuietOption
from ._show import show

app = typer.Typer(cls=Group, name="recipes", rich_markup_mode=None, add_completion=False)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the recipes of gemb, or copy one to change it.

    Example: gemb recipes
    """
    if context.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the recipes: name, and what each does.

    Example: gemb recipes list
    """
    from gemb.jobs import recipes as job

    show(job.list_recipes(), json=json, product=True)


@app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="A name that gemb recipes list shows.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; by default NAME.yaml here.")
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Copy a recipe of gemb into a file, to change it.

    Example: gemb recipes copy embed_wide -o mine.yaml
    """
    from gemb.jobs import recipes as job

    show(job.copy_recipe(name, output, overwrite=overwrite), json=json, quiet=quiet)
