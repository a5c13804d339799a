"""Pooling modes over packed texts, worked out by hand and in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gemb.model import pooling
from gemb.model.folder import PoolingSettings
from gemb.model.layout import Layout
from gemb.model.pooling import LINEAR_MODES, pool, pool_by_attention
from gemb.model.trainable import pooling as trainable
from tests.models import MODES, OWN_MODES, own_tensors

# Two texts of 3 tokens and one of 1.
LAYOUT = Layout.of(np.array([3, 3, 1], dtype=np.int32))
STATES = torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, 8.0], [0.0, 0.0], [-1.0, 1.0], [4.0, -4.0], [7.0, 9.0]])


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("cls", [1.0, -2.0], [0.0, 0.0]),
        ("lasttoken", [5.0, 8.0], [4.0, -4.0]),
        ("max", [5.0, 8.0], [4.0, 1.0]),
        ("mean", [3.0, 2.0], [1.0, -1.0]),
        ("mean_sqrt_len_tokens", [9 / 3**0.5, 6 / 3**0.5], [3 / 3**0.5, -3 / 3**0.5]),
        ("weightedmean", [(1 + 6 + 15) / 6, (-2 + 0 + 24) / 6], [(-2 + 12) / 6, (2 - 12) / 6]),
    ],
)
def test_each_mode_gives_the_numbers_worked_out_by_hand(
    mode: str, first: list[float], second: list[float]
) -> None:
    expected = torch.tensor([first, second, [7.0, 9.0]])  # of one token every mode gives that token
    torch.testing.assert_close(pool(STATES, LAYOUT, [mode]), expected)


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("cls", [3.0, 0.0], [-1.0, 1.0]),
        ("lasttoken", [5.0, 8.0], [4.0, -4.0]),
        ("max", [5.0, 8.0], [4.0, 1.0]),
        ("mean", [4.0, 4.0], [1.5, -1.5]),
        ("mean_sqrt_len_tokens", [8 / 2**0.5, 8 / 2**0.5], [3 / 2**0.5, -3 / 2**0.5]),
        # The weights stay those of the whole text: 2 and 3.
        ("weightedmean", [(6 + 15) / 5, (0 + 24) / 5], [(-2 + 12) / 5, (2 - 12) / 5]),
    ],
)
def test_tokens_of_the_prompt_take_no_part(mode: str, first: list[float], second: list[float]) -> None:
    # The text of one token is all prompt, and keeps it.
    expected = torch.tensor([first, second, [7.0, 9.0]])
    torch.testing.assert_close(pool(STATES, LAYOUT, [mode], skip=1), expected)


def test_a_text_that_is_all_prompt_keeps_its_last_token() -> None:
    for mode in MODES:
        torch.testing.assert_close(pool(STATES, LAYOUT, [mode], skip=3), STATES[[2, 5, 6]])


def test_several_modes_stand_one_after_another() -> None:
    both = pool(STATES, LAYOUT, ["max", "cls", "mean"])
    parts = [pool(STATES, LAYOUT, [mode]) for mode in ("max", "cls", "mean")]
    assert torch.equal(both, torch.cat(parts, dim=1))


def test_filling_tokens_take_no_part() -> None:
    filled = Layout.of(np.array([3, 3, 1], dtype=np.int32), least_rows=20)
    states = torch.cat([STATES, torch.full((13, 2), 100.0)])
    assert torch.equal(pool(states, filled, MODES), pool(STATES, LAYOUT, MODES))


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_does_not_depend_on_its_neighbours(mode: str) -> None:
    random = torch.Generator().manual_seed(3)
    for length, width in ((1, 96), (2, 5), (7, 96), (64, 384), (129, 80), (513, 8)):
        states = torch.randn(9 * length, width, generator=random)
        together = pool(states, Layout.of(np.full(9, length, dtype=np.int32)), [mode])
        one = Layout.of(np.array([length], dtype=np.int32))
        alone = [pool(states[row * length : (row + 1) * length], one, [mode]) for row in range(9)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", sorted(LINEAR_MODES))
def test_a_linear_map_may_follow_the_linear_modes(mode: str) -> None:
    random = torch.Generator().manual_seed(4)
    matrix = torch.randn(5, 2, generator=random)
    after = pool(STATES, LAYOUT, [mode]) @ matrix.T
    torch.testing.assert_close(after, pool(STATES @ matrix.T, LAYOUT, [mode]))
    nonlinear = pool(STATES, LAYOUT, ["max"]) @ matrix.T
    assert not torch.allclose(nonlinear, pool(STATES @ matrix.T, LAYOUT, ["max"]))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'median' is no pooling mode$"):
        pool(STATES, LAYOUT, ["median"])


# --- first-k and last-k


@pytest.mark.parametrize(
    ("mode", "few", "skip", "first", "second"),
    [
        ("first-k", 2, 0, [2.0, -1.0], [-0.5, 0.5]),
        ("last-k", 2, 0, [4.0, 4.0], [1.5, -1.5]),
        ("first-k", 2, 1, [4.0, 4.0], [1.5, -1.5]),
        ("first-k", 1, 1, [3.0, 0.0], [-1.0, 1.0]),
        ("last-k", 2, 2, [5.0, 8.0], [4.0, -4.0]),  # one token is left beside the prompt
        ("last-k", 1, 0, [5.0, 8.0], [4.0, -4.0]),
    ],
)
def test_the_first_or_last_tokens_give_their_mean(
    mode: str, few: int, skip: int, first: list[float], second: list[float]
) -> None:
    expected = torch.tensor([first, second, [7.0, 9.0]])
    torch.testing.assert_close(pool(STATES, LAYOUT, [mode], skip, few=few), expected)


@pytest.mark.parametrize("mode", ["first-k", "last-k"])
def test_more_tokens_than_a_text_has_are_all_of_them(mode: str) -> None:
    assert torch.equal(pool(STATES, LAYOUT, [mode], 1, few=9), pool(STATES, LAYOUT, ["mean"], 1))


# --- attention pooling

WIDTH, HEADS = 24, 4
ATTENTION = [mode for mode in OWN_MODES if mode.startswith("attention")]
LENGTHS = np.array([9, 9, 9, 4, 4, 1], dtype=np.int32)


def settings_of(mode: str) -> PoolingSettings:
    return PoolingSettings((mode,), include_prompt=True, width=WIDTH, **OWN_MODES[mode])  # type: ignore[arg-type]


def tensors_of(mode: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    found = own_tensors(mode, WIDTH)
    return {name.removesuffix(".weight"): tensor.to(dtype) for name, tensor in found.items()}


def states_of(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(5), dtype=dtype)


def padded_reference(
    mode: str, states: Tensor, lengths: list[int], skips: list[int], tensors: dict[str, Tensor]
) -> Tensor:
    """The definitions as they stand in Gemma Encoder: one padded batch, a mask, a head at a time."""
    texts = torch.split(states, lengths)
    x = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=7.0)  # [B, L, D]
    places = torch.arange(max(lengths))
    parts = [(places >= min(skip, n - 1)) & (places < n) for n, skip in zip(lengths, skips, strict=True)]
    mask = torch.stack(parts)
    channels = WIDTH // HEADS
    heads = []
    for head in range(HEADS):
        some = slice(head * channels, (head + 1) * channels)
        if mode == "attention-query":
            keys, values = x @ tensors["key"][some].T, x @ tensors["value"][some].T
            scores = keys @ tensors["probe"][0, some] / math.sqrt(channels)  # [B, L]
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            heads.append((weights[..., None] * values).sum(1))
        else:
            queries = x @ tensors["query"][some].T
            scores = queries @ tensors["key_probes"][:, some].T / math.sqrt(channels)  # [B, L, P]
            each = scores.softmax(-1) @ tensors["value_probes"][:, some]
            heads.append((each * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("mode", ATTENTION)
def test_attention_equals_a_padded_batch_in_float64(mode: str, skip: int) -> None:
    states, tensors = states_of(int(LENGTHS.sum())), tensors_of(mode)
    expected = padded_reference(mode, states, LENGTHS.tolist(), [skip] * len(LENGTHS), tensors)
    attention = pooling.with_tensors(settings_of(mode), tensors)
    found = pool_by_attention(states, Layout.of(LENGTHS), attention, skip)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ATTENTION)
def test_attention_with_a_prompt_of_its_own_before_each_text_equals_a_padded_batch(mode: str) -> None:
    states, tensors = states_of(int(LENGTHS.sum())), tensors_of(mode)
    skips = [0, 3, 9, 1, 4, 0]  # two are all prompt and keep their last token
    expected = padded_reference(mode, states, LENGTHS.tolist(), skips, tensors)
    attention = pooling.with_tensors(settings_of(mode), tensors)
    layout, skip = Layout.of(LENGTHS), np.array(skips, dtype=np.int32)
    found = trainable.pool_by_attention(states, layout, LENGTHS, skip, attention)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_query_probe_of_zero_gives_the_mean_of_the_values() -> None:
    states, tensors = states_of(36), tensors_of("attention-query")
    layout = Layout.of(LENGTHS)
    for name in ("probe", "key"):
        changed = {**tensors, name: torch.zeros_like(tensors[name])}
        attention = pooling.with_tensors(settings_of("attention-query"), changed)
        expected = pool(states @ tensors["value"].T, layout, ["mean"])
        torch.testing.assert_close(pool_by_attention(states, layout, attention), expected, atol=1e-12, rtol=0)


def test_a_text_of_one_token_gives_its_value() -> None:
    states, tensors = states_of(36), tensors_of("attention-query")
    attention = pooling.with_tensors(settings_of("attention-query"), tensors)
    found = pool_by_attention(states, Layout.of(LENGTHS), attention)
    torch.testing.assert_close(found[-1], tensors["value"] @ states[-1])


def test_equal_keys_give_the_mean_of_the_value_probes() -> None:
    states, tensors = states_of(36), tensors_of("attention-kv")
    tensors["key_probes"] = tensors["key_probes"][:1].expand(6, -1)
    attention = pooling.with_tensors(settings_of("attention-kv"), tensors)
    found = pool_by_attention(states, Layout.of(LENGTHS), attention)
    torch.testing.assert_close(found, tensors["value_probes"].mean(0).expand(6, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ATTENTION)
def test_narrow_numbers_give_the_vectors_of_float64(mode: str, dtype: torch.dtype) -> None:
    states, tensors = states_of(36), tensors_of(mode)
    layout = Layout.of(LENGTHS)
    expected = pool_by_attention(states, layout, pooling.with_tensors(settings_of(mode), tensors))
    attention = pooling.with_tensors(settings_of(mode), tensors_of(mode, dtype))
    found = pool_by_attention(states.to(dtype), layout, attention).double()
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    else:
        assert torch.cosine_similarity(found, expected).min() > 0.999


@pytest.mark.parametrize("mode", ATTENTION)
def test_an_attended_vector_does_not_depend_on_its_neighbours(mode: str) -> None:
    random = torch.Generator().manual_seed(3)
    attention = pooling.with_tensors(settings_of(mode), tensors_of(mode, torch.float32))
    for length in (1, 2, 7, 64, 129, 513):
        states = torch.randn(9 * length, WIDTH, generator=random)
        together = pool_by_attention(states, Layout.of(np.full(9, length, dtype=np.int32)), attention)
        one = Layout.of(np.array([length], dtype=np.int32))
        alone = [pool_by_attention(part, one, attention) for part in torch.split(states, length)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", ATTENTION)
def test_attention_has_the_gradients_of_finite_differences(mode: str) -> None:
    lengths, skip = np.array([3, 3, 1], dtype=np.int32), np.array([0, 2, 1], dtype=np.int32)
    tensors = tensors_of(mode)

    def run(states: Tensor, *values: Tensor) -> Tensor:
        attention = pooling.with_tensors(settings_of(mode), dict(zip(tensors, values, strict=True)))
        return trainable.pool_by_attention(states, Layout.of(lengths), lengths, skip, attention)

    inputs = [states_of(7), *tensors.values()]
    assert torch.autograd.gradcheck(run, [one.clone().requires_grad_() for one in inputs], fast_mode=True)


def test_no_text_attended_gives_no_vector() -> None:
    attention = pooling.with_tensors(settings_of("attention-query"), tensors_of("attention-query"))
    empty = Layout.of(np.array([], dtype=np.int32))
    assert pool_by_attention(states_of(0), empty, attention).shape == (0, WIDTH)
