"""Attention with a backward of its own: of packed texts to themselves, and to those of another batch.

As in `functions`, norms and turns of queries and keys are computed anew in the backward pass, a piece of the
rows at a time; so are the attention weights, from the logarithms of their sums.

T packed tokens, O outputs of a product, H query heads, G key/value heads, C channels of a head, N texts of
one length L.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemb.model.attention import CAUSAL, FULL, Reach
from gemb.model.kernels import interleave, turn
from gemb.model.layout import Group, Layout
from gemb.model.packed_attention import QUERY_BLOCK, attend, within
from gemb.model.trainable.functions import WIDE, Norm, apply, pieces


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """The form of one attention layer."""

    heads: int
    """H."""
    shared: int
    """G, key/value heads."""
    channels: int
    """C of each head."""
    scale: float
    """Multiplies the scores."""
    reach: Reach = FULL
    softcap: float | None = None
    norm: Norm | None = None
    """Of queries and keys, where they have gains."""
    dropout: float = 0.0
    """Share of the attention weights that is left out; which ones is drawn from torch's random numbers."""


def packed_attention(
    raw: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    settings: AttentionSettings,
    layout: Layout,
    turns: Tensor | None,
) -> Tensor:
    """Mixed values[T, H * C] of raw[T, (H + 2G) * C], the product of queries, keys and values.

    Queries and keys are normed where they have gains, turned by the complex `turns`[T, 1, C/2], and queries
    scaled. Channels 2c and 2c + 1 of raw queries and keys are a pair where there are turns.
    """
    return apply(_PackedAttention, raw, query_gain, key_gain, settings, layout, turns)


def source_attention(
    raw: Tensor,
    source: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    settings: AttentionSettings,
    pairs: Sequence[tuple[Group, Group]],
    turns: Tensor | None,
) -> Tensor:
    """Mixed values[T, H * C] of rows that attend to rows of another batch, whole.

    raw[T, H * C] is the product of queries alone: cross-attention, without positions in T5Gemma. Or it is
    raw[T, (H + 2G) * C] of queries, keys and values: one softmax over a row's own tokens in `reach` and all
    of its source (merged attention). source[S, 2G * C] is the product of keys and values, whose keys are
    normed but never turned. `pairs` are groups of rows of one length and their sources, of one length too.
    """
    return apply(_SourceAttention, raw, source, query_gain, key_gain, settings, pairs, turns)


class _Heads:
    """Queries[T, H, C], keys and values[T, G, C] of one product raw[T, (H + 2G) * C], and the way back.

    H or G of the settings is 0 where the product holds no queries, or nothing else.
    """

    def __init__(
        self,
        raw: Tensor,
        query_gain: Tensor | None,
        key_gain: Tensor | None,
        settings: AttentionSettings,
        turns: Tensor | None,
        factors: Tensor | None = None,
    ) -> None:
        self._settings = settings
        self._turns = turns
        self._raw = raw.view(len(raw), -1, settings.channels)
        self._gains = gains = _gains(raw, query_gain, key_gain, settings)
        if settings.norm is not None and factors is None:
            factors = gains.new_empty(len(raw), len(gains), 1)
            for rows in pieces(len(raw), raw.device):
                factors[rows] = settings.norm.factors(_wide(self._raw[rows, : len(gains)]))
        self.factors = factors
        """[T, H + G, 1] of the norm, for the backward pass."""
        self.queries, self.keys = _queries_and_keys(self._raw, factors, gains, settings, turns)
        self.values = self._raw[:, len(gains) :]

    def room(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Room for (the gradient of raw, those of queries, keys and values, of which the last is part)."""
        grad_raw = torch.empty_like(self._raw)
        into = (torch.empty_like(self.queries), torch.empty_like(self.keys), grad_raw[:, len(self._gains) :])
        return grad_raw, into

    def backward(
        self, grad_queries: Tensor, grad_keys: Tensor, grad_raw: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(gradient of the query gain, of the key gain); that of raw goes to `grad_raw`, values left alone.

        Back through turns, gains and norms of queries and keys; values are as they were.
        """
        settings, gains, norm = self._settings, self._gains, self._settings.norm
        grad_gains = None if self.factors is None else torch.zeros_like(gains)
        turned_back = None if self._turns is None else self._turns.conj().resolve_conj()
        for rows in pieces(len(grad_raw), grad_raw.device):
            unturned = gains.new_empty(len(grad_raw[rows]), len(gains), settings.channels)
            everything = slice(None)
            here = None if turned_back is None else turned_back[rows]
            _turn(_wide(grad_queries[rows]), here, everything, unturned[:, : settings.heads])
            _turn(_wide(grad_keys[rows]), here, everything, unturned[:, settings.heads :])
            if grad_gains is None or norm is None or self.factors is None:
                grad_raw[rows, : len(gains)] = unturned.mul_(gains)
                continue
            unit = norm.unit(_wide(self._raw[rows, : len(gains)]), self.factors[rows])
            grad_gains += (unturned * unit).sum(0)
            grad_raw[rows, : len(gains)] = norm.backward_(unturned.mul_(gains), unit, self.factors[rows])
        if grad_gains is None:
            return None, None
        undo = torch.argsort(interleave(settings.channels).to(gains.device))
        grad_query = grad_gains[: settings.heads].sum(0)[undo] * settings.scale
        return grad_query, grad_gains[settings.heads :].sum(0)[undo]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        raw: Tensor,
        query_gain: Tensor | None,
        key_gain: Tensor | None,
        settings: AttentionSettings,
        layout: Layout,
        turns: Tensor | None,
    ) -> Tensor:
        heads = _Heads(raw, query_gain, key_gain, settings, turns)
        mixed = raw.new_empty(len(raw), settings.heads, settings.channels)
        sums: list[Tensor] = []
        ctx.draws = _Draws.new(raw.device, settings.dropout)
        draws = ctx.draws.again()
        if raw.is_cuda and not settings.dropout:
            mixed = attend(
                heads.queries, heads.keys, heads.values, layout, settings.reach, settings.softcap
            ).view_as(mixed)
        else:
            for group in layout.groups:
                q, k, v = (_texts(part, group) for part in (heads.queries, heads.keys, heads.values))
                out, logarithms = _mix(q, k, v, settings, draws)
                _texts(mixed, group).copy_(out)
                sums += logarithms
        ctx.save_for_backward(raw, query_gain, key_gain, heads.factors, turns, mixed, *sums)
        ctx.settings, ctx.layout = settings, layout
        return mixed.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        settings: AttentionSettings = ctx.settings
        layout: Layout = ctx.layout
        raw, query_gain, key_gain, factors, turns, mixed, *sums = ctx.saved_tensors
        heads = _Heads(raw, query_gain, key_gain, settings, turns, factors)
        queries, keys, values = heads.queries, heads.keys, heads.values
        grad = grad.view_as(mixed)
        grad_raw, into = heads.room()
        draws = ctx.draws.again()
        if raw.is_cuda and not settings.dropout:
            run = _differentiable(lambda q, k, v: attend(q, k, v, layout, settings.reach, settings.softcap))
            for place, one in zip(into, run(grad.flatten(1), queries, keys, values), strict=True):
                place.copy_(one)
        else:
            remaining = iter(sums)
            for group in layout.groups:
                one_grad, q, k, v, out = (
                    _texts(part, group) for part in (grad, queries, keys, values, mixed)
                )
                found = _mix_backward(one_grad, q, k, v, out, remaining, settings, draws)
                for place, one in zip(into, found, strict=True):
                    _texts(place, group).copy_(one)
        grad_query, grad_key = heads.backward(into[0], into[1], grad_raw)
        return grad_raw.view_as(raw), grad_query, grad_key, None, None, None


class _SourceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        raw: Tensor,
        source: Tensor,
        query_gain: Tensor | None,
        key_gain: Tensor | None,
        settings: AttentionSettings,
        pairs: Sequence[tuple[Group, Group]],
        turns: Tensor | None,
    ) -> Tensor:
        own, other = _own_and_source(raw, source, query_gain, key_gain, settings, turns)
        mixed = raw.new_empty(len(raw), settings.heads, settings.channels)
        sums: list[Tensor] = []
        for group, source_group in pairs:
            q, k, v = (_texts(part, group) for part in (own.queries, own.keys, own.values))
            source_k, source_v = (_texts(part, source_group) for part in (other.keys, other.values))
            if own.keys.shape[1]:
                out, total = _mix_both(q, (k, v), (source_k, source_v), settings)
                sums.append(total)
            else:
                out, logarithms = _mix(q, source_k, source_v, replace(settings, reach=FULL))
                sums += logarithms
            _texts(mixed, group).copy_(out)
        ctx.save_for_backward(
            raw, source, query_gain, key_gain, own.factors, other.factors, turns, mixed, *sums
        )
        ctx.settings, ctx.pairs = settings, pairs
        return mixed.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        settings: AttentionSettings = ctx.settings
        # All at once: where a layer is computed again, what was kept is handed out once only.
        kept = ctx.saved_tensors
        raw, source, query_gain, key_gain, *factors, turns, mixed = kept[:8]
        sums = iter(kept[8:])
        own, other = _own_and_source(raw, source, query_gain, key_gain, settings, turns, factors)
        grad = grad.view_as(mixed)
        grad_raw, into = own.room()
        grad_source, source_into = other.room()
        to_source = replace(settings, reach=FULL)
        for group, source_group in ctx.pairs:
            one_grad, q, k, v, out = (
                _texts(part, group) for part in (grad, own.queries, own.keys, own.values, mixed)
            )
            source_k, source_v = (_texts(part, source_group) for part in (other.keys, other.values))
            logarithms = sums
            grad_q = torch.zeros_like(q)
            if own.keys.shape[1]:
                total = next(sums)
                logarithms = _parted(total, q, to_source)
                grad_q, *found = _mix_backward(one_grad, q, k, v, out, _parted(total, q, settings), settings)
                for place, one in zip(into[1:], found, strict=True):
                    _texts(place, group).copy_(one)
            also_q, *found = _mix_backward(one_grad, q, source_k, source_v, out, logarithms, to_source)
            torch.add(grad_q, also_q, out=_texts(into[0], group))
            for place, one in zip(source_into[1:], found, strict=True):
                _texts(place, source_group).copy_(one)
        grad_query, grad_key = own.backward(into[0], into[1], grad_raw)
        _, grad_source_key = other.backward(source_into[0], source_into[1], grad_source)
        if grad_key is not None and grad_source_key is not None:
            grad_key += grad_source_key
        grads = (grad_raw.view_as(raw), grad_source.view_as(source), grad_query, grad_key)
        return *grads, None, None, None


def _own_and_source(
    raw: Tensor,
    source: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    settings: AttentionSettings,
    turns: Tensor | None,
    factors: Sequence[Tensor | None] = (None, None),
) -> tuple[_Heads, _Heads]:
    """The heads of the rows themselves, without keys in cross-attention, and those of the source."""
    is_merged = raw.shape[1] > settings.heads * settings.channels
    own = settings if is_merged else replace(settings, shared=0)
    return (
        _Heads(raw, query_gain, key_gain, own, turns, factors[0]),
        _Heads(source, query_gain, key_gain, replace(settings, heads=0), None, factors[1]),
    )


def pair_order(settings: AttentionSettings) -> Tensor:
    """int64[O], the order of the outputs of queries, keys and values that puts pairs side by side.

    Checkpoints keep a pair to be turned as channels c and c + C/2 of a head.
    """
    channels = settings.channels
    turned = settings.heads + settings.shared
    starts = torch.arange(turned)[:, None] * channels
    values = torch.arange(turned * channels, (turned + settings.shared) * channels)
    return torch.cat([(starts + interleave(channels)).reshape(-1), values])


def _wide(heads: Tensor) -> Tensor:
    """16-bit heads in fp32, for norms and turns; others as they are."""
    return heads if heads.dtype in WIDE else heads.float()


def _gains(raw: Tensor, query: Tensor | None, key: Tensor | None, settings: AttentionSettings) -> Tensor:
    """What query and key heads are multiplied with, [H + G, C]: gains with offset, and the score scale."""
    if query is None or key is None or settings.norm is None:
        ones = torch.ones(settings.heads + settings.shared, 1, device=raw.device, dtype=_wide(raw[:0]).dtype)
        ones[: settings.heads] = settings.scale
        return ones
    order = interleave(settings.channels).to(raw.device)  # as `pair_order` has the channels
    query, key = (gain[order] + settings.norm.offset for gain in (query, key))
    heads = (query.mul_(settings.scale).expand(settings.heads, -1), key.expand(settings.shared, -1))
    return torch.cat(heads)


def _queries_and_keys(
    heads: Tensor, factors: Tensor | None, gains: Tensor, settings: AttentionSettings, turns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries[T, H, C] and keys[T, G, C] of raw heads[T, H + 2G, C]: normed, scaled and turned."""
    queries, keys = (
        heads.new_empty(len(heads), count, settings.channels) for count in (settings.heads, settings.shared)
    )
    for rows in pieces(len(heads), heads.device):
        x = _wide(heads[rows, : len(gains)])
        if factors is not None and settings.norm is not None:
            x = settings.norm.unit(x, factors[rows]).mul_(gains)
        else:
            x = x * gains
        _turn(x[:, : settings.heads], turns, rows, queries)
        _turn(x[:, settings.heads :], turns, rows, keys)
    return queries, keys


def _turn(x: Tensor, turns: Tensor | None, rows: slice, out: Tensor) -> None:
    """Write heads x, turned, to some rows of `out`."""
    if turns is None or out.dtype != x.dtype:
        out[rows] = x if turns is None else turn(x, turns[rows])
    else:
        torch.mul(_pairs(x), turns[rows], out=_pairs(out[rows]))


def _pairs(x: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, a view."""
    return torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)))


def _texts(x: Tensor, group: Group) -> Tensor:
    """x[T, heads, C] -> the texts of a group, [N, heads, L, C]."""
    return torch.unflatten(x[group.start : group.stop], 0, (group.rows, group.length)).transpose(1, 2)


def _folded(queries: Tensor, shared: int) -> Tensor:
    """The queries of one key head, token by token, as rows: [N, H, L, C] -> [N, G, L * H / G, C]."""
    return torch.unflatten(queries, 1, (shared, -1)).transpose(2, 3).flatten(2, 3)


def _unfolded(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `_folded`."""
    times = heads // rows.shape[1]
    return torch.unflatten(rows, 2, (-1, times)).transpose(2, 3).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of a text and the keys that they see; `mask`[queries, keys] is added to the scores."""

    queries: slice
    keys: slice
    mask: Tensor | None = None
    is_causal: bool = False


def _blocks(q: Tensor, settings: AttentionSettings) -> list[_Block]:
    """The blocks of texts q[N, H, L, C]: one where no window ends inside them and no score is kept at once.

    Else few queries each, to skip most keys.
    """
    length, dtype = q.shape[2], q.dtype
    reach = within(settings.reach, length)
    everything = slice(None)
    if _is_fused(q, settings) and reach in (FULL, CAUSAL):
        return [_Block(everything, everything, is_causal=reach == CAUSAL)]
    if reach == FULL:
        firsts = range(0, length, QUERY_BLOCK)
        return [_Block(slice(first, min(first + QUERY_BLOCK, length)), everything) for first in firsts]
    left = length if reach.left is None else reach.left
    right = length if reach.right is None else reach.right
    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        low, high = max(0, first - left), min(length, last + right)
        mask = _band(last - first, high - low, first - low, left, right, dtype).to(q.device)
        blocks.append(_Block(slice(first, last), slice(low, high), mask))
    return blocks


@lru_cache(maxsize=64)
def _band(queries: int, keys: int, offset: int, left: int, right: int, dtype: torch.dtype) -> Tensor:
    """0 where query i sees key j, offset + i - left <= j <= offset + i + right, else minus infinity."""
    i = torch.arange(queries)[:, None] + offset
    j = torch.arange(keys)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_((j < i - left) | (j > i + right), -torch.inf)


@dataclass(frozen=True, slots=True)
class _Draws:
    """Which attention weights are left out; drawn anew in the backward pass, in the same order."""

    device: torch.device
    rate: float
    seed: int
    generator: torch.Generator | None = None

    @classmethod
    def new(cls, device: torch.device, rate: float) -> "_Draws":
        """Draws that follow from torch's random numbers, of which one is taken if any are needed."""
        return cls(device, rate, int(torch.randint(2**63 - 1, ()).item()) if rate else 0)

    def again(self) -> "_Draws":
        """The same draws from their beginning."""
        generator = torch.Generator(self.device).manual_seed(self.seed) if self.rate else None
        return replace(self, generator=generator)

    def factors(self, like: Tensor) -> Tensor | None:
        """What the next weights are multiplied with: 0, or 1 / (1 - rate); None where all stay."""
        if self.generator is None:
            return None
        keep = 1 - self.rate
        return torch.empty_like(like).bernoulli_(keep, generator=self.generator).div_(keep)


_NO_DRAWS = _Draws(torch.device("cpu"), 0.0, 0)


def _mix(
    q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, draws: _Draws = _NO_DRAWS
) -> tuple[Tensor, list[Tensor]]:
    """Mixed values[N, H, L, C] of texts of one length; keys may be more or fewer than queries.

    Also the logarithms of the sums of exponentials of each block, for the backward pass.
    """
    outs, sums = [], []
    for block in _blocks(q, settings):
        parts = _parts(block, settings, (q,), (k, v))
        if _is_fused(q, settings):
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, logarithms = flash(*parts, 0.0, block.is_causal, attn_mask=block.mask, scale=1.0)
        else:
            out, logarithms = _plain(parts, block.mask, settings.softcap, draws)
        outs.append(_unfolded(out, settings.heads) if _folds(block) else out)
        sums.append(logarithms)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), sums


def _mix_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Iterator[Tensor],
    settings: AttentionSettings,
    draws: _Draws = _NO_DRAWS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values of `_mix`; takes its blocks' `sums` one by one."""
    blocks = _blocks(q, settings)
    found = []
    for block in blocks:
        one_grad, one_q, one_out, one_k, one_v = _parts(block, settings, (grad, q, out), (k, v))
        if _is_fused(q, settings):
            grad_q, *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                one_grad, one_q, one_k, one_v, one_out, next(sums), 0.0, block.is_causal,
                attn_mask=block.mask, scale=1.0,
            )  # fmt: skip
        else:
            parts = (one_q, one_k, one_v)
            grad_q, *grads = _plain_backward(
                one_grad, parts, one_out, next(sums), block.mask, settings.softcap, draws
            )
        if _folds(block):
            grad_q = _unfolded(grad_q, settings.heads)
        else:  # each key head stood there once for each of its query heads
            grads = [torch.unflatten(one, 1, (settings.shared, -1)).sum(2) for one in grads]
        found.append((grad_q, *grads))
    if len(found) == 1:
        return found[0]
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for block, (_, *grads) in zip(blocks, found, strict=True):
        grad_k[:, :, block.keys] += grads[0]
        grad_v[:, :, block.keys] += grads[1]
    return torch.cat([one[0] for one in found], dim=2), grad_k, grad_v


def _mix_both(
    q: Tensor, own: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor], settings: AttentionSettings
) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of the texts themselves and of their sources (T5Gemma 2's merged attention).

    Gives the mixed values[N, H, L, C] and the logarithms[N, H, L] of the sums of exponentials. Each part is
    mixed by itself and weighs as much as its sum of exponentials (arXiv 2512.14856 without its masks).
    """
    outs, sums = [], []
    for (k, v), one in ((own, settings), (source, replace(settings, reach=FULL))):
        out, logarithms = _mix(q, k, v, one)
        outs.append(out)
        sums.append(_joined(logarithms, q, one))
    total = torch.logaddexp(*sums)
    shares = [(part - total).exp_().to(q.dtype)[..., None] for part in sums]
    return torch.addcmul(outs[0] * shares[0], outs[1], shares[1]), total


def _joined(sums: Sequence[Tensor], q: Tensor, settings: AttentionSettings) -> Tensor:
    """The sums of the blocks of texts q[N, H, L, C] as [N, H, L]."""
    parts = [
        _unfolded(part[..., None], settings.heads)[..., 0] if _folds(block) else part
        for block, part in zip(_blocks(q, settings), sums, strict=True)
    ]
    return torch.cat(parts, dim=2)


def _parted(total: Tensor, q: Tensor, settings: AttentionSettings) -> Iterator[Tensor]:
    """The inverse of `_joined`."""
    for block in _blocks(q, settings):
        part = total[:, :, block.queries]
        yield _folded(part[..., None], settings.shared)[..., 0] if _folds(block) else part


def _is_fused(q: Tensor, settings: AttentionSettings) -> bool:
    """Whether torch's fused operator of the CPU computes it: it knows no capped scores and no dropout."""
    return settings.softcap is None and not settings.dropout and q.device.type == "cpu"


def _plain(
    parts: Sequence[Tensor], mask: Tensor | None, softcap: float | None, draws: _Draws
) -> tuple[Tensor, Tensor]:
    """(mixed values[N, H, L, C], logarithms[N, H, L] of the sums) of q[N, H, L, C], k and v[N, H, S, C]."""
    q, k, v = parts
    scores, _ = _scores(q, k, mask, softcap)
    sums = scores.logsumexp(-1)
    shares = scores.sub_(sums[..., None]).exp_()
    if (factors := draws.factors(shares)) is not None:
        shares.mul_(factors)
    return shares.to(v.dtype) @ v, sums


def _plain_backward(
    grad: Tensor,
    parts: Sequence[Tensor],
    out: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    draws: _Draws,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values of `_plain`."""
    q, k, v = parts
    scores, slope = _scores(q, k, mask, softcap, needs_slope=True)
    shares = scores.sub_(sums[..., None]).exp_()
    factors = draws.factors(shares)
    kept = shares if factors is None else shares * factors
    grad_v = kept.to(v.dtype).transpose(-1, -2) @ grad
    grad_scores = _wide(grad @ v.transpose(-1, -2))
    if factors is not None:
        grad_scores = grad_scores.mul_(factors)
    grad_scores.sub_((grad * out).sum(-1, keepdim=True, dtype=grad_scores.dtype)).mul_(shares)
    if slope is not None:
        grad_scores.mul_(slope)
    narrow = grad_scores.to(q.dtype)
    return narrow @ k, narrow.transpose(-1, -2) @ q, grad_v


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, softcap: float | None, *, needs_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(scores[N, H, L, S] in fp32 or wider, how they change with those before the cap, if needed)."""
    slope = None
    if softcap is None:
        scores = _wide(q @ k.transpose(-1, -2))
    else:
        scores = _wide((q / softcap) @ k.transpose(-1, -2)).tanh_()
        slope = 1 - scores.square() if needs_slope else None
        scores.mul_(softcap)
    return scores if mask is None else scores.add_(mask), slope


def _folds(block: _Block) -> bool:
    """Whether the query heads of a key head are taken as rows, which a mask of tokens does not allow."""
    return block.mask is None and not block.is_causal


def _parts(
    block: _Block, settings: AttentionSettings, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> list[Tensor]:
    """A block's part of each tensor[N, heads, L, C], with as many key heads as query heads."""
    queries = [part[:, :, block.queries] for part in of_queries]
    keys = [part[:, :, block.keys] for part in of_keys]
    if _folds(block):
        return [*(_folded(part, settings.shared) for part in queries), *keys]
    times = settings.heads // settings.shared
    return [*queries, *(part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in keys)]


def _differentiable(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(gradient of the result, q, k, v) -> their gradients, the result computed once more."""

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in (q, k, v)]
            result = function(leaves[0], leaves[1], leaves[2])
        grad_q, grad_k, grad_v = torch.autograd.grad(result, leaves, grad)
        return grad_q, grad_k, grad_v

    return backward
