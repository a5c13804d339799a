"""Rows of text out of files, and what is said about rows that cannot be read."""

import csv
import gzip
import io
import itertools
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gemb.errors import Exit, GembError
from gemb.text.inputs import Format
from gemb.text.records import ReadOptions, Record, Reject, check_fields, read_records, resolve_inputs

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names in messages."""
    monkeypatch.chdir(tmp_path)


def write(name: str, data: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return name


def read(*names: str, form: Format = "auto", options: ReadOptions | None = None) -> list[Record | Reject]:
    return list(read_records(resolve_inputs(names, input_format=form), options or ReadOptions()))


def texts(rows: list[Record | Reject]) -> list[tuple[str, str]]:
    assert all(isinstance(row, Record) for row in rows), rows
    return [(row.id, row.text) for row in rows if isinstance(row, Record)]


def reasons(rows: list[Record | Reject]) -> list[str]:
    return [str(row) for row in rows if isinstance(row, Reject)]


# The same rows in every format.

ROWS = [
    {"id": "a", "title": "Ä title", "text": 'one, "two"\nthree\tfour'},
    {"id": "b", "title": "", "text": " 中文 😀 "},
    {"id": "c", "title": "t", "text": "x" * 300_000},
]


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def as_csv(rows: list[dict[str, str]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, str]], **options: object) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, **options)
    return out.getvalue()


PACK: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "jsonl": as_jsonl,
    "csv": lambda rows: as_csv(rows, ","),
    "tsv": lambda rows: as_csv(rows, "\t"),
    "parquet": lambda rows: as_parquet(rows, row_group_size=2000),
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_every_format_gives_the_same_records(form: str, suffix: str, bom: bytes) -> None:
    data = bom + PACK[form](ROWS)
    if suffix == ".gz":
        data = gzip.compress(data)
    if suffix == ".zst":
        data = zstandard.compress(data)
    rows = read(write(f"rows.{form}{suffix}", data))
    assert texts(rows) == [(row["id"], row["text"]) for row in ROWS]
    assert [row.title for row in rows if isinstance(row, Record)] == ["Ä title", "", "t"]
    assert [row.index for row in rows] == [0, 1, 2]


def test_parquet_gives_the_same_records_as_jsonl() -> None:
    expected = read(write("rows.jsonl", as_jsonl(ROWS)))
    rows = read(write("rows.parquet", as_parquet(ROWS, row_group_size=2)))
    for row, other in zip(rows, expected, strict=True):
        assert isinstance(row, Record)
        assert isinstance(other, Record)
        assert (row.id, row.text, row.title, row.line, row.index) == (
            (other.id, other.text, other.title, other.line, other.index)
        )


@given(
    st.lists(
        st.fixed_dictionaries({"id": st.text(min_size=1), "text": st.text(min_size=1), "title": st.text()}),
        min_size=1,
        max_size=8,
    )
)
def test_csv_reads_what_the_csv_module_writes(rows: list[dict[str, str]]) -> None:
    rows = [row for row in rows if not row["text"].isspace()] or [{"id": "i", "text": "t", "title": ""}]
    with pytest.MonkeyPatch.context() as patch:
        stdin = io.TextIOWrapper(io.BytesIO(as_csv(rows, ",")))
        patch.setattr(sys, "stdin", stdin)
        found = read("-", form="csv")
    assert [(row.id, row.text, row.title) for row in found if isinstance(row, Record)] == (
        [(row["id"], row["text"], row["title"]) for row in rows]
    )


# Where a resumed job goes on.


def many_rows(count: int) -> list[dict[str, str]]:
    return [{"id": str(number), "title": "", "text": f"text {number}"} for number in range(count)]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "txt", "docs"])
def test_a_start_gives_the_rest_of_the_whole_reading(form: str) -> None:
    rows = many_rows(40)
    for number, part in enumerate((rows[:13], rows[13:14], rows[14:])):
        name = f"part{number}.{form}"
        if form == "docs":
            for row in part:
                write(f"{name}/{row['id']}.txt", row["text"])
        elif form == "txt":
            write(name, "".join(f"{row['text']}\n" for row in part))
        elif form == "csv":
            # A row that lasts two lines and one with broken quoting count as a row each.
            broken = '"","two\nlines",x\n"a"b,c,d\n'
            write(name, as_csv(part, ",") + broken.encode())
        elif form == "parquet":
            write(name, as_parquet(part, row_group_size=5))
        else:
            write(name, b"\n" + as_jsonl(part) + b'  \n{"broken"\n')
    names = [f"part{number}.{form}" for number in range(3)]
    whole = read(*names)
    assert [row.index for row in whole] == list(range(len(whole)))
    for start in range(len(whole) + 2):
        assert read(*names, options=ReadOptions(start=start)) == whole[start:], start
    for limit in (0, 1, 14, 100):
        options = ReadOptions(start=3, limit_rows=limit)
        assert read(*names, options=options) == whole[3 : 3 + limit]


# Fields.


@pytest.mark.parametrize("field", ["text", "contents", "content", "passage", "body", "sentence", "document"])
def test_the_text_has_any_of_the_usual_names(field: str) -> None:
    assert texts(read(write("a.jsonl", json.dumps({"id": "i", field: "t"})))) == [("i", "t")]
    assert texts(read(write("a.csv", f"id,{field}\ni,t\n"))) == [("i", "t")]


@pytest.mark.parametrize("field", ["id", "_id", "doc_id", "docid", "custom_id"])
def test_the_id_has_any_of_the_usual_names(field: str) -> None:
    assert texts(read(write("a.jsonl", json.dumps({"text": "t", field: "i"})))) == [("i", "t")]


def test_the_first_of_several_names_wins_whatever_the_order_in_the_row() -> None:
    row = {"content": "no", "text": "yes", "_id": "no", "id": "yes"}
    reverse = dict(reversed(row.items()))
    assert (
        texts(read(write("a.jsonl", f"{json.dumps(row)}\n{json.dumps(reverse)}\n"))) == [("yes", "yes")] * 2
    )


def test_named_fields_win_over_the_usual_ones() -> None:
    row = {"id": "no", "key": 7, "text": "no", "summary": "yes", "title": "no", "head": "yes"}
    options = ReadOptions(text_field="summary", title_field="head", id_field="key")
    (record,) = read(write("a.jsonl", json.dumps(row)), options=options)
    assert isinstance(record, Record)
    assert (record.id, record.text, record.title) == ("7", "yes", "yes")


def test_other_fields_are_kept_only_when_asked_for() -> None:
    row = {"id": "i", "text": "t", "year": 1952, "tags": ["a", None]}
    name = write("a.jsonl", json.dumps(row))
    (record,) = read(name)
    assert isinstance(record, Record)
    assert record.fields == {}
    (record,) = read(name, options=ReadOptions(keep_fields=True))
    assert isinstance(record, Record)
    assert record.fields == {"year": 1952, "tags": ["a", None]}
    (record,) = read(write("a.parquet", as_parquet([row])), options=ReadOptions(keep_fields=True))  # type: ignore[list-item]
    assert isinstance(record, Record)
    assert record.fields == {"year": 1952, "tags": ["a", None]}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_fields_left_out_are_not_kept_and_a_column_of_them_is_not_read(form: str) -> None:
    rows = [{"id": "a", "text": "x", "year": 1, "embedding": [0.5, 1.5]}]
    if form == "jsonl":
        name = write("docs.jsonl", orjson.dumps(rows[0]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "docs.parquet")
        name = "docs.parquet"
    options = ReadOptions(keep_fields=True, leave_out=frozenset({"embedding", "none"}))
    (row,) = read(name, options=options)
    assert isinstance(row, Record)
    assert row.fields == {"year": 1}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_text_may_be_missing_where_it_is_optional_and_not_named(form: str) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": None}, {"id": "c", "text": " "}]
    bare = [{"id": "a"}, {"id": "b"}]
    if form == "jsonl":
        names = [
            write(name, b"".join(orjson.dumps(row) + b"\n" for row in some))
            for name, some in (("docs.jsonl", rows), ("bare.jsonl", bare))
        ]
    else:
        names = ["docs.parquet", "bare.parquet"]
        for name, some in zip(names, (rows, bare), strict=True):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), name)
    optional = ReadOptions(text_optional=True)
    assert texts(read(names[0], options=optional)) == [("a", "x"), ("b", ""), ("c", " ")]
    assert texts(read(names[1], options=optional)) == [("a", ""), ("b", "")]
    named = ReadOptions(text_optional=True, text_field="text")
    with pytest.raises(GembError, match='no column "text"' if form == "parquet" else 'no row has "text"'):
        read(names[1], options=named)


def test_integer_ids_become_decimal_strings() -> None:
    assert texts(
        read(write("a.jsonl", '{"id": 18446744073709551615, "text": "t"}\n{"id": -7, "text": "t"}'))
    ) == [
        ("18446744073709551615", "t"),
        ("-7", "t"),
    ]
    table = pyarrow.table({"docid": pyarrow.array([3], pyarrow.uint8()), "text": ["t"]})
    pyarrow.parquet.write_table(table, "a.parquet")
    assert texts(read("a.parquet")) == [("3", "t")]


def test_rows_without_an_id_take_the_line_number_which_counts_blank_lines() -> None:
    assert texts(read(write("a.jsonl", '\n{"text": "x"}\n\r\n{"text": "y"}\n'))) == [("2", "x"), ("4", "y")]


def test_line_numbers_of_several_files_do_not_collide() -> None:
    write("a.jsonl", '{"text": "x"}\n"bare"\n'), write("b.txt", "y\n"), write("c.csv", "text\nz\n")
    assert texts(read("a.jsonl", "b.txt", "c.csv")) == [
        ("a.jsonl:1", "x"),
        ("a.jsonl:2", "bare"),
        ("b.txt:1", "y"),
        ("c.csv:2", "z"),
    ]


def test_bare_strings_are_texts() -> None:
    assert texts(read(write("a.jsonl", '"one"\n"two"\n'))) == [("1", "one"), ("2", "two")]


def test_openai_batch_lines_are_read() -> None:
    line = {
        "custom_id": "request-1",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "m", "input": "the text"},
    }
    assert texts(read(write("batch.jsonl", json.dumps(line)))) == [("request-1", "the text")]
    line["body"] = {"model": "m", "input": ["a", "b"]}
    assert reasons(read(write("batch.jsonl", json.dumps(line)))) == [
        'batch.jsonl:1: "body.input" is a list, not a string'
    ]


def test_a_title_makes_up_for_an_empty_text_unless_titles_are_not_used() -> None:
    name = write("a.jsonl", '{"id": "i", "title": "only a title", "text": ""}')
    (record,) = read(name)
    assert isinstance(record, Record)
    assert (record.text, record.title) == ("", "only a title")
    assert reasons(read(name, options=ReadOptions(use_titles=False))) == ["a.jsonl:1: empty text"]


# Plain text, documents, stdin.


def test_a_text_file_is_one_text_a_line_and_a_missing_last_line_end_is_no_difference() -> None:
    expected = [("1", "one"), ("2", " two\u2028still two ")]
    assert texts(read(write("a.txt", "one\n two\u2028still two \n"))) == expected
    assert texts(read(write("a.txt", "one\r\n two\u2028still two \r\n"))) == expected
    assert texts(read(write("a.txt", "one\n two\u2028still two "))) == expected


def test_a_folder_is_one_document_a_file() -> None:
    write("docs/b.md", "# B\n\ntext\n"), write("docs/a/x.txt", "\ufeffX\n"), write("docs/empty.txt", " \n")
    write("docs/bad.txt", b"ok \xff"), write("docs/wide.txt", "x".encode("utf-16"))
    rows = read("docs")
    assert [(row.id, row.source) for row in rows] == [
        ("a/x.txt", "docs/a/x.txt"),
        ("b.md", "docs/b.md"),
        ("bad.txt", "docs/bad.txt"),
        ("empty.txt", "docs/empty.txt"),
        ("wide.txt", "docs/wide.txt"),
    ]
    assert [row.text for row in rows if isinstance(row, Record)] == ["X\n", "# B\n\ntext\n"]
    assert reasons(rows) == [
        "docs/bad.txt:1: not UTF-8: byte 0xff at byte 3 of the row",
        "docs/empty.txt:1: empty text",
        "docs/wide.txt:1: UTF-16, not UTF-8",
    ]


def test_a_markdown_file_is_one_document() -> None:
    assert texts(read(write("notes/a.md", "one\ntwo\n"))) == [("notes/a.md", "one\ntwo\n")]
    assert texts(read(write("a.txt", "one\ntwo\n"), form="document")) == [("a.txt", "one\ntwo\n")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"id": "i", "text": "t"}\n', [("i", "t")]),
        (b'\xef\xbb\xbf\n \t{"id": "i", "text": "t"}\n', [("i", "t")]),
        (b"plain\n", [("1", "plain")]),
        (b"[1] a list?\n", [("1", "[1] a list?")]),
        # mtime: else its bytes, and with them the name of the test, change from second to second.
        (gzip.compress(b'{"id": "i", "text": "t"}\n', mtime=0), [("i", "t")]),
        (zstandard.compress(b"plain\n"), [("1", "plain")]),
        (b"", []),
    ],
)
def test_stdin_is_told_by_its_first_byte(
    data: bytes, expected: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert texts(read("-")) == expected
    assert not sys.stdin.closed


def test_the_input_format_of_stdin_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"id,text\ni,t\n")))
    assert texts(read("-", form="csv")) == [("i", "t")]


def test_parquet_on_a_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GembError) as caught:
        read("-", form="parquet")
    assert str(caught.value) == "-: Parquet cannot be read from a stream; save it to a file first"


# Rows that cannot be read.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": 1, "text": ', "broken JSON at column 19: unexpected end of data"),
        (b'{"text": "x"} {', "broken JSON at column 15: unexpected content after document"),
        (b'{"text": NaN}', "broken JSON at column 10: unexpected character, expected a JSON value"),
        (b"nonsense", "broken JSON at column 1: invalid literal, expected 'null'"),
        (b"[1, 2]", "a list, not an object with a text"),
        (b"12", "the number 12, not an object with a text"),
        (b"null", "null, not an object with a text"),
        (b'{"query": "q", "passages": []}', 'no "text"; this line has query, passages'),
        (b"{}", 'no "text"; this line has no fields'),
        (b'{"text": null}', '"text" is null, not a string'),
        (b'{"text": 1.5}', '"text" is the number 1.5, not a string'),
        (b'{"text": true}', '"text" is true, not a string'),
        (b'{"text": ["a"]}', '"text" is a list, not a string'),
        (b'{"text": {"en": "a"}}', '"text" is an object, not a string'),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\t\\u3000"}', "empty text"),
        (b'""', "empty text"),
        (
            b'{"text": "half \\ud83d"}',
            "broken JSON at column 16: a lone surrogate (half a character) in a \\u escape",
        ),
        (b'{"text": "ok \xff"}', "not UTF-8: byte 0xff at byte 13 of the row"),
        (b'{"text": "ok \xed\xa0\x80"}', "not UTF-8: byte 0xed at byte 13 of the row"),
        (b'{"id": null, "text": "x"}', '"id" is null, not a string or an integer'),
        (b'{"id": 1.0, "text": "x"}', '"id" is the number 1.0, not a string or an integer'),
        (b'{"id": false, "text": "x"}', '"id" is false, not a string or an integer'),
        (b'{"id": "", "text": "x"}', '"id" is empty'),
        (b'{"text": "x", "title": 5}', '"title" is the number 5, not a string'),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason_and_the_next_is_read(line: bytes, reason: str) -> None:
    name = write("a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(name)
    assert isinstance(before, Record)
    assert isinstance(bad, Reject)
    assert isinstance(after, Record)
    assert str(bad) == f"a.jsonl:2: {reason}"
    assert (bad.index, after.index, after.line) == (1, 2, 3)


def test_a_reject_names_the_id_of_its_row() -> None:
    rows = read(write("a.jsonl", '{"_id": 5, "text": ""}\n{"_id": "x"}\n{'))
    assert [row.id for row in rows] == ["5", "x", None]


def test_rows_of_ten_thousand_different_keys_are_named_in_part() -> None:
    row = {f"key{number}": number for number in range(10_000)}
    assert reasons(read(write("a.jsonl", json.dumps(row))))[0].endswith("key10, key11 and 9988 more")


def test_csv_line_numbers_are_those_where_the_row_starts() -> None:
    rows = read(write("a.csv", 'id,text\n1,"two\nlines ""q"""\n\n2,x\n3\n4,a,b\n5,"a"b\n6,\n7,y\n'))
    assert [(row.id, row.line) for row in rows if isinstance(row, Record)] == [("1", 2), ("2", 5), ("7", 10)]
    assert reasons(rows) == [
        "a.csv:6: 1 columns where the header has 2",
        "a.csv:7: 3 columns where the header has 2",
        "a.csv:8: broken quoting: ',' expected after '\"'",
        "a.csv:9: empty text",
    ]


def test_a_csv_quote_that_is_never_closed_is_a_reject_of_the_row_where_it_opens() -> None:
    rows = read(write("a.csv", 'id,text\n1,x\n2,"y\n3,z\n'))
    assert reasons(rows) == ["a.csv:3: broken quoting: unexpected end of data"]
    assert len(rows) == 2


def test_csv_rows_that_are_not_utf_8_are_rejected_alone() -> None:
    rows = read(write("a.csv", b'id,text\n1,x\n2,"y\n\xe4"\n3,z\n'))
    assert reasons(rows) == ["a.csv:3: not UTF-8: byte 0xe4 at byte 0 of the row"]
    assert [row.id for row in rows if isinstance(row, Record)] == ["1", "3"]


def test_a_text_line_that_is_not_utf_8_or_blank_is_rejected() -> None:
    assert reasons(read(write("a.txt", b"ok\n\xc3\n\nok\n"))) == [
        "a.txt:2: not UTF-8: byte 0xc3 at byte 0 of the row",
        "a.txt:3: empty text",
    ]


def test_parquet_rows_that_are_null_or_not_utf_8_are_rejected_alone() -> None:
    texts_ = pyarrow.array([b"a", b"\xff", None, b"d"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1", "2", "3", None], "text": texts_}), "a.parquet")
    assert reasons(read("a.parquet")) == [
        "a.parquet:2: not UTF-8: byte 0xff at byte 0 of the row",
        'a.parquet:3: "text" is null, not a string',
        'a.parquet:4: "id" is null, not a string or an integer',
    ]


# Files that cannot be read at all.


def refusal(*names: str, options: ReadOptions | None = None) -> str:
    with pytest.raises(GembError) as caught:
        read(*names, options=options)
    assert caught.value.exit_code is Exit.USAGE
    return str(caught.value)


def test_a_missing_column_is_told_with_those_there_are() -> None:
    write("a.csv", "key,summary\n1,x\n")
    expected = 'a.csv: no column "text"; it has key, summary; name one with --text-field'
    assert refusal("a.csv") == expected
    assert refusal("a.csv", options=ReadOptions(text_field="summary", id_field="id")) == (
        'a.csv: no column "id"; it has key, summary; check --id-field'
    )


def test_check_fields_tells_all_headers_at_once_and_passes_good_ones() -> None:
    (
        write("a.csv", "key,summary\n1,x\n"),
        write("b.tsv", ""),
        write("c.csv", "text,text\n"),
        write("d.csv", "text\n"),
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), "e.parquet")
    write("f.parquet", "not parquet at all"), write("g.jsonl", "{")
    with pytest.raises(GembError) as caught:
        check_fields(resolve_inputs(["*"]), ReadOptions())
    lines = str(caught.value).splitlines()
    assert lines[:5] == [
        "inputs: 5 problems",
        '  a.csv: no column "text"; it has key, summary; name one with --text-field',
        "  b.tsv: no header line; the first line must name the columns",
        "  c.csv: two columns are named text; rename one of them",
        '  e.parquet: column "text" holds int64, not strings',
    ]
    assert lines[5].startswith("  f.parquet: not a Parquet file, or damaged: ")


def test_a_field_that_no_row_has_is_told_after_the_last_row() -> None:
    write("a.jsonl", '{"id": "i", "text": "t"}\n' * 3)
    rows = read_records(resolve_inputs(["a.jsonl"]), ReadOptions(text_field="summary", title_field="head"))
    rejects = list(itertools.islice(rows, 3))
    assert reasons(rejects)[0] == 'a.jsonl:1: no "summary"; this line has id, text'
    with pytest.raises(GembError) as caught:
        next(rows)
    assert str(caught.value) == 'a.jsonl: no row has "head" and "summary"; the rows have id, text'


def test_a_row_without_the_id_field_that_was_named_is_refused_and_gets_no_number_for_an_id() -> None:
    write("a.jsonl", '{"key": "i", "text": "t"}\n{"text": "t"}\n')
    first, second = read_records(resolve_inputs(["a.jsonl"]), ReadOptions(id_field="key"))
    assert isinstance(first, Record)
    assert first.id == "i"
    assert reasons([second]) == ['a.jsonl:2: no "key"; this line has text']


def test_a_damaged_parquet_file_says_after_which_row() -> None:
    rows = [{"id": str(number), "text": random.Random(number).randbytes(20).hex()} for number in range(5000)]
    data = bytearray(as_parquet(rows, row_group_size=1000, compression="zstd", use_dictionary=False))
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    write("a.parquet", bytes(data))
    assert refusal("a.parquet").startswith("a.parquet: the Parquet data are damaged after row ")


def test_zero_rows_are_no_error_here() -> None:
    assert read(write("a.jsonl", ""), write("b.csv", "text\n"), write("c.txt", "")) == []


# Size and speed.


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
def test_a_row_of_ten_megabytes_is_read(form: str) -> None:
    text = "ten megabytes " * 700_000
    data = {"jsonl": json.dumps({"text": text}), "csv": f'text\n"{text}"\n', "txt": text}[form]
    began = time.process_time()
    ((_, found),) = texts(read(write(f"a.{form}", data)))
    assert found == text
    assert time.process_time() - began < 2  # 0.03 to 0.2 s


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_rows(form: str) -> None:
    def peak(count: int) -> int:
        write(f"a.{form}", PACK[form](many_rows(count)))
        files = resolve_inputs([f"a.{form}"])
        tracemalloc.start()
        for _ in read_records(files, ReadOptions()):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(100)  # imports
    few, many = peak(4_000), peak(16_000)
    assert many < few * 1.1 + 50_000


def test_jsonl_is_read_at_three_hundred_thousand_rows_a_second() -> None:
    count = 60_000
    rows = [{"id": str(number), "title": "T", "text": f"a short text, {number}"} for number in range(count)]
    files = resolve_inputs([write("a.jsonl", as_jsonl(rows))])

    def seconds() -> float:
        began = time.process_time()
        assert sum(1 for _ in read_records(files, ReadOptions())) == count
        return time.process_time() - began

    assert count / min(seconds() for _ in range(3)) > 300_000  # 1,000,000 on the machine this was written on


# Real data.


@pytest.mark.parametrize("name", ["cacm", "scifact", "jaquad-dev"])
def test_a_beir_folder_is_read_as_the_json_module_reads_it(name: str) -> None:
    folder = DATA / "retrieval" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    rows = read(str(folder))
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        expected: list[Mapping[str, str]] = [json.loads(line) for line in file]
    assert len(rows) == len(expected)
    for row, values in zip(rows, expected, strict=True):
        if isinstance(row, Record):
            assert (row.id, row.title, row.text) == (values["_id"], values["title"], values["text"])
        else:
            assert row.reason == "empty text"
            assert not (values["text"] + values["title"]).strip()
