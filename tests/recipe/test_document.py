"""YAML to values: the traps of YAML 1.1, places, the environment, and what is refused."""

import math

import pytest
import yaml

from gemb.recipe.document import Document, parse, parse_value, plain
from gemb.recipe.problems import Place


def told(text: str) -> list[str]:
    return [str(problem) for problem in parse(text).problems]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, true, null]\nc:\n  d: 'quoted'\n  e: |\n    two\n    lines\n",
        "- no mapping",
        "a: &x {b: 1}\nc: *x\n",
        'a: "tab\\tand \\u00e9"\n',
        "",
    ],
)
def test_parse_agrees_with_pyyaml_where_yaml_1_1_and_1_2_do(text: str) -> None:
    expected = yaml.safe_load(text) or {}
    document = parse(text)
    assert document.values == (expected if isinstance(expected, dict) else {})
    assert document.is_readable == isinstance(expected, dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+3", 3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("True", True),
        ("~", None),
        ("Null", None),
        ("2026-12-01", "2026-12-01"),
        ("1.2.3", "1.2.3"),
        ("0b1", "0b1"),
        ("e5", "e5"),
        ("-", "-"),
        (".", "."),
    ],
)
def test_a_plain_scalar_is_read_by_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


def test_nan_is_a_number() -> None:
    value = plain(".nan")
    assert isinstance(value, float)
    assert math.isnan(value)


def test_an_int_of_thousands_of_digits_stays_a_text() -> None:
    assert plain("9" * 5000) == "9" * 5000


def test_quotes_and_the_tag_str_make_texts() -> None:
    assert parse("a: '1'\nb: \"no\"\nc: !!str 5\nd: &x !!str no\n").values == {
        "a": "1",
        "b": "no",
        "c": "5",
        "d": "no",
    }


def test_keys_are_texts_whatever_they_look_like() -> None:
    assert parse("on: 1\n2: 2\nnull: 3\n").values == {"on": 1, "2": 2, "null": 3}


def test_every_key_and_item_has_its_place() -> None:
    document = parse("a: 1\nb:\n  - x\n  - c: 2\n")
    assert document.places == {
        ("a",): Place(1, 1),
        ("b",): Place(2, 1),
        ("b", 0): Place(3, 5),
        ("b", 1): Place(4, 5),
        ("b", 1, "c"): Place(4, 5),
    }


def test_a_variable_is_filled_in_and_stays_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMB_TEST_DIMS", "256")
    monkeypatch.setenv("GEMB_TEST_EMPTY", "")
    text = (
        "a: ${GEMB_TEST_DIMS}\nb: x-${GEMB_TEST_DIMS}-${GEMB_TEST_MISSING:-y}\nc: ${GEMB_TEST_EMPTY:-d}\n"
        "e: $${HOME}\nf: ${GEMB_TEST_MISSING:-}\ng: '$5'\n"
    )
    assert parse(text).values == {"a": "256", "b": "x-256-y", "c": "d", "e": "${HOME}", "f": "", "g": "$5"}


def test_a_variable_that_is_not_set_is_a_problem() -> None:
    assert told("a: ${GEMB_TEST_MISSING}\nb: ${not valid}\n") == [
        "line 1: a: the environment has no GEMB_TEST_MISSING; set it or write ${GEMB_TEST_MISSING:-default}",
        "line 2: b: ${not valid} is not ${NAME} or ${NAME:-default}",
    ]


def test_a_key_given_twice_is_a_problem_at_any_depth() -> None:
    assert told("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n") == [
        "line 5: b.c: given twice; first on line 3",
        "line 6: a: given twice; first on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [b\n", "line 2: not YAML: while parsing a flow sequence expected ',' or ']', "
         "but got '<stream end>'"),
        ("a: b: c\n", "line 1: not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "line 2: not YAML: expected a single document in the stream "
         "but found another document"),
        ("a: *b\n", "line 1: not YAML: found undefined alias 'b'"),
        ("\ta: 1\n", "line 1: not YAML: while scanning for the next token found character '\\t' "
         "that cannot start any token"),
        ("a: 1\nb: \x07\n", "line 2: a control character is not allowed here"),
        ("- a\n", "line 1: a recipe is a mapping of keys to values"),
        ("just words\n", "line 1: a recipe is a mapping of keys to values"),
        ("a: !!python/object/apply:os.system [ls]\n",
         "line 1: a: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed"),
        ("a: !mine 1\n", "line 1: a: the tag !mine is not allowed"),
        ("a: !!int '1'\n", "line 1: a: the tag tag:yaml.org,2002:int is not allowed"),
        ("? [a, b]\n: 1\n", "line 1: a key must be a word"),
        ("a: &x [*x]\n", "line 1: a.0: an alias stands inside its own anchor"),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_refused_with_its_line(text: str, problem: str) -> None:
    assert told(text) == [problem]


def test_aliases_of_aliases_cannot_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    document = parse("\n".join(lines))
    assert [problem.message for problem in document.problems] == ["more than 100,000 values"]


def test_deep_nesting_is_a_problem_and_no_crash() -> None:
    assert told("a: " + "[" * 5000 + "]" * 5000) == ["nested too deeply"]


def test_parse_value_reads_the_value_of_an_override() -> None:
    assert [parse_value(text) for text in ("0.3", "[1, no]", "{a: 1}", "", "x y")] == [
        (0.3, []),
        ([1, "no"], []),
        ({"a": 1}, []),
        (None, []),
        ("x y", []),
    ]
    assert parse_value("[1")[1] == [
        "not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"
    ]


def test_an_empty_text_is_an_empty_recipe() -> None:
    assert parse("# nothing\n") == Document({}, {}, [], is_readable=True)
