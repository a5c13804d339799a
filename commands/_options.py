"""The options that several commands share; `option` makes one from a recipe's field, `given` is the way back.

The explanation of an option is the docstring of its recipe field; only what is no part of a recipe
(how to show the result, which recipe to read) is explained here.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

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
    is_switch = bool in _types(info.annotation)
    choices = [str(choice) for choice in _choices(info.annotation)]
    names = [f"{name}/--no-{name[2:]}"] if is_switch else [name]
    if field in LETTERS:
        names.append(LETTERS[field])
    help_text = " ".join((info.description or "").replace("`", "").split())
    if not is_switch and info.default not in (None, (), "", PydanticUndefined):
        shown = f"{info.default:g}" if isinstance(info.default, float) else str(info.default)
        help_text += f"  [default: {shown}]"
    return typer.Option(
        *names,
        help=help_text,
        show_default=False,  # typer would show None, or put the field's default in parentheses
        metavar=metavar or "|".join(choices) or None,
        autocompletion=_completer(choices) if choices else None,
    )


def given(recipe: type[Recipe], parameters: Mapping[str, object]) -> dict[str, object]:
    """The keys of a recipe among the parameters of a command, for `gemb.recipe.load`; None is not given."""
    return {key: parameters[key] for key in recipe.model_fields if parameters.get(key) is not None}


def _completer(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Shell completion for a choice."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _types(annotation: object) -> list[object]:
    """The branches of a union; any other type alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _choices(annotation: object) -> list[object]:
    """The values of a Literal, wherever it stands in a union."""
    return [value for part in _types(annotation) if get_origin(part) is Literal for value in get_args(part)]


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
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        help="With --json: progress as JSON lines on stderr.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
