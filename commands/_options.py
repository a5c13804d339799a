"""The options that several commands share, and `option`, which makes one from a recipe's field.

The explanation of an option is the docstring of its recipe field; only what is no part of a recipe
(how to show the result, which recipe to read) is explained here.
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from gemb.recipe import Recipe, key_of

LETTERS = {"output": "-o", "model": "-m", "quiet": "-q", "verbose": "-v"}
"""The one-letter forms, the same in every command."""


def option(recipe: type[Recipe], field: str, *, metavar: str | None = None) -> Any:  # noqa: ANN401  # as typer
    """The command-line option of a recipe's field: name, letter, help and shown default come from the field.

    `as_` gives --as, a bool gives --normalise and --no-normalise. The parameter's own default is None, "not
    given", so that the recipe file can speak: `dims: Annotated[int | None, option(Embed, "dims")] = None`.
    """
    info = recipe.model_fields[field]
    name = "--" + key_of(field).replace("_", "-")
    is_switch = _is_switch(info.annotation)
    names = [f"{name}/--no-{name[2:]}"] if is_switch else [name]
    if field in LETTERS:
        names.append(LETTERS[field])
    default: str | bool = False
    if not is_switch and not info.is_required() and info.default not in (None, (), ""):
        default = str(info.default)
    elif is_switch and info.default:
        default = name[2:]
    return typer.Option(
        *names, help=" ".join((info.description or "").split()), show_default=default, metavar=metavar
    )


def _is_switch(annotation: object) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_switch(part) for part in get_args(annotation))
    return annotation is bool


RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="A recipe file, or the name of one that gemb recipes list shows."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; may be repeated."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="The file or folder to write; - is stdout.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing when all goes well.")]
VerboseOption = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, help="Say more; with --json, progress as JSON on stderr."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
