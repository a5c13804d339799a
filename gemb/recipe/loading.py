"""`load`: file or name, overrides and options to one validated recipe."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gemb.errors import GembError
from gemb.recipe import document, shipped
from gemb.recipe.problems import Key, Place, Problem, did_you_mean, error
from gemb.recipe.schema import PathRule, Recipe

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from, for the report."""

    source: str | None
    """The file or the shipped name; None when all came from defaults and the command line."""
    overridden: tuple[str, ...]
    """The keys that the command line gave, in its order."""


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
    name, text, folder = _read(source)
    parsed = document.parse(text, name)
    values, places = parsed.values, dict(parsed.places)
    problems = [*_check_kind(values, places, model, name)]
    overridden: list[str] = []
    for override in overrides:
        problems += _apply_override(override, values, places, overridden)
    for field, value in (options or {}).items():
        if value is not None:
            _set(values, (field,), value, places, Place(option="--" + field.rstrip("_").replace("_", "-")))
            overridden.append(field)
    recipe, found = _validate(model, values, places)
    problems += found
    if problems or recipe is None:
        raise error(name, problems)
    if folder is not None:
        recipe = _relative_to(recipe, folder, places, ())
    recipe._origin = Origin(None if source is None else name, tuple(overridden))
    return recipe


def origin(recipe: Recipe) -> Origin:
    """Where `recipe` came from; one that was made in Python has no source."""
    return cast("Origin | None", recipe._origin) or Origin(None, ())


def _read(source: str | Path | None) -> tuple[str, str, Path | None]:
    """Name, text, and the folder that relative paths start from (None: the working folder)."""
    if source is None:
        return "command line", "", None
    if str(source) == "-":
        return "stdin", _decoded(sys.stdin.buffer.read(), "stdin"), None
    path = Path(source)
    if not path.is_file():
        ours = {recipe.name: recipe for recipe in shipped.shipped()}
        if str(source) in ours:
            return str(source), ours[str(source)].text, None
        if path.is_dir():
            raise GembError(f"{source} is a folder, not a recipe file")
        hint = did_you_mean(str(source), list(ours)) or "; gemb recipes list shows the recipes of gemb"
        raise GembError(f"no recipe {source}: neither a file nor a recipe of gemb{hint}")
    try:
        return str(path), _decoded(path.read_bytes(), str(path)), path.parent
    except OSError as problem:
        raise GembError(f"{path}: cannot be read: {problem.strerror}") from problem


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise GembError(f"{name}:{line}: not UTF-8 (byte 0x{content[problem.start]:02x})") from problem


def _check_kind(
    values: dict[str, object], places: Mapping[Key, Place], model: type[Recipe], name: str
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
            elif holder.get(name) is None:
                holder[name] = {}
            holder = holder[name]
        else:
            taken = ".".join(str(step) for step in key[:depth])
            return [Problem(f"{taken} is {_shown(holder)} and has no keys", key, place)]
    for known in [known for known in places if known[: len(key)] == key]:
        del places[known]
    places[key] = place
    return []


def _validate(
    model: type[R], values: dict[str, object], places: Mapping[Key, Place]
) -> tuple[R | None, list[Problem]]:
    """The recipe, or what is wrong with `values`."""
    # Through JSON, since only there are strict types strict and a list may still fill a tuple.
    try:
        text = json.dumps(values, default=str, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as problem:
        return None, [Problem(f"{problem.object[problem.start : problem.start + 20]!r} is not UTF-8 text")]
    try:
        return model.model_validate_json(text), []
    except ValidationError as problem:
        return None, _problems(problem, model, values, places)


def _problems(
    invalid: ValidationError, model: type[Recipe], values: dict[str, object], places: Mapping[Key, Place]
) -> list[Problem]:
    """The findings of pydantic in our words; the branches of a union become one problem."""
    messages: dict[Key, list[str]] = {}
    for finding in invalid.errors(include_url=False):
        key = _key_in(values, finding["loc"], missing=finding["type"] == "missing")
        messages.setdefault(key, []).append(_message(cast("dict[str, Any]", finding), key, model))
    return [
        Problem(" and ".join(dict.fromkeys(found)), key, _nearest(places, key))
        for key, found in messages.items()
    ]


def _key_in(values: object, location: tuple[int | str, ...], *, missing: bool) -> Key:
    """The part of pydantic's location that leads into `values`; the rest names branches of a union."""
    key: list[str | int] = []
    for depth, part in enumerate(location):
        if isinstance(values, dict) and (part in values or (missing and depth == len(location) - 1)):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        key.append(part)
    return tuple(key)


def _nearest(places: Mapping[Key, Place], key: Key) -> Place | None:
    """Where `key` was written, or what holds it."""
    for length in range(len(key), 0, -1):
        if key[:length] in places:
            return places[key[:length]]
    return None


_TYPES = {
    "int_type": "is not an int",
    "int_from_float": "is not an int",
    "int_parsing": "is not an int",
    "float_type": "is not a number",
    "bool_type": "is not true or false",
    "string_type": "is not a text; quote it",
    "path_type": "is not a path",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not a mapping",
    "model_type": "is not a mapping",
    "finite_number": "is not a finite number",
}


def _message(finding: dict[str, Any], key: Key, model: type[Recipe]) -> str:
    """One finding of pydantic as the style guide wants it: the value, the rule, the next step."""
    kind, value, context = finding["type"], _shown(finding["input"]), finding.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(model, key[:-1])
        names = list(owner.model_fields) if owner else []
        return "no such key" + did_you_mean(str(key[-1]), names, listing="the keys are")
    if kind == "missing":
        field = _field_at(model, key)
        return "missing" + (f": {_first_sentence(field.description)}" if field and field.description else "")
    if kind in _TYPES:
        return f"{value} {_TYPES[kind]}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        close = did_you_mean(str(finding["input"]), choices)
        return f"{value} is not one of {', '.join(choices)}{close}"
    if kind == "value_error":
        return str(context["error"])
    message = str(finding["msg"]).replace("Input should be", "must be").replace("Input should", "must")
    return f"{value} {message[0].lower()}{message[1:]}"


def _shown(value: object) -> str:
    """A value as the user wrote it, cut at 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _first_sentence(text: str) -> str:
    """The first sentence of a field's explanation, without its full stop."""
    sentence = " ".join(text.split()).partition(". ")[0].rstrip(".")
    return sentence[0].lower() + sentence[1:]


def _models_in(annotation: object) -> Iterator[type[Recipe]]:
    """Every recipe class that `annotation` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Recipe):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _field_at(model: type[Recipe], key: Key) -> FieldInfo | None:
    owner = _model_at(model, key[:-1])
    return owner.model_fields.get(str(key[-1])) if owner and key else None


def _model_at(model: type[Recipe], key: Key) -> type[Recipe] | None:
    """The recipe class that holds the keys below `key`."""
    current: type[Recipe] | None = model
    for part in key:
        if isinstance(part, int) or current is None:
            continue  # the items of a list have the class that the field names
        field = current.model_fields.get(part)
        current = next(_models_in(field.annotation), None) if field else None
    return current


def _path_rule(annotation: object, metadata: Sequence[object] = ()) -> PathRule | None:
    """The rule for paths in a field of this type, if it holds any."""
    for part in metadata:
        if isinstance(part, PathRule):
            return part
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _path_rule(inner, more)
    if get_origin(annotation) in (tuple, list, dict, Union, UnionType):
        return next((rule for part in get_args(annotation) if (rule := _path_rule(part))), None)
    return None


def _relative_to(recipe: R, folder: Path, places: Mapping[Key, Place], key: Key) -> R:
    """`recipe` with the paths that its file gave made relative to the working folder."""
    changed: dict[str, object] = {}
    for name, field in type(recipe).model_fields.items():
        value, at = getattr(recipe, name), (*key, name)
        rule = _path_rule(field.annotation, field.metadata)
        if rule is not None:
            changed[name] = _moved(value, rule, folder, places, at)
        elif isinstance(value, Recipe):
            changed[name] = _relative_to(value, folder, places, at)
        elif isinstance(value, tuple) and any(isinstance(item, Recipe) for item in value):
            changed[name] = tuple(
                _relative_to(item, folder, places, (*at, index)) if isinstance(item, Recipe) else item
                for index, item in enumerate(value)
            )
    fields_set = recipe.model_fields_set
    copy = recipe.model_copy(update=changed)
    copy.__pydantic_fields_set__.intersection_update(fields_set)
    return copy


def _moved(value: Any, rule: PathRule, folder: Path, places: Mapping[Key, Place], key: Key) -> Any:  # noqa: ANN401
    """One value of a field that holds paths; a default, or what the command line gave, stays as it is."""
    if isinstance(value, tuple | list):
        return type(value)(
            _moved(item, rule, folder, places, (*key, index)) for index, item in enumerate(value)
        )
    if isinstance(value, dict):
        return {name: _moved(item, rule, folder, places, (*key, name)) for name, item in value.items()}
    place = _nearest(places, key)
    if place is None or place.option:
        return value
    if isinstance(value, Path):
        return Path(rule.resolve(str(value), folder))
    return rule.resolve(value, folder) if isinstance(value, str) else value
