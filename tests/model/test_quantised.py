"""Training through a grid: a model computes with the weights that its export has, and keeps its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemb.errors import MismatchError
from gemb.model.folder import read_folder
from gemb.model.trainable import TrainableEncoder
from gemb.model.trainable import quantised as module
from gemb.model.trainable.parameters import Tensors
from gemb.model.trainable.quantised import looked_up
from gemb.quantization.fake import fake_quantise
from gemb.quantization.grids import GRIDS, Grid
from gemb.quantization.roles import WeightFormat, grid_of, role_of
from tests.model.test_trainable import gradients, ids_of, trainable, weights_of
from tests.models import random_texts, tiny_folder

FORMATS: tuple[WeightFormat, ...] = ("int4", "int8", "mixed")
FAMILIES = ("gemma3", "gemma2", "qwen3", "bert", "roberta", "modernbert", "t5gemma")
DENSE = ({"out_features": 96, "bias": True}, {"out_features": 32, "activation_function": "torch.nn.Tanh"})
TEXTS = random_texts((1, 5, 20, 33, 2))


def snapped_folder(folder: Path, weight_format: WeightFormat) -> TrainableEncoder:
    """The model of `folder` after all its weights were moved onto the grids of their roles, and saved."""
    for file in sorted(folder.rglob("model.safetensors")):
        moved = {}
        for name, weight in load_file(file).items():
            role = role_of(name, weight.shape)
            moved[name] = weight if role is None else grid_of(role, weight_format).snap(weight)
        save_file(moved, file, metadata={"format": "pt"})
    return trainable(folder)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_the_folder_snapped_to_the_grid_to_the_bit(
    tmp_path: Path, name: str, weight_format: WeightFormat
) -> None:
    folder = tiny_folder(tmp_path / "model", name, dense=DENSE)
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    with torch.no_grad():
        plain = model(ids, lengths)
        with model.quantisation(weight_format).applied() as stand_ins:
            vectors = model(ids, lengths)
        expected = snapped_folder(folder, weight_format)(ids, lengths)
        assert torch.equal(model(ids, lengths), plain)
    assert float((vectors - expected).abs().max()) == 0
    assert float((vectors - plain).abs().max()) > 1e-4
    assert stand_ins == []


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_gradients_are_those_of_the_snapped_folder_but_0_past_the_highest_code(
    tmp_path: Path, name: str, weight_format: WeightFormat
) -> None:
    folder = tiny_folder(tmp_path / "model", name, dense=DENSE)
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    model.zero_grad()
    with model.quantisation(weight_format).applied():
        vectors = model(ids, lengths)
        (vectors * weights_of(vectors.shape)).sum().backward()
    own = {key: one.grad.to_dense() for key, one in model.named_parameters() if one.grad is not None}
    before = {key: one.detach().clone() for key, one in model.named_parameters()}

    reference = snapped_folder(folder, weight_format)
    expected = gradients(reference, reference(ids, lengths))
    assert own.keys() == expected.keys()
    clipped = 0
    for key, gradient in expected.items():
        role = role_of(key, gradient.shape)
        if role is not None:
            grid = grid_of(role, weight_format)
            inside = grid.round_unclamped(before[key])[0] <= grid.highest
            clipped += int((~inside).sum())
            gradient *= inside
        torch.testing.assert_close(own[key], gradient, atol=1e-6, rtol=1e-5, msg=key)
    assert (clipped > 100) is (weight_format == "int4")


def test_a_table_that_is_looked_up_has_the_gradient_of_the_whole_one_snapped() -> None:
    table = Tensors()
    drawn = torch.Generator().manual_seed(0)
    table.register_parameter("weight", torch.nn.Parameter(torch.randn(9, 64, generator=drawn)))
    ids, upstream = torch.tensor([3, 0, 3, 7, 7, 1]), torch.randn(6, 64, generator=drawn)
    for grid in GRIDS.values():
        table.grid = grid
        rows = looked_up(table, ids, 3.0)
        (gradient,) = torch.autograd.grad((rows * upstream).sum(), table.matrix)
        whole = torch.nn.functional.embedding(ids, fake_quantise(table.matrix, grid)) * 3.0
        (expected,) = torch.autograd.grad((whole * upstream).sum(), table.matrix)
        assert torch.equal(rows, whole)
        assert gradient.is_sparse
        torch.testing.assert_close(gradient.to_dense(), expected)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all that is quantised from now on."""
    shapes: list[tuple[int, ...]] = []

    def counted(weight: Tensor, grid: Grid) -> Tensor:
        shapes.append(tuple(weight.shape))
        return fake_quantise(weight, grid)

    monkeypatch.setattr(module, "fake_quantise", counted)
    return shapes


def test_matrices_are_snapped_once_a_block_and_of_the_table_only_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", dense=DENSE)
    model, shapes = trainable(folder), counting(monkeypatch)
    chunks = [ids_of(folder, random_texts(lengths), np.arange(1)) for lengths in [(3,), (9,), (5,)]]
    quantisation = model.quantisation("int4")
    with quantisation.applied():
        for ids, lengths in chunks:
            model(ids, lengths).sum().backward()
    layers = 4 * 7 + len(DENSE)
    assert len(shapes) == layers + len(chunks)
    assert [shape[0] for shape in shapes[layers:]] == [len(ids) for ids, _ in chunks]


def test_chunks_one_after_another_add_up_to_the_gradient_of_all(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", dense=DENSE)
    every = ids_of(folder, TEXTS, np.arange(len(TEXTS)))
    starts = every[1].cumsum() - every[1]

    def found(run: Callable[[TrainableEncoder], None]) -> dict[str, Tensor]:
        model = trainable(folder)
        with model.quantisation("int4").applied():
            run(model)
        return {key: one.grad.to_dense() for key, one in model.named_parameters() if one.grad is not None}

    def at_once(model: TrainableEncoder) -> None:
        model(*every).sum().backward()

    def one_by_one(model: TrainableEncoder) -> None:
        for row, (start, length) in enumerate(zip(starts, every[1], strict=True)):
            vectors = model(every[0][start : start + length], every[1][row : row + 1])
            vectors.sum().backward()

    whole, parts = found(at_once), found(one_by_one)
    assert whole.keys() == parts.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, atol=1e-5, rtol=1e-4, msg=key)


def test_the_parameters_stay_as_they_are_and_get_no_gradient_from_a_block_that_failed(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", dense=DENSE)
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    before = {key: one.detach().clone() for key, one in model.named_parameters()}

    def failing() -> None:
        with model.quantisation("int4").applied():
            model(ids, lengths).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(torch.equal(one, before[key]) for key, one in model.named_parameters())
    matrices = {key for key in before if role_of(key, before[key].shape) not in (None, "embedding")}
    assert all(one.grad is None for key, one in model.named_parameters() if key in matrices)
    assert all(layer.stand_in is None for layer in model.modules() if isinstance(layer, Tensors))


def test_frozen_weights_are_snapped_too_and_get_no_gradient(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3")
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    model.get_parameter("layers.0.mlp.up_proj.weight").requires_grad_(False)
    with model.quantisation("int4").applied() as stand_ins:
        vectors = model(ids, lengths)
        vectors.sum().backward()
    assert len(stand_ins) == 4 * 7 - 1
    assert model.get_parameter("layers.0.mlp.up_proj.weight").grad is None
    assert model.get_parameter("layers.0.mlp.gate_proj.weight").grad is not None
    assert torch.equal(vectors, snapped_folder(folder, "int4")(ids, lengths))


def test_a_low_rank_update_is_snapped_with_its_weight(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3")
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    layer = model.get_submodule("layers.0.mlp.up_proj")

    class Added(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.update = torch.nn.Parameter(torch.full((96, 1), 0.1))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.update

    added = Added()
    weight: Tensor = model.get_parameter("layers.0.mlp.up_proj.weight")
    expected = fake_quantise(weight.detach() + 0.1, GRIDS["q4_0"])
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", added)
    with model.quantisation("int4").applied():
        assert isinstance(layer, Tensors)
        assert torch.equal(layer.matrix, expected)
        model(ids, lengths).sum().backward()
    assert added.update.grad is not None
    assert float(added.update.grad.abs().max()) > 0


def test_widths_that_have_no_blocks_are_refused_all_at_once(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", dense=[{"out_features": 40}, {"out_features": 30}])
    model = TrainableEncoder.load(read_folder(folder))
    with pytest.raises(MismatchError) as error:
        model.quantisation("int4")
    assert str(error.value) == (
        "qat: the model has weights that int4 cannot hold; train without qat, or for the format mixed:\n"
        "  3_Dense.linear.weight: q4_0 has blocks of 32, but the rows are 40 wide"
    )
    model.quantisation("mixed")
