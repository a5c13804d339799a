import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemb.errors import Exit, GembError
from gemb.store.field_types import FieldType, field_name
from gemb.store.where import MAX_COMPARISONS, MAX_DEPTH, MAX_LENGTH, MAX_NAMES, MAX_PATTERN, parse

steadily = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

FIELDS: dict[str, FieldType] = {
    "year": "number",
    "lang": "text",
    "draft": "boolean",
    "published": "date",
    "tags": "list",
    "author": "object",
    "anything": "mixed",
    "`content-type`": "text",
    "Überschrift": "text",
}


def mistake(expression: str, fields: dict[str, FieldType] | None = None) -> str:
    with pytest.raises(GembError) as caught:
        parse(expression, fields)
    assert caught.value.exit_code is Exit.USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a = 1 or b = 2 and not c = 3", "(a = 1) or ((b = 2) and (not (c = 3)))"),
        ("not a and b", "(not a) and b"),
        ("not not a", "not (not (a))"),
        ("a=1", "  a\t=\n1  "),
        ("a = 1 AND NOT b IN (2) Or c Is Null", "a = 1 and not b in (2) or c is null"),
        ("a <> 1", "a != 1"),
        ("a not in (1, 2)", "not a in (1, 2)"),
        ("a not like 'x'", "not a like 'x'"),
        ("a is not null", "not a is null"),
        ("a", "a = true"),
        ("a = TRUE", "a = true"),
        ("a in (1, 1, 2)", "a in (1, 2)"),
        ("a = 'it''s'", 'a = "it\'s"'),
        ('a = "say ""hi"""', "a = 'say \"hi\"'"),
        ("`a` = 1", "a = 1"),
        ("`a`.b = 1", "a.`b` = 1"),
        ("a = +1", "a = 1"),
        ("a = 1.50", "a = 1.5"),
        ("a = .5", "a = 5e-1"),
        ("a = -5.", "a = -5.0"),
        ("a = 12345678901234567890", "a = 12345678901234567890.0"),
        ("a = 2024-05-01T12:30Z", "a = 2024-05-01T12:30"),
        ("a = 2024-05-01T12:30:00+02:00", "a = 2024-05-01T10:30:00"),
        ("a like 'x!%' escape '!'", "a like 'x|%' escape '|'"),
    ],
)
def test_two_ways_to_write_the_same(one: str, other: str) -> None:
    assert parse(one) == parse(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a = 1", "b = 1"),
        ("a = 1", "A = 1"),
        ("a = '1'", "a = 1"),
        ("a = 2024-05-01", "a = '2024-05-01'"),
        ("a = 2024-05-01", "a = 2024-05-01T00:00"),
        ("`a.b` = 1", "a.b = 1"),
        ("`id` = '1'", "id = '1'"),
        ("a like '%'", "a like '!%' escape '!'"),
        ("(a or b) and c", "a or b and c"),
        ("not (a or b)", "not a or b"),
    ],
)
def test_two_things_that_are_not_the_same(one: str, other: str) -> None:
    assert parse(one) != parse(other)


def test_a_text_is_a_date_where_the_field_holds_dates() -> None:
    assert parse("published >= '2024-05-01'", FIELDS) == parse("published >= 2024-05-01")
    assert parse("published in ('2024-05-01 12:30')", FIELDS) == parse("published in (2024-05-01T12:30)")
    assert parse("anything >= '2024-05-01'", FIELDS) == parse("anything >= '2024-05-01'")


def test_known_types_change_nothing_else() -> None:
    expression = (
        "id != 'x' and title like 'A%' and year in (1, 2.5) and lang = 'en' and not draft and draft != false"
        " and published < 2024-05-01T10:00:00 and published like '2024%' and tags is null"
        " and author is not null and author.name = 'x' and author.`first name`.x > 3"
        " and anything = 1 and anything = 'x' and anything and anything.x is null"
        " and `content-type` = 'a' and Überschrift = 'b'"
    )
    assert parse(expression, FIELDS) == parse(expression)


def test_a_name_with_a_type_inside_an_object_has_it() -> None:
    fields: dict[str, FieldType] = {"author.born": "number"}
    assert parse("author.born > 1900 and author is not null", fields) == parse(
        "author.born > 1900 and author is not null"
    )
    assert "author.born holds numbers, but 'x' is a text" in mistake("author.born = 'x'", fields)
    assert "no field author.name; did you mean author.born?" in mistake("author.name = 'x'", fields)


@steadily
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=4
    )
)
def test_a_field_name_reads_back_as_its_path(path: list[str]) -> None:
    everywhere = ".".join("`" + name.replace("`", "``") + "`" for name in path)
    assert parse(f"{field_name(path)} is null") == parse(f"{everywhere} is null")


@pytest.mark.parametrize("name", ["year", "année", "हिन्दी", "日本語", "_x1", "x.y", "Straße.ß"])
def test_a_plain_name_needs_no_backticks(name: str) -> None:
    assert field_name(name.split(".")) == name
    assert parse(f"{name}=1") == parse(f"`{name.replace('.', '`.`')}` = 1")


@pytest.mark.parametrize(
    ("path", "written"),
    [
        (["content-type"], "`content-type`"),
        (["a.b", "c"], "`a.b`.c"),
        (["2nd"], "`2nd`"),
        (["In"], "`In`"),
        (["in", "x"], "in.x"),
        (["id"], "`id`"),
        (["title", "x"], "`title`.x"),
        (["x", "title"], "x.title"),
        (["a`b"], "`a``b`"),
        ([""], "``"),
    ],
)
def test_an_odd_name_is_written_in_backticks(path: list[str], written: str) -> None:
    assert field_name(path) == written


# The message of each mistake: the expression, the place of the caret, the message word for word.
MISTAKES = [
    ("year >= and lang = 'en'", 8, "expected a value after >="),
    ("year >=", 7, "expected a value after >="),
    ("year = )", 7, "expected a value after ="),
    ("year = = 3", 7, "expected a value after ="),
    ("lang = en", 7, "expected a value after =; a text is written in quotes: 'en'"),
    ("lang in (en)", 9, "expected a value after (; a text is written in quotes: 'en'"),
    ("lang in ('de', en)", 15, "expected a value after ,; a text is written in quotes: 'en'"),
    ("lang = null", 7, "nothing is equal to null; write lang is null"),
    ("lang in ('en', NULL)", 15, "nothing is equal to null; write lang is null"),
    ("", None, "there is no condition; write one such as year >= 2020"),
    (" \n ", None, "there is no condition; write one such as year >= 2020"),
    ("()", 1, "expected a field name"),
    ("3 = year", 0, "expected a field name"),
    ("year = 3 and", 12, "expected a field name"),
    ("and year = 3", 0, "expected a field name; a field called and is written `and`"),
    ("'lang' = 'en'", 0, "expected a field name; a name with odd signs stands in backticks, not in quotes"),
    ("year", 4, "expected a comparison after year: =, !=, <, <=, >, >=, in, like, is null"),
    ("title", 5, "expected a comparison after title: =, !=, <, <=, >, >=, in, like, is null"),
    ("draft 3", 6, "expected a comparison after draft: =, !=, <, <=, >, >=, in, like, is null"),
    ("year between 1 and 2", 5, "expected a comparison after year: =, !=, <, <=, >, >=, in, like, is null"),
    ("year not = 3", 9, "expected in or like after not"),
    ("year not is null", 9, "expected in or like after not"),
    ("year is 3", 8, "expected null or not null after is"),
    ("year is not 3", 12, "expected null after is not"),
    ("year in 3", 8, "expected ( after in"),
    ("year in ()", 9, "expected a value after (; the list is empty"),
    ("year in (1,)", 11, "expected a value after ,"),
    ("year in (1 2)", 11, "expected , or ) in the list"),
    ("year in (1", 10, "expected , or ) in the list"),
    ("anything in (1, 'a')", 16, "the list mixes numbers and texts; it takes one kind"),
    ("year = 3 lang = 'en'", 9, "expected and, or, or the end"),
    ("year = 3)", 8, "this ) has no ( before it"),
    ("(year = 3", 0, "this ( is not closed"),
    ("(year = 3 lang", 10, "expected and, or, or )"),
    ("lang like 5", 10, "expected a pattern in quotes after like, such as 'intro%'"),
    ("lang like 'a' escape 5", 21, "expected a character in quotes after escape"),
    ("lang like 'a' escape '!!'", 21, "escape takes one character"),
    ("lang like 'a!' escape '!'", 10, "in this pattern ! has no %, _ or ! after it"),
    ("lang like 'a!b' escape '!'", 10, "in this pattern ! has no %, _ or ! after it"),
    ("lang = 'en", 7, "the text that begins here has no closing '"),
    ("lang = 'it''s", 7, "the text that begins here has no closing '"),
    ("lang = \"en'", 7, 'the text that begins here has no closing "'),
    ("`lang = 'en'", 0, "the name that begins here has no closing `"),
    ("author. = 3", 7, "expected a name after the . (a name with other signs stands in backticks)"),
    ("author.0 = 3", 7, "expected a name after the . (a name with other signs stands in backticks)"),
    ("author..x = 3", 7, "expected a name after the . (a name with other signs stands in backticks)"),
    ("year == 3", 5, "write = for =="),
    ("year = 3 && draft", 9, "write and for &&"),
    ("year = 3 || draft", 9, "write or for ||"),
    ("!draft", 0, "write not for !"),
    ("year = 5 - 3", 9, "a name with - in it stands in backticks, and there is no arithmetic"),
    ("lang = ‘en’", 7, "write a text in straight quotes: '...'"),
    ("lang = “en”", 7, 'write a text in straight quotes: "..."'),
    ("year = 3; drop table x", 8, "; has no meaning outside quotes and backticks"),
    ("year = $1", 7, "$ has no meaning outside quotes and backticks"),
    ("year = 12abc", 7, "12abc is not a number; a text is written '12abc', a name `12abc`"),
    ("year = 1.2.3", 7, "1.2.3 is not a number; a text is written '1.2.3', a name `1.2.3`"),
    ("year = 1e999", 7, "the number is too large; at most 1.7976931348623157e308"),
    ("year = -" + "9" * 5000, 7, "the number is too large; at most 1.7976931348623157e308"),
    ("published < 2024-5-1", 12, "2024-5-1 is not a date; write it like 2024-05-01 or 2024-05-01T12:30:00"),
    (
        "published < 2024-02-30",
        12,
        "2024-02-30 is not a date; write it like 2024-05-01 or 2024-05-01T12:30:00",
    ),
    (
        "published < 2024-05-01T12",
        12,
        "2024-05-01T12 is not a date; write it like 2024-05-01 or 2024-05-01T12:30:00",
    ),
    ("draft < true", 6, "booleans have no order; < cannot compare them"),
    ("yaer > 3", 0, "no field yaer; did you mean year?"),
    ("YEAR > 3", 0, "no field YEAR; did you mean year?"),
    ("ID = 'x'", 0, "no field ID; did you mean id?"),
    ("content-type = 'x'", 0, "no field content; did you mean `content-type`?"),
    ("year > 3 and ueberschrift = 'x'", 13, "no field ueberschrift; did you mean Überschrift?"),
    ("`id` = 'x'", 0, "no field `id`; did you mean id?"),
    (
        "日本語 = 'x'",
        0,
        "no field 日本語; the fields are id, title, year, lang, draft, published, tags, author and 3 more",
    ),
    ("id.x = 'x'", 0, "id is a text; it has no parts"),
    ("year.x = 'x'", 0, "year holds numbers; they have no parts"),
    ("tags.x = 'x'", 0, "tags holds lists; they have no parts"),
    ("year = '2020'", 7, "year holds numbers, but '2020' is a text; write 2020 without quotes"),
    ("year = 'x'", 7, "year holds numbers, but 'x' is a text; write a number"),
    ("year in (1, true)", 12, "year holds numbers, but true is a boolean; write a number"),
    ("year < 2024-05-01", 7, "year holds numbers, but 2024-05-01 is a date; write a number"),
    ("lang = 5", 7, "lang holds texts, but 5 is a number; write '5' to compare it as a text"),
    (
        "lang = 2024-05-01",
        7,
        "lang holds texts, but 2024-05-01 is a date; write '2024-05-01' to compare it as a text",
    ),
    ("id = 5", 5, "id holds texts, but 5 is a number; write '5' to compare it as a text"),
    ("draft = 1", 8, "draft holds booleans, but 1 is a number; write true or false"),
    ("draft = 'true'", 8, "draft holds booleans, but 'true' is a text; write true or false"),
    ("published > 2024", 12, "published holds dates, but 2024 is a number; write a date like 2024-05-01"),
    ("published > 'May'", 12, "published holds dates, but 'May' is a text; write a date like 2024-05-01"),
    ("tags = 'x'", 0, "tags holds lists; only is null and is not null can ask for them"),
    ("author like 'x'", 0, "author holds objects; only is null and is not null can ask for them"),
    ("year like '20%'", 5, "year holds numbers; like is for texts"),
    ("draft like 't%'", 6, "draft holds booleans; like is for texts"),
    ("lang = 'x\0'", 9, "a character that is not text; the expression must be UTF-8"),
    ("lang = '\udcff'", 8, "a character that is not text; the expression must be UTF-8"),
]


@pytest.mark.parametrize(("expression", "at", "message"), MISTAKES)
def test_a_mistake_is_told_and_pointed_at(expression: str, at: int | None, message: str) -> None:
    told = mistake(expression, FIELDS).split("\n")
    assert told[0] == f"--where: {message}"
    if at is None:
        assert len(told) == 1
        return
    _, line, caret = told
    assert caret == "  " + " " * at + "^"
    if len(expression) < 40:
        shown = expression.replace("\0", "?").replace("\udcff", "?")
        assert line == f"  {shown}"


def test_the_source_is_named() -> None:
    with pytest.raises(GembError, match=r"^recipe\.yaml:3: where: expected a field name\n  \(\)\n   \^$"):
        parse("()", source="recipe.yaml:3: where")


def test_the_first_mistake_is_told() -> None:
    assert mistake("yaer >= 'x", FIELDS).startswith("--where: no field yaer; did you mean year?\n")
    assert mistake("year >= and 'x").startswith("--where: expected a value after >=\n")


def test_a_field_of_an_index_without_metadata_is_unknown() -> None:
    assert mistake("yearly > 3", {}) == (
        "--where: no field yearly; the fields are id, title\n  yearly > 3\n  ^"
    )


def test_the_caret_stands_below_the_character_on_a_terminal() -> None:
    # wide letters take two columns, combining marks none; what cannot be seen becomes visible
    assert mistake("名前 = 'x' and = 3") == (
        "--where: expected a field name\n  名前 = 'x' and = 3\n                 ^"
    )
    assert mistake("e\u0301 = 'e\u0301' and = 3").endswith("\n              ^")
    assert mistake("a = 1\n\tand\u00a0= 3").split("\n")[1:] == ["  a = 1  and = 3", "             ^"]
    assert mistake("a = 'x\u200by\x1b[0m' = 3").split("\n")[1:] == [
        "  a = 'x?y?[0m' = 3",
        "                ^",
    ]


def test_a_long_expression_is_shown_around_the_mistake() -> None:
    expression = "a = 1 or " * 50 + "= 3 or " + "b = 2 or " * 49 + "b = 2"
    message, line, caret = mistake(expression).split("\n")
    assert message == "--where: expected a field name"
    assert line.startswith("  …")
    assert line[len(caret) - 1 :].startswith("= 3 or b = 2")
    assert line.endswith("…")
    assert len(line) == 2 + 1 + 60 + 40 + 1


def test_what_a_message_repeats_is_short() -> None:
    message = mistake("x" * 1000 + " = 3", FIELDS).split("\n")[0]
    assert message.startswith("--where: no field " + "x" * 39 + "…; the fields are")
    assert "'" + "x" * 38 + "…" in mistake(f"year = '{'x' * 1000}'", FIELDS)


def test_limits_are_told() -> None:
    assert mistake("a = '" + "x" * MAX_LENGTH + "'").startswith(
        "--where: 100,006 characters are too many; at most 100,000\n"
    )
    deep = "(" * (MAX_DEPTH + 1) + "a = 1" + ")" * (MAX_DEPTH + 1)
    assert mistake(deep) == (
        f"--where: more than 12 parentheses and nots in one another\n  {deep}\n  {' ' * MAX_DEPTH}^"
    )
    assert mistake("not " * 100_000).startswith("--where: 400,000 characters are too many")
    assert mistake("not " * 20_000).startswith("--where: more than 12 parentheses and nots in one another")
    chain = " or ".join(["abc = 1"] * (MAX_COMPARISONS + 1))
    assert mistake(chain).startswith("--where: more than 500 comparisons; a list is written abc in (...)\n")
    path = ".".join(["x"] * (MAX_NAMES + 1))
    assert mistake(f"{path} = 1").startswith("--where: more than 16 names in one path\n")
    pattern = "x" * (MAX_PATTERN + 1)
    assert mistake(f"a like '{pattern}'").startswith(
        "--where: 1,001 characters are too many for a pattern; at most 1,000\n"
    )


def test_what_is_at_the_limits_is_read() -> None:
    parse("(" * MAX_DEPTH + "a = 1" + ")" * MAX_DEPTH)
    parse(" or ".join(["(a = 1)"] * MAX_COMPARISONS))  # side by side is not in one another
    parse(".".join(["x"] * MAX_NAMES) + " = 1")
    parse(f"a like '{'x' * MAX_PATTERN}'")
    parse(("a = '" + "x" * MAX_LENGTH)[: MAX_LENGTH - 1] + "'")


WORDS = st.sampled_from(
    "year lang draft published tags author anything . ` ' \" ( ) , = != < <= in not like escape"
    " is null and or 'x' \"y\" 5 -1.5 2024-05-01 true false `content-type` ; ! - 日本".split(" ")
)


@steadily
@given(st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=30))
def test_anything_is_either_read_or_told_with_a_caret(expression: str) -> None:
    for fields in (None, FIELDS):
        try:
            parse(expression, fields).sql()
        except GembError as error:
            message, *rest = str(error).split("\n")
            assert re.match("--where: [^A-Z\n]", message)
            assert not message.endswith(".")
            if expression and not expression.isspace():
                line, caret = rest
                assert re.fullmatch(" {2,}\\^", caret)
                assert line.startswith("  ")
