"""Weights on integer grids: tables by rows, the packed layout, and files that are not ours."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemb.errors import MismatchError
from gemb.model.folder import read_folder
from gemb.model.grid_weights import RowWeights
from gemb.model.table import PlainTable
from gemb.model.weights import Weights
from gemb.quantization.gguf_layout import F32, KINDS, TensorKind
from gemb.quantization.gguf_writer import GgufTensor, write_gguf
from gemb.quantization.grids import INT4_ROW, INT8_ROW, RowGrid
from tests.models import tiny_folder

TABLE = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
GAINS = torch.linspace(-1.9, 2, 64) + 1
"""As a model that lacks the 1 has them, some below 0.5, where float32 is finer than its sum with 1."""
NAMES = ["embed_tokens.weight", "norm.weight", "2_Dense/linear.weight"]


def with_gguf(place: Path, names: object, kind: TensorKind, architecture: str = "gemma-embedding") -> Path:
    """A model folder with the three tensors NAMES in model.gguf, and no other weights."""
    tiny_folder(place, dense=[{}])
    for file in place.rglob("*.safetensors"):
        file.unlink()
    metadata = {"general.architecture": architecture, **({"gemb.tensor_names": names} if names else {})}
    tensors = [
        GgufTensor("token_embd.weight", (50, 64), kind, lambda: TABLE),
        GgufTensor("output_norm.weight", (64,), F32, lambda: GAINS),
        GgufTensor("dense_2.weight", (64, 64), kind, lambda: torch.ones(64, 64)),
    ]
    write_gguf(place / "model.gguf", metadata, tensors)  # type: ignore[arg-type]
    return place


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_rows_of_a_table_are_those_of_the_whole_tensor(kind: TensorKind, tmp_path: Path) -> None:
    weights = read_folder(with_gguf(tmp_path, NAMES, kind)).weights()
    ids = torch.tensor([3, 49, 3, 0])
    table = weights.table("embed_tokens.weight")
    assert torch.equal(table.rows(ids), weights.tensor("embed_tokens.weight")[ids])
    assert (table.width, table.rows(ids).dtype) == (64, torch.float32)
    assert list(weights) == ["embed_tokens.weight", "norm.weight"]
    assert weights.is_quantised == kind.is_grid


def test_a_gain_comes_back_so_that_adding_1_gives_that_of_the_file(tmp_path: Path) -> None:
    weights = read_folder(with_gguf(tmp_path, NAMES, F32)).weights()
    assert torch.equal(weights.tensor("norm.weight") + 1, GAINS)


def test_modules_find_their_own_tensors(tmp_path: Path) -> None:
    folder = read_folder(with_gguf(tmp_path, NAMES, F32))
    (dense,) = [module for module in folder.modules if module.kind == "dense"]
    assert torch.equal(dense.weights().tensor("linear.weight"), torch.ones(64, 64))


def test_safetensors_go_before_a_gguf_beside_them(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert not read_folder(folder).weights().is_quantised


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    place = with_gguf(tmp_path, None, F32)
    with pytest.raises(MismatchError) as caught:
        read_folder(place)
    assert str(caught.value) == (
        f"{place / 'model.gguf'} was not written by gemb: it has no gemb.tensor_names for its 3 tensors; "
        "put model.safetensors of the model into the folder instead"
    )


def test_an_architecture_that_gemb_does_not_write_is_refused(tmp_path: Path) -> None:
    weights = read_folder(with_gguf(tmp_path, NAMES, F32, "mamba")).weights()
    with pytest.raises(MismatchError, match=r"is of the architecture 'mamba'; gemb reads bert, eurobert,"):
        weights.tensor("norm.weight")


@pytest.mark.parametrize("grid", [INT4_ROW, INT8_ROW], ids=lambda grid: grid.name)
def test_the_packed_layout_reads_as_snapped_floats(grid: RowGrid, tmp_path: Path) -> None:
    quantised = grid.quantise(TABLE)
    codes = grid.pack(quantised.codes)
    save_file(
        {
            "embed_tokens.embedding_quantized": codes,
            "embed_tokens.embedding_scale": quantised.scales,
            "up.weight": codes.clone(),
            "up.weight_scale": quantised.scales.clone(),
            "up.input_activation_scale": torch.tensor(0.0),
            "norm.weight": torch.ones(64),
        },
        tmp_path / "model.safetensors",
    )
    weights = Weights.read(tmp_path)
    assert isinstance(weights, RowWeights)
    assert sorted(weights) == ["embed_tokens.weight", "norm.weight", "up.weight"]
    assert weights.parameters == 2 * 50 * 64 + 64
    snapped = grid.snap(TABLE)
    ids = torch.tensor([7, 7, 1])
    assert torch.equal(weights.tensor("up.weight"), snapped)
    assert torch.equal(weights.table("embed_tokens.weight").rows(ids), snapped[ids])
    with pytest.raises(MismatchError, match=r"the weights are quantised \(int._row\), and this needs floats"):
        weights.plain("this needs floats")


def test_integers_without_scales_are_no_packed_layout(tmp_path: Path) -> None:
    save_file({"up.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert not Weights.read(tmp_path).is_quantised


def test_a_plain_table_gives_its_rows_in_float32() -> None:
    table = PlainTable(TABLE.bfloat16())
    assert torch.equal(table.rows(torch.tensor([2])), TABLE.bfloat16()[2:3].float())
