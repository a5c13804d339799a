"""Every way of packed attention equals dense attention with a mask, in float64."""

import inspect
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemb.device import processor
from gemb.model import packed_attention
from gemb.model.attention import CAUSAL, FULL, Reach
from gemb.model.layout import Layout
from gemb.model.packed_attention import attend, attend_flash, attend_flex, attend_groups, within

torch.set_num_threads(1)  # as the engine runs

Kind = tuple[Reach, float | None]
"""What is seen, and the softcap of scores."""
KINDS: dict[str, Kind] = {
    "full": (FULL, None),
    "causal": (CAUSAL, None),
    "window": (Reach(5, 5), None),
    "a wide window": (Reach(140, 140), None),
    "a lopsided window": (Reach(3, 7), None),
    "a causal window": (Reach(6, 0), None),
    "only what comes": (Reach(0, None), None),
    "softcap": (FULL, 2.0),
    "softcap and window": (Reach(4, 4), 2.0),
    "softcap, causal, window": (Reach(9, 0), 2.0),
}
HEADS = {"one": (1, 1), "each its own": (3, 3), "shared by all": (3, 1), "shared in pairs": (4, 2)}


# Uncompiled is what a CPU can check.
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def heads(layout: Layout, queries: int, shared: int, channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch; scores have about unit size."""
    random = torch.Generator().manual_seed(layout.tokens)
    q, k, v = (
        torch.randn(layout.filled, count, channels, generator=random) for count in (queries, shared, shared)
    )
    return q * channels**-0.5, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout, kind: Kind) -> Tensor:
    """All tokens of the batch in one float64 product under one mask."""
    tokens = layout.tokens
    text = torch.arange(layout.rows).repeat_interleave(layout.starts.diff().long())
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = text[:, None] == text
    reach, softcap = kind
    if reach.left is not None:
        seen &= j >= i - reach.left
    if reach.right is not None:
        seen &= j <= i + reach.right
    q, k, v = (x[:tokens].double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    products = q @ k.transpose(1, 2)
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    weights = products.masked_fill(~seen, -torch.inf).softmax(-1)
    mixed = (weights @ v).transpose(0, 1).flatten(1).float()
    return torch.cat([mixed, mixed.new_zeros(layout.filled - tokens, mixed.shape[1])])


def layouts() -> list[Layout]:
    """Texts of one token, as long as windows and query blocks, longer, in groups and alone."""
    random = np.random.default_rng(7)
    lengths = [
        [1],
        [6, 6, 5, 5, 1],
        [300, 129, 128, 127, 17, 17, 17, 2, 1, 1],
        sorted(random.integers(1, 60, 12).tolist(), reverse=True),
    ]
    made = [Layout.of(np.array(one, dtype=np.int32)) for one in lengths]
    return [*made, Layout.of(np.array([4, 3], dtype=np.int32), least_rows=16)]


@pytest.mark.parametrize("sharing", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_equal_lengths_equal_dense_attention(kind: str, sharing: str) -> None:
    for layout in layouts():
        q, k, v = heads(layout, *HEADS[sharing])
        mixed = attend(q, k, v, layout, *KINDS[kind])
        torch.testing.assert_close(mixed, dense(q, k, v, layout, KINDS[kind]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_differs_by_its_rounding_only(kind: str) -> None:
    if not processor().has_bf16:
        pytest.skip("this processor has no bf16 instructions")
    for layout in layouts():
        q, k, v = (x.bfloat16() for x in heads(layout, 4, 2))
        mixed = attend(q, k, v, layout, *KINDS[kind])
        assert mixed.dtype == torch.bfloat16
        expected = dense(q.float(), k.float(), v.float(), layout, KINDS[kind])
        torch.testing.assert_close(mixed.float(), expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_does_not_see_its_neighbours(kind: str, dtype: torch.dtype) -> None:
    for layout in layouts()[1:]:
        q, k, v = (x.to(dtype) for x in heads(layout, 4, 2))
        together = attend_groups(q, k, v, layout, *KINDS[kind])
        for first, last in pairwise(layout.starts.tolist()):
            one = Layout.of(np.array([last - first], dtype=np.int32))
            alone = attend_groups(q[first:last], k[first:last], v[first:last], one, *KINDS[kind])
            assert torch.equal(together[first:last], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("queries", "shared", "channels"),
    [(12, 12, 32), (3, 1, 256), (4, 1, 512)],
    ids=["MiniLM", "EmbeddingGemma", "EmbeddingGemma 2"],
)
def test_long_texts_of_one_length_do_not_see_each_other(
    queries: int, shared: int, channels: int, dtype: torch.dtype
) -> None:
    length = 300
    together, one = (Layout.of(np.full(rows, length, dtype=np.int32)) for rows in (3, 1))
    parts = [x.to(dtype) for x in heads(together, queries, shared, channels)]
    mixed = attend(parts[0], parts[1], parts[2], together, FULL)
    for first in range(0, 3 * length, length):
        q, k, v = (part[first : first + length] for part in parts)
        assert torch.equal(mixed[first : first + length], attend(q, k, v, one, FULL))


@UNCOMPILED
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_equals_dense_attention(kind: str) -> None:
    layout = Layout.of(np.array([40, 23, 23, 1], dtype=np.int32), least_rows=96)
    for sharing in HEADS.values():
        q, k, v = heads(layout, *sharing)
        mixed = attend_flex(q, k, v, layout, *KINDS[kind])
        torch.testing.assert_close(mixed, dense(q, k, v, layout, KINDS[kind]), atol=2e-6, rtol=0)


@UNCOMPILED
def test_layers_of_one_kind_share_a_mask() -> None:
    layout = Layout.of(np.array([20, 10], dtype=np.int32))
    q, k, v = heads(layout, 2, 1)
    for kind in ("full", "softcap", "window", "softcap"):
        attend_flex(q, k, v, layout, *KINDS[kind])
    assert len(layout.shared) == 2  # full and window; a softcap needs none of its own


@pytest.mark.parametrize("kind", [kind for kind, (_, softcap) in KINDS.items() if softcap is None])
def test_flash_attention_is_called_as_torch_documents_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of torch's `varlen_attn` reads the arguments and computes on the CPU."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert all(x.is_contiguous() for x in (query, key, value))
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (max_q, max_k, scale) == (23, 23, 1.0)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        left, right = (None if side == -1 else side for side in window_size)
        packed = Layout.of(cu_seq_q.diff().numpy())
        mixed = dense(query, key, value, packed, (Reach(left, right), None))
        return torch.unflatten(mixed, 1, (-1, 16))

    stand_in = SimpleNamespace(varlen_attn=varlen_attn)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    layout = Layout.of(np.array([23, 23, 4], dtype=np.int32), least_rows=64)
    q, k, v = heads(layout, 4, 2)
    mixed = attend_flash(q, k, v, layout, KINDS[kind][0])
    torch.testing.assert_close(mixed, dense(q, k, v, layout, KINDS[kind]), atol=2e-6, rtol=0)


def test_flash_attention_of_this_torch_takes_our_arguments() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)


@pytest.mark.parametrize(
    ("channels", "softcap", "dtype", "capability", "expected"),
    [
        (64, None, torch.bfloat16, (9, 0), "flash"),
        (256, None, torch.bfloat16, (8, 0), "flash"),
        (512, None, torch.bfloat16, (9, 0), "flex"),  # EmbeddingGemma 2's full layers
        (64, 50.0, torch.bfloat16, (9, 0), "flex"),  # Gemma 2
        (64, None, torch.float32, (9, 0), "groups"),
        (64, None, torch.bfloat16, (7, 5), "groups"),
    ],
)
def test_a_gpu_takes_the_fastest_way_that_fits(
    channels: int,
    softcap: float | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_attention, "compute_capability", lambda _: capability)
    for way in ("flash", "flex", "groups"):
        monkeypatch.setattr(packed_attention, f"attend_{way}", lambda *_, way=way: way)
    q: Any = SimpleNamespace(is_cuda=True, device=None, dtype=dtype, shape=(10, 4, channels))
    layout = Layout.of(np.array([10], dtype=np.int32))
    assert attend(q, q, q, layout, FULL, softcap) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_of_a_gpu_equal_dense_attention(kind: str, sharing: str) -> None:
    for cpu in layouts()[:4]:
        lengths = cpu.starts.diff().numpy()
        layout = Layout.of(lengths, device="cuda:0")
        q, k, v = (x.bfloat16() for x in heads(cpu, *HEADS[sharing]))
        mixed = attend(q.cuda(), k.cuda(), v.cuda(), layout, *KINDS[kind]).float().cpu()
        expected = dense(q.float(), k.float(), v.float(), cpu, KINDS[kind])
        torch.testing.assert_close(mixed, expected, atol=3e-2, rtol=0)


def test_a_window_that_holds_every_text_is_none() -> None:
    assert within(Reach(9, 9), 10) == FULL
    assert within(Reach(9, 9), 11) == Reach(9, 9)
    assert within(Reach(9, 8), 10) == Reach(None, 8)
    assert within(Reach(9, 0), 10) == CAUSAL
    assert within(CAUSAL, 1) == FULL  # one token has nothing after it
