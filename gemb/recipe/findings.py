"""What pydantic finds wrong with a recipe, in our words: the value, the rule, the next step."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
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
        owner = _model_at(model, finding["loc"][:-1])
        messages.setdefault(key, []).append(_message(cast("dict[str, Any]", finding), key, owner))
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


def _message(finding: dict[str, Any], key: Key, owner: type[Recipe] | None) -> str:
    """One finding of pydantic as the style guide wants it: the value, the rule, the next step.

    `owner` is the recipe class that holds the key.
    """
    kind, value, context = finding["type"], shown(finding["input"]), finding.get("ctx", {})
    if kind == "extra_forbidden":
        names = [key_of(name) for name in owner.model_fields] if owner else []
        word = str(key[-1])
        meant = _meant_below(word, owner, 1.0) or did_you_mean(word, names) or _meant_below(word, owner, 0.8)
        return "no such key" + (meant or did_you_mean(word, names, listing="the keys are"))
    if kind == "missing":
        field = _field(owner, str(key[-1])) if owner and key else None
        return "missing" + (f": {_first_sentence(field.description)}" if field and field.description else "")
    if kind in _TYPES:
        return f"{value} {_TYPES[kind]}"
    if kind == "union_tag_not_found":
        return f"no {_unquoted(context['discriminator'])}, which says what kind it is"
    if kind == "union_tag_invalid":
        given = f"{_unquoted(context['discriminator'])} {shown(context['tag'])}"
        return given + _no_choice(str(context["tag"]), context["expected_tags"])
    if kind == "literal_error":
        return value + _no_choice(str(finding["input"]), context["expected"].replace(" or ", ", "))
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        return f"{value} {_BOUNDS[kind].format(next(iter(context.values())))}".removesuffix(".0")
    message = str(finding["msg"]).replace("Input should be", "must be").replace("Input should", "must")
    return f"{value} {message[0].lower()}{message[1:]}"


def _no_choice(word: str, expected: str) -> str:
    """` is not one of a, b; did you mean a?` for choices as pydantic lists them."""
    choices = [_unquoted(choice) for choice in expected.split(", ")]
    return f" is not one of {', '.join(choices)}{did_you_mean(word, choices)}"


def _unquoted(word: str) -> str:
    return str(word).strip("'")


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


def _meant_below(word: str, model: type[Recipe] | None, cutoff: float) -> str:
    """`; did you mean optimizer.learning_rate?` where one key inside of a mapping is so close."""
    keys = list(_keys_below(model)) if model else []
    close = get_close_matches(word, {key.rpartition(".")[2] for key in keys}, n=1, cutoff=cutoff)
    meant = [key for key in keys if close and key.endswith(f".{close[0]}")]
    return f"; did you mean {meant[0]}?" if len(meant) == 1 else ""


def _keys_below(model: type[Recipe]) -> Iterator[str]:
    """The keys inside of the mappings of a recipe, dotted."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Recipe):
            below = field.annotation
            for key in (*map(key_of, below.model_fields), *_keys_below(below)):
                yield f"{key_of(name)}.{key}"


def _field(model: type[Recipe], key: str) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key_of(name) == key), None)


def _model_at(model: type[Recipe], location: tuple[int | str, ...]) -> type[Recipe] | None:
    """The recipe class at pydantic's `location`, which also names the branches of unions."""
    current = [model]
    for part in location:
        if isinstance(part, int):
            continue  # the items of a list have the class that the field names
        branch = [one for one in current if len(current) > 1 and part in _branch_names(one)]
        fields = [field for one in current if (field := _field(one, part))]
        current = branch or [below for field in fields[:1] for below in _models_in(field.annotation)]
    return current[0] if current else None


def _branch_names(model: type[Recipe]) -> set[object]:
    """What pydantic calls a class in a union: its name, or the value of the field that tells it."""
    fields = model.model_fields.values()
    return {model.__name__, *(value for field in fields for value in get_args(field.annotation))}
