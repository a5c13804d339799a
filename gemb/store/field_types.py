"""What the metadata fields of an index hold, and how a field is written in a filter."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from gemb.store.conditions import check_sql_name
from gemb.store.dates import is_date_sql, stored_moment

FieldType = Literal["text", "number", "boolean", "date", "list", "object", "mixed"]
"""What a metadata field holds. A field that is `mixed` may be compared with anything; a `list` or an
`object` only be asked for null."""

KEYWORDS = ("and", "or", "not", "in", "like", "escape", "is", "null", "true", "false")
"""The words of the filter language, in small letters."""

COLUMNS = ("id", "title")
"""The fields of every document, beside its metadata."""


def field_name(path: Sequence[str]) -> str:
    """A field as it is written in an expression: `author.name`, or in backticks where a name needs them."""
    first, *others = path
    reserved = first in COLUMNS or (not others and first.lower() in KEYWORDS)
    names = [_quoted(first) if reserved else _written(first), *map(_written, others)]
    return ".".join(names)


def _written(name: str) -> str:
    return name if name.isidentifier() else _quoted(name)


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def value_type(value: object) -> str:
    """The type of a JSON value, by SQLite's name for it, or `date`: the second part of `infer_fields`' rows.

    Raises TypeError for what is not JSON.
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return "integer"
        case float():
            return "null" if math.isnan(value) else "real"
        case str():
            return "text" if stored_moment(value) is None else "date"
        case list() | tuple():
            return "array"
        case Mapping():
            return "object"
    raise TypeError(f"{value!r} is not a JSON value")


def summary_sql(table: str = "documents", column: str = "metadata") -> str:
    """The query whose rows are what `infer_fields` takes; it reads the metadata of all documents.

    Raises ValueError if an argument is not a name.
    """
    check_sql_name(table)
    check_sql_name(column)
    is_date = f"field.type = 'text' AND {is_date_sql('field.value')}"
    return (
        f"SELECT field.key, CASE WHEN {is_date} THEN 'date' ELSE field.type END, count(*)"
        f" FROM {table}, json_each({table}.{column}) AS field GROUP BY 1, 2"
    )


_TYPES: dict[str, FieldType] = {
    "true": "boolean",
    "false": "boolean",
    "integer": "number",
    "real": "number",
    "text": "text",
    "date": "date",
    "array": "list",
    "object": "object",
}


def infer_fields(counts: Iterable[tuple[str, str, int]]) -> dict[str, FieldType]:
    """The types of fields for `parse`, from rows of key, type by `value_type` or SQLite, and count.

    A key is one of the metadata object itself, as it stands in the JSON. Nulls say nothing about a
    type; texts among which some are dates are texts; any other mixture, and a field of nulls alone, is
    `mixed`. Rows with a count of 0 or less are left out, so that counts can be kept up as documents go.
    """
    found: dict[str, set[FieldType]] = {}
    for key, type_, count in counts:
        if count > 0:
            types = found.setdefault(field_name((key,)), set())
            if type_ != "null":
                types.add(_TYPES[type_])
    return {name: _united(types) for name, types in found.items()}


def _united(types: set[FieldType]) -> FieldType:
    if types == {"text", "date"}:
        return "text"
    return next(iter(types)) if len(types) == 1 else "mixed"
