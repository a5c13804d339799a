"""The differentiable operators of the packed forward, each with a backward of its own.

A plain graph keeps every operator's input. These keep what cannot be had again cheaply: norms, activations
and rotary turns are computed anew in the backward pass, a piece of the rows at a time, so that neither pass
holds more of them than a piece. Products run in `dtype`; norms, turns and the gradients of parameters stay
in the dtype of the parameters.

T packed tokens, D width, O outputs of a product, F feed-forward width, H query heads, G key/value heads,
C channels of a head, N texts of one length L.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemb.model.attention import CAUSAL, FULL, Reach
from gemb.model.kernels import activation
from gemb.model.layout import Group, Layout
from gemb.model.packed_attention import attend, attend_groups, within

PIECE_ROWS = 1024
"""Rows of a piece: the intermediate rows of a layer stay in the last-level cache, products stay large."""


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm before a product: the root mean square's, or LayerNorm's without bias."""

    epsilon: float
    offset: float = 0.0
    """Added to the gain; Gemma stores gain - 1."""
    is_centred: bool = False
    """Whether the mean is taken away (LayerNorm)."""

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x[..., D] -> the same at unit size, without gain, and the factors [..., 1] that did it."""
        if self.is_centred:
            x = x - x.mean(-1, keepdim=True)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor: Tensor = size.square_().mul_(1 / x.shape[-1]).add_(self.epsilon).rsqrt_()
        return x * factor, factor

    def backward(self, grad: Tensor, unit: Tensor, factor: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of x, gradient of the gain) of grad[..., D].

        `unit` and `factor` are what `normalise` gave.
        `gain` has the shape of the last dimensions of x that it differs along.
        """
        lead = grad.ndim - gain.ndim
        grad_gain = (grad * unit).sum(tuple(range(lead)))
        inner = grad * (gain + self.offset)
        along = (inner * unit).mean(-1, keepdim=True)
        grad_x = torch.addcmul(inner, unit, along, value=-1)
        if self.is_centred:
            grad_x -= inner.mean(-1, keepdim=True)
        return grad_x.mul_(factor), grad_gain


def _normed(x: Tensor, gain: Tensor | None, norm: Norm | None) -> Tensor:
    """norm(x) * gain; x itself without a norm."""
    if norm is None or gain is None:
        return x
    return norm.normalise(x)[0] * (gain + norm.offset)


def norm_rows(x: Tensor, gain: Tensor, norm: Norm) -> Tensor:
    """norm(x) * gain of x[T, D], which keeps nothing but x for the backward pass."""
    return _apply(_NormRows, x, gain, norm)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Several matrices or vectors below each other; a view where they already lie so in memory."""
    first = parts[0]
    if len(parts) == 1:
        return first
    offset = first.storage_offset()
    for part in parts:
        is_next = part.is_contiguous() and part.storage_offset() == offset
        if not is_next or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        offset += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def normed_linear(
    x: Tensor,
    gain: Tensor | None,
    norm: Norm | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """norm(x) * gain through the stacked weights[O, D] and biases: [T, D] -> [T, O] in `dtype`."""
    return _apply(_NormedLinear, x, gain, norm, dtype, len(weights), *weights, *biases)


def feed_forward(
    x: Tensor,
    gain: Tensor | None,
    norm: Norm | None,
    inputs: Sequence[tuple[Tensor, Tensor | None]],
    down: tuple[Tensor, Tensor | None],
    *,
    activation_name: str,
    is_gated: bool,
    after_gain: Tensor | None = None,
    dtype: torch.dtype,
    recomputes: bool = False,
) -> Tensor:
    """The feed-forward of a layer: [T, D] -> [T, D] in the dtype of x.

    down(activation(gate(h)) * up(h)) where `is_gated`, else down(activation(up(h))), of h = norm(x) * gain;
    normed again with `after_gain` where there is one. `inputs` are weight and bias of gate and up (or both
    in one, gate first). `recomputes` keeps nothing as wide as F and computes the first product again in the
    backward pass.
    """
    weights, biases = zip(*inputs, strict=True)
    settings = _FeedForwardSettings(norm, activation_name, is_gated, dtype, recomputes, len(weights))
    return _apply(_FeedForward, x, gain, after_gain, settings, *down, *weights, *biases)


def packed_attention(
    raw: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    settings: "AttentionSettings",
    layout: Layout,
    turns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Mixed values[T, H * C] of raw[T, (H + 2G) * C], the product of queries, keys and values.

    Queries and keys are normed where they have gains, turned by `turns` (cosines and sines, [T, 1, C/2];
    a head's halves are pairs), and queries scaled.
    """
    return _apply(_PackedAttention, raw, query_gain, key_gain, settings, layout, turns)


def embedded(table: Tensor, ids: Tensor, scale: float = 1.0, *, is_sparse: bool = True) -> Tensor:
    """Rows ids[T] of table[V, D] times `scale`; the gradient holds only the rows that are used.

    It is a sparse tensor with each of them once; without `is_sparse` a dense one.
    """
    return _apply(_Embedded, table, ids, scale, is_sparse)


def weighted_sums(states: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """The sums of states[T, D] over the tokens of each text, each token weighted by weights[T]: [B, D]."""
    return _apply(_WeightedSums, states, weights, layout)


def _apply(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    result: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


# --- products --------------------


def _pieces(rows: int, device: torch.device) -> Iterator[slice]:
    """The rows piece by piece; at once on an accelerator, which has no cache to keep them in."""
    step = rows if device.type != "cpu" else PIECE_ROWS
    for first in range(0, rows, max(1, step)):
        yield slice(first, min(first + step, rows))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight, bias)


def _add_outer_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad.T @ x to `total`[O, I], which may be of a wider dtype than the factors."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, x)
    else:
        total += grad.T @ x


def _stacked_biases(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Stacked in `dtype`; None if there are none. Layers of one input have biases all or none."""
    present = _present(parts)
    return stacked(present).to(dtype) if present else None


def _enter(x: Tensor, gain: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the product, x normed; and what `_leave` needs."""
    if norm is None or gain is None:
        return x, x, x
    unit, factor = norm.normalise(x)
    return unit * (gain + norm.offset), unit, factor


def _leave(
    grad: Tensor, unit: Tensor, factor: Tensor, gain: Tensor | None, norm: Norm | None, total: Tensor | None
) -> Tensor:
    """The gradient of x from that of what went into the product; the gain's is added to `total`."""
    if norm is None or gain is None or total is None:
        return grad
    grad_x, grad_gain = norm.backward(grad, unit, factor, gain)
    total += grad_gain
    return grad_x


def _present(parts: Sequence[Tensor | None]) -> list[Tensor]:
    return [part for part in parts if part is not None]


def _split(total: Tensor | None, like: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of stacked parts as those of the parts."""
    if total is None:
        return [None] * len(like)
    sizes = [0 if part is None else len(part) for part in like]
    return [
        None if part is None else piece for part, piece in zip(like, torch.split(total, sizes), strict=True)
    ]


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch's context
        x: Tensor,
        gain: Tensor | None,
        norm: Norm | None,
        dtype: torch.dtype,
        count: int,
        *parts: Tensor | None,
    ) -> Tensor:
        weight, bias = stacked(_present(parts[:count])).to(dtype), _stacked_biases(parts[count:], dtype)
        result = x.new_empty(len(x), len(weight), dtype=dtype)
        for rows in _pieces(len(x), x.device):
            result[rows] = _product(_normed(x[rows], gain, norm), weight, bias, dtype)
        ctx.save_for_backward(x, gain, *parts)
        ctx.settings = (norm, dtype, count)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        x, gain, *parts = ctx.saved_tensors
        norm, dtype, count = ctx.settings
        weights, biases = parts[:count], parts[count:]
        weight = stacked(weights).to(dtype)
        needs_weight = any(ctx.needs_input_grad[5 : 5 + count])
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # Gradients of parameters are summed in the dtype of the parameters.
        grad_weight = torch.zeros_like(weight, dtype=weights[0].dtype) if needs_weight else None
        grad_bias = grad.sum(0, dtype=x.dtype) if any(ctx.needs_input_grad[5 + count :]) else None
        grad_x = torch.empty_like(x) if needs_x else None
        grad_gain = None if gain is None else torch.zeros_like(gain)
        for rows in _pieces(len(x), x.device):
            h, unit, factor = _enter(x[rows], gain, norm)
            if grad_weight is not None:
                _add_outer_(grad_weight, grad[rows], h.to(dtype))
            if grad_x is not None:
                grad_h = (grad[rows] @ weight).to(x.dtype)
                grad_x[rows] = _leave(grad_h, unit, factor, gain, norm, grad_gain)
        return grad_x, grad_gain, None, None, None, *_split(grad_weight, weights), *_split(grad_bias, biases)


class _NormRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, norm: Norm) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, gain)
        ctx.norm = norm
        return _normed(x, gain, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        x, gain = ctx.saved_tensors
        return *ctx.norm.backward(grad, *ctx.norm.normalise(x), gain), None


@dataclass(frozen=True, slots=True)
class _FeedForwardSettings:
    norm: Norm | None
    activation: str
    is_gated: bool
    dtype: torch.dtype
    recomputes: bool
    count: int
    """How many weights the first product is stacked of."""


def _activation_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    match name:
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)  # type: ignore[no-any-return]
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]
        case "relu":
            return torch.ops.aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]
    raise ValueError(f"no backward of {name!r}")


def _activated(wide: Tensor, settings: _FeedForwardSettings) -> Tensor:
    """What goes into `down`: [T, F] of the first product."""
    if not settings.is_gated:
        return activation(settings.activation)(wide)
    gate, up = wide.chunk(2, -1)
    return activation(settings.activation)(gate).mul_(up)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        gain: Tensor | None,
        after_gain: Tensor | None,
        settings: _FeedForwardSettings,
        down: Tensor,
        down_bias: Tensor | None,
        *parts: Tensor | None,
    ) -> Tensor:
        dtype, count = settings.dtype, settings.count
        weight, bias = stacked(_present(parts[:count])).to(dtype), _stacked_biases(parts[count:], dtype)
        out_weight, out_bias = down.to(dtype), _stacked_biases([down_bias], dtype)
        result = torch.empty_like(x)
        wide = None if settings.recomputes else x.new_empty(len(x), len(weight), dtype=dtype)
        before = None if after_gain is None else x.new_empty(x.shape, dtype=dtype)
        for rows in _pieces(len(x), x.device):
            part = _product(_normed(x[rows], gain, settings.norm), weight, bias, dtype)
            if wide is not None:
                wide[rows] = part
            product = _product(_activated(part, settings), out_weight, out_bias, dtype)
            if before is not None:
                before[rows] = product
            result[rows] = _normed(product.to(x.dtype), after_gain, settings.norm)
        ctx.save_for_backward(x, gain, after_gain, wide, before, down, down_bias, *parts)
        ctx.settings = settings
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        settings: _FeedForwardSettings = ctx.settings
        x, gain, after_gain, wide, before, down, down_bias, *parts = ctx.saved_tensors
        norm, dtype, count = settings.norm, settings.dtype, settings.count
        weights, biases = parts[:count], parts[count:]
        weight, bias, out_weight = stacked(weights).to(dtype), _stacked_biases(biases, dtype), down.to(dtype)
        needs = ctx.needs_input_grad
        grad_x = torch.empty_like(x)
        grad_gain, grad_after = (None if one is None else torch.zeros_like(one) for one in (gain, after_gain))
        grad_down = torch.zeros_like(down) if needs[4] else None
        grad_down_bias = None if down_bias is None else torch.zeros_like(down_bias)
        grad_weight = torch.zeros_like(weight, dtype=x.dtype) if any(needs[6 : 6 + count]) else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=x.dtype)
        for rows in _pieces(len(x), x.device):
            h, unit, factor = _enter(x[rows], gain, norm)
            h = h.to(dtype)
            part = _product(h, weight, bias, dtype) if wide is None else wide[rows]
            grad_out = grad[rows]
            if before is not None:
                after = _enter(before[rows].to(x.dtype), after_gain, norm)
                grad_out = _leave(grad_out, after[1], after[2], after_gain, norm, grad_after)
            if grad_down_bias is not None:
                grad_down_bias += grad_out.sum(0)
            grad_out = grad_out.to(dtype)
            grad_inner = grad_out @ out_weight
            if settings.is_gated:
                gate, up = part.chunk(2, -1)
                active = activation(settings.activation)(gate)
                grad_part = torch.empty_like(part)
                grad_gate, grad_up = grad_part.chunk(2, -1)
                torch.mul(grad_inner, active, out=grad_up)
                grad_gate.copy_(_activation_backward(settings.activation, grad_inner.mul_(up), gate))
                active.mul_(up)
            else:
                active = _activated(part, settings)
                grad_part = _activation_backward(settings.activation, grad_inner, part)
            if grad_down is not None:
                _add_outer_(grad_down, grad_out, active)
            if grad_weight is not None:
                _add_outer_(grad_weight, grad_part, h)
            if grad_bias is not None:
                grad_bias += grad_part.sum(0)
            grad_h = (grad_part @ weight).to(x.dtype)
            grad_x[rows] = _leave(grad_h, unit, factor, gain, norm, grad_gain)
        found = _split(grad_weight, weights), _split(grad_bias, biases)
        return grad_x, grad_gain, grad_after, None, grad_down, grad_down_bias, *found[0], *found[1]


# --- attention --------------------


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


def turned(heads: Tensor, turns: tuple[Tensor, Tensor], *, back: bool = False) -> Tensor:
    """heads[T, H, C] with channel c and c + C/2 turned as a pair; `back` turns the other way."""
    cosines, sines = turns
    result = torch.empty_like(heads)
    first, second = heads.chunk(2, -1)
    new_first, new_second = result.chunk(2, -1)
    sign = -1 if back else 1
    torch.mul(first, cosines, out=new_first).addcmul_(second, sines, value=-sign)
    torch.mul(second, cosines, out=new_second).addcmul_(first, sines, value=sign)
    return result


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        raw: Tensor,
        query_gain: Tensor | None,
        key_gain: Tensor | None,
        settings: AttentionSettings,
        layout: Layout,
        turns: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        gains = _gains(query_gain, key_gain, settings)
        queries, keys, values = _heads(raw, gains, settings, turns)
        mixed = raw.new_empty(len(raw), settings.heads, settings.channels)
        sums: list[Tensor | None] = []  # log of the sum of exponentials, by group
        if raw.is_cuda:
            mixed = attend(queries, keys, values, layout, settings.reach, settings.softcap).view_as(mixed)
        else:
            for group in layout.groups:
                q, k, v = (_texts(part, group) for part in (queries, keys, values))
                out, logarithms = _mix(q, k, v, settings)
                _texts(mixed, group).copy_(out)
                sums.append(logarithms)
        ctx.save_for_backward(raw, query_gain, key_gain, mixed, *(turns or ()), *sums)
        ctx.settings, ctx.layout, ctx.turns = settings, layout, 0 if turns is None else 2
        return mixed.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        settings: AttentionSettings = ctx.settings
        layout: Layout = ctx.layout
        raw, query_gain, key_gain, mixed, *others = ctx.saved_tensors
        turns, sums = tuple(others[: ctx.turns]), others[ctx.turns :]
        gains = _gains(query_gain, key_gain, settings)
        queries, keys, values = _heads(raw, gains, settings, turns or None)
        grad = grad.view_as(mixed)
        both = settings.heads + settings.shared
        grad_heads = torch.empty_like(raw).view(len(raw), both + settings.shared, settings.channels)
        into = torch.split(grad_heads, [settings.heads, settings.shared, settings.shared], dim=1)
        if raw.is_cuda:
            run = _differentiable(lambda q, k, v: attend(q, k, v, layout, settings.reach, settings.softcap))
            for place, one in zip(into, run(grad.flatten(1), queries, keys, values), strict=True):
                place.copy_(one)
        else:
            for group, logarithms in zip(layout.groups, sums, strict=True):
                one_grad, q, k, v, out = (
                    _texts(part, group) for part in (grad, queries, keys, values, mixed)
                )
                found_here = _mix_backward(one_grad, q, k, v, out, logarithms, settings)
                for place, one in zip(into, found_here, strict=True):
                    _texts(place, group).copy_(one)
        # Back through turns, scale and norms of queries and keys; values are as they were.
        inner = _wide(grad_heads[:, :both])
        if turns:
            inner = turned(inner, turns, back=True)
        found: tuple[Tensor | None, Tensor | None] = (None, None)
        if gains is not None and settings.norm is not None:
            unit, factor = settings.norm.normalise(_wide(raw.view_as(grad_heads)[:, :both]))
            plain = Norm(settings.norm.epsilon)  # the gains already hold offset and scale
            inner, grad_gains = plain.backward(inner, unit, factor, gains)
            found = grad_gains[: settings.heads].sum(0) * settings.scale, grad_gains[settings.heads :].sum(0)
        else:
            inner[:, : settings.heads] *= settings.scale
        grad_heads[:, :both] = inner
        return grad_heads.view_as(raw), *found, None, None, None


def _wide(heads: Tensor) -> Tensor:
    """16-bit heads in fp32, for norms and turns; others as they are."""
    return heads if heads.dtype in (torch.float32, torch.float64) else heads.float()


def _gains(query: Tensor | None, key: Tensor | None, settings: AttentionSettings) -> Tensor | None:
    """The gains of all query and key heads, [H + G, C], offset and scale of the scores applied."""
    if query is None or key is None or settings.norm is None:
        return None
    offset = settings.norm.offset
    parts = [(query + offset).mul_(settings.scale).expand(settings.heads, -1)]
    return torch.cat([*parts, (key + offset).expand(settings.shared, -1)])


def _heads(
    raw: Tensor, gains: Tensor | None, settings: AttentionSettings, turns: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries[T, H, C], normed, turned and scaled, keys[T, G, C], normed and turned, and values[T, G, C]."""
    heads = raw.view(len(raw), -1, settings.channels)
    both = settings.heads + settings.shared
    x = _wide(heads[:, :both])
    if gains is not None and settings.norm is not None:
        x = settings.norm.normalise(x)[0].mul_(gains)
    if turns is not None:
        x = turned(x, turns)
    if gains is None:
        x = x.clone() if turns is None else x
        x[:, : settings.heads] *= settings.scale
    queries, keys = torch.split(x.to(raw.dtype), [settings.heads, settings.shared], dim=1)
    return queries, keys, heads[:, both:]


def _texts(x: Tensor, group: Group) -> Tensor:
    """x[T, heads, C] -> the texts of a group, [N, heads, L, C]."""
    return torch.unflatten(x[group.start : group.stop], 0, (group.rows, group.length)).transpose(1, 2)


def _is_plain(settings: AttentionSettings, length: int) -> bool:
    """Whether texts of this length need no mask but causality's, and no softcap."""
    return settings.softcap is None and within(settings.reach, length) in (FULL, CAUSAL)


def _folded(queries: Tensor, shared: int) -> Tensor:
    """The queries of one key head, token by token, as rows: [N, H, L, C] -> [N, G, L * H / G, C]."""
    return torch.unflatten(queries, 1, (shared, -1)).transpose(2, 3).flatten(2, 3)


def _unfolded(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `_folded`."""
    times = heads // rows.shape[1]
    return torch.unflatten(rows, 2, (-1, times)).transpose(2, 3).flatten(1, 2)


def _mix(q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> tuple[Tensor, Tensor | None]:
    """Mixed values[N, H, L, C] of texts of one length on a CPU, and what the backward pass needs of it."""
    length = q.shape[2]
    if not _is_plain(settings, length):
        return _masked(settings)(q, k, v), None
    is_causal = within(settings.reach, length) == CAUSAL
    if is_causal:
        k, v = (_repeated(part, settings) for part in (k, v))
    rows = q if is_causal else _folded(q, settings.shared)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, k, v, 0.0, is_causal, scale=1.0
    )
    return out if is_causal else _unfolded(out, settings.heads), sums


def _mix_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor | None,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values of `_mix`."""
    length = q.shape[2]
    if sums is None:
        return _differentiable(_masked(settings))(grad, q, k, v)
    is_causal = within(settings.reach, length) == CAUSAL
    if is_causal:
        k, v = (_repeated(part, settings) for part in (k, v))
    else:
        grad, q, out = (_folded(part, settings.shared) for part in (grad, q, out))
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, sums, 0.0, is_causal, scale=1.0
    )
    if is_causal:
        grad_k, grad_v = (torch.unflatten(part, 1, (settings.shared, -1)).sum(2) for part in (grad_k, grad_v))
        return grad_q, grad_k, grad_v
    return _unfolded(grad_q, settings.heads), grad_k, grad_v


def _repeated(x: Tensor, settings: AttentionSettings) -> Tensor:
    """Key or value heads[N, G, L, C], each as often as it has query heads."""
    return x.repeat_interleave(settings.heads // settings.shared, dim=1)


def _masked(settings: AttentionSettings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of texts of one length, [N, heads, L, C], where a window or a softcap asks for it."""

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        texts, _, length, _ = q.shape
        group = Group(0, 0, texts, length)
        place = torch.empty(0)  # positions and starts, which attention by groups does not look at
        layout = Layout((group,), texts * length, texts * length, texts, length, place, place)
        rows = [part.transpose(1, 2).flatten(0, 1) for part in (q, k, v)]
        flat = attend_groups(rows[0], rows[1], rows[2], layout, settings.reach, settings.softcap)
        return torch.unflatten(torch.unflatten(flat, 1, (settings.heads, -1)), 0, (texts, length)).transpose(
            1, 2
        )

    return mixed


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


# --- tables and sums --------------------


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, scale: float, is_sparse: bool) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(ids)
        ctx.settings = (table.shape, scale, is_sparse)
        rows = F.embedding(ids, table)
        return rows if scale == 1 else rows.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        (ids,) = ctx.saved_tensors
        shape, scale, is_sparse = ctx.settings
        used, place = torch.unique(ids, return_inverse=True)
        sums = grad.new_zeros(len(used), shape[1]).index_add_(0, place, grad, alpha=scale)
        if not is_sparse:
            return grad.new_zeros(shape).index_copy_(0, used, sums), None, None, None
        gradient = torch.sparse_coo_tensor(used[None], sums, shape, is_coalesced=True, check_invariants=False)
        return gradient, None, None, None


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weights: Tensor, layout: Layout) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weights)
        ctx.layout = layout
        sums = states.new_empty(layout.rows, states.shape[1])
        for group in layout.groups:
            size = (group.rows, group.length)
            tokens = torch.unflatten(states[group.start : group.stop], 0, size)
            shares = torch.unflatten(weights[group.start : group.stop], 0, size)[:, None]
            sums[group.row : group.row + group.rows] = (shares @ tokens).squeeze(1)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        (weights,) = ctx.saved_tensors
        lengths = ctx.layout.starts.diff().long()
        return grad.repeat_interleave(lengths, dim=0) * weights[:, None], None, None
