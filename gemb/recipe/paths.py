"""Paths of a recipe file, made relative to the working folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from gemb.recipe.problems import Key, Place, nearest
from gemb.recipe.schema import PathRule, Recipe, key_of

R = TypeVar("R", bound=Recipe)


def relative_to(recipe: R, folder: Path, places: Mapping[Key, Place], key: Key) -> R:
    """`recipe` with the paths that its file gave made relative to the working folder."""
    changed: dict[str, object] = {}
    for name, field in type(recipe).model_fields.items():
        value, at = getattr(recipe, name), (*key, key_of(name))
        rule = _path_rule(field.annotation, field.metadata)
        if rule is not None:
            changed[name] = _moved(value, rule, folder, places, at)
        elif isinstance(value, Recipe):
            changed[name] = relative_to(value, folder, places, at)
        elif isinstance(value, tuple) and any(isinstance(item, Recipe) for item in value):
            changed[name] = tuple(
                relative_to(item, folder, places, (*at, index)) if isinstance(item, Recipe) else item
                for index, item in enumerate(value)
            )
    fields_set = recipe.model_fields_set
    copy = recipe.model_copy(update=changed)
    copy.__pydantic_fields_set__.intersection_update(fields_set)
    return copy


def _path_rule(annotation: object, metadata: Sequence[object] = ()) -> PathRule | None:
    """The rule for paths in a field of this type, if it holds any."""
    for part in metadata:
        if isinstance(part, PathRule):
            return part
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _path_rule(inner, more)
    if get_args(annotation):
        return next((rule for part in get_args(annotation) if (rule := _path_rule(part))), None)
    return None


def _moved(value: Any, rule: PathRule, folder: Path, places: Mapping[Key, Place], key: Key) -> Any:  # noqa: ANN401
    """One value of a field that holds paths; a default, or what the command line gave, stays as it is."""
    if isinstance(value, tuple | list):
        return type(value)(
            _moved(item, rule, folder, places, (*key, index)) for index, item in enumerate(value)
        )
    if isinstance(value, dict):
        return {name: _moved(item, rule, folder, places, (*key, name)) for name, item in value.items()}
    place = nearest(places, key)
    if place is None or place.option:
        return value
    if isinstance(value, Path):
        return Path(rule.resolve(str(value), folder))
    return rule.resolve(value, folder) if isinstance(value, str) else value
