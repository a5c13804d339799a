import json
import sqlite3
from collections import Counter
from typing import Any

import pytest

from gemb.store.field_types import infer_fields, summary_sql, value_type

DOCUMENTS: list[dict[str, Any]] = [
    {
        "year": 2020,
        "lang": "en",
        "draft": True,
        "published": "2024-05-01",
        "tags": ["a"],
        "author": {"a": "x"},
    },
    {"year": 2020.5, "lang": "2024-05-01", "draft": False, "published": "2024-05-02T10:00:00Z", "tags": []},
    {"year": None, "lang": "", "published": None, "any": 1, "nothing": None, "content-type": "text"},
    {"any": "one", "id": "7", "été": "2024-02-30", "deep": {"deep": {"deep": 1}}},
    {},
]

FIELDS = {
    "year": "number",
    "lang": "text",
    "draft": "boolean",
    "published": "date",
    "tags": "list",
    "author": "object",
    "any": "mixed",
    "nothing": "mixed",
    "`content-type`": "text",
    "`id`": "text",
    "été": "text",
    "deep": "object",
}


def test_the_fields_of_documents_are_inferred_from_what_they_hold() -> None:
    counts = Counter((key, value_type(value)) for document in DOCUMENTS for key, value in document.items())
    assert infer_fields((key, type_, count) for (key, type_), count in counts.items()) == FIELDS


def test_sqlite_summarises_to_the_same_fields() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE documents (key INTEGER PRIMARY KEY, id TEXT, type TEXT, metadata TEXT)")
    rows = [("x", "y", json.dumps(document)) for document in DOCUMENTS]
    connection.executemany(
        "INSERT INTO documents (id, type, metadata) VALUES (?, ?, ?)", [*rows, ("x", "y", None)]
    )
    counts = connection.execute(summary_sql()).fetchall()
    connection.close()
    assert infer_fields(counts) == FIELDS
    assert ("year", "integer", 1) in counts
    assert ("published", "date", 2) in counts


def test_counts_of_0_say_nothing() -> None:
    counts = [("a", "text", 0), ("a", "integer", 2), ("b", "text", 0), ("c", "true", -1), ("c", "null", 1)]
    assert infer_fields(counts) == {"a": "number", "c": "mixed"}


def test_no_rows_are_no_fields() -> None:
    assert infer_fields([]) == {}


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (1, "integer"),
        (1.0, "real"),
        (float("nan"), "null"),
        ("2020", "text"),
        ("2024-05-01", "date"),
        ([1], "array"),
        ({"a": 1}, "object"),
    ],
)
def test_a_value_has_the_type_that_sqlite_gives_it(value: object, type_: str) -> None:
    assert value_type(value) == type_


def test_what_is_not_json_has_no_type() -> None:
    with pytest.raises(TypeError, match=r"^b'x' is not a JSON value$"):
        value_type(b"x")


@pytest.mark.parametrize("name", ["documents; DROP TABLE x", "", "a b"])
def test_a_table_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a name in SQL"):
        summary_sql(name)
    with pytest.raises(ValueError, match="is not a name in SQL"):
        summary_sql(column=name)
