"""Write docs/cli.md from the program itself; `--check` compares instead and fails when they differ."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

PAGE = Path(__file__).with_name("cli.md")

HEAD = """# Commands

This page is written by `make docs` from the program; `gemb COMMAND --help` shows the same.
"""

WIDTH = 96


def page() -> str:
    """The whole page: the help of `gemb` and of every command below it."""
    commands = import_module("gemb.commands")
    root = get_command(commands.app)
    context = typer.Context(root, info_name="gemb", terminal_width=WIDTH, **root.context_settings)
    below = {name: commands.load_command(name) for name in commands.COMMANDS}
    return "\n".join([HEAD, *_sections(root, context, below)])


def _sections(command: Any, context: typer.Context, below: Mapping[str, Any]) -> Iterator[str]:  # noqa: ANN401
    """The section of `command` and those of the commands `below` it; typer has no public name for either."""
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    for name, child in below.items():
        inner = typer.Context(child, info_name=name, parent=context)
        yield from _sections(child, inner, getattr(child, "commands", {}))


def main() -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("docs/cli.md is not what the program says; run make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
