"""`Plan` and `Report`: what a job would do, and what it did.

stdout is data and stderr is talk: a report goes to stdout only when it is what the user asked for
(`product`, as in `gemb info`) or as the one JSON object of `--json`.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gemb.errors import Exit
from gemb.report import terminal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.text import Text

_LONG_WORD = 20
"""Letters of a word in a table that may be folded on a narrow terminal."""
_BETWEEN = 2  # blanks between two columns


@dataclass(frozen=True)
class Table:
    """Rows for people, as the hits of a search; every row has one text a column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    right_aligned: Sequence[str] = ()
    """The columns that hold numbers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job would do, as `--dry-run` shows it; a job derives its own and adds what `run` needs."""

    title: str
    """One line: `would embed 3 files into docs.npy`."""
    rows: Sequence[tuple[str, str]] = ()
    """Label and value, for people, in this order."""
    data: Mapping[str, object] = field(default_factory=dict)
    """The same for programs: the one object that `--json` prints."""
    outputs: Sequence[Path] = ()
    """The files that would be written."""
    tables: Sequence[Table] = ()

    @property
    def exit_code(self) -> Exit:
        """A plan that could be made is a success."""
        return Exit.DONE


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a job did, with the exit code that a scheduler sees."""

    title: str
    """One line: `embedded 11,240 texts into docs.npy in 41 s`."""
    rows: Sequence[tuple[str, str]] = ()
    """Label and value, for people, in this order."""
    data: Mapping[str, object] = field(default_factory=dict)
    """The same for programs: the one object that `--json` prints."""
    outputs: Sequence[Path] = ()
    """The files that were written."""
    tables: Sequence[Table] = ()
    exit_code: Exit = Exit.DONE


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 row`, `2,000 rows`; `plural` where it is not the noun with an s: `2 queries`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def show(
    result: Plan | Report,
    *,
    json: bool = False,
    quiet: bool = False,
    product: bool = False,
    stdout_taken: bool = False,
) -> None:
    """Show a plan or report, once.

    `json` prints `result.data` as one line on stdout. Otherwise it is told to people: on stdout when it is
    the `product` the user asked for, else on stderr, and under `quiet` only when something went wrong.
    `stdout_taken` says that stdout carries rows (`-o -`), so that nothing else is mixed in.
    """
    stdout = sys.stderr if stdout_taken else sys.stdout
    if json:
        stdout.write(as_json(result) + "\n")
    elif product:
        write(result, stdout)
    elif not quiet or result.exit_code != Exit.DONE:
        write(result, sys.stderr)


def as_json(result: Plan | Report) -> str:
    """One line: `result.data`, with `exit_code` and `outputs` where the job did not give them."""
    import orjson

    data = {
        **result.data,
        "outputs": result.data.get("outputs", [str(path) for path in result.outputs]),
        "exit_code": int(result.exit_code),
    }
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(data, default=str, option=options).decode()


def write(result: Plan | Report, stream: TextIO) -> None:
    """Write `result` for people: in colour on a terminal, as plain lines anywhere else."""
    if terminal.is_interactive(stream) or terminal.has_colour(stream):
        console = terminal.console(stream)
        for part in _rendered(result, console.width):
            console.print(part)
    else:
        stream.write("\n".join(_lines(result)) + "\n")


def _lines(result: Plan | Report) -> list[str]:
    """The plain lines: no wrapping, so that they can be searched."""
    width = max((len(label) for label, _ in result.rows), default=0)
    lines = [result.title]
    for label, value in result.rows:
        first, *more = value.split("\n")
        lines.append(f"  {label:<{width}}  {first}".rstrip())
        lines += [f"  {'':<{width}}  {line}".rstrip() for line in more]
    for table in result.tables:
        lines += ["", *([table.title] if table.title else [])]
        cells = [list(table.columns), *(list(row) for row in table.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
        for row in cells:
            padded = [
                f"{text:>{width}}" if name in table.right_aligned else f"{text:<{width}}"
                for text, width, name in zip(row, widths, table.columns, strict=True)
            ]
            lines.append("  ".join(padded).rstrip())
    return lines


def _rendered(result: Plan | Report, width: int) -> "list[RenderableType]":
    """The same with rich: a bold title, coloured labels, tables with a head line where `width` is enough."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[RenderableType] = [Text(result.title, style="bold")]
    if result.rows:
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in result.rows:
            grid.add_row(Text(f"  {label}"), Text(value))
        parts.append(grid)
    for table in result.tables:
        if not _fits(table, width):
            for row in table.rows:
                record = RichTable.grid(padding=(0, 2))
                record.add_column(style="cyan", no_wrap=True)
                record.add_column(overflow="fold")
                for name, text in zip(table.columns, row, strict=True):
                    record.add_row(Text(f"  {name}"), Text(text))
                parts += [Text(), record]
            continue
        shown = RichTable(
            title=table.title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold"
        )
        for name in table.columns:
            shown.add_column(
                name, justify="right" if name in table.right_aligned else "left", overflow="fold"
            )
        for row in table.rows:
            shown.add_row(*(_Name(text) if _is_name(text) else Text(text) for text in row))
        parts.append(shown)
    return parts


def _fits(table: Table, width: int) -> bool:
    """Whether no short word of a table is cut at a terminal's `width`; long ones may be folded."""
    cells = zip(table.columns, *table.rows, strict=True)
    words = (max(len(word) for text in column for word in [*text.split(), ""]) for column in cells)
    return sum(min(longest, _LONG_WORD) + _BETWEEN for longest in words) <= width


def _is_name(text: str) -> bool:
    """Whether `text` is a dotted name: where rich folds it, it would be cut anywhere."""
    return "." in text.strip(".") and " " not in text and not text.replace(".", "").replace(",", "").isdigit()


@dataclass(frozen=True)
class _Name:
    """A dotted name in a table, such as a tensor's; where it needs several lines they end with a dot."""

    text: str

    def __rich_measure__(self, console: "Console", options: "ConsoleOptions") -> "Measurement":
        from rich.measure import Measurement

        return Measurement(max(map(len, self._parts())), len(self.text)).with_maximum(options.max_width)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        from rich.text import Text

        line = ""
        for part in self._parts():
            if line and len(line) + len(part) > options.max_width:
                yield Text(line, overflow="fold")
                line = ""
            line += part
        yield Text(line, overflow="fold")

    def _parts(self) -> list[str]:
        return re.findall(r"[^.]*\.|[^.]+", self.text)
