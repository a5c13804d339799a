"""The usable rows of a data set by number, from the disk, so that any order of any number of them is cheap.

A data set is read once from end to end before the first step. What cannot be used is counted and written down
with its line; of the rest an index keeps where each row stands (24 bytes a row, on disk). Plain JSONL is
indexed where it lies. Rows of compressed files, CSV, Parquet, BEIR folders and rows that name documents by id
are written out once as plain rows, since none of these can be entered in the middle.

    NAME-1f3a.../
      prepared.json   what was prepared, from which files; written last
      index           offset, line (int64), length, number of the file (uint32) of each usable row
      rows            the rows of files that are not read in place: JSON arrays, one a line
      rejects.jsonl   the other rows: source, line, reason
      order           of labelled texts: the rows sorted by label (int64)
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import accumulate, islice
from pathlib import Path
from struct import Struct
from typing import IO, NamedTuple, Self

import orjson

from gemb.errors import GembError
from gemb.files import Lock, os_errors_explained, read_json, write_json
from gemb.recipe.problems import did_you_mean
from gemb.text.inputs import InputFile, resolve_inputs
from gemb.training.columns import Columns, Example, Lookup, Text, bind, named
from gemb.training.data_recipe import DataSet, Shape, name_of_paths
from gemb.training.documents import beir_files, open_documents, read_judged
from gemb.training.permutation import key_of
from gemb.training.rows import Row, read_rows

_VERSION = 1
_DECIDE_ROWS = ("shape", "columns", "header", "quoting", "split", "limit")  # with the contents of the files
_ENTRY = Struct("<qqII")
_BLOCK_ROWS = 65_536
_REMEMBERED_LAYOUTS = 1024  # rows can have ids as keys; remembering all sets of keys would eat the memory
_REASONS_COUNTED = 30
_FIRST_REJECTS = 5
_WAIT_SECONDS = 24 * 3600.0  # for another process of this run that prepares the same data

OnRows = Callable[[str, int], None]
"""Hears the name of the data set and the rows read so far."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a data set as it was when it was prepared."""

    name: str
    path: str
    size_bytes: int
    mtime_ns: int
    in_place: bool
    """Rows are read from the file itself, and not from `rows`."""


@dataclass(frozen=True, slots=True)
class Label:
    """The rows of one label: `order[start : start + count]`."""

    start: int
    count: int
    one: int
    """A row,"""
    other: int
    """and a row with another text."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepared.json says."""

    version: int
    name: str
    shape: Shape
    files: tuple[SourceFile, ...]
    fingerprint: str
    """Of the contents of the files and of what the recipe says about reading them."""
    size: int
    """Usable rows."""
    rejected: int
    reasons: dict[str, int]
    """Reasons of rejected rows, the most frequent first; the rarest may be missing."""
    first_rejects: tuple[str, ...]
    """`FILE:LINE: reason`."""
    columns: tuple[str, ...]
    """How the columns were bound, one text a layout of rows."""
    with_negatives: int
    """Usable rows with a hard negative."""
    all_queries_equal: bool
    all_positives_equal: bool
    labels: dict[str, Label] = field(default_factory=dict)


class Rows:
    """The usable rows of a data set; `example(i)` reads row i. For one thread at a time."""

    def __init__(self, folder: Path, prepared: Prepared, data: DataSet) -> None:
        self.prepared = prepared
        self.rejects_path = folder / "rejects.jsonl"
        self.name = prepared.name
        self.shape = prepared.shape
        self.size = prepared.size
        self._data = data
        self._layouts: dict[tuple[str, ...], Columns] = {}
        with ExitStack() as opened:
            self._index = _open(folder / "index", opened)
            rows = _open(folder / "rows", opened)
            self._files = [_open(file.path, opened) if file.in_place else rows for file in prepared.files]
            self._order = _open(folder / "order", opened) if prepared.labels else -1
            self._opened = opened.pop_all()

    def example(self, row: int) -> Example:
        """Row number `row` of those that can be used. Raises GembError if the file is not what it was."""
        offset, _, length, file = self._entry(row)
        raw = os.pread(self._files[file], length, offset)
        try:
            values = orjson.loads(raw)
            example = self._bound(values) if self.prepared.files[file].in_place else _unpacked(values)
        except (orjson.JSONDecodeError, GembError):
            example = None
        if example is None:
            raise GembError(f"{self.place(row)}: changed while it was in use; start the run again")
        return example

    def place(self, row: int) -> str:
        """`FILE:LINE`, for messages."""
        _, line, _, file = self._entry(row)
        return f"{self.prepared.files[file].name}:{line}"

    def in_label_order(self, position: int) -> int:
        """The row at a position of the rows sorted by label."""
        return int.from_bytes(os.pread(self._order, 8, 8 * position), "little")

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, row: int) -> tuple[int, int, int, int]:
        offset, line, length, file = _ENTRY.unpack(os.pread(self._index, _ENTRY.size, _ENTRY.size * row))
        return offset, line, length, file

    def _bound(self, values: object) -> Example | None:
        if not isinstance(values, dict):
            return None
        keys = tuple(values)
        if keys not in self._layouts:
            if len(self._layouts) == _REMEMBERED_LAYOUTS:
                self._layouts.clear()
            self._layouts[keys] = _bind(keys, self._data, self.shape)
        example = self._layouts[keys].example(values, None)
        return example if isinstance(example, Example) else None


def open_rows(
    data: DataSet,
    cache: Path,
    *,
    notice: Callable[[str], None] = lambda _: None,
    on_rows: OnRows = lambda _name, _rows: None,
) -> Rows:
    """The usable rows of a data set, prepared in a folder below `cache` unless they are there already.

    Files that have the size and time they had are taken for unchanged. Several processes may ask at once; one
    prepares, the others wait and tell so to `notice`.

    Raises GembError for what is wrong with a file or with all of its rows: an unknown column, no usable row.
    """
    name = name_of(data)
    request = {
        "version": _VERSION,
        "paths": data.paths,
        **data.model_dump(mode="json", include={*_DECIDE_ROWS, "format", "corpus"}),
    }
    slug = re.sub(r"[^\w.-]+", "-", name)[:60]
    folder = cache / f"{slug}-{key_of(orjson.dumps(request).decode()):016x}"
    with os_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "lock", f"data set {name}", _WAIT_SECONDS, notice):
        sources = _sources(data, name)
        prepared = _load(folder, sources)
        if prepared is None:
            prepared = _Preparation(data, name, folder, sources, on_rows).run()
            write_json(folder / "prepared.json", prepared)
    return Rows(folder, prepared, data)


def name_of(data: DataSet) -> str:
    """What reports call a data set: its name, else its first file or folder without suffixes."""
    return data.name or name_of_paths(data.paths)


@dataclass(frozen=True, slots=True)
class _Sources:
    """The files of a data set; of a BEIR folder corpus, queries and qrels."""

    files: tuple[InputFile, ...]
    is_beir: bool
    corpus: InputFile | None

    def all(self) -> tuple[InputFile, ...]:
        return (*self.files, *([self.corpus] if self.corpus else []))


def _sources(data: DataSet, name: str) -> _Sources:
    beir = beir_files(data.paths[0], data.split) if len(data.paths) == 1 else None
    if beir is not None:
        if data.columns or data.corpus or data.shape not in ("auto", "pairs"):
            raise GembError(f"{name}: a BEIR folder has its own columns and corpus; leave these keys out")
        return _Sources(beir, is_beir=True, corpus=None)
    files = resolve_inputs(data.paths, input_format=data.format)
    for file in files:
        if file.is_stream:
            raise GembError(f"{file.name}: training data are read many times; save the stream to a file")
        if file.format not in ("jsonl", "csv", "tsv", "parquet"):
            raise GembError(
                f"{file.name}: holds texts without columns; training data are rows of .jsonl, .csv, .tsv or "
                ".parquet files, or a BEIR folder with queries.jsonl and qrels"
            )
    corpus = resolve_inputs([data.corpus])[0] if data.corpus else None
    return _Sources(tuple(files), is_beir=False, corpus=corpus)


def _load(folder: Path, sources: _Sources) -> Prepared | None:
    """What was prepared in `folder`, if it was finished and its files are as they were."""
    if not (folder / "prepared.json").is_file():
        return None
    values = read_json(folder / "prepared.json")
    values["files"] = tuple(SourceFile(**file) for file in values["files"])
    values["first_rejects"], values["columns"] = tuple(values["first_rejects"]), tuple(values["columns"])
    values["labels"] = {label: Label(**group) for label, group in values["labels"].items()}
    prepared = Prepared(**values)
    now = [(file.name, file.size_bytes, file.mtime_ns) for file in sources.all()]
    then = [(file.name, file.size_bytes, file.mtime_ns) for file in prepared.files]
    return prepared if now == then else None


def _bind(names: Sequence[str], data: DataSet, shape: Shape | None) -> Columns:
    return bind(names, shape=shape or (None if data.shape == "auto" else data.shape), columns=data.columns)


class _Usable(NamedTuple):
    example: Example
    line: int
    file: int
    offset: int
    length: int
    """0 for a row that is not read in place."""


class _Preparation:
    """One pass over the files of a data set."""

    def __init__(self, data: DataSet, name: str, folder: Path, sources: _Sources, on_rows: OnRows) -> None:
        self._data = data
        self._name = name
        self._folder = folder
        self._sources = sources
        self._on_rows = on_rows
        self._shape: Shape | None = None if data.shape == "auto" else data.shape
        self._layouts: dict[tuple[str, ...], Columns] = {}
        self._descriptions: dict[str, None] = {}
        self._seen_columns: dict[str, None] = {}
        self._named = named(data.columns) if data.columns else {}
        self._not_found = set(self._named)
        self._rejected = 0
        self._reasons: Counter[str] = Counter()
        self._first_rejects: list[str] = []

    def run(self) -> Prepared:
        """Writes all files but prepared.json, and says what that holds."""
        folder = self._folder
        with os_errors_explained(folder):
            (folder / "prepared.json").unlink(missing_ok=True)
            with ExitStack() as opened:
                self._index = opened.enter_context((folder / "index").open("wb"))
                self._rows = opened.enter_context((folder / "rows").open("wb"))
                self._rejects = opened.enter_context((folder / "rejects.jsonl").open("wb"))
                seen = _Seen(opened.enter_context((folder / "labels").open("wb")))
                size = 0
                for usable in islice(self._usable(opened), self._data.limit):
                    self._write(usable)
                    seen.add(size, usable.example)
                    size += 1
                groups, size = self._labelled(seen, size) if seen.labels else ({}, size)
            (folder / "labels").unlink()
        self._check(size)
        digest = blake2b(digest_size=16)
        for file in self._sources.all():
            digest.update(file.fingerprint().encode())
        wanted = self._data.model_dump_json(include={*_DECIDE_ROWS})
        digest.update(wanted.encode())
        return Prepared(
            version=_VERSION,
            name=self._name,
            shape=self._shape or "pairs",
            files=tuple(
                SourceFile(file.name, str(file.path), file.size_bytes, file.mtime_ns, self._in_place(file))
                for file in self._sources.all()
            ),
            fingerprint=digest.hexdigest(),
            size=size,
            rejected=self._rejected,
            reasons=dict(self._reasons.most_common()),
            first_rejects=tuple(self._first_rejects),
            columns=tuple(self._descriptions),
            with_negatives=seen.with_negatives,
            all_queries_equal=seen.all_queries_equal,
            all_positives_equal=seen.all_positives_equal,
            labels=groups,
        )

    def _in_place(self, file: InputFile) -> bool:
        plain = file.format == "jsonl" and file.compression == "none"
        return plain and not self._sources.is_beir and self._sources.corpus is None

    def _usable(self, opened: ExitStack) -> Iterator[_Usable]:
        if self._sources.is_beir:
            yield from self._judged()
            return
        lookup: Lookup | None = None
        if self._sources.corpus is not None:
            documents = opened.enter_context(open_documents())
            documents.add("corpus", self._sources.corpus)
            lookup = lambda identifier: documents.find("corpus", identifier)  # noqa: E731
        for number, file in enumerate(self._sources.files):
            in_place = self._in_place(file)
            rows = read_rows(
                file,
                partial(self._wanted, file),
                header=self._data.header,
                quoting=self._data.quoting,
            )
            for row in rows:
                example = row.values if isinstance(row.values, str) else self._example(file, row, lookup)
                if isinstance(example, str):
                    self._reject(file.name, row.line, example)
                else:
                    yield _Usable(example, row.line, number, row.offset, row.length if in_place else 0)
                if row.line % _BLOCK_ROWS == 0:
                    self._on_rows(self._name, row.line)

    def _judged(self) -> Iterator[_Usable]:
        corpus, queries, qrels = self._sources.files
        self._shape = "pairs"
        self._descriptions["query <- queries.jsonl, positive <- corpus.jsonl, by qrels"] = None
        for line, example in read_judged((corpus, queries, qrels)):
            if isinstance(example, str):
                self._reject(qrels.name, line, example)
            else:
                yield _Usable(example, line, 2, 0, 0)

    def _wanted(self, file: InputFile, names: Sequence[str]) -> Sequence[str]:
        columns = self._layout(tuple(names), file, 1)
        return [name for name in names if name not in columns.left_out]

    def _example(self, file: InputFile, row: Row, lookup: Lookup | None) -> Example | str:
        values = row.values
        if isinstance(values, str):
            return values
        try:
            return self._layout(tuple(values), file, row.line).example(values, lookup)
        except GembError as error:
            place = f"{file.name}:{row.line}: "
            raise GembError(f"{place}{str(error).removeprefix(place)}") from error

    def _layout(self, names: tuple[str, ...], file: InputFile, line: int) -> Columns:
        layout = self._layouts.get(names)
        if layout is None:
            try:
                layout = _bind(names, self._data, self._shape)
            except GembError as error:
                raise GembError(f"{file.name}:{line}: {error}") from error
            self._shape = layout.shape
            if len(self._layouts) == _REMEMBERED_LAYOUTS:
                self._layouts.clear()
            self._layouts[names] = layout
            if len(self._descriptions) < _REASONS_COUNTED:
                self._descriptions[str(layout)] = None
            self._not_found.difference_update(names)
            if len(self._seen_columns) < _REMEMBERED_LAYOUTS:
                self._seen_columns.update(dict.fromkeys(names))
        return layout

    def _reject(self, source: str, line: int, reason: str) -> None:
        self._rejected += 1
        if reason in self._reasons or len(self._reasons) < _REASONS_COUNTED:
            self._reasons[reason] += 1
        if len(self._first_rejects) < _FIRST_REJECTS:
            self._first_rejects.append(f"{source}:{line}: {reason}")
        self._rejects.write(orjson.dumps({"source": source, "line": line, "reason": reason}) + b"\n")

    def _write(self, usable: _Usable) -> None:
        offset, length = usable.offset, usable.length
        if not length:
            packed = _packed(usable.example)
            offset, length = self._rows.tell(), len(packed)
            self._rows.write(packed)
        self._index.write(_ENTRY.pack(offset, usable.line, length, usable.file))

    def _labelled(self, seen: "_Seen", size: int) -> tuple[dict[str, Label], int]:
        """Takes out the rows whose label has no second text, and writes the order by label."""
        self._index.flush()
        seen.file.flush()
        alone = {group.number: label for label, group in seen.labels.items() if group.other < 0}
        kept = [label for label, group in seen.labels.items() if group.other >= 0]
        starts = list(accumulate((seen.labels[label].count for label in kept), initial=0))
        new_number = {seen.labels[label].number: number for number, label in enumerate(kept)}
        new_row: dict[int, int] = {}  # of the rows named by groups
        named_rows = {row for label in kept for row in (seen.labels[label].one, seen.labels[label].other)}
        cursor = starts[:-1]
        count = starts[-1]
        with ExitStack() as opened:
            old_index = opened.enter_context((self._folder / "index").open("rb"))
            old_labels = opened.enter_context((self._folder / "labels").open("rb"))
            index = opened.enter_context((self._folder / "kept").open("wb"))
            order = opened.enter_context((self._folder / "order").open("wb"))
            position = 0
            for row in range(size):
                entry = old_index.read(_ENTRY.size)
                number = int.from_bytes(old_labels.read(4), "little")
                if number in alone:
                    _, line, _, file = _ENTRY.unpack(entry)
                    reason = f'no other text has the label "{alone[number]}"'
                    self._reject(self._sources.files[file].name, line, reason)
                    continue
                index.write(entry)
                if row in named_rows:
                    new_row[row] = position
                place = cursor[new_number[number]]
                os.pwrite(order.fileno(), position.to_bytes(8, "little"), 8 * place)
                cursor[new_number[number]] = place + 1
                position += 1
        os.replace(self._folder / "kept", self._folder / "index")
        groups = {}
        for label, start in zip(kept, starts[:-1], strict=True):
            group = seen.labels[label]
            groups[label] = Label(start, group.count, new_row[group.one], new_row[group.other])
        return groups, count

    def _check(self, size: int) -> None:
        """Raises GembError if there is no usable row, or a column that was named is in no row."""
        if self._seen_columns:
            for column in self._named:
                if column in self._not_found:
                    hint = did_you_mean(column, list(self._seen_columns), listing="the rows have")
                    role = self._named[column]
                    raise GembError(f'{self._name}: no row has the column "{column}" ({role}){hint}')
        if size == 0:
            names = ", ".join(file.name for file in self._sources.all())
            if not self._rejected:
                raise GembError(f"{self._name}: no rows in {names}")
            raise GembError(
                f"{self._name}: no usable row; {self._rejected:,} rejected, the first: "
                f"{self._first_rejects[0]}; all are in {self._folder / 'rejects.jsonl'}"
            )


@dataclass(slots=True)
class _Group:
    number: int
    count: int
    text: int
    one: int
    other: int = -1


class _Seen:
    """What can be said about all usable rows together."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.with_negatives = 0
        self.all_queries_equal = self.all_positives_equal = True
        self.labels: dict[str, _Group] = {}
        self._first: Example | None = None

    def add(self, row: int, example: Example) -> None:
        """Row number `row` is `example`."""
        if self._first is None:
            self._first = example
        self.with_negatives += bool(example.negatives)
        self.all_queries_equal &= example.query == self._first.query
        self.all_positives_equal &= example.positives == self._first.positives
        if example.label is None:
            return
        text = key_of(example.query.text)
        group = self.labels.get(example.label)
        if group is None:
            group = self.labels[example.label] = _Group(len(self.labels), 0, text, row)
        group.count += 1
        if group.other < 0 and text != group.text:
            group.other = row
        self.file.write(group.number.to_bytes(4, "little"))


def _packed(example: Example) -> bytes:
    return orjson.dumps(example, default=tuple) + b"\n"


def _unpacked(values: list[object]) -> Example:
    query, positives, negatives, score, label = values
    return Example(
        Text(*query),  # type: ignore[misc]
        tuple(Text(*text) for text in positives),  # type: ignore[attr-defined]
        tuple(Text(*text) for text in negatives),  # type: ignore[attr-defined]
        score,  # type: ignore[arg-type]
        label,  # type: ignore[arg-type]
    )


def _open(path: Path | str, opened: ExitStack) -> int:
    with os_errors_explained(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, descriptor)
    return descriptor
