"""Language models in training: loss and gradients equal transformers' padded ones, rows stay apart."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemb.errors import GembError
from gemb.model.folder import read_folder
from gemb.model.trainable.language_model import LanguageBatch, TrainableLanguageModel
from tests.models import tiny_folder

# Products on several threads sum in another order, and tiny ones wait for each other.
torch.set_num_threads(1)

VOCABULARY = 90
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {"sliding_window": 6, "layer_types": KINDS}
GEMMA = {**SMALL, **WINDOWED, "query_pre_attn_scalar": 16}
DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3 with a capped head": ("Gemma3Text", {**GEMMA, "final_logit_softcapping": 3.0}),
    "gemma3 with a head of its own": ("Gemma3Text", {**GEMMA, "tie_word_embeddings": False}),
    "llama": ("Llama", SMALL),
    "llama with one table": ("Llama", {**SMALL, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 6}),
    "qwen2": ("Qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL),
}
TOWER = {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
NARROW = {**TOWER, "hidden_size": 16, "num_hidden_layers": 2, "layer_types": KINDS[:2]}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 14,
}
SPECIAL = {"mm_tokens_per_image": 1, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
TWO_TOWERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "t5gemma": ("T5Gemma", {"encoder": TOWER, "decoder": TOWER}),
    "t5gemma unbalanced": ("T5Gemma", {"encoder": TOWER, "decoder": NARROW}),
    "t5gemma with a head of its own": (
        "T5Gemma",
        {"encoder": TOWER, "decoder": TOWER, "tie_word_embeddings": False},
    ),
    "t5gemma without caps": (
        "T5Gemma",
        {tower: {**TOWER, **UNCAPPED} for tower in ("encoder", "decoder")},
    ),
    "t5gemma2": (
        "T5Gemma2",
        {"encoder": {"text_config": GEMMA, "vision_config": VISION, **SPECIAL}, "decoder": GEMMA},
    ),
    "t5gemma2 of other depths": (
        "T5Gemma2",
        {
            "encoder": {"text_config": GEMMA, "vision_config": VISION, **SPECIAL},
            "decoder": {
                **GEMMA,
                "num_hidden_layers": 2,
                "layer_types": KINDS[:2],
                "num_key_value_heads": 1,
                "final_logit_softcapping": 3.0,
            },
        },
    ),
}
NONE = np.zeros(0, dtype=np.int32)
PRECISIONS: Sequence[Any] = ("fp32", "bf16")
SORTS = ["gemma2", "gemma3", "llama", "t5gemma", "t5gemma2"]
"""One of each way to compute: caps, norms of queries, neither, cross-attention, merged attention."""
MODELS = [*DECODERS, *TWO_TOWERS]
LENGTHS = (9, 1, 30, 2, 9, 17, 1, 3)
"""Wildly unequal, in no order, some equal, longer than the windows."""
SOURCE_LENGTHS = (4, 26, 1, 13, 4, 1, 26, 40)
"""The first and the fifth row are a pair of the same lengths, and the second and the seventh."""


@cache
def reference(name: str) -> Any:  # noqa: ANN401  # any model class of transformers
    """transformers' own model with random weights, in fp32."""
    family, settings = {**DECODERS, **TWO_TOWERS}[name]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(dict(settings)))
    task = "ForConditionalGeneration" if name in TWO_TOWERS else "ForCausalLM"
    model = getattr(transformers, f"{family.removesuffix('Text')}{task}")(config).eval()
    random = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)  # gains; their neutral value depends on the family
                continue
            # What comes back to the stream is small beside it, as at the start of a training (GPT-2).
            share = 0.2 if key.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.copy_(noise * share * parameter.shape[1] ** -0.5)
    return model


def folder_of(name: str, place: Path) -> Path:
    reference(name).save_pretrained(place)
    return place


def decoder_batch(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> LanguageBatch:
    """Rows of random tokens; most places predict the next token, the last of a row none."""
    random = np.random.default_rng(seed)
    sizes = np.array(lengths, dtype=np.int32)
    ids = random.integers(3, VOCABULARY, sizes.sum(), dtype=np.int32)
    targets = np.append(ids[1:], -100).astype(np.int32)
    targets[random.random(len(ids)) < 0.2] = -100
    targets[np.cumsum(sizes) - 1] = -100
    return LanguageBatch(ids, sizes, targets, NONE, NONE)


def batch_of(
    name: str, lengths: Sequence[int] = LENGTHS, sources: Sequence[int] = SOURCE_LENGTHS
) -> LanguageBatch:
    """A batch for the model `name`; with two towers each row has a source of its own length."""
    batch = decoder_batch(lengths)
    if name in DECODERS:
        return batch
    sizes = np.array(sources, dtype=np.int32)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, sizes.sum(), dtype=np.int32)
    return dataclasses.replace(batch, source_ids=ids, source_lengths=sizes)


def padded(values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], fill: int) -> Tensor:
    """[R, L] on the right padded rows of packed values."""
    rows = torch.split(torch.from_numpy(values).long(), lengths.tolist())
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def padded_loss(model: Any, batch: LanguageBatch) -> Tensor:  # noqa: ANN401
    """The sum of transformers' own loss of one padded batch with labels."""
    ids = padded(batch.ids, batch.lengths, 0)
    mask = padded(np.ones_like(batch.ids), batch.lengths, 0)
    labels = padded(batch.targets, batch.lengths, -100)
    if len(batch.source_ids):
        loss: Tensor = model(
            input_ids=padded(batch.source_ids, batch.source_lengths, 0),
            attention_mask=padded(np.ones_like(batch.source_ids), batch.source_lengths, 0),
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            labels=labels,
        ).loss
    else:  # it shifts the labels itself
        loss = model(input_ids=ids, attention_mask=mask, labels=F.pad(labels, (1, -1), value=-100)).loss
    return loss * int((batch.targets >= 0).sum())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The dense gradients by name."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.to_dense()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """|left - right| / |right|, all tensors of `right` together, in float64."""
    gap = sum(float((left[name].double() - right[name].double()).square().sum()) for name in right)
    return float((gap / sum(float(one.double().square().sum()) for one in right.values())) ** 0.5)


def walk(loss: Tensor) -> None:
    """The backward pass."""
    loss.backward()  # type: ignore[no-untyped-call]


def loss_of(model: TrainableLanguageModel, batch: LanguageBatch) -> float:
    return float(model.loss(batch).total.detach())


def target_states(model: TrainableLanguageModel, batch: LanguageBatch) -> Tensor:
    """[N, D], the final states at the places with a target."""
    return model.teacher_states(batch).states


def scores_of(model: TrainableLanguageModel, batch: LanguageBatch) -> Tensor:
    """[N, V], with the model's cap."""
    seen = model.teacher_states(batch)
    scores = seen.states @ seen.table.T
    return scores if seen.softcap is None else seen.softcap * torch.tanh(scores / seen.softcap)


def rows_of(batch: LanguageBatch) -> list[LanguageBatch]:
    """Each row as a batch of its own."""
    starts = np.cumsum(batch.lengths)[:-1]
    parts = [np.split(values, starts) for values in (batch.ids, batch.targets)]
    sources = [NONE] * len(batch.lengths)
    if len(batch.source_ids):
        sources = np.split(batch.source_ids, np.cumsum(batch.source_lengths)[:-1])
    return [
        LanguageBatch(
            ids,
            np.array([len(ids)], dtype=np.int32),
            targets,
            source,
            np.array([len(source)] if len(source) else [], dtype=np.int32),
        )
        for ids, targets, source in zip(*parts, sources, strict=True)
    ]


def joined(rows: Sequence[LanguageBatch]) -> LanguageBatch:
    """The rows as one batch."""
    names = [field.name for field in dataclasses.fields(LanguageBatch)]
    return LanguageBatch(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))


def step(model: TrainableLanguageModel, batch: LanguageBatch) -> None:
    """Change all parameters a little."""
    for name, gradient in gradients(model, model.loss(batch).total).items():
        with torch.no_grad():
            model.get_parameter(name).sub_(gradient, alpha=1e-3)


def change_config(folder: Path, **keys: Any) -> None:  # noqa: ANN401
    """Write some keys of config.json anew."""
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, **keys}), "utf-8")


# --- equal to transformers


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets float64 models of transformers compute in float64 all through, without their detours by fp32."""
    narrow, softmax = torch.Tensor.float, F.softmax

    def as_is(self: Tensor) -> Tensor:
        return self if self.dtype == torch.float64 and self.requires_grad else narrow(self)

    def shares(scores: Tensor, *, dim: int, dtype: torch.dtype) -> Tensor:
        return softmax(scores, dim=dim, dtype=torch.promote_types(dtype, scores.dtype))

    monkeypatch.setattr(torch.Tensor, "float", as_is)
    monkeypatch.setattr(F, "softmax", shares)


def in_float64(name: str) -> Any:  # noqa: ANN401
    """transformers' own model in float64; angles are fp32 there, as in fp32."""
    model = copy.deepcopy(reference(name)).double()
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # a root, rounded to fp32 before
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.to(torch.float32)
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(wide_norm, module)
    return model


def wide_norm(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """A norm of Gemma or Llama without its detour by fp32."""
    gain = module.weight + hasattr(module, "eps")  # Gemma stores gain - 1
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    result: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain
    return result


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_in_float64_equal_those_of_transformers_to_ten_digits(
    tmp_path: Path, wide: None, name: str
) -> None:
    model = TrainableLanguageModel.load(folder_of(name, tmp_path / "model")).double()
    theirs, batch = in_float64(name), batch_of(name)

    found, expected = model.loss(batch), padded_loss(theirs, batch)

    assert found.cross_entropy == pytest.approx(float(expected.detach()), rel=1e-10)
    assert found.tokens == int((batch.targets >= 0).sum())
    assert_same_gradients(gradients(model, found.total), gradients(theirs, expected), 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_those_of_transformers_padded(tmp_path: Path, name: str) -> None:
    model = TrainableLanguageModel.load(folder_of(name, tmp_path / "model"))
    theirs, batch = copy.deepcopy(reference(name)), batch_of(name)

    found, expected = model.loss(batch), padded_loss(theirs, batch)

    assert float(found.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    # Seen below 2.0e-6 for two towers, 1e-6 for one; either side is that far from float64.
    tolerance = 2.5e-6 if name in TWO_TOWERS else 1e-6
    assert_same_gradients(gradients(model, found.total), gradients(theirs, expected), tolerance)


def assert_same_gradients(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """The same parameters have gradients, and these differ by less than `tolerance` of their length."""
    # Files call the encoder's text model otherwise than the class in memory.
    others = {name.replace(".text_model.", "."): one for name, one in theirs.items()}
    assert own.keys() == others.keys()
    assert relative_difference(own, others) < tolerance


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_decoder_told_to_see_both_ways_is_the_encoder_made_of_it(tmp_path: Path, name: str) -> None:
    causal = folder_of(name, tmp_path / "causal")
    adapted = shutil.copytree(causal, tmp_path / "adapted")
    flag = {"use_bidirectional_attention": True} if name == "gemma3" else {"is_causal": False}
    change_config(adapted, **flag)
    batch = decoder_batch()

    told = loss_of(TrainableLanguageModel.load(causal, attention="bidirectional"), batch)
    as_is = loss_of(TrainableLanguageModel.load(adapted), batch)
    back = loss_of(TrainableLanguageModel.load(adapted, attention="causal"), batch)

    assert told == as_is == loss_of(TrainableLanguageModel.load(adapted, attention="bidirectional"), batch)
    assert back == loss_of(TrainableLanguageModel.load(causal), batch) != told
    theirs: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(adapted)
    assert as_is == pytest.approx(float(padded_loss(theirs, batch).detach()), rel=1e-6)


# --- rows stay apart


@pytest.mark.parametrize("name", SORTS)
def test_rows_together_are_rows_alone(tmp_path: Path, name: str) -> None:
    model = TrainableLanguageModel.load(folder_of(name, tmp_path / "model")).double()
    batch = batch_of(name)
    together = gradients(model, model.loss(batch).total)
    alone = [model.loss(one).total for one in rows_of(batch)]

    assert loss_of(model, batch) == pytest.approx(sum(float(one.detach()) for one in alone), rel=1e-12)
    assert relative_difference(gradients(model, torch.stack(alone).sum()), together) < 1e-12


@pytest.mark.parametrize("name", SORTS)
def test_the_order_of_the_rows_does_not_matter(tmp_path: Path, name: str) -> None:
    model = TrainableLanguageModel.load(folder_of(name, tmp_path / "model")).double()
    rows = rows_of(batch_of(name))
    expected = gradients(model, model.loss(joined(rows)).total)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 4, 7, 6, 1, 5, 2]):
        found = gradients(model, model.loss(joined([rows[row] for row in order])).total)
        assert relative_difference(found, expected) < 1e-12


def test_a_token_moves_only_the_losses_of_its_row_and_of_what_comes_after_it(tmp_path: Path) -> None:
    model = TrainableLanguageModel.load(folder_of("t5gemma2", tmp_path / "model"))
    batch = batch_of("t5gemma2")
    states = target_states(model, batch)
    ids, source_ids = batch.ids.copy(), batch.source_ids.copy()
    ids[9 + 1 + 12] = 77  # in the third row, of 30 tokens
    source_ids[4 + 26 + 1 + 5] = 77  # in the source of the fourth row, of 2 tokens
    row = np.repeat(np.arange(len(batch.lengths)), batch.lengths)[batch.targets >= 0]
    place = np.flatnonzero(batch.targets >= 0)

    for moved, changed in (
        ({"ids": ids}, (row == 2) & (place >= 22)),
        ({"source_ids": source_ids}, row == 3),
    ):
        other = target_states(model, dataclasses.replace(batch, **moved))
        assert np.array_equal((states != other).any(1).numpy(), changed)


# --- the same, computed otherwise


@pytest.mark.parametrize("name", SORTS)
@pytest.mark.parametrize("recompute", ["feed_forward", "layers"])
def test_recomputing_gives_the_same_gradients_to_the_bit_with_dropout(
    tmp_path: Path,
    name: str,
    recompute: Any,  # noqa: ANN401
) -> None:
    folder, batch, found = folder_of(name, tmp_path / "model"), batch_of(name), []
    for way in ("nothing", recompute):
        model = TrainableLanguageModel.load(folder, dropout=0.2, recompute=way)
        torch.manual_seed(4)
        found.append(gradients(model, model.loss(batch).total))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_dropout_is_on_in_training_only(tmp_path: Path) -> None:
    folder, batch = folder_of("t5gemma", tmp_path / "model"), batch_of("t5gemma")
    model = TrainableLanguageModel.load(folder, dropout=0.3)
    assert loss_of(model, batch) != loss_of(model, batch)
    plain = loss_of(TrainableLanguageModel.load(folder), batch)
    assert loss_of(model.eval(), batch) == plain


@pytest.mark.parametrize("name", SORTS)
def test_bf16_keeps_the_loss_and_the_direction_of_the_gradients(tmp_path: Path, name: str) -> None:
    folder, batch = folder_of(name, tmp_path / "model"), batch_of(name)
    wide, narrow = (TrainableLanguageModel.load(folder, precision=one) for one in PRECISIONS)
    assert loss_of(narrow, batch) == pytest.approx(loss_of(wide, batch), rel=5e-3)
    expected = gradients(wide, wide.loss(batch).total)
    found = gradients(narrow, narrow.loss(batch).total)
    assert all(one.dtype == torch.float32 for one in found.values())
    assert relative_difference(found, expected) < 0.05


def test_gradient_of_a_table_of_its_own_holds_the_used_rows_only(tmp_path: Path) -> None:
    folder, batch = folder_of("t5gemma", tmp_path / "model"), batch_of("t5gemma")
    model = TrainableLanguageModel.load(folder)
    walk(model.loss(batch).total)
    assert model.table_name == "model.encoder.embed_tokens.weight"
    gradient = model.get_parameter(model.table_name).grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient._indices()[0].tolist() == np.unique(batch.source_ids).tolist()
    tied = model.get_parameter("model.decoder.embed_tokens.weight").grad
    assert tied is not None
    assert not tied.is_sparse


# --- parts of a model


def test_only_the_cross_attention_learns_where_all_else_is_frozen(tmp_path: Path) -> None:
    model = TrainableLanguageModel.load(folder_of("t5gemma unbalanced", tmp_path / "model"))
    batch = batch_of("t5gemma unbalanced")
    expected = gradients(model, model.loss(batch).total)
    names = model.cross_attention_names
    parts = [f"cross_attn.{part}_proj" for part in "qkvo"]
    norms = ["pre_cross_attn_layernorm", "post_cross_attn_layernorm"]
    assert names == {
        f"model.decoder.layers.{layer}.{part}.weight" for layer in (0, 1) for part in (*parts, *norms)
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)

    found = gradients(model, model.loss(batch).total)

    assert found.keys() == names
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_a_decoder_whose_cross_attention_brings_nothing_back_is_the_decoder_alone(tmp_path: Path) -> None:
    both = TrainableLanguageModel.load(folder_of("t5gemma", tmp_path / "both")).double()
    alone = TrainableLanguageModel.load(folder_of("gemma2", tmp_path / "alone")).double()
    ours = dict(both.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.items():
            if "cross_attn.o_proj" in name:
                parameter.zero_()
        for name, parameter in alone.named_parameters():
            own = name.replace("model.", "model.decoder.")
            own = own.replace("post_attention_layernorm", "post_self_attn_layernorm")
            parameter.copy_(ours[own.replace("input_layernorm", "pre_self_attn_layernorm")])

    assert loss_of(both, batch_of("t5gemma")) == pytest.approx(loss_of(alone, decoder_batch()), rel=1e-14)


def test_merged_attention_has_no_cross_attention_of_its_own(tmp_path: Path) -> None:
    model = TrainableLanguageModel.load(folder_of("t5gemma2", tmp_path / "model"))
    assert model.cross_attention_names == frozenset()
    assert model.is_encoder_decoder
    assert model.vocabulary == VOCABULARY
    assert not TrainableLanguageModel.load(folder_of("llama", tmp_path / "other")).is_encoder_decoder


# --- teachers


def test_a_decoder_teaches_an_encoder_decoder_at_places_of_its_own(tmp_path: Path) -> None:
    student = TrainableLanguageModel.load(folder_of("t5gemma", tmp_path / "student")).double()
    teacher = TrainableLanguageModel.load(folder_of("gemma2", tmp_path / "teacher"), dropout=0.5).double()
    batch = batch_of("t5gemma")
    # The teacher reads the source before what the student's decoder reads.
    rows = []
    for row in rows_of(batch):
        none = np.full(len(row.source_ids), -100, dtype=np.int32)
        whole = np.concatenate([row.source_ids, row.ids])
        size = np.array([len(whole)], dtype=np.int32)
        rows.append(LanguageBatch(whole, size, np.concatenate([none, row.targets]), NONE, NONE))

    states = teacher.teacher_states(joined(rows), temperature=2.0, share=0.75)
    found = student.loss(batch, teacher=states)

    reference_scores = []
    for row in rows:
        scores = in_float64("gemma2")(input_ids=torch.from_numpy(row.ids).long()[None]).logits[0]
        reference_scores.append(scores[torch.from_numpy(row.targets >= 0)])
    theirs = F.softmax(torch.cat(reference_scores) / 2, -1)
    own = scores_of(student, batch)
    divergence = F.kl_div(F.log_softmax(own / 2, -1), theirs.detach(), reduction="sum")
    expected = 0.75 * 4 * float(divergence) + 0.25 * found.cross_entropy
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)  # theirs has norms in fp32
    walk(found.total)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- folders


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_the_same_loss_in_transformers(tmp_path: Path, name: str) -> None:
    model, batch = TrainableLanguageModel.load(folder_of(name, tmp_path / "model")), batch_of(name)
    step(model, batch)
    model.save(tmp_path / "saved")

    auto = "AutoModelForCausalLM" if name in DECODERS else "AutoModelForSeq2SeqLM"
    theirs = getattr(transformers, auto).from_pretrained(tmp_path / "saved").eval()

    assert loss_of(model, batch) != pytest.approx(
        float(padded_loss(reference(name), batch).detach()), rel=1e-3
    )
    assert float(padded_loss(theirs, batch).detach()) == pytest.approx(loss_of(model, batch), rel=1e-6)
    assert loss_of(TrainableLanguageModel.load(tmp_path / "saved"), batch) == loss_of(model, batch)


@pytest.mark.parametrize("name", ["gemma3", "llama with one table", "t5gemma", "t5gemma2"])
def test_tied_tables_that_a_file_repeats_stay_one_and_are_saved_alike(tmp_path: Path, name: str) -> None:
    folder, batch = folder_of(name, tmp_path / "model"), batch_of(name)
    expected = loss_of(TrainableLanguageModel.load(folder), batch)
    tensors = load_file(folder / "model.safetensors")
    table = (
        "model.decoder.embed_tokens.weight"
        if name == "t5gemma"
        else TrainableLanguageModel.load(folder).table_name
    )
    copies = {"lm_head.out_proj.weight" if name in TWO_TOWERS else "lm_head.weight": table}
    if name == "t5gemma2":
        copies["model.decoder.embed_tokens.weight"] = table
        copies["model.decoder.embed_tokens.eoi_embedding"] = "model.encoder.embed_tokens.eoi_embedding"
    repeated = {copy: tensors[own].clone() for copy, own in copies.items()}
    save_file({**tensors, **repeated}, folder / "model.safetensors", metadata={"format": "pt"})

    model = TrainableLanguageModel.load(folder)
    assert loss_of(model, batch) == expected
    step(model, batch)
    model.save(tmp_path / "saved")

    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == {*tensors, *copies}
    assert all(torch.equal(saved[copy], saved[own]) for copy, own in copies.items())
    assert not torch.equal(saved[table], tensors[table])


def test_a_head_that_is_declared_tied_but_differs_stays_apart_as_in_transformers(tmp_path: Path) -> None:
    folder, batch = folder_of("gemma3 with a head of its own", tmp_path / "model"), decoder_batch()
    expected = loss_of(TrainableLanguageModel.load(folder), batch)
    change_config(folder, tie_word_embeddings=True)
    model = TrainableLanguageModel.load(folder)
    assert loss_of(model, batch) == expected
    assert "lm_head.weight" in dict(model.named_parameters())


def test_shards_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    reference("t5gemma").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    model, batch = TrainableLanguageModel.load(tmp_path / "model"), batch_of("t5gemma")
    assert loss_of(model, batch) == loss_of(
        TrainableLanguageModel.load(folder_of("t5gemma", tmp_path / "whole")), batch
    )
    step(model, batch)
    model.save(tmp_path / "saved")
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert loss_of(TrainableLanguageModel.load(tmp_path / "saved"), batch) == loss_of(model, batch)


def test_a_folder_in_bf16_is_saved_in_fp32_at_every_depth_or_as_it_was(tmp_path: Path) -> None:
    copy.deepcopy(reference("t5gemma2")).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = TrainableLanguageModel.load(tmp_path / "model")
    model.save(tmp_path / "wide")
    model.save(tmp_path / "narrow", dtype="source")
    for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name)
        assert {parameter.dtype for parameter in theirs.parameters()} == {dtype}
        assert f'"{str(dtype).removeprefix("torch.")}"' in (tmp_path / name / "config.json").read_text(
            "utf-8"
        )
    assert '"bfloat16"' not in (tmp_path / "wide/config.json").read_text("utf-8")


def test_a_sentence_transformers_folder_keeps_its_modules(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", dense=[{"out_features": 24}])
    model = TrainableLanguageModel.load(folder, attention="causal")
    step(model, decoder_batch())
    model.save(tmp_path / "saved")
    assert read_folder(tmp_path / "saved").dims == 24
    batch = decoder_batch()
    again = TrainableLanguageModel.load(tmp_path / "saved", attention="causal")
    assert loss_of(again, batch) == loss_of(model, batch)
    assert loss_of(TrainableLanguageModel.load(tmp_path / "saved"), batch) != loss_of(model, batch)


# --- mistakes


def test_what_is_no_batch_of_the_model_is_refused(tmp_path: Path) -> None:
    one, two = (
        TrainableLanguageModel.load(folder_of(name, tmp_path / name)) for name in ("llama", "t5gemma")
    )
    batch, both = decoder_batch(), batch_of("t5gemma")
    lengths = batch.lengths.copy()
    lengths[0] += 1
    high = np.full_like(batch.ids, VOCABULARY)
    for model, wrong, message in (
        (one, {"lengths": lengths}, "lengths of 73 tokens for 72 ids; each is 1 at least"),
        (one, {"ids": high}, "ids from 90 to 90, but the vocabulary has 90 tokens"),
        (one, {"targets": high}, "targets from 90 to 90, but the vocabulary has 90 tokens"),
        (one, {"targets": batch.targets[1:]}, "71 targets for 72 ids"),
        (one, {"source_ids": batch.ids}, "the batch has a source, but the model has no encoder to read it"),
        (two, {"source_lengths": both.source_lengths[1:]}, "7 sources for 8 rows"),
        (
            two,
            {"source_ids": both.source_ids[1:]},
            "lengths of 115 tokens for 114 source_ids; each is 1 at least",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            model.loss(dataclasses.replace(batch if model is one else both, **wrong))


def test_folders_that_are_no_language_model_are_refused(tmp_path: Path) -> None:
    encoder = tiny_folder(tmp_path / "bert", "bert")
    headless = folder_of("llama", tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    quantised = folder_of("llama", tmp_path / "quantised")
    change_config(quantised, quantization_config={"bits": 4})
    known = "gemma2, gemma3, gemma3_text, llama, mistral, qwen2, qwen3, t5gemma, t5gemma2"
    cases: Sequence[tuple[Path, Mapping[str, Any], str]] = (
        (
            encoder,
            {},
            f"{encoder}/config.json: model type 'bert' cannot be trained as a language model; "
            f"train a model of another type, one of {known}",
        ),
        (
            headless,
            {},
            f"{headless}: its weights have no lm_head, and config.json does not tie it to the token table "
            "(tie_word_embeddings); take the model that generates text, not its encoder alone",
        ),
        (
            quantised,
            {},
            f"{quantised}/config.json: the weights are quantised and cannot be trained; "
            "use the model that they were made from",
        ),
        (
            folder_of("t5gemma", tmp_path / "both"),
            {"attention": "causal"},
            f"{tmp_path / 'both'}/config.json: attention is 'causal', but each tower of t5gemma sees one way "
            "only; leave it at 'folder'",
        ),
        (
            tmp_path,
            {},
            f"{tmp_path} is not a model folder: no config.json; a model is a folder with config.json and "
            "model.safetensors",
        ),
    )
    for folder, options, message in cases:
        with pytest.raises(GembError) as told:
            TrainableLanguageModel.load(folder, **options)
        assert str(told.value) == message
