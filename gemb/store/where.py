"""The filter language of a search, over the metadata of a document: text in, a condition for SQLite out.

    year >= 2020 and lang in ('en', 'de')
    not (title like 'Draft%' or reviewed = false) and author.name is not null
    published < 2024-05-01 or `content-type` = "text/html"

    condition  = and-part {"or" and-part}
    and-part   = not-part {"and" not-part}
    not-part   = "not" not-part | "(" condition ")" | test
    test       = field ("=" | "!=" | "<>" | "<" | "<=" | ">" | ">=") value
               | field ["not"] "in" "(" value {"," value} ")"
               | field ["not"] "like" text ["escape" text]
               | field "is" ["not"] "null"
               | field                                        (a boolean: the same as field = true)
    field      = "id" | "title" | name {"." name}             (a . goes into a nested object)
    name       = letters, digits and _, not beginning with a digit | anything in `backticks`
    value      = text | number | date | "true" | "false"
    text       = 'in single' or "double" quotes, the quote itself doubled
    date       = 2024-05-01 | 2024-05-01T12:30 | 2024-05-01T12:30:59, a time with Z or +02:00 or neither

Words of the language may be written in any case; names and texts are what they are, letter by letter.
`id` and `title` are the document's own columns; in backticks they are metadata like any other name.

What a test says:

- A value has a type, and is only ever compared with its like: the text "2020" is not the number 2020.
- Where the field is missing, null or of another type, a test is neither true nor false but unknown, and
  so is its `not` (SQL's three values). A document is found if the whole condition is true: `lang != 'en'`
  does not find documents without `lang`; `lang != 'en' or lang is null` does.
- `is null` is true where the field is missing or null, else false; it is never unknown.
- Texts are ordered by code point. `like` looks at the whole text and distinguishes cases, as `=` does.
- Dates are texts of ISO 8601. A date is a span as long as it is written: `= 2024-05-01` is any time of
  that day, `<= 2024-05-01` includes all of it. All times are taken to UTC; without an offset they are UTC.
- Where the types of the fields are known, a text in quotes is a date too if the field holds dates.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, NoReturn

from gemb.errors import GembError
from gemb.store.conditions import (
    OPERATORS,
    AllOf,
    AnyOf,
    Compare,
    Condition,
    Field,
    In,
    IsNull,
    Kind,
    Like,
    Not,
    Value,
    Wild,
    as_sqlite,
)
from gemb.store.dates import written_date
from gemb.store.field_types import COLUMNS, KEYWORDS, FieldType, field_name

MAX_LENGTH = 100_000  # characters of an expression; a command line has no room for more
MAX_COMPARISONS = 500  # a chain of `or` is as deep as long, and SQLite goes at most 1,000 deep
MAX_DEPTH = 12  # parentheses and nots in one another; SQLite's parser keeps 100 symbols, some 5 a level
MAX_PATTERN = 1_000  # characters of a `like`; SQLite allows 50,000 bytes after our rewriting
MAX_NAMES = 16  # names in a path, each of which can become a table of a join; SQLite joins at most 64

_SUGGESTION_CUTOFF = 0.6

_SHOWN_BEFORE = 60  # characters of a long expression on either side of the mistake
_SHOWN_AFTER = 40


def _mistake(source: str, text: str, at: int, message: str) -> GembError:
    """The message, the expression, and a caret under its character `at`."""
    start = at - _SHOWN_BEFORE if at > _SHOWN_BEFORE else 0
    end = at + _SHOWN_AFTER
    before = ("…" if start else "") + _shown(text[start:at])
    after = _shown(text[at:end]) + ("…" if end < len(text) else "")
    return GembError(f"{source}: {message}\n  {before}{after}\n  {' ' * _width(before)}^")


def _shown(text: str) -> str:
    """One line, one character for each: white space as blanks, what cannot be seen as `?`."""
    return "".join(
        " " if character.isspace() else character if character.isprintable() else "?" for character in text
    )


def _width(text: str) -> int:
    """The columns of a terminal that a text takes."""
    return sum(
        0
        if unicodedata.category(character) in ("Mn", "Me")
        else 2
        if unicodedata.east_asian_width(character) in "WF"
        else 1
        for character in text
    )


@dataclass(frozen=True, slots=True)
class _Token:
    kind: Literal["keyword", "path", "text", "value", "symbol", "end"]
    text: str
    """As it is written; a keyword in small letters."""
    at: int
    """Its place in the expression, in characters."""
    path: tuple[str, ...] = ()
    value: Value | None = None


_SYMBOL = re.compile(r"<=|>=|!=|<>|==|&&|\|\||.", re.DOTALL)
_SYMBOLS = frozenset(["=", "!=", "<>", "<", "<=", ">", ">=", "(", ")", ","])
_OTHER_LANGUAGES = {
    "==": "write = for ==",
    "&&": "write and for &&",
    "||": "write or for ||",
    "!": "write not for !",
    "-": "a name with - in it stands in backticks, and there is no arithmetic",
    "‘": "write a text in straight quotes: '...'",
    "’": "write a text in straight quotes: '...'",
    "“": 'write a text in straight quotes: "..."',
    "”": 'write a text in straight quotes: "..."',
}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DATE_LIKE = re.compile(r"[0-9]+-[0-9][0-9A-Za-z:.+-]*")


class _Reader:
    """The tokens of an expression, one after the other."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source

    def fail(self, at: int, message: str) -> NoReturn:
        """Raise the GembError for a mistake at a character."""
        raise _mistake(self.source, self.text, at, message)

    def tokens(self) -> Iterator[_Token]:
        """All tokens; the last is `end`.

        They are read as they are asked for, so that the first mistake is told first, be it one of
        letters or of grammar.
        """
        at = 0
        while True:
            while at < len(self.text) and self.text[at].isspace():
                at += 1
            if at == len(self.text):
                break
            token, at = self._token(at)
            yield token
        yield _Token("end", "", at)

    def _token(self, at: int) -> tuple[_Token, int]:
        first = self.text[at]
        if first in "'\"":
            text, end = self._quoted(at, "text")
            return _Token("text", self.text[at:end], at, value=Value(Kind.TEXT, text)), end
        if first == "`" or _begins_name(first):
            return self._path(at)
        if match := _DATE_LIKE.match(self.text, at):
            date = written_date(match[0])
            if date is None:
                self.fail(
                    at, f"{_brief(match[0])} is not a date; write it like 2024-05-01 or 2024-05-01T12:30:00"
                )
            return _Token("value", match[0], at, value=Value(Kind.DATE, date)), match.end()
        if match := _NUMBER.match(self.text, at):
            return self._number(match), match.end()
        symbol = _SYMBOL.match(self.text, at)
        written = symbol[0] if symbol else first
        if written not in _SYMBOLS:
            stray = f"{_shown(written)} has no meaning outside quotes and backticks"
            self.fail(at, _OTHER_LANGUAGES.get(written, stray))
        return _Token("symbol", written, at), at + len(written)

    def _quoted(self, at: int, what: str) -> tuple[str, int]:
        """What stands in the quotes that begin at `at`, and where they end."""
        quote = self.text[at]
        end = at + 1
        while True:
            end = self.text.find(quote, end)
            if end < 0:
                self.fail(at, f"the {what} that begins here has no closing {quote}")
            if not self.text.startswith(quote, end + 1):
                return self.text[at + 1 : end].replace(quote * 2, quote), end + 1
            end += 2

    def _path(self, at: int) -> tuple[_Token, int]:
        names: list[str] = []
        end = at
        while True:
            if self.text.startswith("`", end):
                name, end = self._quoted(end, "name")
            else:
                start = end
                while end < len(self.text) and _continues_name(self.text[end]):
                    end += 1
                name = self.text[start:end]
            names.append(name)
            if not self.text.startswith(".", end):
                break
            end += 1
            if not (self.text.startswith("`", end) or _begins_name(self.text[end : end + 1])):
                self.fail(end, "expected a name after the . (a name with other signs stands in backticks)")
            if len(names) == MAX_NAMES:
                self.fail(end, f"more than {MAX_NAMES} names in one path")
        written = self.text[at:end]
        if written.lower() in KEYWORDS:
            return _Token("keyword", written.lower(), at), end
        return _Token("path", written, at, path=tuple(names)), end

    def _number(self, match: re.Match[str]) -> _Token:
        written, at = match[0], match.start()
        rest = match.end()
        while rest < len(self.text) and (_continues_name(self.text[rest]) or self.text[rest] == "."):
            rest += 1
        if rest > match.end():
            word = _brief(self.text[at:rest])
            self.fail(at, f"{word} is not a number; a text is written '{word}', a name `{word}`")
        # Of long integers SQLite takes the nearest float, and int() takes no more than 4,300 digits.
        digits = written.lstrip("+-")
        number = as_sqlite(int(written)) if digits.isdecimal() and len(digits) < 20 else float(written)
        if math.isinf(number):
            self.fail(at, "the number is too large; at most 1.7976931348623157e308")
        return _Token("value", written, at, value=Value(Kind.NUMBER, number))


def _begins_name(character: str) -> bool:
    return character.isidentifier()


def _continues_name(character: str) -> bool:
    return ("a" + character).isidentifier()


_HOLDS = {
    "text": "texts",
    "number": "numbers",
    "boolean": "booleans",
    "date": "dates",
    "list": "lists",
    "object": "objects",
}
_COMPARISONS = "=, !=, <, <=, >, >=, in, like, is null"
_WILDCARDS: dict[str, str | Wild] = {"%": Wild.ANY, "_": Wild.ONE}
_BRIEF = 40  # characters of the user's that a message repeats
_LISTED = 8  # fields that a message lists


class _Parser:
    """Reads a condition by recursive descent, with one token of look-ahead."""

    def __init__(self, reader: _Reader, fields: Mapping[str, FieldType] | None) -> None:
        self.reader = reader
        self.fields = fields
        self.tokens = reader.tokens()
        self.token = next(self.tokens)
        self.depth = 0
        self.comparisons = 0

    def parse(self) -> Condition:
        condition = self._condition()
        if self.token.text == ")":
            self._fail("this ) has no ( before it")
        if self.token.kind != "end":
            self._fail("expected and, or, or the end")
        return condition

    def _fail(self, message: str, token: _Token | None = None) -> NoReturn:
        self.reader.fail((token or self.token).at, message)

    def _next(self) -> _Token:
        """The token under the cursor, which moves on, but not beyond the end."""
        token = self.token
        self.token = next(self.tokens, token)
        return token

    def _take(self, kind: Literal["keyword", "symbol"], text: str) -> bool:
        """True, and the cursor moves on, if that is the token under it."""
        if self.token.kind != kind or self.token.text != text:
            return False
        self._next()
        return True

    def _condition(self) -> Condition:
        parts = [self._and_part()]
        while self._take("keyword", "or"):
            parts.append(self._and_part())
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _and_part(self) -> Condition:
        parts = [self._not_part()]
        while self._take("keyword", "and"):
            parts.append(self._not_part())
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def _not_part(self) -> Condition:
        opening = self.token
        if not (self._take("keyword", "not") or self._take("symbol", "(")):
            return self._test()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(f"more than {MAX_DEPTH} parentheses and nots in one another", opening)
        if opening.text == "not":
            condition: Condition = Not(self._not_part())
        else:
            condition = self._condition()
            if not self._take("symbol", ")"):
                if self.token.kind == "end":
                    self._fail("this ( is not closed", opening)
                self._fail("expected and, or, or )")
        self.depth -= 1
        return condition

    def _test(self) -> Condition:
        token = self.token
        field, type_ = self._field(token)
        self._next()
        self.comparisons += 1
        if self.comparisons > MAX_COMPARISONS:
            self._fail(
                f"more than {MAX_COMPARISONS} comparisons; a list is written {_brief(token.text)} in (...)",
                token,
            )
        if self._take("keyword", "is"):
            is_not = self._take("keyword", "not")
            if not self._take("keyword", "null"):
                self._fail("expected null after is not" if is_not else "expected null or not null after is")
            return Not(IsNull(field)) if is_not else IsNull(field)
        if type_ in ("list", "object"):
            self._fail(
                f"{_brief(token.text)} holds {_HOLDS[type_]}; only is null and is not null can ask for them",
                token,
            )
        is_not = self._take("keyword", "not")
        condition: Condition
        if self._take("keyword", "in"):
            condition = self._in(field, type_, token)
        elif self.token.text == "like" and self.token.kind == "keyword":
            condition = self._like(field, type_, token)
        elif is_not:
            self._fail("expected in or like after not")
        else:
            return self._comparison(field, type_, token)
        return Not(condition) if is_not else condition

    def _comparison(self, field: Field, type_: FieldType, name: _Token) -> Condition:
        sign = "!=" if self.token.text == "<>" else self.token.text
        if self.token.kind == "symbol" and sign in OPERATORS:
            symbol = self._next()
            value = self._value(type_, name, f"after {symbol.text}")
            if value.kind is Kind.BOOLEAN and sign not in ("=", "!="):
                self._fail(f"booleans have no order; {symbol.text} cannot compare them", symbol)
            return Compare(field, sign, value)
        ends = self.token.kind == "end" or self.token.text in (")", "and", "or")
        if ends and type_ in ("boolean", "mixed") and not field.is_column:
            return Compare(field, "=", Value(Kind.BOOLEAN, True))
        self._fail(f"expected a comparison after {_brief(name.text)}: {_COMPARISONS}")

    def _in(self, field: Field, type_: FieldType, name: _Token) -> Condition:
        if not self._take("symbol", "("):
            self._fail("expected ( after in")
        if self.token.text == ")" and self.token.kind == "symbol":
            self._fail("expected a value after (; the list is empty")
        values: dict[int, dict[Value, None]] = {}  # by the length of dates; the inner one is an ordered set
        kind: Kind | None = None
        before = "("
        while True:
            token = self.token
            value = self._value(type_, name, f"after {before}")
            kind = kind or value.kind
            if value.kind is not kind:
                self._fail(
                    f"the list mixes {_HOLDS[kind]} and {_HOLDS[value.kind]}; it takes one kind", token
                )
            values.setdefault(value.length, {})[value] = None
            before = ","
            if self._take("symbol", ")"):
                break
            if not self._take("symbol", ","):
                self._fail("expected , or ) in the list")
        parts = tuple(In(field, tuple(some)) for some in values.values())
        return parts[0] if len(parts) == 1 else AnyOf(parts)

    def _like(self, field: Field, type_: FieldType, name: _Token) -> Condition:
        if type_ not in ("text", "date", "mixed"):
            self._fail(f"{_brief(name.text)} holds {_HOLDS[type_]}; like is for texts")
        self._next()
        pattern, token = self._text("expected a pattern in quotes after like, such as 'intro%'")
        if len(pattern) > MAX_PATTERN:
            self._fail(
                f"{len(pattern):,} characters are too many for a pattern; at most {MAX_PATTERN:,}", token
            )
        if not self._take("keyword", "escape"):
            return Like(field, tuple(_WILDCARDS.get(character, character) for character in pattern))
        escape, escape_token = self._text("expected a character in quotes after escape")
        if len(escape) != 1:
            self._fail("escape takes one character", escape_token)
        parts: list[str | Wild] = []
        characters = iter(pattern)
        for character in characters:
            if character != escape:
                parts.append(_WILDCARDS.get(character, character))
                continue
            character = next(characters, "")
            if character not in ("%", "_", escape):
                self._fail(f"in this pattern {escape} has no %, _ or {escape} after it", token)
            parts.append(character)
        return Like(field, tuple(parts))

    def _text(self, expected: str) -> tuple[str, _Token]:
        """The text under the cursor, which moves on, and its token."""
        token = self.token
        if token.kind != "text" or token.value is None:
            self._fail(expected)
        self._next()
        return str(token.value.value), token

    def _value(self, type_: FieldType, name: _Token, place: str) -> Value:
        """The value under the cursor, which moves on; of the type that the field `name` holds."""
        token = self.token
        if token.kind == "keyword" and token.text in ("true", "false"):
            value = Value(Kind.BOOLEAN, token.text == "true")
        elif token.value is not None:
            value = token.value
        elif token.kind == "keyword" and token.text == "null":
            self._fail(f"nothing is equal to null; write {_brief(name.text)} is null")
        elif token.kind == "path":
            self._fail(f"expected a value {place}; a text is written in quotes: '{_brief(token.text)}'")
        else:
            self._fail(f"expected a value {place}")
        if value.kind != type_ and type_ != "mixed":
            value = self._as_date(value, name) if type_ == "date" else self._mismatch(value, type_, name)
        self._next()
        return value

    def _as_date(self, value: Value, name: _Token) -> Value:
        date = written_date(str(value.value)) if value.kind is Kind.TEXT else None
        return Value(Kind.DATE, date) if date else self._mismatch(value, "date", name)

    def _mismatch(self, value: Value, type_: FieldType, name: _Token) -> NoReturn:
        """Fail because the value under the cursor is not of the type that the field holds."""
        written = _brief(self.token.text)
        advice = {
            "text": f"write '{written}' to compare it as a text",
            "number": "write a number",
            "boolean": "write true or false",
            "date": "write a date like 2024-05-01",
        }[type_]
        if type_ == "number" and value.kind is Kind.TEXT and _NUMBER.fullmatch(str(value.value)):
            advice = f"write {_brief(str(value.value))} without quotes"
        self._fail(f"{_brief(name.text)} holds {_HOLDS[type_]}, but {written} is a {value.kind}; {advice}")

    def _field(self, token: _Token) -> tuple[Field, FieldType]:
        """The field that a token names, and its type."""
        if token.kind == "keyword":
            self._fail(f"expected a field name; a field called {token.text} is written `{token.text}`", token)
        if token.kind == "text":
            self._fail(
                "expected a field name; a name with odd signs stands in backticks, not in quotes", token
            )
        if token.kind != "path":
            self._fail("expected a field name", token)
        if token.path[0] in COLUMNS and not token.text.startswith("`"):
            if len(token.path) > 1:
                self._fail(f"{token.path[0]} is a text; it has no parts", token)
            return Field(token.path, is_column=True), "text"
        return Field(token.path), self._type(token)

    def _type(self, token: _Token) -> FieldType:
        if self.fields is None:
            return "mixed"
        name = field_name(token.path)
        if name in self.fields:
            return self.fields[name]
        if any(known.startswith(f"{name}.") for known in self.fields):
            return "object"
        for length in range(len(token.path) - 1, 0, -1):
            outer = self.fields.get(field_name(token.path[:length]))
            if outer in ("object", "mixed"):
                return "mixed"
            if outer is not None:
                self._fail(
                    f"{field_name(token.path[:length])} holds {_HOLDS[outer]}; they have no parts", token
                )
        self._fail(f"no field {_brief(token.text)}; {self._suggestion(name)}", token)

    def _suggestion(self, name: str) -> str:
        known = [*COLUMNS, *(self.fields or {})]
        folded = {field.casefold(): field for field in reversed(known)}
        close = get_close_matches(name.casefold(), folded, n=1, cutoff=_SUGGESTION_CUTOFF)
        if close:
            return f"did you mean {_brief(folded[close[0]])}?"
        listed = ", ".join(_brief(field) for field in known[:_LISTED])
        more = len(known) - _LISTED
        return f"the fields are {listed}" + (f" and {more} more" if more > 0 else "")


def _brief(written: str) -> str:
    """A part of the expression, fit to stand in a message."""
    return _shown(written if len(written) <= _BRIEF else written[: _BRIEF - 1] + "…")


def parse(text: str, fields: Mapping[str, FieldType] | None = None, *, source: str = "--where") -> Condition:
    """The condition that an expression states; the docstring of the module has the language.

    `fields` are the fields that the metadata have, each by its `field_name`, with what they hold. A field
    that is not there is a mistake, and so is comparing one with a value of another type; parts of an
    object that is there may have any name. None leaves out both checks. `source` is where the expression
    comes from, for messages.

    Raises GembError for the first mistake: what is wrong, the expression, and a caret under the character.
    """
    for at, character in enumerate(text[: MAX_LENGTH + 1]):
        if at == MAX_LENGTH:
            raise _mistake(source, text, at, f"{len(text):,} characters are too many; at most {MAX_LENGTH:,}")
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise _mistake(source, text, at, "a character that is not text; the expression must be UTF-8")
    if not text or text.isspace():
        raise GembError(f"{source}: there is no condition; write one such as year >= 2020")
    return _Parser(_Reader(text, source), fields).parse()
