"""The packed forward with gradients: equal to transformers' padded one, independent of order, saved whole."""

import copy
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemb.device import processor
from gemb.errors import GembError, MismatchError
from gemb.model.attention import CAUSAL, FULL, Reach
from gemb.model.encoder import PackedEncoder
from gemb.model.folder import read_folder
from gemb.model.kernels import Kernels
from gemb.model.layout import Layout
from gemb.model.trainable import TrainableEncoder
from gemb.model.trainable.attention import AttentionSettings, packed_attention
from gemb.model.trainable.saving import appearing
from tests.models import (
    MODES,
    OWN_MODES,
    PROMPT_TOKENS,
    PROMPTS,
    SORTS,
    packed,
    random_texts,
    tiny_folder,
    tiny_model,
)

TRAINED = [name for name, sort in SORTS.items() if sort.is_packed]
TEXTS = random_texts((1, 5, 5, 20, 44, 60, 2, 13))
# Shuffled, so that the rows are in no order of length.
ORDER = np.random.default_rng(3).permutation(len(TEXTS))
DENSE: Sequence[Mapping[str, Any]] = ({"out_features": 96, "bias": True}, {"out_features": 48})


def ids_of(
    folder: Path, texts: Sequence[str] = TEXTS, order: NDArray[np.int64] = ORDER
) -> tuple[Tensor, NDArray[np.int32]]:
    """Packed ids[T] and lengths[R] of `texts` in `order`."""
    ids, lengths, rows = packed(folder, texts)
    starts = np.cumsum(lengths) - lengths
    places = rows[order]
    chosen = [ids[starts[row] : starts[row] + lengths[row]] for row in places]
    return torch.from_numpy(np.concatenate(chosen)), lengths[places]


def trainable(folder: Path, **options: Any) -> TrainableEncoder:  # noqa: ANN401
    return TrainableEncoder.load(read_folder(folder), **options)


def weights_of(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that stand for the gradient of a loss at the vectors."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def gradients(model: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    """The dense gradients by name of sum(vectors * weights)."""
    model.zero_grad()
    (vectors * weights_of(vectors.shape, vectors.dtype)).sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.to_dense()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def padded_vectors(
    model: nn.Module, ids: Tensor, lengths: NDArray[np.int32], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unit vectors[R, D] of mean pooling over what transformers gives for one padded batch."""
    texts = torch.split(ids.long(), lengths.tolist())
    batch = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    states = model(input_ids=batch, attention_mask=mask).last_hidden_state.to(dtype)
    sums = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.normalize(sums)


def relative_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """|left - right| / |right|, all tensors of `right` together, in float64."""
    gap = sum(float((left[name].double() - right[name].double()).square().sum()) for name in right)
    return float((gap / sum(float(one.double().square().sum()) for one in right.values())) ** 0.5)


# --- equal to transformers


@pytest.mark.parametrize("name", TRAINED)
def test_vectors_and_gradients_equal_those_of_transformers_padded(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "model", name)
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    reference = copy.deepcopy(tiny_model(name)).requires_grad_(True)

    vectors = model(ids, lengths)
    expected = padded_vectors(reference, ids, lengths)

    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
    own, theirs = gradients(model, vectors), gradients(reference, expected)
    used = {key: value for key, value in theirs.items() if "pooler" not in key and "type_embed" not in key}
    assert used.keys() <= own.keys()
    assert relative_difference(own, used) < 1e-6  # seen below 5e-7; each is 4e-7 from float64


def test_gradients_in_float64_equal_those_of_transformers_to_ten_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        scaled: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        result: Tensor = scaled * (1 + self.weight)
        return result

    monkeypatch.setattr(Gemma3RMSNorm, "forward", forward)  # theirs goes through fp32
    folder = tiny_folder(tmp_path / "model")
    ids, lengths = ids_of(folder)
    model = trainable(folder).double()
    reference = copy.deepcopy(tiny_model("gemma3")).requires_grad_(True).double()
    reference.embed_tokens.embed_scale = torch.tensor(64.0).sqrt().double()

    vectors = model(ids, lengths)
    expected = padded_vectors(reference, ids, lengths, torch.float64)

    torch.testing.assert_close(vectors, expected, atol=1e-12, rtol=0)
    assert relative_difference(gradients(model, vectors), gradients(reference, expected)) < 1e-10


@pytest.mark.parametrize("mode", [*MODES, *OWN_MODES])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_every_pooling_gives_the_vectors_of_the_packed_encoder(
    tmp_path: Path, mode: str, include_prompt: bool
) -> None:
    folder = tiny_folder(
        tmp_path / "model", pooling=mode, include_prompt=include_prompt, dense=DENSE, layer_norm=True
    )
    texts = [f"{PROMPTS['query']}{text}" for text in TEXTS]
    ids, lengths, rows = packed(folder, texts)
    encoder = PackedEncoder(read_folder(folder), Kernels("cpu", torch.float32))
    expected = encoder.forward(ids, lengths, prompt_tokens=PROMPT_TOKENS["query"])[
        torch.from_numpy(rows[ORDER])
    ]

    vectors = trainable(folder)(
        *ids_of(folder, texts), np.full(len(texts), PROMPT_TOKENS["query"], dtype=np.int32)
    )

    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", [*MODES, *OWN_MODES])
def test_each_text_leaves_its_own_prompt_out(tmp_path: Path, mode: str) -> None:
    folder = tiny_folder(tmp_path / "model", pooling=mode, include_prompt=False)
    model = trainable(folder)
    ids, lengths = ids_of(folder)
    prompts = np.array([3, 0, 1, 5, 2, 0, 1, 4], dtype=np.int32)  # one is longer than its text
    together = model(ids, lengths, prompts)
    encoder = PackedEncoder(read_folder(folder), Kernels("cpu", torch.float32))
    for place, text in enumerate(torch.split(ids, lengths.tolist())):
        alone = encoder.forward(text.numpy(), lengths[[place]], prompt_tokens=int(prompts[place]))
        torch.testing.assert_close(together[place], alone[0], atol=1e-6, rtol=0)


def test_several_poolings_at_once_stand_side_by_side(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert", pooling=("cls", "max", "mean"))
    ids, lengths, rows = packed(folder, TEXTS)
    expected = PackedEncoder(read_folder(folder), Kernels("cpu", torch.float32)).forward(ids, lengths)

    vectors = trainable(folder)(*ids_of(folder))

    torch.testing.assert_close(vectors, expected[torch.from_numpy(rows[ORDER])], atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", ["Identity", "Tanh", "GELU"])
@pytest.mark.parametrize("residual", [False, True])
def test_dense_modules_get_the_gradients_of_finite_differences(
    tmp_path: Path, activation: str, residual: bool
) -> None:
    dense = {
        "bias": True,
        "activation_function": f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}."
        + activation,
        "use_residual": residual,
    }
    folder = tiny_folder(tmp_path / "model", dense=[dense, {**dense, "out_features": 24}])
    model = trainable(folder).double()
    check_direction(model, *ids_of(folder))


@pytest.mark.parametrize("mode", ["max", "weightedmean", "lasttoken", *OWN_MODES])
def test_poolings_have_the_gradients_of_finite_differences(tmp_path: Path, mode: str) -> None:
    folder = tiny_folder(tmp_path / "model", pooling=mode, include_prompt=False)
    ids, lengths = ids_of(folder)
    prompts = np.minimum(lengths - 1, np.arange(len(lengths), dtype=np.int32))  # of another length each
    check_direction(trainable(folder).double(), ids, lengths, prompts)


def check_direction(
    model: TrainableEncoder,
    ids: Tensor,
    lengths: NDArray[np.int32],
    prompts: NDArray[np.int32] | None = None,
    step: float = 1e-6,
) -> None:
    """The slope along one random direction of all parameters is what the gradients say, in float64."""
    found = gradients(model, model(ids, lengths, prompts))
    random = torch.Generator().manual_seed(9)
    directions = {
        name: torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        for name, parameter in model.named_parameters()
    }

    def value(shift: float) -> float:
        for name, parameter in model.named_parameters():
            parameter.add_(directions[name], alpha=shift)
        vectors = model(ids, lengths, prompts)
        return float((vectors * weights_of(vectors.shape, vectors.dtype)).sum())

    with torch.no_grad():
        slope = (value(step) - value(-2 * step)) / (2 * step)
    expected = sum(float((found[name] * directions[name]).sum()) for name in found)
    assert slope == pytest.approx(expected, rel=1e-6)


# --- the same, computed otherwise


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "qwen3", "bert", "modernbert"])
@pytest.mark.parametrize("recompute", ["feed_forward", "layers"])
def test_recomputing_gives_the_same_gradients_to_the_bit(tmp_path: Path, name: str, recompute: str) -> None:
    folder = tiny_folder(tmp_path / "model", name)
    ids, lengths = ids_of(folder)
    plain, saving = trainable(folder), trainable(folder, recompute=recompute)
    expected, found = (gradients(model, model(ids, lengths)) for model in (plain, saving))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_pieces_of_the_rows_change_nothing_but_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "model")
    ids, lengths = ids_of(folder)
    model = trainable(folder).double()
    whole = gradients(model, model(ids, lengths))
    monkeypatch.setattr("gemb.model.trainable.functions.PIECE_ROWS", 7)
    assert relative_difference(gradients(model, model(ids, lengths)), whole) < 1e-14


def test_gradient_of_the_table_holds_the_used_rows_only(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    ids, lengths = ids_of(folder)
    sparse, dense = trainable(folder), trainable(folder, sparse_table=False)
    expected = gradients(dense, dense(ids, lengths))[dense.table_name]
    sparse(ids, lengths).mul(weights_of((len(lengths), 64))).sum().backward()

    gradient = sparse.get_parameter(sparse.table_name).grad

    assert gradient is not None
    assert gradient.is_sparse
    assert torch.equal(gradient._indices()[0], torch.unique(ids))
    assert torch.equal(gradient.to_dense(), expected)


def test_bf16_products_stay_near_fp32_and_leave_parameters_in_fp32(tmp_path: Path) -> None:
    if not processor().has_bf16:
        pytest.skip("this processor has no bf16 instructions")
    folder = tiny_folder(tmp_path / "model", dense=DENSE)
    ids, lengths = ids_of(folder)
    exact, rounded = trainable(folder), trainable(folder, precision="bf16")
    expected, found = exact(ids, lengths), rounded(ids, lengths)
    assert (expected * found).sum(1).min() > 0.9999
    own, theirs = gradients(rounded, found), gradients(exact, expected)
    assert {value.dtype for value in own.values()} == {torch.float32}
    assert relative_difference(own, theirs) < 0.02  # bf16 has 8 bits


# --- order, neighbours, single texts


def test_vectors_follow_the_order_of_the_texts(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = trainable(folder)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    first, second = (model(*ids_of(folder, order=chosen)) for chosen in (np.arange(len(TEXTS)), order))
    torch.testing.assert_close(second, first[torch.from_numpy(order)], atol=1e-6, rtol=0)


def test_a_text_alone_has_the_vector_that_it_has_among_others(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = trainable(folder)
    together = model(*ids_of(folder))
    for place, row in enumerate(ORDER):
        alone = model(*ids_of(folder, [TEXTS[row]], np.zeros(1, dtype=np.int64)))
        torch.testing.assert_close(alone[0], together[place], atol=1e-6, rtol=0)


def test_gradients_of_parts_add_up_to_those_of_the_whole(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = trainable(folder).double()
    ids, lengths = ids_of(folder)
    whole = gradients(model, model(ids, lengths))
    weights = weights_of((len(lengths), 64), torch.float64)
    model.zero_grad()
    first = int(lengths[:3].sum())
    for part, rows in ((ids[:first], slice(0, 3)), (ids[first:], slice(3, None))):
        (model(part, lengths[rows]) * weights[rows]).sum().backward()
    found = {name: one.grad.to_dense() for name, one in model.named_parameters() if one.grad is not None}
    assert relative_difference(found, whole) < 1e-14


def test_lengths_that_do_not_fit_the_ids_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = trainable(folder)
    with pytest.raises(ValueError, match="lengths of 5 tokens for 4 ids; each is 1 at least"):
        model(torch.tensor([1, 2, 3, 4]), np.array([3, 2], dtype=np.int32))


# --- dropout and frozen parts


@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_dropout_changes_vectors_in_training_only_and_repeats_with_the_seed(
    tmp_path: Path, name: str
) -> None:
    folder = tiny_folder(tmp_path / "model", name)
    ids, lengths = ids_of(folder)
    model, plain = trainable(folder, dropout=0.1), trainable(folder)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        vectors: Tensor = model(ids, lengths)
        return vectors

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-3)
    assert torch.equal(model.eval()(ids, lengths), plain(ids, lengths))


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "bert", "modernbert", "llama"])
def test_attention_dropout_changes_vectors_in_training_only_and_repeats_with_the_seed(
    tmp_path: Path, name: str
) -> None:
    folder = tiny_folder(tmp_path / "model", name)
    ids, lengths = ids_of(folder)
    model, plain = trainable(folder, attention_dropout=0.1), trainable(folder)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        vectors: Tensor = model(ids, lengths)
        return vectors

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-3)
    assert torch.equal(model.eval()(ids, lengths), plain(ids, lengths))


@pytest.mark.parametrize("reach", [FULL, CAUSAL, Reach(3, 3)], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_attention_with_dropout_has_the_gradients_of_finite_differences(
    reach: Reach, softcap: float | None, shared: int
) -> None:
    lengths = np.array([11, 11, 3, 1], dtype=np.int32)
    settings = AttentionSettings(4, shared, 6, 0.4, reach, softcap, dropout=0.3)
    random = torch.Generator().manual_seed(2)
    raw = torch.randn(26, (4 + 2 * shared) * 6, generator=random, dtype=torch.float64, requires_grad=True)

    def run(raw: Tensor) -> Tensor:
        torch.manual_seed(9)
        return packed_attention(raw, None, None, settings, Layout.of(lengths), None)

    assert torch.autograd.gradcheck(run, (raw,), fast_mode=True)


def test_attention_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    # All keys alike, one channel of ones: the result is the sum of the weights that are left, scaled.
    lengths = np.array([400] * 4, dtype=np.int32)
    settings = AttentionSettings(2, 2, 2, 1.0, dropout=0.25)
    raw = torch.zeros(1600, 12)
    raw[:, 8:] = 1
    torch.manual_seed(1)
    mixed = packed_attention(raw, None, None, settings, Layout.of(lengths), None)
    assert abs(mixed.mean().item() - 1) < 2e-3
    # A sum of 400 weights of 1/400, each 0 or 4/3 of it: variance 1/400 x 0.25 / 0.75.
    assert mixed[:, 0].std().item() == pytest.approx((0.25 / 0.75 / 400) ** 0.5, rel=0.1)


def test_recomputed_layers_drop_the_same_numbers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    ids, lengths = ids_of(folder)
    found = []
    for recompute in ("nothing", "layers"):
        model = trainable(folder, dropout=0.1, attention_dropout=0.1, recompute=recompute)
        torch.manual_seed(4)
        found.append(gradients(model, model(ids, lengths)))
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


def test_frozen_parts_get_no_gradient_and_the_rest_keeps_its_own(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", dense=DENSE)
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    whole = gradients(model, model(ids, lengths))
    frozen = [
        name
        for name, _ in model.named_parameters()
        if "layers.0." in name or "k_proj" in name or name.endswith("layernorm.weight") or "embed" in name
    ]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad(set_to_none=True)

    found = gradients(model, model(ids, lengths))

    assert found.keys() == whole.keys() - set(frozen)
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_a_low_rank_update_of_a_weight_trains_through_a_parametrization(tmp_path: Path) -> None:
    class LowRank(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            random = torch.Generator().manual_seed(2)
            self.left = nn.Parameter(torch.randn(len(weight), 2, generator=random) * 0.1)
            self.right = nn.Parameter(torch.randn(2, weight.shape[1], generator=random) * 0.1)

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.left @ self.right

    folder = tiny_folder(tmp_path / "model")
    ids, lengths = ids_of(folder)
    model, plain = trainable(folder), trainable(folder)
    layer = "layers.1.self_attn.q_proj"
    update = LowRank(plain.get_parameter(f"{layer}.weight"))
    with torch.no_grad():
        plain.get_parameter(f"{layer}.weight").copy_(update(plain.get_parameter(f"{layer}.weight")))
    nn.utils.parametrize.register_parametrization(model.get_submodule(layer), "weight", update)

    vectors = model(ids, lengths)

    torch.testing.assert_close(vectors, plain(ids, lengths), atol=1e-6, rtol=0)
    full = gradients(plain, plain(ids, lengths))[f"{layer}.weight"]
    vectors.mul(weights_of(vectors.shape)).sum().backward()
    torch.testing.assert_close(update.left.grad, full @ update.right.detach().T, atol=1e-5, rtol=1e-4)


# --- saving


@pytest.mark.parametrize("name", ["gemma3", "bert", "t5gemma", "modernbert"])
@pytest.mark.parametrize("is_old", [True, False], ids=["old spelling", "new spelling"])
def test_a_saved_model_gives_the_same_vectors_in_gemb_and_sentence_transformers(
    tmp_path: Path, name: str, is_old: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    source = tiny_folder(tmp_path / "source", name, dense=DENSE, layer_norm=True, is_old=is_old)
    model = moved(trainable(source))
    expected = model(*ids_of(source))

    model.save(tmp_path / "saved")

    again = trainable(tmp_path / "saved")
    torch.testing.assert_close(again(*ids_of(source)), expected, atol=0, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
        vectors = theirs.encode([TEXTS[row] for row in ORDER], convert_to_tensor=True)
    torch.testing.assert_close(vectors.clone(), expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_a_saved_model_gives_the_same_states_in_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoModel

    source = tiny_folder(tmp_path / "source", name)
    model = moved(trainable(source))
    model.save(tmp_path / "saved")
    theirs = AutoModel.from_pretrained(tmp_path / "saved", local_files_only=True)
    vectors = padded_vectors(theirs, *ids_of(source))
    torch.testing.assert_close(vectors, model(*ids_of(source)), atol=1e-6, rtol=0)


def moved(model: TrainableEncoder) -> TrainableEncoder:
    """The model with every parameter a little elsewhere."""
    random = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
    return model


def test_parameters_are_called_as_in_the_files(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", dense=DENSE)
    names = set(load_file(folder / "model.safetensors"))
    names |= {"2_Dense.linear.weight", "2_Dense.linear.bias", "3_Dense.linear.weight"}
    model = trainable(folder)
    assert {name for name, _ in model.named_parameters()} == names
    assert model.table_name == "embed_tokens.weight"
    assert set(model.state_dict()) == names


def test_saving_keeps_other_tensors_and_files_but_no_other_formats_and_no_records(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "bert")
    (source / "onnx").mkdir()
    for name in ("onnx/model.onnx", "pytorch_model.bin"):
        (source / name).write_bytes(b"old")
    for name in ("adapt_report.json", "gemb.json"):
        (source / name).write_text("{}", "utf-8")
    (source / "README.md").write_text("a card", "utf-8")
    before = load_file(source / "model.safetensors")
    model = moved(trainable(source))

    model.save(tmp_path / "saved")

    after = load_file(tmp_path / "saved/model.safetensors")
    assert after.keys() == before.keys()
    untouched = [name for name in before if torch.equal(before[name], after[name])]
    assert untouched
    assert all("pooler" in name for name in untouched)
    files = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    saved = tmp_path / "saved"
    assert {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()} == files - {
        "adapt_report.json",
        "gemb.json",
        "onnx/model.onnx",
        "pytorch_model.bin",
    }


def test_saving_in_shards_and_bf16_keeps_both_or_gives_fp32(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", config={"torch_dtype": "bfloat16", "dtype": "bfloat16"})
    tensors = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == file}
        save_file(part, source / file, metadata={"format": "pt"})
    (source / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    model = moved(trainable(source))

    model.save(tmp_path / "wide")
    model.save(tmp_path / "narrow", dtype="source")

    for folder, name, dtype in (("wide", "float32", torch.float32), ("narrow", "bfloat16", torch.bfloat16)):
        place = tmp_path / folder
        found = {
            key: value for file in set(places.values()) for key, value in load_file(place / file).items()
        }
        assert {value.dtype for value in found.values()} == {dtype}
        stored = json.loads((place / "model.safetensors.index.json").read_text("utf-8"))
        size = sum(value.numel() * value.element_size() for value in found.values())
        assert stored == {"metadata": {"total_size": size}, "weight_map": places}
        assert json.loads((place / "config.json").read_text("utf-8"))["dtype"] == name
    assert torch.equal(trainable(tmp_path / "wide")(*ids_of(source)), model(*ids_of(source)))


def test_saving_over_a_folder_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    model = trainable(source)
    target = tmp_path / "there"
    target.mkdir()
    (target / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(GembError) as caught:
        model.save(target)
    assert str(caught.value) == f"{target} exists; choose another path for the model, or move it away"
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_a_failed_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "source")
    model = trainable(source)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemb.model.trainable.saving._declare_fp32", fail)
    with pytest.raises(GembError, match="no space left"):
        model.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_writer_left_is_removed_and_that_of_a_live_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    left = tmp_path / ".saved.0123abcd.tmp"
    others = [tmp_path / ".other.0123abcd.tmp", tmp_path / ".saved.mine.tmp"]
    for folder in (left, *others):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    with appearing(target) as live:
        assert not left.exists()
        with appearing(target) as second:
            assert live.is_dir()
            (second / "config.json").touch()
        (target / "config.json").unlink()
    assert sorted(tmp_path.iterdir()) == [*others, target]


# --- moving, and what cannot be trained


def test_weights_of_one_input_lie_together_after_loading_and_after_a_conversion(tmp_path: Path) -> None:
    model = trainable(tiny_folder(tmp_path / "model"))
    for _ in range(2):
        query, key, value = (model.get_parameter(f"layers.0.self_attn.{part}_proj.weight") for part in "qkv")
        assert key.data_ptr() == query.data_ptr() + query.numel() * query.element_size()
        assert value.data_ptr() == key.data_ptr() + key.numel() * key.element_size()
        model = model.double()


def test_a_copy_trains_apart_from_its_original(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    ids, lengths = ids_of(folder)
    model = trainable(folder)
    expected = model(ids, lengths)
    other = moved(copy.deepcopy(model))
    assert torch.equal(model(ids, lengths), expected)
    assert not torch.allclose(other(ids, lengths), expected, atol=1e-3)
    assert gradients(other, other(ids, lengths)).keys() == dict(model.named_parameters()).keys()


def test_a_family_without_packed_training_is_refused_with_those_that_have_it(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mpnet")
    with pytest.raises(MismatchError) as caught:
        trainable(folder)
    assert str(caught.value) == (
        f"{folder}/config.json: training does not know the model type 'mpnet'; train a model of another "
        "type, one of bert, camembert, distilbert, embedding_gemma2, embedding_gemma2_text, "
        "eurobert, gemma2, gemma3, gemma3_text, llama, mistral, "
        "modernbert, qwen2, qwen3, roberta, t5_gemma_module, t5gemma, xlm-roberta"
    )


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        trainable(folder)
    assert str(caught.value) == (
        f"{folder}/model.safetensors: layers.0.mlp.up_proj.weight is I8; quantised weights cannot be "
        "trained; use the model that they were made from"
    )


def test_gains_of_2018_keep_their_names(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "bert")
    shutil.copytree(source, tmp_path / "old")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(old, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    model = trainable(tmp_path / "old")
    assert torch.equal(model(*ids_of(source)), trainable(source)(*ids_of(source)))
    assert "embeddings.LayerNorm.gamma" in dict(model.named_parameters())
