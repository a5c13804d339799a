from pathlib import Path

import numpy as np
import pytest

from gemb.errors import GembError
from gemb.files import write_json
from gemb.vectors import Int8Ranges, Layout, check_output, estimated_bytes, kind_of, open_sink, output_files
from tests.vectors.conftest import Contents, Rows

RANGES = Int8Ranges(np.zeros(8, np.float32), np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("docs.npy", "npy"),
        ("docs.v2.NPY", "npy"),
        ("docs.parquet", "parquet"),
        ("docs.jsonl", "jsonl"),
        ("docs.ndjson", "jsonl"),
        ("docs.safetensors", "safetensors"),
        ("docs.u8bin", "fbin"),
        ("docs", "shards"),
        ("docs.shard-00003-of-00016", "shards"),
        ("docs.npy/", "shards"),
        ("-", "stream"),
    ],
)
def test_a_name_tells_its_format(output: str, kind: str) -> None:
    assert kind_of(output) == kind


def test_an_existing_folder_is_a_folder_of_parts_whatever_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "docs.v2"
    folder.mkdir()
    assert kind_of(folder) == "shards"


def test_an_unknown_suffix_is_told_with_the_choices() -> None:
    with pytest.raises(GembError) as caught:
        kind_of("docs.jsonl.gz")
    assert str(caught.value) == (
        "docs.jsonl.gz: no vector format ends in .gz; the formats are .npy, .safetensors, .fbin, .i8bin, "
        ".u8bin, .jsonl, .ndjson, .parquet, a folder (a name that ends in /), and - for JSON lines on stdout"
    )


@pytest.mark.parametrize(
    ("output", "dtype", "files"),
    [
        ("out/docs.npy", "f32", ["docs.ids.txt", "docs.npy"]),
        ("out/docs.v2.npy", "int8", ["docs.v2.ids.txt", "docs.v2.ranges.npy", "docs.v2.npy"]),
        ("out/docs.safetensors", "int8", ["docs.ids.txt", "docs.safetensors"]),
        ("out/docs.jsonl", "int8", ["docs.ranges.npy", "docs.jsonl"]),
        ("out/docs.parquet", "int8", ["docs.parquet"]),
        ("out/docs", "int8", ["docs"]),
        ("-", "f32", []),
    ],
)
def test_every_file_of_an_output_is_known_before(output: str, dtype: str, files: list[str]) -> None:
    layout = Layout(8, "int8", ranges=RANGES) if dtype == "int8" else Layout(8)
    assert output_files(output, layout) == [Path("out") / name for name in files]


@pytest.mark.parametrize(
    ("output", "layout", "message"),
    [
        (
            "docs.parquet",
            Layout(8, "bf16"),
            "docs.parquet: Parquet has no bf16; pass --dtype f16 or f32, or write .npy or .safetensors",
        ),
        (
            "docs.fbin",
            Layout(8, "f16"),
            "docs.fbin: .fbin cannot hold f16; write .fbin for f32, .i8bin for int8, .u8bin for binary",
        ),
        (
            "-",
            Layout(8, "int8", ranges=RANGES),
            "a stream has no place for the int8 ranges; write to a file, or stream another --dtype",
        ),
    ],
)
def test_a_format_that_cannot_hold_the_type_is_told_before_the_work(
    output: str, layout: Layout, message: str
) -> None:
    with pytest.raises(GembError) as caught:
        check_output(output, layout)
    assert str(caught.value) == message


def test_binary_needs_whole_bytes() -> None:
    with pytest.raises(GembError) as caught:
        Layout(100, "binary")
    assert str(caught.value) == (
        "--dtype binary packs 8 dims a byte, but the vectors are 100 wide; pass --dims 96"
    )


@pytest.mark.parametrize(
    ("dtype", "ranges"), [("f32", RANGES), ("int8", None)], ids=["ranges without int8", "int8 without ranges"]
)
def test_ranges_belong_to_int8_alone(dtype: str, ranges: Int8Ranges | None) -> None:
    with pytest.raises(ValueError, match="ranges belong to int8 and only to it"):
        Layout(8, "int8" if dtype == "int8" else "f32", ranges=ranges)


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(GembError) as caught:
        check_output(tmp_path, Layout(8))
    assert str(caught.value) == (
        f"{tmp_path} is not empty and was not written by gemb; choose another output"
    )
    write_json(tmp_path / "manifest.json", {"format": "gemb shards 1", "files": []})
    with pytest.raises(GembError) as caught:
        check_output(tmp_path, Layout(8))
    assert str(caught.value) == (
        f"{tmp_path} holds files that gemb did not write (thesis.tex); choose another output"
    )
    (tmp_path / "thesis.tex").unlink()
    assert check_output(tmp_path, Layout(8)) == "shards"


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    path = tmp_path / "docs"
    path.write_text("x")
    with pytest.raises(GembError, match="is a file; a folder of parts cannot take its place"):
        check_output(path, Layout(8))


@pytest.mark.parametrize("output", ["docs.npy", "docs.parquet", "docs.jsonl", "docs", "docs.safetensors"])
def test_the_space_needed_is_estimated_within_a_fifth(
    output: str, tmp_path: Path, unit_rows: Rows, contents: Contents
) -> None:
    layout = Layout(128)
    sink = open_sink(tmp_path / output, tmp_path / "work", layout)
    sink.append([f"{row:016}" for row in range(2000)], unit_rows(2000, 128))
    sink.finish()
    sink.close()
    written = sum(map(len, contents(tmp_path).values()))
    assert estimated_bytes(output, layout, 2000) == pytest.approx(written, rel=0.2)


def test_a_stream_needs_no_space() -> None:
    assert estimated_bytes("-", Layout(128), 10**9) == 0
