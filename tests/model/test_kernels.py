"""The operators equal their plain forms, and a row of a product does not depend on the others."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from gemb.device import processor
from gemb.model import kernels
from gemb.model.kernels import (
    ACTIVATIONS,
    Kernels,
    Linear,
    PackedLinear,
    Rotary,
    activation,
    add_normed_,
    can_pack,
    interleave,
    inverse_rms,
    rms_norm,
    turn,
)
from gemb.model.layout import Layout

torch.set_num_threads(1)  # as the engine runs

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(
        torch.bfloat16,
        id="bf16",
        marks=pytest.mark.skipif(not processor().has_bf16, reason="this processor has no bf16 instructions"),
    ),
]
# A product of numbers of size 1 over 64 inputs; bf16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
RANDOM = torch.Generator().manual_seed(11)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of unit size."""
    return torch.randn(shape, generator=RANDOM).to(dtype)


# --- linear layers


def forms(layer: Linear, x: Tensor, other: Tensor) -> list[Tensor]:
    """The product alone, and with everything that can be fused into it."""
    fused = [layer.activated(x, name) for name in ACTIVATIONS]
    return [layer(x), layer.times(x, other), layer.plus(x, other), *fused]


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_equals_the_plain_one(dtype: torch.dtype, has_bias: bool) -> None:
    if not can_pack(dtype):
        pytest.skip("torch packs no weights of this dtype here")
    weight = normal(48, 64, dtype=dtype) / 8
    bias = normal(48, dtype=dtype) if has_bias else None
    packed, plain = PackedLinear(weight, bias), Linear(weight, bias)
    for rows in (1, 5, 16, 70, 300):
        x, other = normal(rows, 64, dtype=dtype), normal(rows, 48, dtype=dtype)
        for ours, theirs in zip(forms(packed, x, other), forms(plain, x, other), strict=True):
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=1e-2)
        stream = normal(rows, 48)
        assert packed.plus(x, stream).dtype == torch.float32
        torch.testing.assert_close(
            packed.plus(x, stream), plain(x).float() + stream, atol=TOLERANCE[dtype], rtol=1e-2
        )


# Inputs and outputs of layers: tiny ones, MiniLM, EmbeddingGemma, BERT, EmbeddingGemma 2, BERT-large.
WIDTHS = [
    (64, 96),
    (384, 1152),
    (1536, 384),
    (768, 2304),
    (768, 1280),
    (1152, 768),
    (3072, 768),
    (512, 2048),
    (2048, 512),
    (4096, 1024),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS, ids=lambda width: str(width))
def test_a_row_is_the_same_to_the_bit_at_every_row_count(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    if not can_pack(dtype):
        pytest.skip("torch packs no weights of this dtype here")
    # Fewer outputs than the layer has: how inputs are summed does not depend on their number, and time does.
    layer = Kernels("cpu", dtype).linear(normal(min(outputs, 256), inputs) * inputs**-0.5)
    x = normal(1100, inputs, dtype=dtype)
    whole = layer(x)
    for rows in [*range(1, 80), *range(80, 260, 4), *range(260, 1100, 60)]:
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
    other = normal(1100, whole.shape[1], dtype=dtype)
    all_forms = forms(layer, x, other)
    for rows in (1, 17, 33, 64, 129, 257):
        for some, everything in zip(forms(layer, x[:rows], other[:rows]), all_forms, strict=True):
            assert torch.equal(some, everything[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_bit_wherever_it_stands(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("torch packs no weights of this dtype here")
    layer = Kernels("cpu", dtype).linear(normal(768, 384) / 20)
    x = normal(700, 384, dtype=dtype)
    order = torch.randperm(700, generator=RANDOM)
    assert torch.equal(layer(x)[order], layer(x[order]))


def test_without_packing_layers_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a torch that lost its private operators, or an oneDNN that refuses the processor."""
    monkeypatch.setattr(kernels, "can_pack", lambda _: False)
    made = Kernels("cpu", torch.float32)
    assert not made.packs
    assert type(made.linear(normal(4, 4))) is Linear


def test_a_torch_without_the_private_operators_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoOperators:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", NoOperators(), raising=False)
    can_pack.cache_clear()
    assert not can_pack(torch.float32)
    monkeypatch.undo()
    can_pack.cache_clear()


def test_this_torch_packs_fp32_weights() -> None:
    """If this fails after an upgrade, the private operators are gone: see gemb.model.kernels."""
    assert can_pack(torch.float32)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'tanh' is not one of gelu, gelu_tanh, silu, relu$"):
        activation("tanh")


def test_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    x = normal(100)
    for ours, theirs in {
        "gelu": "gelu",
        "gelu_tanh": "gelu_pytorch_tanh",
        "silu": "silu",
        "relu": "relu",
    }.items():
        torch.testing.assert_close(activation(ours)(x), ACT2FN[theirs](x))


# --- norms


def test_rms_norm_equals_the_formula_in_float64() -> None:
    x, gain = normal(7, 96) * 3, normal(96)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x, None, 1e-6), exact.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(rms_norm(x, gain, 1e-6), (exact * gain).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(inverse_rms(x, 1e-6).flatten() ** -2, x.square().mean(-1) + 1e-6)


def test_epsilon_keeps_a_zero_row_finite() -> None:
    assert rms_norm(torch.zeros(2, 8), None, 1e-6).abs().max() == 0


def test_the_norm_of_bf16_is_computed_in_fp32() -> None:
    x = (normal(3, 64) * 100).bfloat16()
    torch.testing.assert_close(rms_norm(x.float(), None, 1e-6), rms_norm(x, None, 1e-6))


def test_a_normed_sub_layer_is_added_in_place() -> None:
    stream, x, gain = normal(5, 32), normal(5, 32), normal(32)
    expected = stream + rms_norm(x, gain, 1e-6)
    add_normed_(stream, x, gain, 1e-6)
    torch.testing.assert_close(stream, expected)


# --- rotary positions


def test_turning_interleaved_heads_equals_the_rotation_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    channels, lengths = 16, np.array([9, 4], dtype=np.int32)
    frequencies = 1.0 / 100.0 ** (torch.arange(0, channels, 2).float() / channels)
    layout = Layout.of(lengths)
    heads = normal(13, 3, channels)
    order = interleave(channels)
    ours = turn(heads[..., order].contiguous(), Rotary(frequencies).at(layout))
    angles = layout.positions[:, None].float() * frequencies.repeat(2)
    theirs, _ = apply_rotary_pos_emb(
        heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None]
    )
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1)[..., order], atol=1e-6, rtol=0)


def test_interleaving_puts_the_halves_of_a_pair_side_by_side() -> None:
    assert interleave(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_scores_depend_on_distance_alone() -> None:
    channels = 32
    rotary = Rotary(1.0 / 1e4 ** (torch.arange(0, channels, 2).float() / channels))
    turns = rotary.at(Layout.of(np.array([40], dtype=np.int32)))
    q, k = (
        normal(1, 1, channels).expand(40, 1, -1).contiguous(),
        normal(1, 1, channels).expand(40, 1, -1).contiguous(),
    )
    scores = turn(q, turns)[:, 0] @ turn(k, turns)[:, 0].T
    for distance in (0, 1, 7, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def test_angles_grow_with_the_longest_text_and_stay_what_they_were() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.01]))
    sizes = [5, 300, 4000, 7]
    tables = [rotary.at(Layout.of(np.array([size], dtype=np.int32))) for size in sizes]
    for short, long in pairwise(tables):
        common = min(len(short), len(long))
        assert torch.equal(short[:common], long[:common])
    assert tables[2][3999, 0, 1].angle().item() == pytest.approx(39.99 - 12 * np.pi, abs=1e-5)
