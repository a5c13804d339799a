"""Damaged GGUF files: whatever is cut or flipped is told, and nothing else is raised."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.quantization.gguf_layout import KINDS
from gemb.quantization.gguf_reader import read_gguf
from gemb.quantization.gguf_writer import GgufTensor, write_gguf


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    weights = {"w": (torch.ones(2, 32), "q4_0"), "g": (torch.ones(5), "f32")}
    tensors = [
        GgufTensor(name, tuple(weight.shape), KINDS[kind], lambda weight=weight: weight)  # type: ignore[misc]
        for name, (weight, kind) in weights.items()
    ]
    write_gguf(tmp_path / "whole.gguf", {"a.name": "x", "a.list": ["b", "c"], "a.size": 3}, tensors)
    return (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_cut_anywhere_is_refused(verify: bool, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    padding = 0 if verify else 12  # after the last tensor; only the checksum knows of it
    for length in range(len(whole) - padding):
        path.write_bytes(whole[:length])
        with pytest.raises(UnavailableError):
            read_gguf(path, verify=verify)


def test_every_flipped_bit_is_told(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.gguf"
    key = whole.index(b"gemb.sha256")  # under another name it is no checksum, and nothing else is wrong
    for position in sorted(set(range(len(whole))) - set(range(key, key + len(b"gemb.sha256")))):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises((UnavailableError, MismatchError), match=r"flipped\.gguf"):
            read_gguf(path)


def test_without_the_checksum_no_flipped_bit_raises_anything_but_a_clear_error(
    whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "flipped.gguf"
    told = 0
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            file = read_gguf(path, verify=False)
            for name in file.tensors:
                file.tensor(name)
        except GembError:
            told += 1
    assert told > 100  # lengths, kinds and places


def test_a_file_of_gguf_py_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "theirs.gguf", "gemma-embedding")
    writer.add_float64("a.wide", 0.1)
    writer.add_custom_alignment(64)
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", weight)
    writer.add_tensor("h", weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "theirs.gguf")
    assert file.metadata == {
        "general.architecture": "gemma-embedding",
        "a.wide": 0.1,
        "general.alignment": 64,
    }
    for name in ("w", "h"):
        assert torch.equal(file.tensor(name), torch.from_numpy(weight))


def test_a_kind_of_tensor_that_we_do_not_read_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "theirs.gguf", "gemma-embedding")
    writer.add_tensor("w", np.zeros((1, 144), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MismatchError) as error:
        read_gguf(tmp_path / "theirs.gguf")
    told = f"{tmp_path / 'theirs.gguf'} holds w as ggml type 12; gemb reads f32, f16, bf16, q8_0, q4_0"
    assert str(error.value) == told


def patched(place: bytes, skip: int, new: bytes) -> Callable[[bytes], bytes]:
    def patch(content: bytes) -> bytes:
        at = content.index(place) + len(place) + skip
        return content[:at] + new + content[at + len(new) :]

    return patch


TENSOR = struct.pack("<Q", 1) + b"w"  # its name; then sizes, kind and offset


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"", "is damaged: it is empty; export or copy it again"),
        (lambda whole: b"PK\3\4" + whole[4:],
         "is no GGUF file: it starts with b'PK\\x03\\x04', not b'GGUF'; export or copy it again"),
        (lambda whole: whole[:4] + b"\1" + whole[5:], "is of GGUF version 1; gemb reads 2 and 3"),
        (lambda whole: whole[:20],
         "is damaged: its counts: 16 bytes at position 8, but the file ends at 20; export or copy it again"),
        (lambda whole: whole[:40],
         "is damaged: the value of 'a.name': 4 bytes at position 38, but the file ends at 40; "
         "export or copy it again"),
        (patched(b"a.name", 0, b"\x63"),
         "is damaged: the value of 'a.name' is of the unknown kind 99; export or copy it again"),
        (patched(b"a.name", 12, b"\xff"),
         "is damaged: the value of 'a.name' before position 51 is not UTF-8; export or copy it again"),
        (patched(TENSOR, 0, b"\5"), "is damaged: w has 5 sizes; GGUF has at most 4; export or copy it again"),
        (patched(TENSOR, 4, b"\x21"),
         "is damaged: w: q4_0 has blocks of 32, but the rows are 33 wide; export or copy it again"),
        (patched(TENSOR, 24, b"\x40"),
         "is damaged: w ends at 420, but the file at 416: it was cut short; export or copy it again"),
        (patched(TENSOR, 24, b"\1"),
         "is damaged: w starts at 321, inside of another tensor or between places; export or copy it again"),
    ],
)  # fmt: skip
def test_the_damage_is_told_word_for_word(
    damage: Callable[[bytes], bytes], message: str, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(whole))
    with pytest.raises(GembError) as error:
        read_gguf(path, verify=False)
    assert str(error.value) == f"{path} {message}"


def test_the_checksum_tells_a_flipped_weight(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:-60] + bytes([whole[-60] ^ 1]) + whole[-59:])
    digest = str(read_gguf(path, verify=False).metadata["gemb.sha256"])
    with pytest.raises(UnavailableError) as error:
        read_gguf(path)
    assert str(error.value) == (
        f"{path} is damaged: its content does not have the checksum {digest[:12]} it was written with; "
        "export or copy it again"
    )


def test_a_file_or_tensor_that_is_not_there_is_named(whole: bytes, tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    with pytest.raises(UnavailableError) as error:
        read_gguf(missing)
    assert str(error.value) == f"{missing} does not exist; export the model again"
    file = read_gguf(tmp_path / "whole.gguf")
    with pytest.raises(MismatchError) as mismatch:
        file.tensor("v")
    assert str(mismatch.value) == f"{file.path} has no tensor v"
    with pytest.raises(MismatchError) as mismatch:
        file.quantised("g")
    assert str(mismatch.value) == f"{file.path}: g is stored as f32, which has no codes"
