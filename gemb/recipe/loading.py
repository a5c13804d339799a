"""`load`: file or name, overrides and options to one validated recipe."""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from pydantic import ValidationError

from gemb.errors import GembError
from gemb.recipe import document
from gemb.recipe.findings import problems_in
from gemb.recipe.paths import relative_to
from gemb.recipe.problems import COMMAND_LINE, Key, Place, Problem, did_you_mean, error, nearest, shown
from gemb.recipe.schema import Recipe, key_of
from gemb.recipe.shipped import shipped_recipes

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from, for the report."""

    source: str | None
    """The file or the shipped name; None when all came from defaults and the command line."""
    overridden: tuple[str, ...]
    """The keys that the command line gave, in its order."""
    places: Mapping[Key, Place] = field(default_factory=dict, repr=False, compare=False)
    """Where each key was written."""


def load(
    source: str | Path | None,
    model: type[R],
    overrides: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
) -> R:
    """The recipe in `source`, changed by the command line: overrides first, then options.

    `source` is a file, the name of a shipped recipe, `-` for stdin, or None for the defaults. `overrides` are
    `key=value` words with dotted keys and YAML values (`data.0.weight=0.3`). `options` are fields by name, as
    the command's options gave them; None means not given.

    Raises GembError with every problem, each with its line and, for an unknown key, the one that was meant.
    """
    return load_one_of(source, lambda keys: model, overrides, options)


def load_one_of(
    source: str | Path | None,
    choose: Callable[[Collection[str]], type[R]],
    overrides: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
) -> R:
    """As `load`, of the class that `choose` gives for the keys of the file and the overrides."""
    name, text, folder = _read(source)
    parsed = document.parse(text)
    if not parsed.is_readable:
        raise error(name, parsed.problems)
    values, places = parsed.values, dict(parsed.places)
    model = choose({*values, *(override.partition("=")[0].partition(".")[0] for override in overrides)})
    problems = [*parsed.problems, *_check_kind(values, places, model)]
    overridden: list[str] = []
    for override in overrides:
        problems += _apply_override(override, values, places, overridden)
    for option, value in (options or {}).items():
        if value is not None:
            key = key_of(option)
            _set(values, (key,), value, places, Place(option="--" + key.replace("_", "-")))
            overridden.append(key)
    given = [key for key in model.alternatives if key in overridden and values[key] is not None]
    for key in model.alternatives if given else ():
        if key not in overridden:
            values.pop(key, None)
    recipe, found = _validate(model, values, places)
    told = {problem.key for problem in problems}
    problems += [problem for problem in found if problem.key not in told]
    if problems or recipe is None:
        raise error(name, problems)
    if folder is not None:
        recipe = relative_to(recipe, folder, places, ())
    recipe._origin = Origin(None if source is None else name, tuple(overridden), places)
    return recipe


def origin(recipe: Recipe) -> Origin:
    """Where `recipe` came from; one that was made in Python has no source."""
    return cast("Origin | None", recipe._origin) or Origin(None, ())


def refused(recipe: Recipe, key: Key, message: str) -> GembError:
    """The error for a value that only the run finds wrong, such as one that does not fit the model.

    It tells file, line and key as the errors of `load` do.
    """
    known = origin(recipe)
    problem = Problem(message, key, nearest(known.places, key))
    return error(known.source or COMMAND_LINE, [problem])


def _read(source: str | Path | None) -> tuple[str, str, Path | None]:
    """Name, text, and the folder that relative paths start from (None: the working folder)."""
    if source is None:
        return COMMAND_LINE, "", None
    if str(source) == "-":
        return "stdin", _decoded(sys.stdin.buffer.read(), "stdin"), None
    path = Path(source)
    if not path.is_file():
        ours = {recipe.name: recipe for recipe in shipped_recipes()}
        if str(source) in ours:
            return str(source), ours[str(source)].text, None
        if path.is_dir():
            raise GembError(f"{source} is a folder, not a recipe file")
        hint = did_you_mean(str(source), list(ours)) or "; gemb recipes list shows the recipes of gemb"
        raise GembError(f"no recipe {source}: neither a file nor a recipe of gemb{hint}")
    try:
        return str(path), _decoded(path.read_bytes(), str(path)), path.parent
    except OSError as problem:
        raise GembError(f"{path}: cannot be read: {(problem.strerror or '').lower()}") from problem


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise GembError(f"{name}:{line}: not UTF-8 (byte 0x{content[problem.start]:02x})") from problem


def _check_kind(
    values: dict[str, object], places: Mapping[Key, Place], model: type[Recipe]
) -> Iterator[Problem]:
    """Take `kind:` out of the values; a problem when the file is for another command."""
    if "kind" not in values or "kind" in model.model_fields:
        return
    kind = values.pop("kind")
    if kind != model.kind:
        yield Problem(
            f"this is a recipe for gemb {kind}, not for gemb {model.kind}", ("kind",), places.get(("kind",))
        )


def _apply_override(
    override: str, values: dict[str, object], places: dict[Key, Place], overridden: list[str]
) -> list[Problem]:
    """Change `values` by one `key=value` word."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        return [Problem(f"{override!r} is not key=value")]
    place = Place(option=dotted)
    key: Key = tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))
    value, messages = document.parse_value(text)
    problems = [Problem(message, key, place) for message in messages]
    if not problems:
        problems += _set(values, key, value, places, place)
        overridden.append(dotted)
    return problems


def _set(
    values: dict[str, object], key: Key, value: object, places: dict[Key, Place], place: Place
) -> list[Problem]:
    """Put `value` at `key`, making the mappings on the way; lists are only ever indexed."""
    holder: object = values
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(holder, list):
            if not isinstance(part, int) or part >= len(holder):
                listing = ".".join(str(step) for step in key[:depth])
                return [
                    Problem(f"{listing} has {len(holder)} items, counted from 0; {part} is none", key, place)
                ]
            if last:
                holder[part] = value
            holder = holder[part]
        elif isinstance(holder, dict):
            name = str(part)
            if last:
                holder[name] = value
            elif holder.get(name) is None and isinstance(key[depth + 1], int):
                listing = ".".join(str(step) for step in key[: depth + 1])
                return [Problem(f"the recipe has no {listing}, so there is no item to change", key, place)]
            elif holder.get(name) is None:
                holder[name] = {}
            holder = holder[name]
        else:
            taken = ".".join(str(step) for step in key[:depth])
            return [Problem(f"{taken} is {shown(holder)} and has no keys", key, place)]
    for known in [known for known in places if known[: len(key)] == key]:
        del places[known]
    places[key] = place
    return []


def _validate(
    model: type[R], values: dict[str, object], places: Mapping[Key, Place]
) -> tuple[R | None, list[Problem]]:
    """The recipe, or what is wrong with `values`."""
    # Through JSON, since only there are strict types strict and a list may still fill a tuple.
    if problems := [
        Problem(f"{shown(text)} is not UTF-8 text", key, nearest(places, key))
        for key, text in _texts(values, ())
        if not _is_utf8(text)
    ]:
        return None, problems
    try:
        return model.model_validate_json(json.dumps(values, default=str)), []
    except ValidationError as problem:
        return None, problems_in(problem, model, values, places)


def _texts(value: object, key: Key) -> Iterator[tuple[Key, str]]:
    """Every text in `value`, with the way to it."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, (*key, name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, (*key, index))
    elif isinstance(value, str | Path):
        yield key, str(value)


def _is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8; a word of the command line may hold any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
