"""The differentiable operators of the packed forward, each with a backward of its own.

A plain graph keeps every operator's input. These keep what cannot be had again cheaply: norms, activations
and rotary turns are computed anew in the backward pass, a piece of the rows at a time, so that neither pass
holds more of them than a piece. Products run in `dtype`; norms, turns and the gradients of parameters stay
in the dtype of the parameters. The gain of a norm is folded into the weight of the product that follows, so
that neither the gain nor its gradient needs a pass over the rows.

T packed tokens, D width, O outputs of a product, F feed-forward width. Those of attention are in `attention`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemb.model.kernels import activation
from gemb.model.layout import Layout

PIECE_ROWS = 512
"""Rows of a piece: its intermediate numbers stay in the second-level cache, products stay large enough."""
WIDE = (torch.float32, torch.float64)
"""Dtypes in which norms, turns and activations are computed."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of rows: by the root of their mean square, or LayerNorm's without bias."""

    epsilon: float
    offset: float = 0.0
    """Added to the gain; Gemma stores gain - 1."""
    is_centred: bool = False
    """Whether the mean is taken away (LayerNorm)."""

    def factors(self, x: Tensor) -> Tensor:
        """What brings each row of x[..., D] to unit size, [..., 1]."""
        if self.is_centred:
            return x.var(-1, correction=0, keepdim=True).add_(self.epsilon).rsqrt_()
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factors: Tensor = size.square_().mul_(1 / x.shape[-1]).add_(self.epsilon).rsqrt_()
        return factors

    def unit(self, x: Tensor, factors: Tensor) -> Tensor:
        """The rows of x at unit size, without gain."""
        return (x - x.mean(-1, keepdim=True)).mul_(factors) if self.is_centred else x * factors

    def backward_(self, grad: Tensor, unit: Tensor, factors: Tensor) -> Tensor:
        """The gradient of x from that of `unit`, whose memory it takes."""
        along = (grad * unit).mean(-1, keepdim=True)
        if self.is_centred:
            grad -= grad.mean(-1, keepdim=True)
        return grad.addcmul_(unit, along, value=-1).mul_(factors)


def norm_rows(x: Tensor, gain: Tensor, norm: Norm) -> Tensor:
    """norm(x) * gain of x[T, D]."""
    return apply(_NormRows, x, gain, norm)


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
    order: Tensor | None = None,
) -> Tensor:
    """norm(x) * gain through the stacked weights[O, D] and biases: [T, D] -> [T, O] in `dtype`.

    `order`[O] says which of the stacked outputs stands where; None leaves them as they are.
    """
    return apply(_NormedLinear, x, gain, norm, dtype, order, len(weights), *weights, *biases)


def returned(
    x: Tensor,
    stream: Tensor,
    layer: tuple[Tensor, Tensor | None],
    after_gain: Tensor | None,
    norm: Norm | None,
    *,
    adds: bool,
) -> Tensor:
    """What attention brings back to the stream[T, D]: x[T, I] through weight and bias, normed if told.

    `adds` adds it to the stream. The product runs in the dtype of x.
    """
    return apply(_Returned, x, stream, after_gain, norm, adds, *layer)


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
    adds: bool = False,
) -> Tensor:
    """The feed-forward of a layer: [T, D] -> [T, D] in the dtype of x.

    down(activation(gate(h)) * up(h)) where `is_gated`, else down(activation(up(h))), of h = norm(x) * gain;
    normed again with `after_gain` where there is one. `inputs` are weight and bias of gate and up (or both
    in one, gate first). `recomputes` keeps nothing as wide as F and computes the first product again in the
    backward pass. `adds` adds x to what comes out.
    """
    weights, biases = zip(*inputs, strict=True)
    settings = _FeedForwardSettings(norm, activation_name, is_gated, dtype, recomputes, adds, len(weights))
    return apply(_FeedForward, x, gain, after_gain, settings, *down, *weights, *biases)


def embedded(table: Tensor, ids: Tensor, scale: float = 1.0, *, is_sparse: bool = True) -> Tensor:
    """Rows ids[T] of table[V, D] times `scale`; the gradient holds only the rows that are used.

    It is a sparse tensor with each of them once; without `is_sparse` a dense one.
    """
    return apply(_Embedded, table, ids, scale, is_sparse)


def weighted_sums(states: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """The sums of states[T, D] over the tokens of each text, each token weighted by weights[T]: [B, D]."""
    return apply(_WeightedSums, states, weights, layout)


def apply(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    """The result of one of these operators, typed."""
    result: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


# --- products --------------------


def pieces(rows: int, device: torch.device) -> Iterator[slice]:
    """The rows piece by piece; at once on an accelerator, which has no cache to keep them in."""
    step = rows if device.type != "cpu" else PIECE_ROWS
    for first in range(0, rows, max(1, step)):
        yield slice(first, min(first + step, rows))


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The product x @ weight.T + bias, into `out` if given; no gradients."""
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def _add_outer_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad.T @ x to `total`[O, I], which may be of a wider dtype than the factors."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, x)
    else:
        total += grad.T @ x


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


class _Product:
    """A product of normed rows: stacked weights with the gain folded in, and the gradients of all of them.

    Layers of one input have biases all or none.
    """

    def __init__(
        self,
        gain: Tensor | None,
        norm: Norm | None,
        parts: Sequence[Tensor | None],
        count: int,
        dtype: torch.dtype,
        order: Tensor | None = None,
    ) -> None:
        self._weights, self._biases = parts[:count], parts[count:]
        self._whole = stacked(_present(self._weights))
        self._gain = None if gain is None or norm is None else gain + norm.offset
        self._norm = norm if self._gain is not None else None
        self._order = None if order is None else order.to(self._whole.device)
        weight = self._whole if self._gain is None else self._whole * self._gain
        biases = _present(self._biases)
        bias = stacked(biases) if biases else None
        if self._order is not None:
            weight, bias = weight[self._order], None if bias is None else bias[self._order]
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def enter(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """What is multiplied: the rows of x at unit size, or as they are without a norm."""
        return x if self._norm is None or factors is None else self._norm.unit(x, factors)

    def factors(self, x: Tensor) -> Tensor | None:
        """What `enter` needs of x."""
        return None if self._norm is None else self._norm.factors(x)

    def leave_(self, grad: Tensor, entered: Tensor, factors: Tensor | None, out: Tensor) -> None:
        """Write the gradient of x to `out`, from the product's; `entered` is what was multiplied."""
        if out.dtype == grad.dtype:
            torch.mm(grad, self.weight, out=out)
        else:
            out.copy_(grad @ self.weight)
        if self._norm is not None and factors is not None:
            self._norm.backward_(out, entered, factors)

    def zero_gradients(self, *, needs_weight: bool) -> None:
        """Make room for the gradients that `add_gradients` adds up."""
        self._grad = torch.zeros_like(self._whole) if needs_weight or self._gain is not None else None
        bias = self.bias
        self._grad_bias = None if bias is None else torch.zeros_like(bias, dtype=self._whole.dtype)

    def add_gradients(self, grad: Tensor, entered: Tensor) -> None:
        """Add those of some rows; `entered` is what was multiplied, in the dtype of the product."""
        if self._grad is not None:
            _add_outer_(self._grad, grad, entered)
        if self._grad_bias is not None:
            self._grad_bias += grad.sum(0)

    def gradients(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """(gradient of the gain, gradients of all parts)."""
        grad, bias = self._grad, self._grad_bias
        if self._order is not None:
            grad = None if grad is None else torch.empty_like(grad).index_copy_(0, self._order, grad)
            bias = None if bias is None else torch.empty_like(bias).index_copy_(0, self._order, bias)
        grad_gain = None
        if grad is not None and self._gain is not None:
            grad_gain = (grad * self._whole).sum(0)
            grad *= self._gain
        return grad_gain, [*_split(grad, self._weights), *_split(bias, self._biases)]


class _NormRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, norm: Norm) -> Tensor:  # noqa: ANN401  # torch's context
        result, factors = torch.empty_like(x), x.new_empty(len(x), 1)
        for rows in pieces(len(x), x.device):
            factors[rows] = norm.factors(x[rows])
            torch.mul(norm.unit(x[rows], factors[rows]), gain + norm.offset, out=result[rows])
        ctx.save_for_backward(x, gain, factors)
        ctx.norm = norm
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        x, gain, factors = ctx.saved_tensors
        grad_x, grad_gain = torch.empty_like(x), torch.zeros_like(gain)
        for rows in pieces(len(x), x.device):
            grad_x[rows] = _after_backward(grad[rows], x[rows], factors[rows], gain, ctx.norm, grad_gain)
        return grad_x, grad_gain, None


def _after_backward(
    grad: Tensor, x: Tensor, factors: Tensor, gain: Tensor, norm: Norm, total: Tensor
) -> Tensor:
    """The gradient of x from that of norm(x) * gain; the gain's is added to `total`."""
    unit = norm.unit(x, factors)
    total += (grad * unit).sum(0)
    return norm.backward_(grad * (gain + norm.offset), unit, factors)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        gain: Tensor | None,
        norm: Norm | None,
        dtype: torch.dtype,
        order: Tensor | None,
        count: int,
        *parts: Tensor | None,
    ) -> Tensor:
        product = _Product(gain, norm, parts, count, dtype, order)
        result = x.new_empty(len(x), len(product.weight), dtype=dtype)
        factors = product.factors(x)
        for rows in pieces(len(x), x.device):
            entered = product.enter(x[rows], _rows(factors, rows))
            _multiply(entered.to(dtype), product.weight, product.bias, result[rows])
        ctx.save_for_backward(x, gain, factors, *parts)
        ctx.settings = (norm, dtype, order, count)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        x, gain, factors, *parts = ctx.saved_tensors
        norm, dtype, order, count = ctx.settings
        product = _Product(gain, norm, parts, count, dtype, order)
        product.zero_gradients(needs_weight=any(ctx.needs_input_grad[6 : 6 + count]))
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for rows in pieces(len(x), x.device):
            here = _rows(factors, rows)
            entered = product.enter(x[rows], here)
            product.add_gradients(grad[rows], entered.to(dtype))
            if grad_x is not None:
                product.leave_(grad[rows], entered, here, grad_x[rows])
        grad_gain, grad_parts = product.gradients()
        return grad_x, grad_gain, None, None, None, None, *grad_parts


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        stream: Tensor,
        after_gain: Tensor | None,
        norm: Norm | None,
        adds: bool,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        product = _Product(None, None, [weight, bias], 1, x.dtype)
        result = torch.empty_like(stream)
        before, factors = _room_for_after(x.dtype, stream, after_gain)
        for rows in pieces(len(x), x.device):
            back = _multiply(x[rows], product.weight, product.bias, _rows(before, rows))
            _write_after(rows, back, stream, after_gain, norm, adds, result, factors)
        ctx.save_for_backward(x, after_gain, before, factors, weight, bias)
        ctx.settings = (norm, adds)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        x, after_gain, before, factors, weight, bias = ctx.saved_tensors
        norm, adds = ctx.settings
        product = _Product(None, None, [weight, bias], 1, x.dtype)
        product.zero_gradients(needs_weight=ctx.needs_input_grad[5])
        grad_x = torch.empty_like(x)
        grad_after = None if after_gain is None else torch.zeros_like(after_gain)
        for rows in pieces(len(x), x.device):
            back = grad[rows]
            if grad_after is not None:
                here = before[rows].to(grad.dtype)
                back = _after_backward(back, here, factors[rows], after_gain, norm, grad_after)
            back = back.to(x.dtype)
            product.add_gradients(back, x[rows])
            torch.mm(back, product.weight, out=grad_x[rows])
        _, (grad_weight, grad_bias) = product.gradients()
        return grad_x, grad if adds else None, grad_after, None, None, grad_weight, grad_bias


def _room_for_after(
    dtype: torch.dtype, stream: Tensor, after_gain: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the norm on the way back keeps: its input[T, D] and its factors[T, 1]."""
    if after_gain is None:
        return None, None
    return stream.new_empty(stream.shape, dtype=dtype), stream.new_empty(len(stream), 1)


def _write_after(
    rows: slice,
    back: Tensor,
    stream: Tensor,
    after_gain: Tensor | None,
    norm: Norm | None,
    adds: bool,
    result: Tensor,
    factors: Tensor | None,
) -> None:
    """Some rows of the result: `back`, normed if there is a gain, added to the stream if told."""
    back = back.to(stream.dtype)
    if after_gain is not None and norm is not None and factors is not None:
        factors[rows] = norm.factors(back)
        unit, gain = norm.unit(back, factors[rows]), after_gain + norm.offset
        if adds:
            torch.addcmul(stream[rows], unit, gain, out=result[rows])
        else:
            torch.mul(unit, gain, out=result[rows])
    elif adds:
        torch.add(back, stream[rows], out=result[rows])
    else:
        result[rows] = back


@dataclass(frozen=True, slots=True)
class _FeedForwardSettings:
    norm: Norm | None
    activation: str
    is_gated: bool
    dtype: torch.dtype
    recomputes: bool
    adds: bool
    count: int
    """How many weights the first product is stacked of."""


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
        norm, dtype = settings.norm, settings.dtype
        product = _Product(gain, norm, parts, settings.count, dtype)
        out = _Product(None, None, [down, down_bias], 1, dtype)
        result, factors = torch.empty_like(x), product.factors(x)
        wide = None if settings.recomputes else x.new_empty(len(x), len(product.weight), dtype=dtype)
        before, after_factors = _room_for_after(dtype, x, after_gain)
        for rows in pieces(len(x), x.device):
            entered = product.enter(x[rows], _rows(factors, rows)).to(dtype)
            part = _multiply(entered, product.weight, product.bias, _rows(wide, rows))
            back = _multiply(_activated(part, settings), out.weight, out.bias, _rows(before, rows))
            _write_after(rows, back, x, after_gain, norm, settings.adds, result, after_factors)
        ctx.save_for_backward(
            x, gain, factors, after_gain, wide, before, after_factors, down, down_bias, *parts
        )
        ctx.settings = settings
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        settings: _FeedForwardSettings = ctx.settings
        x, gain, factors, after_gain, wide, before, after_factors, down, down_bias, *parts = ctx.saved_tensors
        norm, dtype, count = settings.norm, settings.dtype, settings.count
        product = _Product(gain, norm, parts, count, dtype)
        out = _Product(None, None, [down, down_bias], 1, dtype)
        product.zero_gradients(needs_weight=any(ctx.needs_input_grad[6 : 6 + count]))
        out.zero_gradients(needs_weight=ctx.needs_input_grad[4])
        grad_x = torch.empty_like(x)
        grad_after = None if after_gain is None else torch.zeros_like(after_gain)
        for rows in pieces(len(x), x.device):
            here = _rows(factors, rows)
            entered = product.enter(x[rows], here)
            narrow = entered.to(dtype)
            part = _multiply(narrow, product.weight, product.bias) if wide is None else wide[rows]
            back = grad[rows]
            if grad_after is not None and norm is not None:
                last = before[rows].to(x.dtype)
                back = _after_backward(back, last, after_factors[rows], after_gain, norm, grad_after)
            back = back.to(dtype)
            active, grad_part = _activated_backward(back @ out.weight, part, settings)
            out.add_gradients(back, active)
            product.add_gradients(grad_part, narrow)
            product.leave_(grad_part, entered, here, grad_x[rows])
            if settings.adds:
                grad_x[rows] += grad[rows]
        grad_gain, grad_parts = product.gradients()
        _, grad_down = out.gradients()
        return grad_x, grad_gain, grad_after, None, *grad_down, *grad_parts


def _activated(wide: Tensor, settings: _FeedForwardSettings) -> Tensor:
    """What goes into `down`: [T, F] of the first product."""
    if not settings.is_gated:
        return _active(wide, settings.activation)
    gate, up = wide.chunk(2, -1)
    return _active(gate, settings.activation).mul_(up)


def _activated_backward(grad: Tensor, wide: Tensor, settings: _FeedForwardSettings) -> tuple[Tensor, Tensor]:
    """(what went into `down`, gradient of the first product); `grad` of the former is overwritten."""
    if not settings.is_gated:
        return _active_backward(grad, wide, settings.activation)
    gate, up = wide.chunk(2, -1)
    grad_wide = torch.empty_like(wide)
    grad_gate, grad_up = grad_wide.chunk(2, -1)
    active, slope = _active_and_slope(gate, settings.activation)
    torch.mul(grad, active, out=grad_up)
    grad.mul_(up)
    torch.mul(grad, slope, out=grad_gate)
    return active.mul_(up), grad_wide


# gelu(x) with tanh is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)). torch's operator needs three times the
# time of these passes on a CPU, and its backward as much again.
_GELU_LINEAR = 1.5957691216057308
_GELU_CUBIC = _GELU_LINEAR * 0.044715


def _active(x: Tensor, name: str) -> Tensor:
    """The activation of x."""
    if name == "gelu_tanh" and x.dtype in WIDE and x.device.type == "cpu":
        return _gelu_gate(x).mul_(x)
    return activation(name)(x)


def _gelu_gate(x: Tensor) -> Tensor:
    """The sigmoid that gelu multiplies x with."""
    return _line_of_square(x, _GELU_CUBIC).mul_(x).sigmoid_()


def _line_of_square(x: Tensor, slope: float) -> Tensor:
    """What gelu's polynomial has besides x: its linear coefficient + slope * x^2, in one pass."""
    return torch.addcmul(torch.tensor(_GELU_LINEAR, dtype=x.dtype), x, x, value=slope)


def _active_and_slope(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The activation of x and its derivative."""
    if name == "gelu_tanh" and x.dtype in WIDE and x.device.type == "cpu":
        gate = _gelu_gate(x)
        active = gate * x
        # d/dx x s(u(x)) = s + x s (1 - s) u'
        slope = _line_of_square(x, 3 * _GELU_CUBIC).mul_(active)
        return active, torch.addcmul(gate, slope, 1 - gate)
    if name == "silu" and x.dtype in WIDE:
        gate = torch.sigmoid(x)
        active = gate * x
        return active, torch.addcmul(gate, active, 1 - gate)
    return _active_backward(torch.ones_like(x), x, name)


def _active_backward(grad: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(activation of x, gradient of x)."""
    match name:
        case "gelu":
            grad_x = torch.ops.aten.gelu_backward(grad, x)
        case "gelu_tanh":
            grad_x = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        case "silu":
            grad_x = torch.ops.aten.silu_backward(grad, x)
        case "relu":
            grad_x = torch.ops.aten.threshold_backward(grad, x, 0)
        case _:
            raise ValueError(f"no backward of {name!r}")
    return activation(name)(x), grad_x


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
