"""What pydantic finds wrong with a recipe, in our words: the value, the rule, the next step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gemb.recipe.problems import Key, Place, Problem, did_you_mean, nearest, shown
from gemb.recipe.schema import Recipe, key_of


def problems_in(
    invalid: ValidationError, model: type[Recipe], values: dict[str, object], places: Mapping[Key, Place]
) -> list[Problem]:
    """The findings of pydantic in our words; the branches of a union become one problem."""
    messages: dict[Key, list[str]] = {}
    for finding in invalid.errors(include_url=False):
        key = _key_in(values, finding["loc"], missing=finding["type"] == "missing")
        messages.setdefault(key, []).append(_message(cast("dict[str, Any]", finding), key, model))
    return [Problem(_joined(found), key, nearest(places, key)) for key, found in messages.items()]


def _joined(messages: Sequence[str]) -> str:
    """`'b' is not a number and not one of auto`: what each branch of a union found, the value named once."""
    first, *more = dict.fromkeys(messages)
    value, negation, _ = first.partition(" is not ")
    return " and ".join([first, *(message.removeprefix(value + negation[:3]).strip() for message in more)])


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

_BOUNDS = {
    "greater_than_equal": "is too small; at least {}",
    "greater_than": "is too small; more than {}",
    "less_than_equal": "is too large; at most {}",
    "less_than": "is too large; less than {}",
}


def _message(finding: dict[str, Any], key: Key, model: type[Recipe]) -> str:
    """One finding of pydantic as the style guide wants it: the value, the rule, the next step."""
    kind, value, context = finding["type"], shown(finding["input"]), finding.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(model, key[:-1])
        names = [key_of(name) for name in owner.model_fields] if owner else []
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
    if kind in _BOUNDS:
        return f"{value} {_BOUNDS[kind].format(next(iter(context.values())))}".removesuffix(".0")
    message = str(finding["msg"]).replace("Input should be", "must be").replace("Input should", "must")
    return f"{value} {message[0].lower()}{message[1:]}"


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
    return _field(owner, str(key[-1])) if owner and key else None


def _field(model: type[Recipe], key: str) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key_of(name) == key), None)


def _model_at(model: type[Recipe], key: Key) -> type[Recipe] | None:
    """The recipe class that holds the keys below `key`."""
    current: type[Recipe] | None = model
    for part in key:
        if isinstance(part, int) or current is None:
            continue  # the items of a list have the class that the field names
        field = _field(current, part)
        current = next(_models_in(field.annotation), None) if field else None
    return current
