"""Low-rank training: the values and gradients of peft, and what is saved."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from gemb.errors import MismatchError
from gemb.model.trainable import TrainableEncoder
from tests.model.test_trainable import (
    gradients,
    ids_of,
    padded_vectors,
    relative_difference,
    trainable,
    weights_of,
)
from tests.models import tiny_folder

TARGETS = {
    "gemma3": ("*.q_proj.weight", "*.v_proj.weight", "*.down_proj.weight"),
    "bert": ("*.query.weight", "*.value.weight", "*.output.dense.weight"),
    "qwen3": ("*",),
}
MODULES = {
    "gemma3": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "dense"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def low_rank(folder: Path, targets: tuple[str, ...] = ("*",), *, moved: bool = True) -> TrainableEncoder:
    """A model whose updates are not 0, unless it is left as it begins."""
    model = trainable(folder)
    model.train_low_rank(rank=3, alpha=6.0, targets=targets, seed=4)
    random = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if moved and name.endswith("low_rank.b"):
            parameter.data.normal_(0, 0.1, generator=random)
    return model


@pytest.mark.parametrize("name", ["gemma3", "bert", "qwen3"])
def test_vectors_and_gradients_are_those_of_peft(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "model", name)
    ours = low_rank(folder, TARGETS[name])
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=MODULES[name], lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, settings)
    pairs = {}
    for key, parameter in theirs.named_parameters():
        if ".lora_" not in key:
            continue
        layer = key.removeprefix("base_model.model.").partition(".lora_")[0]
        own = f"{layer}.low_rank.{'a' if '.lora_A.' in key else 'b'}"
        if own in dict(ours.named_parameters()):
            parameter.data.copy_(ours.get_parameter(own).data)
            pairs[own] = parameter
        else:  # a dense layer that is none of attention or feed-forward, as BERT's pooler
            assert ".pooler." in key or ".attention.output." in key or ".intermediate." in key
            parameter.data.zero_()
    trained = {key for key, parameter in ours.named_parameters() if parameter.requires_grad}
    assert pairs.keys() == trained
    ids, lengths = ids_of(folder)
    vectors, expected = ours(ids, lengths), padded_vectors(theirs, ids, lengths)
    torch.testing.assert_close(vectors, expected, atol=2e-6, rtol=0)
    found = gradients(ours, vectors)
    (expected * weights_of(expected.shape)).sum().backward()  # type: ignore[no-untyped-call]
    reference = {key: one.grad for key, one in pairs.items() if one.grad is not None}
    assert found.keys() == reference.keys() == trained
    assert relative_difference(found, reference) < 2e-5  # two implementations in fp32


def test_a_begins_as_in_peft_and_b_with_zeros(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "model", "qwen3")
    model, plain = low_rank(folder, moved=False), trainable(folder)
    ids, lengths = ids_of(folder)
    torch.testing.assert_close(model(ids, lengths), plain(ids, lengths), rtol=0, atol=0)
    layer = peft.tuners.lora.Linear(nn.Linear(64, 64), "default", peft.LoraConfig(), r=3, lora_alpha=6)
    own = model.get_parameter("layers.0.self_attn.q_proj.low_rank.a")
    theirs = layer.lora_A["default"].weight
    bound = 64**-0.5
    for one in (own, theirs):  # uniform to +-bound: the deviation is bound / sqrt(3)
        assert float(one.detach().abs().max()) <= bound
        assert float(one.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert layer.scaling["default"] == 2.0


def test_a_saved_model_is_the_sum_and_holds_no_adapter(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", dense=[{"out_features": 32}])
    model = low_rank(folder)
    model.save(tmp_path / "saved")
    ids, lengths = ids_of(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            trainable(tmp_path / "saved")(ids, lengths), model(ids, lengths), atol=1e-6, rtol=0
        )
    names = [set(load_file(one / "model.safetensors")) for one in (folder, tmp_path / "saved")]
    assert names[0] == names[1]
    name = "layers.0.mlp.up_proj"
    update = model.get_parameter(f"{name}.low_rank.b") @ model.get_parameter(f"{name}.low_rank.a")
    before = load_file(folder / "model.safetensors")[f"{name}.weight"]
    after = load_file(tmp_path / "saved" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(after, before + 2.0 * update.detach(), rtol=0, atol=1e-6)


def test_sums_made_once_give_the_vectors_and_gradients_of_sums_made_at_each_use(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = low_rank(folder)
    ids, lengths = ids_of(folder)
    vectors = model(ids, lengths)
    expected = gradients(model, vectors)
    model.zero_grad()
    with model.summed() as sums:
        again = model(ids, lengths)
        (again * weights_of(again.shape)).sum().backward()
        assert all(one.grad is not None for one in sums)
        assert all(one.grad is None for one in model.parameters())
    torch.testing.assert_close(again, vectors, rtol=0, atol=1e-6)
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == expected.keys()
    assert relative_difference(found, expected) < 1e-6
    torch.testing.assert_close(model(ids, lengths), vectors, rtol=0, atol=0)


def test_quantised_sums_pass_their_gradients_on_to_a_and_b(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = low_rank(folder)
    ids, lengths = ids_of(folder)
    with model.quantisation("int8").applied(), model.summed() as sums:
        assert sums == []
        vectors = model(ids, lengths)
        (vectors * weights_of(vectors.shape)).sum().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    expected = gradients(model, model(ids, lengths))
    assert found.keys() == expected.keys()
    # Straight through: near those without a grid, and not the same.
    assert 1e-4 < relative_difference(found, expected) < 0.1


def test_updates_follow_from_the_seed_alone(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    one, other = (low_rank(folder, moved=False).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (f"layers.{layer}.self_attn.q_proj.low_rank.a" for layer in (0, 1))
    assert not torch.equal(one[first], one[second])


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (2, "*embed_tokens*",
         "lora.targets: no matrix is called *embed_tokens*; the names are such as "
         "layers.0.self_attn.q_proj.weight, layers.0.self_attn.k_proj.weight, "
         "layers.0.self_attn.v_proj.weight, and * stands for anything"),
        (64, "*",
         "lora.rank is 64, but layers.0.self_attn.q_proj.weight is only 64 wide on one side; "
         "give a lower rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_so_is_told(tmp_path: Path, rank: int, targets: str, message: str) -> None:
    model = trainable(tiny_folder(tmp_path / "model"))
    with pytest.raises(MismatchError) as caught:
        model.train_low_rank(rank=rank, alpha=4.0, targets=(targets,))
    assert str(caught.value) == message
