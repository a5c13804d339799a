"""What a stream can show: colours, moving bars, how many columns."""

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def _set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def is_interactive(stream: TextIO) -> bool:
    """Whether a person watches `stream`: a terminal that can move its cursor, and no CI job."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not _set("CI")


def has_colour(stream: TextIO) -> bool:
    """Whether to colour `stream`: NO_COLOR wins, then FORCE_COLOR and CLICOLOR_FORCE, then the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return _set("FORCE_COLOR") or _set("CLICOLOR_FORCE") or is_interactive(stream)


def console(stream: TextIO) -> "Console":
    """A rich console on `stream` that follows the rules of this module, not rich's own."""
    from rich.console import Console

    return Console(
        file=stream,
        force_terminal=is_interactive(stream) or has_colour(stream),
        force_interactive=is_interactive(stream),
        no_color=not has_colour(stream),
        highlight=False,
    )
