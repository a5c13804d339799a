"""The command line: one thin module a subcommand, loaded when it is called.

`main` is the one door, for the console script and for `python -m gemb`: it alone turns errors into
messages and exit codes. `gemb --help` reads the table below and loads no command.
"""

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from gemb.errors import GembError

from ._door import run_door
from ._groups import Group

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "embed": "Embed texts: files in, vectors out, resumable.",
        "index": "Build a searchable index of documents.",
        "search": "Search an index with a question.",
        "train": "Train an encoder on pairs of texts, or a language model, resumable.",
        "distill": "Distil a model into a smaller one, resumable.",
        "adapt": "Turn a decoder into an encoder, or into an encoder-decoder, proved.",
        "merge": "Merge models of one shape: soups, SLERP, TIES, DARE and more.",
        "quantize": "Quantise a model, or export it as GGUF or ONNX, and measure the loss.",
        "mine": "Mine hard negatives for pairs of queries and positives, resumable.",
        "eval": "Evaluate a model on your data: retrieval, similarity, labels and more.",
        "info": "Show what a model or an index is, and what would run.",
        "demo": "Embed and search the docstrings of the Python standard library.",
        "recipes": "List the recipes of gemb, or copy one to change it.",
    }
)
"""Name and first sentence of every subcommand, in the order of the help; a test compares the sentences."""


class LazyCommands(Group):
    """The subcommands by name; the module of one is imported when it is called, not when it is listed."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Name and first sentence of a subcommand, which is all that a listing needs."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]  # noqa: ANN401
        """The subcommand that `args` begin with, loaded."""
        name, *rest = args
        if name not in COMMANDS:
            if ctx.resilient_parsing:  # shell completion of a word that is no command
                return None, None, rest
            close = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
            raise GembError(f"no such command: {name}; {hint}")
        return name, load_command(name), rest


def load_command(name: str) -> Any:  # noqa: ANN401  # typer has no public name for what it makes
    """The command or group `name`, from the module of that name beside this one."""
    module = import_module(f".{name}", __name__)
    if isinstance(group := getattr(module, "app", None), typer.Typer):
        command = typer.main.get_command(group)
    else:
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name)(getattr(module, name))
        command = typer.main.get_command(alone)
    command.name = name
    return command


app = typer.Typer(
    cls=LazyCommands,
    name="gemb",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # main shows errors
    rich_markup_mode=None,  # half of the start of `gemb --help` would be rich; plain help also suits a pipe
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import gemb

        sys.stdout.write(f"gemb {gemb.__version__}\n")
        raise typer.Exit


@app.callback()
def gemb(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Embed, index and search text with small encoders.

    Example: gemb embed docs.jsonl -o docs.npy

    Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 bug or machine failure, 2 mistake of the user,
    3 rows rejected, 4 stopped by a limit, 5 mismatch, 6 locked, 7 not available, 8 gate failed, 130 and 143
    interrupted with the state saved, 141 closed pipe.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run `gemb` with `arguments` (by default the process's) and exit with the code for a scheduler."""
    sys.exit(run_door(cast("Any", app), sys.argv[1:] if arguments is None else arguments))
