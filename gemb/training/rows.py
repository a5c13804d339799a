"""The rows of training files as they stand there: named values, with the line and the bytes of each.

What the columns mean is left to `gemb.training.columns`, finding and opening files to `gemb.text.inputs`.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import orjson

from gemb.errors import GembError
from gemb.text.inputs import BOM, InputFile, lines_of, open_bytes

if TYPE_CHECKING:
    import pyarrow

_PARQUET_ROWS = 256  # decoded at a time
_LONGEST_CSV_FIELD = 1 << 28  # characters; a quote that is never closed must not swallow a huge file whole


class Row(NamedTuple):
    """One row of a file."""

    line: int
    """1-based line where it starts; the row of a Parquet file."""
    values: dict[str, object] | str
    """Column to value, or why the row cannot be read."""
    offset: int = 0
    """Of JSONL: where the row begins, in bytes of the uncompressed file."""
    length: int = 0
    """Of JSONL: its bytes, line end included."""


Wanted = Callable[[Sequence[str]], Sequence[str]]
"""Of the columns that a file has those to read."""


def read_rows(
    file: InputFile, wanted: Wanted, *, header: Sequence[str] | None = None, quoting: bool = True
) -> Iterator[Row]:
    """Every row of a file; streams in constant memory. Empty cells of CSV and TSV are None.

    `wanted` is asked once for CSV, TSV and Parquet, and spares the columns that are not. `header` are the
    columns of CSV and TSV without a header line; without `quoting` a double quote there is a character.

    Raises GembError for what is wrong with the whole file.
    """
    if file.format == "parquet":
        yield from _parquet(file, wanted)
        return
    with open_bytes(file) as stream:
        if file.format == "jsonl":
            yield from _jsonl(file, stream)
        else:
            yield from _csv(file, stream, wanted, header, quoting)


def _jsonl(file: InputFile, stream: io.BufferedReader) -> Iterator[Row]:
    offset = len(BOM) if stream.peek(len(BOM)).startswith(BOM) else 0
    for line, raw in enumerate(lines_of(file, stream), 1):
        values: object
        try:
            values = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            values = None if raw.isspace() else f"broken JSON: {error.msg}"
        else:
            if not isinstance(values, dict):
                values = "not an object with named values"
        if isinstance(values, dict | str):
            yield Row(line, values, offset, len(raw))
        offset += len(raw)


def _csv(
    file: InputFile, stream: io.BufferedReader, wanted: Wanted, header: Sequence[str] | None, quoting: bool
) -> Iterator[Row]:
    """RFC 4180: fields in double quotes may hold delimiters, doubled quotes and line breaks."""
    csv.field_size_limit(_LONGEST_CSV_FIELD)  # of the whole process; the default is 128 Ki characters
    undecodable: list[UnicodeDecodeError] = []
    reader = csv.reader(
        _decoded(lines_of(file, stream), undecodable),
        delimiter="\t" if file.format == "tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        columns = next(reader, []) if header is None else list(header)
    except csv.Error as error:
        raise GembError(f"{file.name}:1: broken header: {error}") from error
    if not columns or undecodable:
        raise GembError(f"{file.name}: no header line in UTF-8; the first line must name the columns")
    _check_names(file, columns)
    keep = set(wanted(columns))
    while True:
        line = reader.line_num + 1
        undecodable.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row(line, f"broken quoting: {error}")
            continue
        if cells is None:
            return
        if undecodable:
            yield Row(line, _not_utf_8(undecodable[0]))
        elif cells and len(cells) != len(columns):
            yield Row(line, f"{len(cells)} columns where the header has {len(columns)}")
        elif cells:
            pairs = zip(columns, cells, strict=True)
            yield Row(line, {column: cell or None for column, cell in pairs if column in keep})


def _decoded(lines: Iterator[bytes], undecodable: list[UnicodeDecodeError]) -> Iterator[str]:
    for raw in lines:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            undecodable.append(error)
            text = raw.decode("utf-8", "replace")
        yield text


def _not_utf_8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} of the row"


def _parquet(file: InputFile, wanted: Wanted) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        # Without pre-buffering a column is read page by page; no row group stands in memory as a whole.
        with pyarrow.parquet.ParquetFile(file.path, pre_buffer=False) as table:
            columns = table.schema_arrow.names
            _check_names(file, columns)
            keep = list(wanted(columns))
            for batch in table.iter_batches(_PARQUET_ROWS, columns=keep, use_threads=False):
                for values in _decoded_rows(batch):
                    line += 1
                    yield Row(line, values)
    except (pyarrow.ArrowException, OSError) as error:
        after = f"the data are damaged after row {line}" if line else "not a Parquet file, or damaged"
        raise GembError(f"{file.name}: {after}: {error}") from error


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


def _check_names(file: InputFile, columns: Sequence[str]) -> None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise GembError(f"{file.name}: two columns are named {', '.join(twice)}; rename one of them")
