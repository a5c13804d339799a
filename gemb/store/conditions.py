"""Conditions over one document: as SQL for SQLite, and in plain Python.

What each says is told in `gemb.store.where`, which reads them. Both forms give SQL's three truth values.
"""

import json
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from gemb.store.dates import moment_sql, stored_moment


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns in the SQL of the caller."""

    metadata: str
    id: str
    title: str


@dataclass(frozen=True, slots=True)
class Row:
    """One document."""

    metadata: Mapping[str, object]
    id: str | None
    title: str | None


Sql = tuple[str, list[object]]


class Condition(ABC):
    """A filter that has been read and found in order; what it says is told in `gemb.store.where`."""

    __slots__ = ()

    def sql(
        self, column: str = "metadata", *, id_column: str = "id", title_column: str = "title"
    ) -> tuple[str, list[object]]:
        """An SQL expression for SQLite, and the values of its `?` in order.

        It is true, false or NULL, and stands as it is on either side of AND. `column` holds JSON objects
        or NULL; the two others hold text. Nothing of the user's is in the SQL: names, texts and numbers
        are parameters.

        Raises ValueError if a column is not a name such as `metadata` or `documents.metadata`.
        """
        for name in (column, id_column, title_column):
            check_sql_name(name)
        return self._sql(Columns(column, id_column, title_column))

    def matches(
        self, metadata: Mapping[str, object], *, id: str | None = None, title: str | None = None
    ) -> bool:
        """True if the condition is true of a document. `metadata` is an object as `json.loads` gives it."""
        return self._truth(Row(metadata, id, title)) is True

    @abstractmethod
    def _sql(self, columns: Columns) -> Sql:
        """The same as `sql`."""

    @abstractmethod
    def _truth(self, row: Row) -> bool | None:
        """True, false, or None for unknown."""


def check_sql_name(name: str) -> None:
    """Raise ValueError if `name` is not one that can stand in SQL as it is: `metadata`, `documents.id`."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", name, re.ASCII):
        raise ValueError(f"{name!r} is not a name in SQL such as metadata or documents.metadata")


class Kind(StrEnum):
    """The types of values that can be compared."""

    TEXT = "text"
    NUMBER = "number"
    BOOLEAN = "boolean"
    DATE = "date"


@dataclass(frozen=True, slots=True)
class Value:
    """A value to compare with."""

    kind: Kind
    value: str | int | float | bool
    """A date is in UTC, cut to the length in which it was written: 10 characters are a day."""

    @property
    def length(self) -> int:
        """The characters to which a date is compared; 0 for other kinds."""
        return len(self.value) if self.kind is Kind.DATE and isinstance(self.value, str) else 0


# What becomes of the value of a field in SQL: itself where it is of the kind asked for, else NULL.
_TYPED = {
    Kind.TEXT: "CASE {type} WHEN 'text' THEN {value} END",
    Kind.NUMBER: "CASE WHEN {type} IN ('integer', 'real') THEN {value} END",
    Kind.BOOLEAN: "CASE {type} WHEN 'true' THEN 1 WHEN 'false' THEN 0 END",
}


@dataclass(frozen=True, slots=True)
class Field:
    """A column of the document, or a place in its metadata."""

    path: tuple[str, ...]
    is_column: bool = False

    def read(self, row: Row) -> object:
        """The value as it stands; None where it is missing."""
        if self.is_column:
            return row.id if self.path == ("id",) else row.title
        value: object = row.metadata
        for name in self.path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return None if isinstance(value, float) and math.isnan(value) else value  # JSON has no NaN

    def read_as(self, kind: Kind, length: int, row: Row) -> str | int | float | bool | None:
        """The value if it is of that kind, a date in UTC and cut to `length`; else None."""
        value = self.read(row)
        if isinstance(value, bool):
            return value if kind is Kind.BOOLEAN else None
        if isinstance(value, int | float):
            return as_sqlite(value) if kind is Kind.NUMBER else None
        if not isinstance(value, str) or kind not in (Kind.TEXT, Kind.DATE):
            return None
        if kind is Kind.TEXT:
            return value
        moment = stored_moment(value)
        return moment[:length] if moment else None

    def sql(self, columns: Columns) -> Sql:
        """The value as it stands, or NULL."""
        return self._select("{value}", columns)

    def sql_as(self, kind: Kind, length: int, columns: Columns) -> Sql:
        """The SQL of `read_as`."""
        if kind is not Kind.DATE:
            return self._select(_TYPED[kind], columns)
        text, parameters = self._select(_TYPED[Kind.TEXT], columns)
        return moment_sql(text, length), parameters

    def _select(self, template: str, columns: Columns) -> Sql:
        """`template` with the SQL for the field's {type} and {value}."""
        if self.is_column:
            column = columns.id if self.path == ("id",) else columns.title
            # The type is known; a bare column lets SQLite use its index.
            return column, []
        if all(_is_plain(name) for name in self.path):
            path = "$" + "".join(f'."{name}"' for name in self.path)
            type_, value = f"json_type({columns.metadata}, ?)", f"json_extract({columns.metadata}, ?)"
            return template.format(type=type_, value=value), [path] * template.count("{")
        # A JSON path cannot hold every name, and which it can depends on SQLite's version: a quote ends a
        # name, and "é" is not found where it is stored as "\u00e9". Looking at all keys finds any.
        tables, parents = [], columns.metadata
        for level in range(len(self.path)):
            tables.append(f"json_each({parents}) AS level{level}")
            # Only objects: a text that looks like JSON must not be gone into.
            parents = f"CASE level{level}.type WHEN 'object' THEN level{level}.value END"
        last = f"level{len(self.path) - 1}"
        keys = " AND ".join(f"level{level}.key = ?" for level in range(len(self.path)))
        selected = template.format(type=f"{last}.type", value=f"{last}.value")
        return f"(SELECT {selected} FROM {', '.join(tables)} WHERE {keys})", list(self.path)


def _is_plain(name: str) -> bool:
    """True for a name that every version of SQLite finds by a JSON path."""
    return name != "" and name.isascii() and name.isprintable() and '"' not in name and "\\" not in name


def as_sqlite(number: int | float) -> int | float:
    """The number that SQLite makes of one in JSON: integers of more than 64 bits become floats."""
    if isinstance(number, float) or -(2**63) <= number < 2**63:
        return number
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number)


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Compare(Condition):
    """`field >= value`."""

    field: Field
    sign: str
    value: Value

    def _sql(self, columns: Columns) -> Sql:
        field, parameters = self.field.sql_as(self.value.kind, self.value.length, columns)
        return f"{field} {self.sign} ?", [*parameters, self.value.value]

    def _truth(self, row: Row) -> bool | None:
        found = self.field.read_as(self.value.kind, self.value.length, row)
        return None if found is None else OPERATORS[self.sign](found, self.value.value)


@dataclass(frozen=True, slots=True)
class In(Condition):
    """`field in (value, ...)`; all values are of one kind and length, and there is at least one."""

    field: Field
    values: tuple[Value, ...]

    def _sql(self, columns: Columns) -> Sql:
        field, parameters = self.field.sql_as(self.values[0].kind, self.values[0].length, columns)
        # One parameter however long the list is; SQLite makes an index of it once.
        values = json.dumps([value.value for value in self.values])
        return f"{field} IN (SELECT value FROM json_each(?))", [*parameters, values]

    def _truth(self, row: Row) -> bool | None:
        found = self.field.read_as(self.values[0].kind, self.values[0].length, row)
        return None if found is None else any(found == value.value for value in self.values)


class Wild(Enum):
    """The two wildcards of a pattern; the values are those of GLOB."""

    ANY = "*"
    ONE = "?"


@dataclass(frozen=True, slots=True)
class Like(Condition):
    """`field like pattern`; a pattern is characters and wildcards."""

    field: Field
    pattern: tuple[str | Wild, ...]

    def _sql(self, columns: Columns) -> Sql:
        field, parameters = self.field.sql_as(Kind.TEXT, 0, columns)
        # SQLite's LIKE takes a for A but not ä for Ä, unless a pragma says otherwise; GLOB is always exact.
        glob = "".join(
            part.value if isinstance(part, Wild) else f"[{part}]" if part in "*?[" else part
            for part in self.pattern
        )
        return f"{field} GLOB ?", [*parameters, glob]

    def _truth(self, row: Row) -> bool | None:
        found = self.field.read_as(Kind.TEXT, 0, row)
        return None if not isinstance(found, str) else self._regex().fullmatch(found) is not None

    def _regex(self) -> re.Pattern[str]:
        pieces = [""]
        for part in self.pattern:
            if part is Wild.ANY:
                pieces.append("")
            else:
                pieces[-1] += "." if isinstance(part, Wild) else re.escape(part)
        first, *others = pieces
        if not others:
            return re.compile(first, re.DOTALL)
        # Atomic groups: the first place where a piece fits is as good as any, so nothing is tried twice.
        middle = "".join(f"(?>.*?{piece})" for piece in others[:-1])
        return re.compile(f"{first}{middle}.*{others[-1]}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class IsNull(Condition):
    """`field is null`."""

    field: Field

    def _sql(self, columns: Columns) -> Sql:
        field, parameters = self.field.sql(columns)
        return f"{field} IS NULL", parameters

    def _truth(self, row: Row) -> bool:
        return self.field.read(row) is None


@dataclass(frozen=True, slots=True)
class Not(Condition):
    """`not part`."""

    part: Condition

    def _sql(self, columns: Columns) -> Sql:
        part, parameters = self.part._sql(columns)
        return f"NOT {part}", parameters

    def _truth(self, row: Row) -> bool | None:
        truth = self.part._truth(row)
        return None if truth is None else not truth


@dataclass(frozen=True, slots=True)
class AllOf(Condition):
    """`part and part ...`: false if one is, else unknown if one is, else true."""

    parts: tuple[Condition, ...]

    def _sql(self, columns: Columns) -> Sql:
        return _joined(self.parts, " AND ", columns)

    def _truth(self, row: Row) -> bool | None:
        truths = {part._truth(row) for part in self.parts}
        return False if False in truths else None if None in truths else True


@dataclass(frozen=True, slots=True)
class AnyOf(Condition):
    """`part or part ...`: true if one is, else unknown if one is, else false."""

    parts: tuple[Condition, ...]

    def _sql(self, columns: Columns) -> Sql:
        return _joined(self.parts, " OR ", columns)

    def _truth(self, row: Row) -> bool | None:
        truths = {part._truth(row) for part in self.parts}
        return True if True in truths else None if None in truths else False


def _joined(parts: Sequence[Condition], between: str, columns: Columns) -> Sql:
    fragments, parameters = zip(*(part._sql(columns) for part in parts), strict=True)
    return f"({between.join(fragments)})", [parameter for some in parameters for parameter in some]
