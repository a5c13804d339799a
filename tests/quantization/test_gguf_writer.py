"""GGUF files: what is written is read by gguf-py, and by our own reader."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from gemb.errors import MismatchError
from gemb.quantization import gguf_writer
from gemb.quantization.gguf_layout import ALIGNMENT, KINDS, TensorKind, Value
from gemb.quantization.gguf_reader import read_gguf
from gemb.quantization.gguf_writer import GgufTensor, encode, write_gguf

ALL_KINDS = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
METADATA: dict[str, Value] = {
    "general.architecture": "gemma-embedding",
    "a.count": 7,
    "a.negative": -7,
    "a.ratio": 0.5,
    "a.yes": True,
    "a.names": ["", "Füße", "日本"],
    "a.scores": [-1.0, -2.5],
    "a.kinds": [1, 3, -6],
    "a.flags": [True, False],
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def listed(tensors: Sequence[tuple[str, Tensor, str]]) -> list[GgufTensor]:
    return [
        GgufTensor(name, tuple(weight.shape), KINDS[kind], lambda weight=weight: weight)  # type: ignore[misc]
        for name, weight, kind in tensors
    ]


@ALL_KINDS
def test_gguf_py_reads_the_tensors_and_so_do_we(kind: TensorKind, tmp_path: Path) -> None:
    matrix, gain = drawn(5, 96), drawn(3)
    write_gguf(tmp_path / "m.gguf", METADATA, listed([("matrix", matrix, kind.name), ("gain", gain, "f32")]))
    ours = read_gguf(tmp_path / "m.gguf")
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert list(theirs) == list(ours.tensors) == ["matrix", "gain"]
    for name, weight in {"matrix": matrix, "gain": gain}.items():
        assert theirs[name].shape.tolist() == list(reversed(weight.shape))
        assert ours.tensors[name].shape == tuple(weight.shape)
        assert ours.tensors[name].start % ALIGNMENT == 0
        numbers = torch.tensor(dequantize(theirs[name].data, theirs[name].tensor_type))
        assert torch.equal(ours.tensor(name), numbers.reshape(weight.shape))
    assert torch.equal(ours.tensor("gain"), gain)
    if kind.grid is not None:
        assert torch.equal(ours.tensor("matrix"), kind.grid.snap(matrix))
        assert torch.equal(ours.quantised("matrix").codes, kind.grid.quantise(matrix).codes)


def test_gguf_py_reads_the_metadata_and_so_do_we(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {**METADATA, "a.empty": "", "a.none": []}, [])
    ours = read_gguf(tmp_path / "m.gguf").metadata
    theirs = GGUFReader(tmp_path / "m.gguf").fields
    digest = ours["gemb.sha256"]
    assert ours == {**METADATA, "gemb.sha256": digest}
    assert {name: theirs[name].contents() for name in ours} == ours
    kinds = {name: [kind.name for kind in theirs[name].types] for name in METADATA}
    assert kinds == {
        "general.architecture": ["STRING"],
        "a.count": ["UINT32"],
        "a.negative": ["INT64"],
        "a.ratio": ["FLOAT32"],
        "a.yes": ["BOOL"],
        "a.names": ["ARRAY", "STRING"],
        "a.scores": ["ARRAY", "FLOAT32"],
        "a.kinds": ["ARRAY", "INT32"],
        "a.flags": ["ARRAY", "BOOL"],
    }


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_gguf(tmp_path / name, METADATA, listed([("matrix", drawn(4, 64), "q4_0")]))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@ALL_KINDS
def test_rows_written_in_pieces_are_the_rows_written_at_once(
    kind: TensorKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = listed(
        [("w", drawn(7, 3, 64), kind.name), ("s", torch.tensor(2.0), "f32"), ("z", drawn(0, 32), "f32")]
    )
    write_gguf(tmp_path / "whole", METADATA, tensors)
    monkeypatch.setattr(gguf_writer, "_NUMBERS_AT_ONCE", 130)
    write_gguf(tmp_path / "pieces", METADATA, tensors)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert read_gguf(tmp_path / "whole").tensor("s").item() == 2.0
    assert read_gguf(tmp_path / "whole").tensor("z").shape == (0, 32)


def test_one_tensor_is_loaded_after_the_other(tmp_path: Path) -> None:
    loaded: list[int] = []
    alive: list[bool] = []

    def load(index: int) -> Tensor:
        loaded.append(index)
        alive.append((tmp_path / "m.gguf").exists())
        return torch.full((32,), float(index))

    def loader(index: int) -> GgufTensor:
        return GgufTensor(f"t{index}", (32,), KINDS["f32"], lambda: load(index))

    tensors = [loader(index) for index in range(3)]
    assert loaded == []
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    assert loaded == [0, 1, 2]
    assert alive == [False] * 3  # the file appears when it is whole


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", torch.zeros(2, 40), "q4_0")],
         "w: q4_0 has blocks of 32, but the rows are 40 wide; choose f32, bf16 or f16"),
        ([("w", torch.zeros(2), "f32"), ("w", torch.zeros(2), "f32")], "w is there twice"),
        ([("w", torch.tensor([[float("nan")] * 32]), "q8_0")],
         "w: its largest size is nan, which q8_0 cannot hold"),
        ([("w", torch.full((1, 32), 1e6), "q4_0")], "w: its largest size is 1e+06, which q4_0 cannot hold"),
        ([("w", torch.full((3,), 1e6), "f16")], "w: its largest size is 1e+06, which f16 cannot hold"),
        ([("w", torch.full((3,), float("inf")), "f32")], "w: its largest size is inf, which f32 cannot hold"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_by_name_and_leaves_nothing(
    tensors: list[tuple[str, Tensor, str]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(MismatchError) as error:
        write_gguf(path, METADATA, listed(tensors))
    assert str(error.value) == f"{path}: {message}"
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_than_announced_is_our_mistake(tmp_path: Path) -> None:
    wrong = GgufTensor("w", (2, 3), KINDS["f32"], lambda: torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^w was announced as \(2, 3\), but is \(3, 2\)$"):
        write_gguf(tmp_path / "m.gguf", {}, [wrong])
    assert list(tmp_path.iterdir()) == []


@ALL_KINDS
def test_bytes_a_weight_are_those_of_the_kind(kind: TensorKind) -> None:
    assert (
        encode(drawn(4, 64), kind).numel() == kind.size_bytes((4, 64)) == 256 * kind.block_bytes / kind.block
    )
