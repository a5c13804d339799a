import base64
import re
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.files import write_json
from gemb.vectors import Layout, calibrate, open_sink, open_vectors
from gemb.vectors.readers import LineIndex
from tests.vectors.conftest import Rows

DIMS = 8


def written(path: Path, vectors: NDArray[np.float32], layout: Layout | None = None) -> Path:
    """An output with the sidecar that a finished job leaves."""
    sink = open_sink(path, path.with_name("work"), layout or Layout(DIMS, part_rows=40))
    sink.append([f"p{row}" for row in range(len(vectors))], vectors)
    files = sink.finish()
    if path.suffix:
        write_json(path.with_name(f"{path.name}.gemb.json"), {"files": [file.as_json() for file in files]})
    return path


def message_of(path: Path) -> str:
    """What `open_vectors`, or reading everything, says of a damaged file."""
    with pytest.raises(GembError) as caught, open_vectors(path) as found:  # either of them
        for _ in found.blocks():
            pass
    return str(caught.value)


# Blocks and ids


@pytest.mark.parametrize(
    "output", ["docs.npy", "docs.safetensors", "docs.fbin", "docs.jsonl", "docs.parquet", "docs"]
)
def test_any_blocks_are_slices_of_the_whole(
    tmp_path: Path, unit_rows: Rows, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr("gemb.vectors.parquet.GROUP_BYTES", 1)  # row groups of 1,024, the least
    vectors = unit_rows(2500, DIMS)
    with open_vectors(written(tmp_path / output, vectors, Layout(DIMS, part_rows=1000))) as found:
        for start, stop in ((0, 2500), (999, 1001), (1023, 2049), (2499, 2500), (7, 7), (0, 1)):
            assert np.array_equal(found.block(start, stop), vectors[start:stop])
            assert found.ids(start, stop) == [f"p{row}" for row in range(start, stop)]
        assert found.ids() == list(found.iter_ids()) == [f"p{row}" for row in range(2500)]
        assert len(found) == 2500
        blocks = list(found.blocks(600))
    assert [len(ids) for ids, _ in blocks] == [600, 600, 600, 600, 100]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), vectors)
    assert [id_ for ids, _ in blocks for id_ in ids] == [f"p{row}" for row in range(2500)]


def test_a_block_may_be_written_to_without_harm(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(5, DIMS)
    with open_vectors(written(tmp_path / "docs.npy", vectors)) as found:
        found.block(0, 5)[:] = 0
        assert np.array_equal(found.block(0, 5), vectors)


def test_any_lines_are_found_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    lines = [b"x" * (row % 7) for row in range(5000)]
    for end in (b"\n", b""):
        path.write_bytes(b"\n".join([*lines, b"last"]) + end)
        index = LineIndex(path)
        assert index.count == 5001
        for start, stop in ((0, 5001), (1023, 1026), (1024, 1025), (5000, 5001), (2048, 2048)):
            assert index.lines(start, stop) == [*lines, b"last"][start:stop]
    path.write_bytes(b"")
    assert LineIndex(path).count == 0


def test_line_numbers_hold_over_the_borders_of_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.txt"
    lines = [str(row).encode() for row in range(4000)]
    path.write_bytes(b"\n".join(lines))
    for chunk in (1, 3, 1024, 4096):
        monkeypatch.setattr("gemb.vectors.readers.CHUNK_BYTES", chunk)
        assert LineIndex(path).lines(2047, 3100) == lines[2047:3100]


def test_ids_with_windows_line_ends_are_read(tmp_path: Path, unit_rows: Rows) -> None:
    np.save(tmp_path / "docs.npy", unit_rows(2, DIMS))
    (tmp_path / "docs.ids.txt").write_bytes(b"a\r\nb\r\n")
    with open_vectors(tmp_path / "docs.npy") as found:
        assert found.ids() == ["a", "b"]


# Damage


@pytest.mark.parametrize(
    "output", ["docs.npy", "docs.safetensors", "docs.fbin", "docs.jsonl", "docs.parquet"]
)
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path, unit_rows: Rows, output: str) -> None:
    path = written(tmp_path / output, unit_rows(30, DIMS))
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 25)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert message_of(path) == (
            f"{path} is damaged: its checksum is not the one in {path}.gemb.json; write it again"
        )
    path.write_bytes(whole)
    with open_vectors(path) as found:
        assert found.rows == 30


def test_a_flipped_bit_in_the_ids_is_found_too(tmp_path: Path, unit_rows: Rows) -> None:
    path = written(tmp_path / "docs.npy", unit_rows(30, DIMS))
    ids = tmp_path / "docs.ids.txt"
    ids.write_bytes(ids.read_bytes().replace(b"p7", b"p8"))
    assert message_of(path) == (
        f"{ids} is damaged: its checksum is not the one in {path}.gemb.json; write it again"
    )
    with open_vectors(path, verify=False) as found:  # the negative control: nothing else could tell
        assert found.ids()[7] == "p8"


@pytest.mark.parametrize("name", ["part-00001.npy", "part-00001.ids.txt"])
def test_a_flipped_bit_in_a_folder_is_found(tmp_path: Path, unit_rows: Rows, name: str) -> None:
    folder = written(tmp_path / "docs", unit_rows(100, DIMS))
    damaged = bytearray((folder / name).read_bytes())
    damaged[-2] ^= 1
    (folder / name).write_bytes(damaged)
    assert message_of(folder) == (
        f"{folder}/{name} is damaged: its checksum is not the one in {folder}/manifest.json; write it again"
    )


def test_a_flipped_bit_in_a_table_is_found_without_any_sidecar(tmp_path: Path, unit_rows: Rows) -> None:
    path = written(tmp_path / "docs.parquet", unit_rows(3000, DIMS))
    path.with_name("docs.parquet.gemb.json").unlink()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert re.fullmatch(
        rf"{re.escape(str(path))} is damaged, or no Parquet file: .*CRC.*; write it again", message_of(path)
    )


@pytest.mark.parametrize("output", ["docs.jsonl", "docs.parquet"])
def test_a_file_cut_off_anywhere_is_one_message(tmp_path: Path, unit_rows: Rows, output: str) -> None:
    path = written(tmp_path / output, unit_rows(30, DIMS))
    path.with_name(f"{output}.gemb.json").unlink()
    whole = path.read_bytes()
    for size in range(1, len(whole) - 1, 31):
        if whole[:size].endswith(b"}\n") or whole[size : size + 1] == b"\n":
            continue  # the end of a line: fewer rows, but sound ones; only a sidecar can tell
        path.write_bytes(whole[:size])
        assert message_of(path).startswith(str(path))


def test_a_file_that_lost_its_end_is_told_by_its_size(tmp_path: Path, unit_rows: Rows) -> None:
    path = written(tmp_path / "docs.jsonl", unit_rows(30, DIMS))
    whole = path.read_bytes()
    shorter = whole[: whole.index(b"\n") + 1]
    path.write_bytes(shorter)
    assert message_of(path) == (
        f"{path} is damaged: {len(shorter)} bytes, but {path}.gemb.json says {len(whole)}; write it again"
    )


def test_missing_pieces_are_named(tmp_path: Path, unit_rows: Rows) -> None:
    path = written(tmp_path / "docs.npy", unit_rows(3, DIMS))
    (tmp_path / "docs.ids.txt").unlink()
    assert message_of(path) == (
        f"{tmp_path}/docs.ids.txt is missing, but {path}.gemb.json lists it; write it again"
    )
    folder = written(tmp_path / "docs", unit_rows(100, DIMS))
    (folder / "part-00002.npy").unlink()
    assert message_of(folder) == (
        f"{folder}/part-00002.npy is missing, but {folder}/manifest.json lists it; write it again"
    )
    (folder / "manifest.json").unlink()
    assert message_of(folder) == f"{folder} has no manifest.json; it is unfinished, or no folder of vectors"


def test_ids_of_other_vectors_are_told(tmp_path: Path, unit_rows: Rows) -> None:
    np.save(tmp_path / "docs.npy", unit_rows(3, DIMS))
    (tmp_path / "docs.ids.txt").write_text("a\nb\n")
    assert message_of(tmp_path / "docs.npy") == (
        f"{tmp_path}/docs.ids.txt has 2 ids but {tmp_path}/docs.npy has 3 rows; "
        "they do not belong together, write them again"
    )


def test_ids_that_are_not_utf8_are_told_with_their_line(tmp_path: Path, unit_rows: Rows) -> None:
    np.save(tmp_path / "docs.npy", unit_rows(3, DIMS))
    (tmp_path / "docs.ids.txt").write_bytes(b"a\nb\xff\nc\n")
    assert message_of(tmp_path / "docs.npy") == (
        f"{tmp_path}/docs.ids.txt:2: the id is not UTF-8; write it again"
    )


def test_int8_codes_without_ranges_are_told(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(30, DIMS)
    path = written(tmp_path / "docs.npy", vectors, Layout(DIMS, "int8", ranges=calibrate(vectors)))
    path.with_name("docs.npy.gemb.json").unlink()
    (tmp_path / "docs.ranges.npy").unlink()
    assert message_of(path) == (
        f"{path} holds int8 codes, but their ranges are not beside it (docs.ranges.npy); write both again"
    )
    np.save(tmp_path / "docs.ranges.npy", np.zeros((2, 4), np.float32))
    assert message_of(path) == f"{tmp_path}/docs.ranges.npy holds no int8 ranges [2, 8]; write it again"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("docs.npy", "cannot read {path}: no such file or folder; check the path"),
        ("docs", "cannot read {path}: no such folder of vectors"),
        ("-", "vectors cannot be read from a pipe; write them to a file first"),
    ],
)
def test_what_is_not_there_is_told(tmp_path: Path, name: str, message: str) -> None:
    path = Path("-") if name == "-" else tmp_path / name
    assert message_of(path) == message.format(path=path)


def test_a_manifest_of_something_else_is_told(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"name": "an extension"})
    assert message_of(tmp_path) == (
        f"{tmp_path}/manifest.json is not 'gemb shards 1'; it was not written by gemb, or by a newer one"
    )


# JSON lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b", "embedding": [1', ":2: not JSON (unexpected end of data); is the file cut off?"),
        (b"[1, 2]", ":2: a JSON list, not an object with id and embedding"),
        (b'{"id": "b", "text": "x"}', ':2: no "embedding"; this line has id, text'),
        (
            b'{"id": "b", "embedding": [1, "x"]}',
            ":2: the embedding is neither a list of f32 numbers nor their base64",
        ),
        (
            b'{"id": "b", "embedding": "AAA"}',
            ":2: the embedding is neither a list of f32 numbers nor their base64",
        ),
        (
            b'{"id": "b", "embedding": [[1, 2]]}',
            ":2: the embedding is neither a list of f32 numbers nor their base64",
        ),
        (
            b'{"id": "b", "embedding": 3}',
            ":2: the embedding is neither a list of f32 numbers nor their base64",
        ),
        (
            b'{"id": "b", "dtype": "f64", "embedding": []}',
            ":2: dtype 'f64' is none of f32, f16, bf16, int8, binary",
        ),
        (b'{"id": "b", "embedding": [1, 2, 3]}', ":2: 3 numbers of f32, but the first line has 2 of f32"),
    ],
)
def test_a_damaged_json_line_is_told_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"id": "a", "embedding": [1, 2]}\n' + line + b"\n")
    assert message_of(path) == f"{path}{message}"


def test_json_lines_of_other_writers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"_id": 17, "vector": [1, 2.5]}\r\n{"vector": [3, 4], "text": "x"}')
    with open_vectors(path) as found:
        assert found.ids() == ["17", "1"]
        assert found.block(0, 2).tolist() == [[1, 2.5], [3, 4]]


def test_json_lines_are_what_other_readers_expect(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(2, DIMS)
    listed = written(tmp_path / "list.jsonl", vectors, Layout(DIMS)).read_bytes().splitlines()
    encoded = (
        written(tmp_path / "base64.jsonl", vectors, Layout(DIMS, encoding="base64")).read_bytes().splitlines()
    )
    for row in range(2):
        value = orjson.loads(listed[row])
        assert value["id"] == f"p{row}"
        assert np.array_equal(np.array(value["embedding"], np.float32), vectors[row])
        raw = base64.b64decode(orjson.loads(encoded[row])["embedding"])
        assert np.array_equal(np.frombuffer(raw, "<f4"), vectors[row])


def test_an_empty_json_lines_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"")
    assert message_of(path) == f"{path} is empty; JSON lines of no rows tell no width"


# Parquet


def test_a_table_is_read_by_pandas_like_readers(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(30, DIMS)
    table = pq.read_table(written(tmp_path / "docs.parquet", vectors))
    assert table.schema.field("id").type == pa.string()
    assert table.schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), DIMS
    )
    assert table.column("id").to_pylist() == [f"p{row}" for row in range(30)]
    assert np.array_equal(np.array(table.column("embedding").to_pylist(), np.float32), vectors)
    column = pq.ParquetFile(tmp_path / "docs.parquet").metadata.row_group(0).column(1)
    assert (column.compression, column.has_dictionary_page) == ("UNCOMPRESSED", False)


@pytest.mark.parametrize("number", [pa.float64(), pa.float32(), pa.float16()])
@pytest.mark.parametrize("size", [-1, 3])
@pytest.mark.parametrize("name", ["embedding", "embeddings", "vector"])
def test_tables_of_other_writers_are_read(tmp_path: Path, name: str, size: int, number: pa.DataType) -> None:
    rows = [np.array([1, 2, 3], np.float16), np.array([4, 5, 6.5], np.float16)]
    table = pa.table({"doc_id": pa.array([10, 11]), name: pa.array(rows, pa.list_(number, size))})
    pq.write_table(table, tmp_path / "docs.parquet")
    with open_vectors(tmp_path / "docs.parquet") as found:
        assert found.ids() == ["10", "11"]
        assert found.block(0, 2).tolist() == [[1, 2, 3], [4, 5, 6.5]]


def test_a_column_of_vectors_is_taken_by_its_name(tmp_path: Path) -> None:
    columns = {"id": ["a"], "embedding": [[1.0, 2.0]], "other": [[3.0, 4.0, 5.0]]}
    pq.write_table(pa.table(columns), tmp_path / "docs.parquet")
    with open_vectors(tmp_path / "docs.parquet", column="other") as found:
        assert found.block(0, 1).tolist() == [[3, 4, 5]]
    with pytest.raises(GembError) as raised:
        open_vectors(tmp_path / "docs.parquet", column="none")
    assert str(raised.value) == (
        f'{tmp_path / "docs.parquet"} has no column "none"; it has id, embedding, other'
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"id": ["a"], "text": ["x"]}, ' has no column "embedding"; it has id, text'),
        (
            {"embedding": ["x"]},
            ': column "embedding" is string, not a list of float, halffloat, int8 or uint8',
        ),
        (
            {"embedding": [[1.0, 2.0], [1.0]]},
            ': a row at or after row 1 has no "embedding" of 2 numbers; every row needs one',
        ),
        (
            {"embedding": [[1.0, 2.0], None]},
            ': a row at or after row 1 has no "embedding" of 2 numbers; every row needs one',
        ),
        (
            {"embedding": [[1.0, 2.0], [1.0, None]]},
            ': a row at or after row 0 has no "embedding" of 2 numbers; every row needs one',
        ),
        ({"id": ["a", None], "embedding": [[1.0], [2.0]]}, ': a row has no "id"; every row needs one'),
    ],
)
def test_a_table_that_lacks_something_is_told(
    tmp_path: Path, column: dict[str, list[object]], message: str
) -> None:
    pq.write_table(pa.table(column), tmp_path / "docs.parquet")
    assert message_of(tmp_path / "docs.parquet") == f"{tmp_path}/docs.parquet{message}"
