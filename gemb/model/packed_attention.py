"""Attention within each text of a packed batch.

T packed tokens, H query heads, G key/value heads, C channels of a head; N texts of one length L.

Three ways, one result: text by text in groups of equal length (every device; no padding, and a mask only
where a window ends inside a text), FlashAttention over packed tokens (CUDA, 16 bit, heads up to 256
channels), and FlexAttention over packed tokens (CUDA, for what FlashAttention does not take). Scores are
not scaled here: the scale is folded into the weights that make the queries.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.device import compute_capability
from gemb.model.attention import CAUSAL, FULL, Reach
from gemb.model.layout import Group, Layout

FLASH_CHANNELS = 256
"""The widest head that FlashAttention takes."""
QUERY_BLOCK = 128
"""Queries of one piece where not all scores are wanted: few enough to skip most keys."""


def within(reach: Reach, longest: int) -> Reach:
    """The same for texts of at most `longest` tokens: a window that holds them all is none."""
    left, right = reach.left, reach.right
    return Reach(
        None if left is None or left >= longest - 1 else left,
        None if right is None or right >= longest - 1 else right,
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Reach = FULL, softcap: float | None = None
) -> Tensor:
    """Mixed values[filled, H * C] of q[filled, H, C], k and v[filled, G, C]; filling rows give zeros.

    `softcap` c squeezes a score s to c tanh(s / c) (Gemma 2).
    """
    reach = within(reach, layout.longest)
    if q.is_cuda and compute_capability(q.device) >= (8, 0) and q.dtype != torch.float32:
        if q.shape[2] <= FLASH_CHANNELS and softcap is None:
            return attend_flash(q, k, v, layout, reach)
        return attend_flex(q, k, v, layout, reach, softcap)
    return attend_groups(q, k, v, layout, reach, softcap)


def attend_groups(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Reach, softcap: float | None = None
) -> Tensor:
    """`attend`, one call for each group of texts of one length."""
    parts = [
        _group(_texts(q, group), _texts(k, group), _texts(v, group), reach, softcap)
        for group in layout.groups
    ]
    if layout.filled > layout.tokens:
        parts.append(q.new_zeros(layout.filled - layout.tokens, q.shape[1] * v.shape[2]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _texts(x: Tensor, group: Group) -> Tensor:
    """x[T, heads, C] -> the texts of a group, [N, heads, L, C]."""
    return torch.unflatten(x[group.start : group.stop], 0, (group.rows, group.length)).transpose(1, 2)


def _group(q: Tensor, k: Tensor, v: Tensor, reach: Reach, softcap: float | None) -> Tensor:
    """Texts of one length: q[N, H, L, C], k and v[N, G, L, C] -> [N * L, H * C]."""
    length = q.shape[2]
    reach = within(reach, length)
    if softcap is None and reach in (FULL, CAUSAL):
        mixed = _fused(q, k, v, None, reach == CAUSAL)
    else:
        left = length if reach.left is None else reach.left
        right = length if reach.right is None else reach.right
        pieces = []
        for first in range(0, length, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, length)
            low, high = max(0, first - left), min(length, last + right)
            mask = _band(last - first, high - low, first - low, left, right, str(q.device))
            block = q[:, :, first:last], k[:, :, low:high], v[:, :, low:high]
            pieces.append(_fused(*block, mask, False) if softcap is None else _capped(*block, mask, softcap))
        mixed = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


@lru_cache(maxsize=256)
def _band(queries: int, keys: int, offset: int, left: int, right: int, device: str) -> Tensor | None:
    """True where query i sees key j: offset + i - left <= j <= offset + i + right; None if everywhere."""
    i = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)
    band = (j >= i - left) & (j <= i + right)
    return None if bool(band.all()) else band


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q[N, H, L, C], k and v[N, G, S, C] -> [N, H, L, C] through torch's fused operator."""
    shared, length = k.shape[1], q.shape[2]
    grouped = q.shape[1] != shared
    if grouped and q.dtype == torch.float32 and not q.is_cuda:
        # Few wide key heads lie far apart in the packed rows, which costs fp32 products on a CPU a quarter.
        k, v = k.contiguous(), v.contiguous()
        if mask is None and not causal:
            # The queries of one key head, token by token, as rows of one product.
            rows = torch.unflatten(q, 1, (shared, -1)).transpose(2, 3)  # [N, G, L, H / G, C]
            mixed = F.scaled_dot_product_attention(rows.flatten(2, 3), k, v, scale=1.0)
            return torch.unflatten(mixed, 2, (length, -1)).transpose(2, 3).flatten(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=grouped
    )


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float) -> Tensor:
    """The same with capped scores, which the fused operator does not know."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v


def attend_flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Reach) -> Tensor:
    """`attend` through FlashAttention on packed tokens; CUDA, 16 bit, no softcap."""
    from torch.nn.attention.varlen import varlen_attn

    left, right = (-1 if side is None else side for side in (reach.left, reach.right))
    query, key, value = (x[: layout.tokens].contiguous() for x in (q, k, v))
    mixed: Any = varlen_attn(
        query,
        key,
        value,
        layout.starts,
        layout.starts,
        layout.longest,
        layout.longest,
        scale=1.0,
        window_size=(left, right),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return F.pad(mixed.flatten(1), (0, 0, 0, layout.filled - layout.tokens))


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Reach, softcap: float | None = None
) -> Tensor:
    """`attend` through FlexAttention on packed tokens; compiled on CUDA, plain and slow on a CPU."""
    query, key, value = (x[: layout.tokens].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, C]
    mixed: Tensor = _flex(q.is_cuda)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=_block_mask(layout, reach),
        scale=1.0,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return F.pad(mixed[0].transpose(0, 1).flatten(1), (0, 0, 0, layout.filled - layout.tokens))


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    attention: Callable[..., Tensor] = flex_attention
    return torch.compile(attention, dynamic=True) if compiled else attention


@cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's form of the softcap."""

    def bend(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bend


def _block_mask(layout: Layout, reach: Reach) -> Any:  # noqa: ANN401  torch.nn.attention's BlockMask
    """Which tokens of the packed batch see each other, made once a layout and reach."""
    if reach not in layout.shared:
        from torch.nn.attention.flex_attention import create_block_mask

        size = layout.tokens
        lengths = layout.starts.diff().long()
        text = torch.arange(layout.rows, device=lengths.device).repeat_interleave(lengths)
        left = size if reach.left is None else reach.left
        right = size if reach.right is None else reach.right

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = (key >= query - left) & (key <= query + right)
            return (text[query] == text[key]) & near

        layout.shared[reach] = create_block_mask(sees, None, None, size, size, device=str(lengths.device))
    return layout.shared[reach]
