"""Rows of text out of files: `Record` where a row can be embedded, `Reject` with its reason where not.

Streams in constant memory: one line, one CSV row or one small Parquet batch at a time. Finding and
opening the files stands in `gemb.text.inputs`. Whether a reject stops the job is the job's decision.
"""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

import orjson

from gemb.errors import GembError
from gemb.text.inputs import (
    BOM,
    UTF_16_BOMS,
    InputFile,
    documents_below,
    lines_of,
    open_bytes,
    resolve_inputs,
    sniff_rows,
)

if TYPE_CHECKING:
    import pyarrow.parquet

__all__ = ["InputFile", "ReadOptions", "Record", "Reject", "check_fields", "read_records", "resolve_inputs"]

ID_FIELDS = ("id", "_id", "doc_id", "docid", "custom_id")
TEXT_FIELDS = ("text", "contents", "content", "passage", "body", "sentence", "document")
TITLE_FIELDS = ("title",)
QUERY_ID_FIELDS = ("query_id", "qid", *ID_FIELDS)
QUERY_TEXT_FIELDS = ("query", *TEXT_FIELDS)
"""Of files of queries, where these names say more than the others."""

EMPTY_TEXT = "empty text"
NOT_UTF_8 = "not UTF-8"
"""The reason of a row whose text is empty or white space only."""

_PARQUET_ROWS = 1024  # rows decoded at a time; a page of a column is read as a whole anyway
_LONGEST_CSV_FIELD = 1 << 28  # characters; a quote that is never closed must not swallow a huge file whole
_REMEMBERED_LAYOUTS = 1024  # rows can have ids as keys; remembering all sets of keys would eat the memory
_NO_FIELDS: Mapping[str, object] = MappingProxyType({})


# Not frozen: making one would take 0.7 instead of 0.15 microseconds, for every row. Nobody writes to one.
@dataclass(slots=True)
class Record:
    """One text to embed."""

    id: str
    text: str
    """Without the title. Empty only where there is a title."""
    title: str | None
    line: int
    """1-based line in `source` where the row starts; the row of a Parquet file; 1 for a document."""
    source: str
    """The file as the user named it; `-` is stdin."""
    index: int
    """0-based position in the whole input, rejects counted."""
    fields: Mapping[str, object]
    """The fields besides id, text and title; only with `ReadOptions.keep_fields`."""


@dataclass(slots=True)
class Reject:
    """One row that cannot be read; never silently dropped."""

    source: str
    line: int
    index: int
    id: str | None
    """None where the row is too broken to tell."""
    reason: str

    def __str__(self) -> str:
        """The reject as an error message: `FILE:LINE: REASON`."""
        return f"{self.source}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Which fields of a row are read, and which rows."""

    text_field: str | None = None
    """None: the first of `text_fields` that the row has."""
    title_field: str | None = None
    """None: `TITLE_FIELDS`. A row may lack it."""
    id_field: str | None = None
    """None: the first of `id_fields` that the row has, else its line; `FILE:LINE` for several files."""
    text_fields: tuple[str, ...] = TEXT_FIELDS
    id_fields: tuple[str, ...] = ID_FIELDS
    use_titles: bool = True
    """False where the prompt ignores titles: none is read then, and none makes up for an empty text."""
    keep_fields: bool = False
    """Fill `Record.fields`; reads all columns of a Parquet file."""
    leave_out: frozenset[str] = frozenset()
    """Fields that are not kept; of a Parquet file such columns are not even read."""
    text_optional: bool = False
    """A row without a text is a record with an empty one, unless `text_field` names the field it lacks."""
    limit_rows: int | None = None
    """At most so many rows, rejects counted, from `start` on."""
    start: int = 0
    """Rows to skip, rejects counted: `Record.index` of the first one wanted. Skipped rows are not parsed."""


def read_records(inputs: Sequence[InputFile], options: ReadOptions) -> Iterator[Record | Reject]:
    """Every row of `inputs` in order, as a Record or as a Reject; `index` counts both.

    Blank lines of JSONL and CSV are no rows; a blank text line is a row with an empty text.

    Raises GembError for what is wrong with a whole file: see `check_fields`; compressed data that break
    off; a field named in `options` that no row had; a stream in a format that cannot be streamed.
    """
    rows = _read_all(inputs, options)
    return rows if options.limit_rows is None else itertools.islice(rows, options.limit_rows)


def check_fields(inputs: Sequence[InputFile], options: ReadOptions) -> None:
    """Reads the headers of CSV, TSV and Parquet files, so that a missing column shows before the work starts.

    Raises GembError with all problems at once. Streams and formats without a header pass.
    """
    problems: list[str] = []
    for file in inputs:
        if file.is_stream or file.format not in ("csv", "tsv", "parquet"):
            continue
        rows = _Rows(file, options, _Position(0, 0), number_ids=True)
        try:
            if file.format == "parquet":
                _open_parquet(rows).close()
            else:
                with open_bytes(file) as stream:
                    next(_read_csv(rows, stream, "\t" if file.format == "tsv" else ","), None)
        except GembError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise GembError(problems[0])
    if problems:
        raise GembError("\n  ".join([f"inputs: {len(problems)} problems", *problems]))


def _read_all(inputs: Sequence[InputFile], options: ReadOptions) -> Iterator[Record | Reject]:
    position = _Position(0, options.start)
    wanted = {field for field in (options.text_field, options.title_field, options.id_field) if field}
    seen: dict[str, None] = {}
    for file in inputs:
        rows = _Rows(file, options, position, number_ids=len(inputs) == 1)
        yield from _read_file(rows)
        seen.update(rows.seen_fields)
    # After a resume the rows before `start` were not looked at; lines of plain text have no fields at all.
    if seen and not wanted <= seen.keys() and not options.start:
        names = " and ".join(f'"{field}"' for field in sorted(wanted - seen.keys()))
        files = ", ".join(file.name for file in inputs)
        raise GembError(f"{files}: no row has {names}; the rows have {_few(seen)}")


def _read_file(rows: "_Rows") -> Iterator[Record | Reject]:
    file = rows.file
    if file.format == "folder":
        yield from _read_folder(rows)
        return
    if file.format == "parquet":
        yield from _read_parquet(rows)
        return
    with open_bytes(file) as stream:
        form = sniff_rows(stream) if file.format == "auto" else file.format
        if form == "jsonl":
            yield from _read_jsonl(rows, stream)
        elif form == "csv":
            yield from _read_csv(rows, stream, ",")
        elif form == "tsv":
            yield from _read_csv(rows, stream, "\t")
        elif form == "document":
            yield from _read_document(rows, stream)
        else:
            yield from _read_text(rows, stream)


@dataclass(slots=True)
class _Position:
    """Where the reading stands in the whole input."""

    index: int
    start: int

    @property
    def to_skip(self) -> int:
        return max(0, self.start - self.index)


class _Layout(NamedTuple):
    """Where id, text and title stand in rows with the same keys; None where they have none."""

    id: str | None
    text: str | None
    title: str | None


class _Rows:
    """Makes records and rejects of the raw rows of one file."""

    def __init__(
        self, file: InputFile, options: ReadOptions, position: _Position, *, number_ids: bool
    ) -> None:
        self.file = file
        self.options = options
        self.position = position
        self.seen_fields: dict[str, None] = {}
        self._line_id_prefix = "" if number_ids else f"{file.name}:"
        self._id_fields = (options.id_field,) if options.id_field else options.id_fields
        self._text_fields = (options.text_field,) if options.text_field else options.text_fields
        self._title_fields = (options.title_field,) if options.title_field else TITLE_FIELDS
        self.may_lack_text = options.text_optional and options.text_field is None

    def layout(self, keys: Sequence[str]) -> _Layout:
        if len(self.seen_fields) < _REMEMBERED_LAYOUTS:
            self.seen_fields.update(dict.fromkeys(keys))
        title_fields = self._title_fields if self.options.use_titles else ()
        return _Layout(
            next((field for field in self._id_fields if field in keys), None),
            next((field for field in self._text_fields if field in keys), None),
            next((field for field in title_fields if field in keys), None),
        )

    def line_id(self, line: int) -> str:
        return f"{self._line_id_prefix}{line}"

    def of_mapping(self, row: dict[str, object], layout: _Layout, line: int) -> Record | Reject:
        """The record of one row of named values; consumes one index."""
        position = self.position
        index = position.index
        position.index = index + 1
        name = self.file.name

        id_field, text_field, title_field = layout
        if id_field is None and self.options.id_field:
            return Reject(name, line, index, None, self._no_field(self.options.id_field, row))
        if id_field is None:
            identifier = f"{self._line_id_prefix}{line}"
        else:
            value = row[id_field]
            if type(value) is str:
                identifier = value
            elif type(value) is int:  # not isinstance: True is an int
                identifier = str(value)
            else:
                reason = f'"{id_field}" is {_kind(value)}, not a string or an integer'
                return Reject(name, line, index, None, reason)
            if not identifier:
                return Reject(name, line, index, None, f'"{id_field}" is empty')

        if text_field is None:
            if not self.may_lack_text:
                return Reject(name, line, index, identifier, self._no_field(self._text_fields[0], row))
            text: object = None
        else:
            text = row[text_field]
        if text is None and self.options.text_optional:
            text = ""
        if type(text) is not str:
            # A line of an OpenAI batch file: {"custom_id": ..., "body": {"input": ...}}.
            if type(text) is dict and text_field == "body" and "input" in text:
                text = text["input"]
                text_field = "body.input"
            if type(text) is not str:
                reason = f'"{text_field}" is {_kind(text)}, not a string'
                return Reject(name, line, index, identifier, reason)

        title = None
        if title_field is not None:
            value = row[title_field]
            if type(value) is str:
                title = value
            elif value is not None:
                reason = f'"{title_field}" is {_kind(value)}, not a string'
                return Reject(name, line, index, identifier, reason)
        if (not text or text.isspace()) and (not title or title.isspace()) and not self.options.text_optional:
            return Reject(name, line, index, identifier, EMPTY_TEXT)

        fields = _NO_FIELDS
        if self.options.keep_fields:
            out = self.options.leave_out
            fields = {key: value for key, value in row.items() if key not in layout and key not in out}
        return Record(identifier, text, title, line, name, index, fields)

    def of_text(self, text: str, line: int, identifier: str, source: str) -> Record | Reject:
        """The record of a text without fields; consumes one index."""
        index = self.position.index
        self.position.index = index + 1
        if not text or text.isspace():
            return Reject(source, line, index, identifier, EMPTY_TEXT)
        return Record(identifier, text, None, line, source, index, _NO_FIELDS)

    def reject(
        self, line: int, reason: str, identifier: str | None = None, source: str | None = None
    ) -> Reject:
        """A row that has no values; consumes one index."""
        index = self.position.index
        self.position.index = index + 1
        return Reject(source or self.file.name, line, index, identifier, reason)

    def _no_field(self, field: str, row: dict[str, object]) -> str:
        return f'no "{field}"; this line has {_few(row) if row else "no fields"}'

    def check_columns(self, columns: Sequence[str]) -> _Layout:
        """The layout of a file with a header; GembError for a column that is missing or there twice."""
        name = self.file.name
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise GembError(f"{name}: two columns are named {_few(twice)}; rename one of them")
        layout = self.layout(columns)
        if layout.text is None and not self.may_lack_text:
            wanted = f'"{self._text_fields[0]}"'
            raise GembError(f"{name}: no column {wanted}; it has {_few(columns)}; name one with --text-field")
        for option, field in (
            ("--id-field", self.options.id_field),
            ("--title-field", self.options.title_field),
        ):
            if field and field not in columns:
                raise GembError(f'{name}: no column "{field}"; it has {_few(columns)}; check {option}')
        return layout


def _read_jsonl(rows: _Rows, stream: io.BufferedReader) -> Iterator[Record | Reject]:
    lines = enumerate(lines_of(rows.file, stream), 1)
    for _ in range(rows.position.to_skip):
        for _, raw in lines:
            if not raw.isspace():
                rows.position.index += 1
                break
        else:
            return
    layouts: dict[tuple[str, ...], _Layout] = {}
    loads = orjson.loads
    make = rows.of_mapping
    for line, raw in lines:
        try:
            row = loads(raw)
        except orjson.JSONDecodeError as error:
            if not raw.isspace():
                yield rows.reject(line, _broken_json(raw, error))
            continue
        if type(row) is dict:
            keys = tuple(row)
            layout = layouts.get(keys)
            if layout is None:
                if len(layouts) == _REMEMBERED_LAYOUTS:
                    layouts.clear()
                layout = layouts[keys] = rows.layout(keys)
            yield make(row, layout, line)
        elif type(row) is str:
            yield rows.of_text(row, line, rows.line_id(line), rows.file.name)
        else:
            yield rows.reject(line, f"{_kind(row)}, not an object with a text")


def _broken_json(raw: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        row = raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as undecodable:
        return _not_utf_8(undecodable)
    column = min(error.pos, len(row)) + 1
    if "surrogate" in error.msg:
        return f"broken JSON at column {column}: a lone surrogate (half a character) in a \\u escape"
    return f"broken JSON at column {column}: {error.msg}"


def _not_utf_8(error: UnicodeDecodeError) -> str:
    return f"{NOT_UTF_8}: byte 0x{error.object[error.start]:02x} at byte {error.start} of the row"


def _read_text(rows: _Rows, stream: io.BufferedReader) -> Iterator[Record | Reject]:
    for line, raw in enumerate(lines_of(rows.file, stream), 1):
        if rows.position.to_skip:
            rows.position.index += 1
            continue
        identifier = rows.line_id(line)
        try:
            text = raw.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            yield rows.reject(line, _not_utf_8(error), identifier)
            continue
        yield rows.of_text(text, line, identifier, rows.file.name)


def _read_csv(rows: _Rows, stream: io.BufferedReader, delimiter: str) -> Iterator[Record | Reject]:
    """RFC 4180: fields in double quotes may hold delimiters, doubled quotes and line breaks."""
    # A setting of the whole process; the default of 128 Ki characters is too small for a document in a field.
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    undecodable: list[UnicodeDecodeError] = []
    reader = csv.reader(_decoded(lines_of(rows.file, stream), undecodable), delimiter=delimiter, strict=True)
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise GembError(f"{rows.file.name}:1: broken header: {error}") from error
    if undecodable:
        raise GembError(f"{rows.file.name}:1: broken header: {_not_utf_8(undecodable[0])}")
    if not columns:
        raise GembError(f"{rows.file.name}: no header line; the first line must name the columns")
    layout = rows.check_columns(columns)
    while True:
        line = reader.line_num + 1
        undecodable.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            values, broken = [], f"broken quoting: {error}"
        else:
            if values is None:
                return
            if not values:
                continue
            broken = ""
        if rows.position.to_skip:
            rows.position.index += 1
        elif undecodable:
            yield rows.reject(line, _not_utf_8(undecodable[0]))
        elif broken:
            yield rows.reject(line, broken)
        elif len(values) != len(columns):
            yield rows.reject(line, f"{len(values)} columns where the header has {len(columns)}")
        else:
            yield rows.of_mapping(dict(zip(columns, values, strict=True)), layout, line)


def _decoded(lines: Iterator[bytes], undecodable: list[UnicodeDecodeError]) -> Iterator[str]:
    for raw in lines:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            undecodable.append(error)
            text = raw.decode("utf-8", "replace")
        yield text


def _read_parquet(rows: _Rows) -> Iterator[Record | Reject]:
    import pyarrow

    name = rows.file.name
    line = 0
    with _open_parquet(rows) as file:
        columns = file.schema_arrow.names
        layout = rows.check_columns(columns)
        wanted = [
            column
            for column in columns
            if column in layout or (rows.options.keep_fields and column not in rows.options.leave_out)
        ]
        groups: list[int] = []
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if not groups and group_rows <= rows.position.to_skip:
                rows.position.index += group_rows
                line += group_rows
            else:
                groups.append(group)
        batches = file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=wanted, use_threads=False)
        try:
            for batch in batches:
                for row in _decoded_rows(batch):
                    line += 1
                    if rows.position.to_skip:
                        rows.position.index += 1
                    elif isinstance(row, str):
                        yield rows.reject(line, row)
                    else:
                        yield rows.of_mapping(row, layout, line)
        except (pyarrow.ArrowException, OSError) as error:
            raise GembError(f"{name}: the Parquet data are damaged after row {line}: {error}") from error


def _decoded_rows(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, object] | str]:
    """The rows of a batch; in place of a row that is not UTF-8, which Arrow does not check, the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield _not_utf_8(error)


def _open_parquet(rows: _Rows) -> "pyarrow.parquet.ParquetFile":
    import pyarrow
    import pyarrow.parquet

    name, path = rows.file.name, rows.file.path
    if path is None or rows.file.is_stream:
        raise GembError(f"{name}: Parquet cannot be read from a stream; save it to a file first")
    try:
        # Without pre-buffering a column is read page by page; no row group stands in memory as a whole.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise GembError(f"{name}: not a Parquet file, or damaged: {error}") from error
    layout = rows.check_columns(file.schema_arrow.names)
    types = pyarrow.types
    for column, rule in (
        (layout.id, "strings or integers"),
        (layout.text, "strings"),
        (layout.title, "strings"),
    ):
        if column is None:
            continue
        held = file.schema_arrow.field(column).type
        if types.is_dictionary(held):
            held = held.value_type
        is_text = types.is_string(held) or types.is_large_string(held) or types.is_string_view(held)
        if not (is_text or (column == layout.id and types.is_integer(held))):
            raise GembError(f'{name}: column "{column}" holds {held}, not {rule}')
    return file


def _read_folder(rows: _Rows) -> Iterator[Record | Reject]:
    folder = cast(Path, rows.file.path)
    for path in documents_below(folder):
        if rows.position.to_skip:
            rows.position.index += 1
            continue
        relative = path.relative_to(folder)
        source = str(Path(rows.file.name) / relative)
        try:
            data = path.read_bytes()
        except OSError as error:  # it was there when the folder was listed
            yield rows.reject(1, f"cannot be read: {error.strerror or error}", relative.as_posix(), source)
            continue
        yield _document(rows, source, relative.as_posix(), data)


def _read_document(rows: _Rows, stream: io.BufferedReader) -> Iterator[Record | Reject]:
    if rows.position.to_skip:
        rows.position.index += 1
        return
    yield _document(rows, rows.file.name, rows.file.name, b"".join(lines_of(rows.file, stream)))


def _document(rows: _Rows, source: str, identifier: str, data: bytes) -> Record | Reject:
    try:
        identifier.encode()
    except UnicodeEncodeError:
        return rows.reject(1, "its path is not UTF-8, so it gives no id; rename it", None, source)
    if data.startswith(UTF_16_BOMS):
        return rows.reject(1, "UTF-16, not UTF-8", identifier, source)
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        return rows.reject(1, _not_utf_8(error), identifier, source)
    return rows.of_text(text, 1, identifier, source)


def _few(names: Iterable[str]) -> str:
    """The names for a message; a row can have thousands."""
    names = list(names)
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _kind(value: object) -> str:
    """What a JSON value is called."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"
