"""Problems of one recipe, gathered so that a user sees all of them at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gemb.errors import GembError

COMMAND_LINE = "command line"
"""The source of a recipe that is no file."""

Key = tuple[str | int, ...]
"""The way to a value: `("data", 0, "weight")`."""


@dataclass(frozen=True)
class Place:
    """Where a key was written: a line of a file, or a word of the command line."""

    line: int = 0
    """1-based; 0 for the command line."""
    column: int = 0
    option: str = ""
    """What was typed instead: `--dims`, or the key of `dims=256`."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    message: str
    key: Key = ()
    place: Place | None = None

    def __str__(self) -> str:
        """`line 3: batch_size: '8' is not an int`."""
        key = ".".join(str(part) for part in self.key)
        if self.place is not None and self.place.option:
            return f"{self.place.option}: {self.message}"
        where = f"line {self.place.line}: " if self.place is not None else ""
        return f"{where}{key}: {self.message}" if key else f"{where}{self.message}"


def error(source: str, problems: Sequence[Problem]) -> GembError:
    """The one error that tells all `problems` of `source`, in the order of its lines.

    A single option of the command line needs no heading: `--k: 0 is too small; at least 1`.
    """
    if len(problems) == 1 and source == COMMAND_LINE:
        return GembError(str(problems[0]))
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    ordered = sorted(problems, key=lambda problem: problem.place.line if problem.place else 0)
    return GembError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in ordered)]))


def did_you_mean(word: str, choices: Sequence[str], *, listing: str = "") -> str:
    """`; did you mean temperature?`, or the `choices` after `listing` where none is close."""
    close = get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {listing} {', '.join(choices)}" if listing and choices else ""


def nearest(places: Mapping[Key, Place], key: Key) -> Place | None:
    """Where `key` was written, or what holds it."""
    for length in range(len(key), 0, -1):
        if key[:length] in places:
            return places[key[:length]]
    return None


def shown(value: object) -> str:
    """A value as the user wrote it, cut at 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
