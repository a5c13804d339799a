import io
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gemb.errors import GembError
from gemb.vectors import Layout, calibrate, from_bfloat16, open_sink, open_vectors, to_int8
from gemb.vectors.headers import header_bytes
from gemb.vectors.layout import DType, Kind
from tests.vectors.conftest import Rows


def written(path: Path, layout: Layout, rows: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> Path:
    sink = open_sink(path, path.with_name("work"), layout)
    sink.append([str(row) for row in range(len(rows))], rows)
    sink.finish()
    return path


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8", "binary"])
def test_npy_files_are_those_that_numpy_saves(tmp_path: Path, unit_rows: Rows, dtype: DType) -> None:
    vectors = unit_rows(10, 16)
    layout = Layout(16, dtype, ranges=calibrate(vectors) if dtype == "int8" else None)
    saved = io.BytesIO()
    np.save(saved, layout.store(vectors)[0])
    assert written(tmp_path / "docs.npy", layout, vectors).read_bytes() == saved.getvalue()


def test_bfloat16_npy_files_cannot_be_taken_for_integers(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(10, 16)
    loaded = np.load(written(tmp_path / "docs.npy", Layout(16, "bf16"), vectors))
    assert loaded.dtype == np.dtype("V2")
    expected = torch.from_numpy(vectors).bfloat16().float().numpy()
    assert np.array_equal(from_bfloat16(loaded.view(np.uint16)), expected)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "binary"])
def test_safetensors_files_open_in_the_library(tmp_path: Path, unit_rows: Rows, dtype: DType) -> None:
    vectors = unit_rows(10, 16)
    ranges = calibrate(vectors) if dtype == "int8" else None
    layout = Layout(16, dtype, metadata={"model": "minilm ä"}, ranges=ranges)
    path = written(tmp_path / "docs.safetensors", layout, vectors)
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor("embeddings")
        assert file.metadata() == {
            "model": "minilm ä",
            "gemb.format": "1",
            "gemb.dtype": dtype,
            "gemb.dims": "16",
        }
        names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "int8": "int8", "binary": "uint8"}
        assert str(tensor.dtype) == f"torch.{names[dtype]}"
        if ranges is not None:
            assert np.array_equal(file.get_tensor("ranges").numpy(), ranges.as_array())
            assert np.array_equal(tensor.numpy(), to_int8(vectors, ranges)[0])
        elif dtype != "binary":
            stored = torch.from_numpy(vectors).to(tensor.dtype)
            assert torch.equal(tensor, stored)


def test_fbin_files_are_two_counts_and_the_rows(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = unit_rows(10, 16)
    path = written(tmp_path / "docs.fbin", Layout(16), vectors)
    assert path.read_bytes() == struct.pack("<II", 10, 16) + vectors.tobytes()


@pytest.mark.parametrize("kind", ["npy", "safetensors", "fbin"])
def test_a_header_is_as_long_for_any_number_of_rows(kind: Kind) -> None:
    layout = Layout(4096, metadata={"model": "m"})
    limit = 2**32 if kind == "fbin" else 10**18
    lengths = {len(header_bytes(kind, layout, rows)) for rows in (0, 9, 10**6, limit - 1)}
    assert len(lengths) == 1


def test_more_rows_than_fbin_can_count_are_refused() -> None:
    with pytest.raises(GembError) as caught:
        header_bytes("fbin", Layout(8), 2**32)
    assert str(caught.value) == (
        "an .fbin file counts at most 4294967295 rows, not 4294967296; write .npy or a folder"
    )


# Files from other hands


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("numbers", ["<f8", ">f4", "<f2"])
def test_npy_files_of_other_writers_are_read(
    tmp_path: Path, unit_rows: Rows, numbers: str, order: Literal["C", "F"]
) -> None:
    vectors = unit_rows(10, 16).astype(numbers, order=order)
    np.save(tmp_path / "docs.npy", vectors)
    with open_vectors(tmp_path / "docs.npy") as found:
        assert (found.rows, found.dims) == (10, 16)
        assert np.array_equal(found.block(3, 7), vectors[3:7].astype(np.float32))
        assert found.ids(8) == ["8", "9"]


def test_safetensors_files_of_other_writers_are_read(tmp_path: Path, unit_rows: Rows) -> None:
    vectors = torch.from_numpy(unit_rows(10, 16))
    save_file({"vectors": vectors.bfloat16()}, tmp_path / "docs.safetensors")
    with open_vectors(tmp_path / "docs.safetensors") as found:
        assert found.dtype == "bf16"
        assert np.array_equal(found.block(0, 10), vectors.bfloat16().float().numpy())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "{path} is no .npy file: its header cannot be read; write it again"),
        (
            "a.npy",
            b"PK\x03\x04" + bytes(200),
            "{path} is no .npy file: its header cannot be read; write it again",
        ),
        (
            "a.safetensors",
            b"\xff" * 40,
            "{path} is no safetensors file, or cut off in its header; write it again",
        ),
        (
            "a.safetensors",
            struct.pack("<Q", 2) + b"[]",
            "{path} is no safetensors file: its header cannot be read; write it again",
        ),
        (
            "a.safetensors",
            struct.pack("<Q", 2) + b"{}",
            '{path} has no tensor "embeddings"; it has none',
        ),
        ("a.fbin", b"abc", "{path} is cut off: 3 bytes, but its header alone has 8; write it again"),
        (
            "a.fbin",
            struct.pack("<II", 2, 8) + bytes(63),
            "{path} is cut off: 71 bytes, but 2 rows of 8 f32 need 72; write it again",
        ),
        (
            "a.fbin",
            struct.pack("<II", 2, 8) + bytes(65),
            "{path} is too long: 73 bytes, but 2 rows of 8 f32 need 72; write it again",
        ),
    ],
    ids=["empty", "zip", "long header", "no object", "no tensor", "no counts", "cut off", "too long"],
)
def test_a_damaged_header_is_one_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GembError) as caught:
        open_vectors(path)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), "holds an array of shape [3], not [rows, dims]"),
        (
            np.zeros((2, 2), np.int64),
            "holds int64 numbers; vectors are float32, float16, bfloat16, int8 or uint8 bits",
        ),
    ],
)
def test_an_array_that_is_no_matrix_of_vectors_is_told(
    tmp_path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(GembError) as caught:
        open_vectors(tmp_path / "a.npy")
    assert str(caught.value) == f"{tmp_path}/a.npy {message}"


@pytest.mark.parametrize("size", range(0, 700, 13))
def test_a_file_cut_off_anywhere_is_never_read(tmp_path: Path, unit_rows: Rows, size: int) -> None:
    for name in ("docs.npy", "docs.safetensors", "docs.fbin"):
        path = written(tmp_path / name, Layout(16), unit_rows(10, 16))
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        if size < len(whole):
            with pytest.raises(GembError):
                open_vectors(path)
