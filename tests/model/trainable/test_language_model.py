"""Language models in training: loss and gradients equal transformers' padded ones, rows stay apart."""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from gemb.model.trainable.language_model import LanguageBatch, TrainableLanguageModel

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
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
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
LENGTHS = (9, 1, 30, 2, 9, 17, 1, 3)
"""Wildly unequal, in no order, some equal, longer than the windows."""


@cache
def reference(name: str) -> Any:  # noqa: ANN401  # any model class of transformers
    """transformers' own model with random weights, in fp32."""
    family, settings = DECODERS[name]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    random = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)  # gains; their neutral value depends on the family
                continue
            # What comes back to the stream is small beside it, as at the start of a training (GPT-2).
            share = 0.4 if key.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
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
    none = np.zeros(0, dtype=np.int32)
    return LanguageBatch(ids, sizes, targets, none, none)


def padded(values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], fill: int) -> Tensor:
    """[R, L] on the right padded rows of packed values."""
    rows = torch.split(torch.from_numpy(values).long(), lengths.tolist())
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def padded_loss(model: Any, batch: LanguageBatch) -> Tensor:  # noqa: ANN401
    """The sum of transformers' own loss of one padded batch with labels."""
    ids = padded(batch.ids, batch.lengths, 0)
    mask = padded(np.ones_like(batch.ids), batch.lengths, 0)
    labels = F.pad(padded(batch.targets, batch.lengths, -100), (1, -1), value=-100)  # they shift it back
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
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


# --- equal to transformers


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_equal_those_of_transformers_padded(tmp_path: Path, name: str) -> None:
    model = TrainableLanguageModel.load(folder_of(name, tmp_path / "model"))
    theirs, batch = copy.deepcopy(reference(name)), decoder_batch()

    found, expected = model.loss(batch), padded_loss(theirs, batch)

    assert float(found.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert found.tokens == int((batch.targets >= 0).sum())
    assert found.cross_entropy == pytest.approx(float(expected.detach()), rel=1e-6)
    own, others = gradients(model, found.total), gradients(theirs, expected)
    assert own.keys() == others.keys()
    assert relative_difference(own, others) < 1e-6
