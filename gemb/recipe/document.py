"""YAML to plain values, with the line of every key.

Built on PyYAML's nodes, with the traps of YAML 1.1 taken out: a key given twice is an error, `1e-5` is a
number, `no` and `on` are texts, `010` is ten, a date stays a text, and tags that make objects are refused.
`${NAME}` and `${NAME:-default}` in a text are filled in from the environment; `$${` is a plain `${`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from gemb.recipe.problems import Key, Place, Problem

# The core schema of YAML 1.2 (section 10.3.2), with decimal integers only plus 0x and 0o.
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED_INT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = re.compile(r"(&\S+\s+)?!")
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{[^}]*\}?")

_MAX_VALUES = 100_000  # aliases of aliases can stand for 10^9 values in 300 bytes


@dataclass(frozen=True)
class Document:
    """The values of one YAML text, where they stand, and what is wrong with the text itself."""

    values: dict[str, object]
    places: Mapping[Key, Place]
    problems: Sequence[Problem]
    is_readable: bool
    """False when the text is no YAML mapping at all; then the values say nothing."""


def parse(text: str) -> Document:
    """The mapping that `text` holds; an empty text is an empty mapping.

    Where a value has a problem, something harmless stands in its place, so that the rest can be checked, too.
    """
    reader = _Reader()
    values = reader.document(text)
    return Document(values, reader.places, reader.problems, reader.is_readable)


def parse_value(text: str) -> tuple[object, list[str]]:
    """The value of an override such as `0.3`, `[1, 2]` or `no`, and what is wrong with it."""
    reader = _Reader()
    value = reader.value_of(text)
    return value, [problem.message for problem in reader.problems]


class _Reader:
    """Reads one text and gathers its problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.is_readable = True
        self.places: dict[Key, Place] = {}
        self._open: set[int] = set()  # nodes being read, to find an alias inside its own anchor
        self._count = 0

    def document(self, text: str) -> dict[str, object]:
        """The mapping at the top of `text`."""
        node = self._compose(text)
        if node is None:
            self.is_readable = not self.problems
            return {}
        if not isinstance(node, yaml.MappingNode):
            self._problem("a recipe is a mapping of keys to values", (), node)
            self.is_readable = False
            return {}
        return self._mapping(node, ())

    def value_of(self, text: str) -> object:
        """The one value in `text`."""
        node = self._compose(text)
        return None if node is None else self._value(node, ())

    def _compose(self, text: str) -> yaml.Node | None:
        loader = yaml.SafeLoader(text) if not _control_character(text) else None
        if loader is None:
            line = text.count("\n", 0, _control_character(text) - 1) + 1
            self.problems.append(Problem("a control character is not allowed here", (), Place(line)))
            return None
        try:
            return loader.get_single_node()
        except yaml.MarkedYAMLError as problem:
            mark = problem.problem_mark or problem.context_mark
            message = " ".join(part for part in (problem.context, problem.problem) if part)
            place = Place(mark.line + 1, mark.column + 1) if mark else None
            self.problems.append(Problem(f"not YAML: {message}", (), place))
            return None
        except RecursionError:
            self.problems.append(Problem("nested too deeply"))
            return None
        finally:
            loader.dispose()

    def _value(self, node: yaml.Node, key: Key) -> object:
        self._count += 1
        if self._count > _MAX_VALUES:
            if self._count == _MAX_VALUES + 1:
                self._problem(f"more than {_MAX_VALUES:,} values", key, node)
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if id(node) in self._open:
            self._problem("an alias stands inside its own anchor", key, node)
            return None
        self._open.add(id(node))
        value = self._mapping(node, key) if isinstance(node, yaml.MappingNode) else self._sequence(node, key)
        self._open.discard(id(node))
        return value

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, object]:
        self._check_tag(node, "tag:yaml.org,2002:map", key)
        values: dict[str, object] = {}
        first_lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self._problem("a key must be a word", key, name_node)
                continue
            name: str = name_node.value
            if name in values:
                self._problem(f"given twice; first on line {first_lines[name]}", (*key, name), name_node)
                continue
            first_lines[name] = name_node.start_mark.line + 1
            self.places[*key, name] = _place(name_node)
            values[name] = self._value(value_node, (*key, name))
        return values

    def _sequence(self, node: yaml.Node, key: Key) -> list[object]:
        self._check_tag(node, "tag:yaml.org,2002:seq", key)
        values = []
        for index, child in enumerate(node.value):
            self.places[*key, index] = _place(child)
            values.append(self._value(child, (*key, index)))
        return values

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> object:
        text: str = node.value
        is_tagged = _is_tagged(node)  # otherwise the tag is PyYAML's guess by YAML 1.1, which is ignored
        if is_tagged and node.tag != "tag:yaml.org,2002:str":
            self._problem(f"the tag {node.tag} is not allowed", key, node)
            return None
        value = text if is_tagged or node.style is not None else plain(text)
        return self._filled(value, key, node) if isinstance(value, str) else value

    def _filled(self, text: str, key: Key, node: yaml.Node) -> str:
        """`text` with its `${NAME:-default}` filled in; the result stays a text."""

        def fill(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(2)
            if match.group() == "$${":
                return "${"
            if name is None:
                self._problem(f"{match.group()} is not ${{NAME}} or ${{NAME:-default}}", key, node)
                return ""
            value = (
                os.environ.get(name) or default
            )  # as in a shell, `:-` also covers a variable set to nothing
            if value is None:
                self._problem(
                    f"the environment has no {name}; set it or write ${{{name}:-default}}", key, node
                )
                return ""
            return value

        return _VARIABLE.sub(fill, text)

    def _check_tag(self, node: yaml.Node, expected: str, key: Key) -> None:
        if node.tag != expected:
            self._problem(f"the tag {node.tag} is not allowed", key, node)

    def _problem(self, message: str, key: Key, node: yaml.Node) -> None:
        self.problems.append(Problem(message, key, _place(node)))


def plain(text: str) -> object:
    """The value of an unquoted scalar, by the core schema of YAML 1.2."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 300 else text
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float("nan") if special.group(3) else float(f"{special.group(1)}inf")
    return text


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _is_tagged(node: yaml.ScalarNode) -> bool:
    """Whether the text itself gives a tag: the node then starts with it, or with its anchor."""
    mark = node.start_mark
    return mark.buffer is not None and _TAG.match(mark.buffer, mark.pointer) is not None


def _control_character(text: str) -> int:
    """1 + the position of the first character that YAML does not allow; 0 when all are fine."""
    match = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return 0 if match is None else match.start() + 1
