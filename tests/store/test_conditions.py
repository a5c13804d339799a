import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemb.store.conditions import Condition
from gemb.store.where import MAX_COMPARISONS, MAX_DEPTH, MAX_NAMES, MAX_PATTERN, parse

steadily = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Document:
    metadata: Mapping[str, object]
    id: str = "1"
    title: str | None = None


def found_by_sqlite(
    condition: Condition, documents: Sequence[Document], *, ascii_json: bool = False
) -> list[int]:
    """The positions of the documents that SQLite finds; the table is like the catalogue's."""
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE documents (id TEXT, title TEXT, text TEXT, metadata TEXT)")
        connection.executemany(
            "INSERT INTO documents VALUES (?, ?, 'text', ?)",
            [
                (document.id, document.title, json.dumps(document.metadata, ensure_ascii=ascii_json))
                for document in documents
            ],
        )
        fragment, parameters = condition.sql("documents.metadata")
        query = f"SELECT rowid - 1 FROM documents WHERE (rowid > 0 AND ({fragment})) ORDER BY rowid"
        rows = connection.execute(query, parameters).fetchall()
    connection.close()
    return [row for (row,) in rows]


def found_plainly(condition: Condition, documents: Sequence[Document]) -> list[int]:
    return [
        position
        for position, document in enumerate(documents)
        if condition.matches(document.metadata, id=document.id, title=document.title)
    ]


# Names of every sort; values from small pools, so that they meet, and some from anywhere.
NAMES = [
    "a",
    "b",
    "nested.a",
    "nested.b.a",
    "été",
    '`odd "name`.a',
    "`x.y`",
    "``",
    "`\\`",
    "`a``[0]`",
    "id",
    "title",
]
KEYS = ["a", "b", "nested", "été", 'odd "name', "x.y", "", "\\", "a`[0]"]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
SOME_TEXTS = [
    "",
    "a",
    "A",
    "ab",
    "ä",
    "Ä",
    "日本",
    "😀",
    "a%b",
    "a_b",
    "[a]",
    "*",
    "?",
    "a*",
    "5",
    '{"a": 1}',
    "now",
]
SOME_DATES = [
    "2024-05-01",
    "2024-05-02",
    "2024-02-30",
    "2024-05-01T12:30",
    "2024-05-01T12:30:59",
    "2024-05-01 12:30:59.250Z",
    "2024-05-02T00:30:00+02:00",
    "2024-05-01T22:30:00-03:00",
    "2024-05-01T24:00",
    "2024-05-01T12:30:00+0200",
    "2024-05-01Txx",
    "9999-12-31T23:59-01:00",
    "12:30",
]
SOME_NUMBERS = [
    -3,
    0,
    1,
    2,
    0.0,
    -0.0,
    0.5,
    1.0,
    1e-7,
    2**53,
    2**53 + 1,
    float(2**53),
    2**63 - 1,
    2**63,
    10**30,
]
SOME_WRITTEN_DATES = [
    "2024-05-01",
    "2024-05-02",
    "2024-05-01T12:30",
    "2024-05-01T12:30:59Z",
    "2024-05-02T00:30:00+02:00",
]
SOME_PATTERNS = [
    "",
    "%",
    "_",
    "a",
    "a%",
    "%a",
    "_%",
    "a_",
    "[a]",
    "[%",
    "*",
    "?",
    "a*",
    "%b",
    "a%b",
    "A%",
    "ä",
    "__",
]

TEXTS = st.sampled_from(SOME_TEXTS) | st.text(CHARACTERS, max_size=6)
DATES = st.sampled_from(SOME_DATES)
NUMBERS = st.sampled_from(SOME_NUMBERS) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(TEXTS, DATES, NUMBERS, st.booleans(), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)
# Fields that most documents have, with values of all kinds, beside fields that only some have.
METADATA = st.builds(
    lambda common, others: {**common, **others},
    st.fixed_dictionaries({"a": SCALARS, "b": SCALARS, "nested": st.fixed_dictionaries({"a": SCALARS})}),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
DOCUMENTS = st.lists(st.builds(Document, METADATA, TEXTS, st.none() | TEXTS), min_size=3, max_size=8)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


LITERALS = {
    "text": TEXTS.map(quoted),
    "number": NUMBERS.map(repr),
    "boolean": st.sampled_from(["true", "FALSE"]),
    "date": st.sampled_from(SOME_WRITTEN_DATES),
}


@st.composite
def single_tests(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(["a", "b", "nested.a"]) | st.sampled_from(NAMES))
    kinds = ["text"] if name in ("id", "title") else list(LITERALS)
    literals = LITERALS[kind := draw(st.sampled_from(kinds))]
    signs = ["=", "!=", "<>"] if kind == "boolean" else ["=", "!=", "<>", "<", "<=", ">", ">="]
    listed = st.lists(literals, min_size=1, max_size=3).map(", ".join)
    patterns = st.sampled_from(SOME_PATTERNS).map(quoted)
    no = draw(st.sampled_from(["", "not "]))
    written = [
        f"{name} {draw(st.sampled_from(signs))} {draw(literals)}",
        f"{name} {no}in ({draw(listed)})",
        f"{name} {no}like {draw(patterns)}",
        f"{name} is {no}null",
    ]
    return draw(st.sampled_from(written if name in ("id", "title") else [*written, name]))


EXPRESSIONS = st.recursive(
    single_tests(),
    lambda inner: st.one_of(
        inner.map(lambda part: f"not {part}"),
        inner.map(lambda part: f"({part})"),
        st.lists(inner, min_size=2, max_size=3).map(" and ".join),
        st.lists(inner, min_size=2, max_size=3).map(" OR ".join),
    ),
    max_leaves=4,
).filter(lambda expression: expression.count("(") + expression.count("not") < MAX_DEPTH)


def every_test_of(name: str) -> list[str]:
    signs = ["=", "!=", "<", "<=", ">", ">="]
    literals = {
        "text": [quoted(text) for text in SOME_TEXTS + SOME_DATES],
        "number": [repr(number) for number in SOME_NUMBERS],
        "date": SOME_WRITTEN_DATES,
    }
    return [
        *(f"{name} {sign} {literal}" for sign in signs for some in literals.values() for literal in some),
        *(f"{name} in ({some[0]}, {literal})" for some in literals.values() for literal in some),
        *(f"{name} like {quoted(pattern)}" for pattern in SOME_PATTERNS),
        *(f"{name} {test}" for test in ["", "= true", "= false", "!= true", "in (false)", "is null"]),
    ]


@pytest.mark.parametrize("key", ["a", "é"])
def test_sqlite_agrees_on_every_test_of_every_value(key: str) -> None:
    values = [*SOME_TEXTS, *SOME_DATES, *SOME_NUMBERS, True, False, None, [], ["a"], [1], {}, {"a": "a"}]
    documents = [Document({key: value}) for value in values] + [Document({})]
    wrong = []
    for test in every_test_of(key):
        for expression in (test, f"not {test}"):
            condition = parse(expression)
            expected = found_plainly(condition, documents)
            if found_by_sqlite(condition, documents) != expected:
                wrong.append(expression)
    assert wrong == []


@steadily
@given(EXPRESSIONS, DOCUMENTS, st.booleans())
def test_sqlite_finds_what_the_condition_matches(
    expression: str, documents: list[Document], ascii_json: bool
) -> None:
    for written in (expression, f"not ({expression})"):
        condition = parse(written)
        expected = found_plainly(condition, documents)
        assert found_by_sqlite(condition, documents, ascii_json=ascii_json) == expected


@steadily
@given(EXPRESSIONS, EXPRESSIONS, DOCUMENTS)
def test_de_morgan_holds_with_unknown_values(left: str, right: str, documents: list[Document]) -> None:
    one = parse(f"not (({left}) and ({right}))")
    other = parse(f"not ({left}) or not ({right})")
    assert found_by_sqlite(one, documents) == found_by_sqlite(other, documents)


@steadily
@given(st.text(CHARACTERS), st.text(CHARACTERS))
def test_a_text_equals_itself_and_nothing_else(text: str, other: str) -> None:
    condition = parse(f"a = {quoted(text)}")
    documents = [Document({"a": text}), Document({"a": other})]
    assert found_by_sqlite(condition, documents) == ([0, 1] if text == other else [0])


@steadily
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_equals_itself_to_the_last_digit(number: float) -> None:
    assert found_by_sqlite(parse(f"a = {number!r}"), [Document({"a": number})]) == [0]
    assert found_by_sqlite(parse(f"a in ({number!r})"), [Document({"a": number})]) == [0]


@steadily
@given(st.lists(st.text(CHARACTERS), min_size=1, max_size=4))
def test_a_field_of_any_name_is_found(path: list[str]) -> None:
    written = ".".join("`" + name.replace("`", "``") + "`" for name in path)
    metadata: object = "here"
    for name in reversed(path):
        metadata = {name: metadata}
    assert isinstance(metadata, dict)
    for ascii_json in (False, True):
        documents = [Document(metadata), Document({"other": 1})]
        assert found_by_sqlite(parse(f"{written} = 'here'"), documents, ascii_json=ascii_json) == [0]


def ids_found(expression: str, **documents: object) -> set[str]:
    """The names of the documents that SQLite finds; each has one field, `a`, unless it is None."""
    rows = [Document({} if value is None else {"a": value}, name) for name, value in documents.items()]
    condition = parse(expression)
    found = found_by_sqlite(condition, rows)
    assert found == found_plainly(condition, rows)
    return {rows[position].id for position in found}


def test_a_value_is_compared_with_its_like_only() -> None:
    values = {"text": "2020", "number": 2020, "float": 2020.0, "truth": True, "list": [2020], "missing": None}
    assert ids_found("a = 2020", **values) == {"number", "float"}
    assert ids_found("a = '2020'", **values) == {"text"}
    assert ids_found("a = true", **values) == {"truth"}
    assert ids_found("a = 1", **values) == set()
    assert ids_found("a > 0", **values) == {"number", "float"}
    assert ids_found("a > ''", **values) == {"text"}
    assert ids_found("a in (2020, 7)", **values) == {"number", "float"}


def test_a_test_of_a_missing_field_and_its_not_are_unknown() -> None:
    values = {"en": "en", "de": "de", "null": [None], "missing": None}
    assert ids_found("a = 'en'", **values) == {"en"}
    assert ids_found("a != 'en'", **values) == {"de"}
    assert ids_found("not a = 'en'", **values) == {"de"}
    assert ids_found("a not in ('en')", **values) == {"de"}
    assert ids_found("a not like 'e%'", **values) == {"de"}
    assert ids_found("a != 'en' or a is null", **values) == {"de", "missing"}


def test_null_is_the_same_as_missing() -> None:
    documents = [
        Document({"a": None}),
        Document({}),
        Document({"a": 0}),
        Document({"a": ""}),
        Document({"a": []}),
    ]
    assert found_by_sqlite(parse("a is null"), documents) == [0, 1]
    assert found_by_sqlite(parse("a is not null"), documents) == [2, 3, 4]


def test_a_boolean_field_stands_for_itself() -> None:
    values = {"yes": True, "no": False, "one": 1, "missing": None}
    assert ids_found("a", **values) == {"yes"}
    assert ids_found("not a", **values) == {"no"}
    assert ids_found("a in (true, false)", **values) == {"yes", "no"}


def test_like_looks_at_the_whole_text_and_at_cases() -> None:
    values = {"one": "50% off", "two": "50 percent", "three": "Ä[b]*c", "four": "line\nbreak", "five": "50%"}
    assert ids_found("a like '50%'", **values) == {"one", "two", "five"}
    assert ids_found(r"a like '50\%%' escape '\'", **values) == {"one", "five"}
    assert ids_found("a like '50!%' escape '!'", **values) == {"five"}
    assert ids_found("a like '_[b]*_'", **values) == {"three"}
    assert ids_found("a like 'ä%'", **values) == set()
    assert ids_found("a like 'line%break'", **values) == {"four"}
    assert ids_found("a like 'line_break'", **values) == {"four"}
    assert ids_found("a like ''", **values) == set()


def test_a_pattern_of_many_wildcards_is_quick() -> None:
    documents = [Document({"a": "a" * 1000})]
    condition = parse("a like '" + "%a" * (MAX_PATTERN // 2 - 1) + "%b'")
    assert found_by_sqlite(condition, documents) == found_plainly(condition, documents) == []


def test_a_date_is_as_long_as_it_is_written() -> None:
    values = {
        "day": "2024-05-01",
        "noon": "2024-05-01T12:30:15Z",
        "evening": "2024-05-01T22:30:00-03:00",
        "next": "2024-05-02T00:10:00.5",
        "early": "2024-05-01T01:00+02:00",
        "text": "soon",
        "no_day": "2024-02-30",
    }
    assert ids_found("a = 2024-05-01", **values) == {"day", "noon"}
    assert ids_found("a != 2024-05-01", **values) == {"evening", "next", "early"}
    assert ids_found("a > 2024-05-01", **values) == {"evening", "next"}
    assert ids_found("a <= 2024-05-01", **values) == {"day", "noon", "early"}
    assert ids_found("a >= 2024-05-01T12:30", **values) == {"noon", "evening", "next"}
    assert ids_found("a = 2024-05-01T12:30", **values) == {"noon"}
    assert ids_found("a = 2024-05-01T12:30:16", **values) == set()
    assert ids_found("a in (2024-04-30, 2024-05-02T03:30:00+02:00)", **values) == {"evening", "early"}
    assert ids_found("a = 2024-05-01T00:00", **values) == {"day"}
    assert ids_found("a >= '2024-05-01'", **values) == set(values) - {"no_day"}  # as texts


def test_the_columns_are_the_documents_own_and_backticks_mean_metadata() -> None:
    documents = [Document({"id": "x", "title": "y"}, "1", "One"), Document({}, "é", None)]
    assert found_by_sqlite(parse("id = '1'"), documents) == [0]
    assert found_by_sqlite(parse("id in ('é', '2')"), documents) == [1]
    assert found_by_sqlite(parse("title like 'O%'"), documents) == [0]
    assert found_by_sqlite(parse("title is null"), documents) == [1]
    assert found_by_sqlite(parse("`id` = 'x' and `title` = 'y'"), documents) == [0]


def test_metadata_that_are_null_have_no_fields() -> None:
    connection = sqlite3.connect(":memory:")
    for expression, found in (("a = 1", 0), ("a is null", 1), ("`é` is null", 1), ("`é` != 'x'", 0)):
        fragment, parameters = parse(expression).sql()
        query = f"SELECT count(*) FROM (SELECT NULL AS metadata) WHERE {fragment}"
        assert connection.execute(query, parameters).fetchone() == (found,), expression
    connection.close()


def test_a_text_that_looks_like_json_has_no_parts() -> None:
    documents = [Document({"é": '{"a": 1}', "b": '{"a": 1}'}), Document({"é": "no json"})]
    assert found_by_sqlite(parse("é.a = 1 or b.a = 1"), documents) == []


def test_a_long_chain_is_not_too_deep_for_sqlite() -> None:
    chain = " or ".join(f"a = 2024-05-{day % 28 + 1:02}" for day in range(MAX_COMPARISONS))
    assert found_by_sqlite(parse(chain), [Document({"a": "2024-05-28"}), Document({})]) == [0]


@pytest.mark.parametrize(
    "test", ["a = 2024-05-01", "`é`.`é` in (2024-05-01)", "a is not null", "id like 'x%'"]
)
def test_the_deepest_condition_is_not_too_deep_for_sqlite(test: str) -> None:
    nested = test
    for level in range(MAX_DEPTH):
        nested = f"a = 1 or {test} and ({nested})" if level % 3 else f"a = 1 or a = 2 and not {nested}"
    assert found_by_sqlite(parse(nested), [Document({"a": 1})]) == [0]


def test_the_longest_path_is_not_too_long_for_sqlite() -> None:
    condition = parse(" or ".join([".".join(["é"] * MAX_NAMES) + " = 2024-05-01"] * 20))
    assert found_by_sqlite(condition, [Document({"é": 1})]) == []


def test_a_long_list_is_one_parameter() -> None:
    condition = parse("a in (" + ", ".join(map(str, range(10_000))) + ")")
    fragment, parameters = condition.sql()
    assert fragment.count("?") == len(parameters) == 3
    assert found_by_sqlite(condition, [Document({"a": 9_999}), Document({"a": 10_000})]) == [0]


ATTACKS = [
    "'; DROP TABLE documents; --",
    "' OR '1'='1",
    '" OR 1=1 --',
    "x') UNION SELECT text FROM documents --",
    "$.a",
    '"].b',
    "?",
    "?1",
    ":name",
    "{type}",
    "{0.__class__}",
    "%s",
    "\\",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_the_users_is_in_the_sql(attack: str) -> None:
    name = "`" + attack.replace("`", "``") + "`"
    template = "{0} = {1} or {0} in ({1}) or {0}.x like {1} or not ({0} is null or {0} > 2024-05-01)"
    harmless = parse(template.format("`é`", "'y'")).sql()[0]
    plain = parse(template.format("`plain`", "'y'")).sql()[0]
    attacking = parse(template.format(name, quoted(attack)))
    assert attacking.sql()[0] in (harmless, plain)
    documents = [Document({attack: attack}), Document({attack: "y"}), Document({"a": "1"})]
    assert found_by_sqlite(parse(f"{name} = {quoted(attack)}"), documents) == [0]
    assert found_by_sqlite(attacking, documents) == found_plainly(attacking, documents)


@pytest.mark.parametrize("column", ["metadata; DROP TABLE documents", "", "1", "a.b.c", "meta data", "é"])
def test_a_column_that_is_no_name_is_refused(column: str) -> None:
    with pytest.raises(ValueError, match=r"is not a name in SQL such as metadata or documents\.metadata$"):
        parse("a = 1").sql(column)
    with pytest.raises(ValueError, match=r"is not a name in SQL such as metadata or documents\.metadata$"):
        parse("a = 1").sql(id_column=column)
