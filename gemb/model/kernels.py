"""The operators of the packed forward: linear layers, norms, rotary positions, attention.

T packed tokens, D width, H query heads, G key/value heads, C channels of a head.

On a CPU linear layers run through oneDNN with weights packed once at load, which fuses activation, gate
and residual into the product. The packing operators are private to torch: where they are missing, or
refuse the processor, `F.linear` takes their place, slower and equal.

A row of a product must not depend on the other rows, or a text's vector would depend on its neighbours in
the batch. oneDNN picks how it sums over the inputs by the number of rows; within the row counts of
`_row_limits` it is one way, so that products of more rows are cut and products of fewer are filled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.device import compute_capability
from gemb.model.layout import Group, Layout

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
_POINTWISE = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
}

Window = tuple[int, int]
"""(left, right): token i sees token j if i - left <= j <= i + right."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name, one of ACTIVATIONS."""
    match name:
        case "gelu":
            return F.gelu
        case "gelu_tanh":
            return lambda x: F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu
        case "relu":
            return F.relu
    raise ValueError(f"{name!r} is not one of {', '.join(ACTIVATIONS)}")


class Linear:
    """x[T, I] -> x @ weight.T + bias, [T, O], in the dtype of the weight; with what may be fused into it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return F.linear(x, self._weight, self._bias)

    def activated(self, x: Tensor, name: str) -> Tensor:
        """The product through an activation of ACTIVATIONS."""
        return activation(name)(self(x))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other`[T, O]."""
        return self(x) * other

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other`[T, O], in the dtype of `other`."""
        return self(x) + other


class PackedLinear(Linear):
    """A linear layer through oneDNN, its weight packed at load. CPU only, no gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 512)  # 512 rows: a hint for the blocking
        super().__init__(packed, bias)
        self._least, self._most = _row_limits(weight.dtype, weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return self._cut(lambda part: self._pointwise(part, "none", ""), x)

    def activated(self, x: Tensor, name: str) -> Tensor:
        """The product through an activation of ACTIVATIONS."""
        operator, algorithm = _POINTWISE[name]
        return self._cut(lambda part: self._pointwise(part, operator, algorithm), x)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other`[T, O]."""
        return self._cut(lambda part, second: self._binary(part, second, "mul"), x, other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other`[T, O], in the dtype of `other`."""
        if other.dtype != x.dtype:
            return other + self(x)
        return self._cut(lambda part, second: self._binary(part, second, "add"), x, other)

    def _pointwise(self, x: Tensor, operator: str, algorithm: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, operator, [], algorithm
        )
        return result

    def _binary(self, x: Tensor, other: Tensor, operator: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, operator
        )
        return result

    def _cut(self, product: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The product in even pieces of `_most` rows at most, and `_least` at least."""
        rows = len(inputs[0])
        if self._least <= rows <= self._most:
            return product(*inputs)
        if rows < self._least:
            filled = [torch.cat([x, x.new_zeros(self._least - rows, x.shape[1])]) for x in inputs]
            return product(*filled)[:rows]
        pieces = -(-rows // self._most)
        return torch.cat(
            [product(*part) for part in zip(*(x.tensor_split(pieces) for x in inputs), strict=True)]
        )


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear layer runs here in `dtype` (bf16 needs its instructions)."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), 16)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(16, 16, dtype=dtype), weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def _row_limits(dtype: torch.dtype, inputs: int) -> tuple[int, int]:
    """(least, most) rows of one product within which a row's result does not depend on their number.

    Found by comparing all row counts up to 1,100 on processors with AMX (oneDNN of torch 2.13):
    fp32 changes at 1 row only; bf16 at 33 to 37 and again at 353 (384 to 1,536 inputs) or 166 (3,072).
    """
    if dtype == torch.float32:
        return 16, 1 << 30
    return (64, 256) if inputs <= 1536 else (64, 128)


@dataclass(frozen=True)
class Kernels:
    """Makes the operators of a model for one device and dtype."""

    device: str
    dtype: torch.dtype

    @property
    def packs(self) -> bool:
        """Whether linear layers are packed."""
        return self.device == "cpu" and can_pack(self.dtype)

    @property
    def least_rows(self) -> int:
        """Rows that a product has at least; a smaller batch is filled once, at its end."""
        return 1 if self.device != "cpu" else 16 if self.dtype == torch.float32 else 64

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A linear layer of weight[O, I] and bias[O], any float dtype; it keeps its own copy."""
        weight = weight.to(device=self.device, dtype=self.dtype)
        bias = None if bias is None else bias.to(device=self.device, dtype=self.dtype)
        return PackedLinear(weight, bias) if self.packs else Linear(weight.contiguous(), bias)

    def vector(self, values: Tensor) -> Tensor:
        """A gain or bias, in fp32 on the device."""
        return values.to(device=self.device, dtype=torch.float32)


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last dimension, kept; fp32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()


def rms_norm(x: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    """X / rms(x) * gain over the last dimension, in fp32."""
    scaled = x * inverse_rms(x, epsilon)
    return scaled if gain is None else scaled.mul_(gain)


def add_normed_(stream: Tensor, x: Tensor, gain: Tensor, epsilon: float) -> None:
    """Add rms_norm(x) * gain to the fp32 stream, in place."""
    x = x.float()
    stream.addcmul_(x * inverse_rms(x, epsilon), gain)


class Rotary:
    """Rotary positions of one base frequency; heads hold the two halves of a pair side by side.

    Checkpoints keep the pair (c, c + C/2); `interleave` reorders their channels to (2c, 2c + 1), so that
    turning a pair is one complex product. Scores do not change: queries and keys are reordered alike.
    """

    def __init__(self, frequencies: Tensor, factor: float = 1.0) -> None:
        self._frequencies = frequencies.double().cpu()
        self._factor = factor
        self._table = torch.empty(0, len(frequencies), dtype=torch.complex64)

    def at(self, layout: Layout) -> Tensor:
        """The turns of each token of a batch, complex64[T, 1, C/2]."""
        if len(self._table) < layout.longest or self._table.device != layout.positions.device:
            size = 1 << max(8, (layout.longest - 1).bit_length())
            # transformers multiplies fp32 positions and frequencies; so do we, for equal angles.
            angles = torch.arange(size).float()[:, None] * self._frequencies.float()
            self._table = torch.polar(torch.full_like(angles, self._factor), angles).to(
                layout.positions.device
            )
        return self._table[layout.positions][:, None]


def interleave(channels: int) -> Tensor:
    """The order that puts channel c and c + C/2 of a head side by side, int64[C]."""
    return torch.arange(channels).view(2, channels // 2).T.reshape(-1)


def turn(heads: Tensor, turns: Tensor) -> Tensor:
    """heads[T, H, C], fp32 and contiguous in C, turned by complex `turns`[T, 1, C/2]."""
    pairs = torch.view_as_complex(torch.unflatten(heads, -1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float = 1.0,
    causal: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention within each text of a packed batch, [T, H * C]; q[T, H, C], k and v[T, G, C].

    `window` limits the reach, `causal` cuts what comes later, `softcap` c squeezes scores to c tanh(s / c).
    """
    if window is not None and max(window) >= layout.longest - 1 and min(window) >= layout.longest - 1:
        window = None
    if q.is_cuda:
        packed = _attend_varlen(q, k, v, layout, scale, causal, window, softcap)
        if packed is not None:
            return packed
    parts = [
        _attend_group(
            _texts(q, group), _texts(k, group), _texts(v, group), scale, causal, window, softcap
        )
        for group in layout.groups
    ]
    if layout.filled > layout.tokens:
        parts.append(q.new_zeros(layout.filled - layout.tokens, q.shape[1] * q.shape[2]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _texts(x: Tensor, group: Group) -> Tensor:
    """x[T, ...] -> the texts of a group, [N, L, ...]."""
    return torch.unflatten(x[group.start : group.stop], 0, (group.rows, group.length))


_QUERY_BLOCK = 128
"""Queries of one piece in a windowed layer: small enough to skip most keys, large enough for the product."""


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Window | None, softcap: float | None
) -> Tensor:
    """Attention of texts of one length: q[N, L, H, C], k and v[N, L, G, C] -> [N * L, H * C]."""
    length = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None or (max(window) >= length - 1 and (causal or min(window) >= length - 1)):
        mixed = _attention(q, k, v, scale, None, causal, softcap)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)
    left, right = window[0], 0 if causal else window[1]
    pieces = []
    for first in range(0, length, _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, length)
        low, high = max(0, first - left), min(length, last + right)
        mask = _band(last - first, high - low, first - low, left, right, str(q.device))
        block = (q[:, :, first:last], k[:, :, low:high], v[:, :, low:high])
        pieces.append(_attention(*block, scale, mask, False, softcap))
    return torch.cat(pieces, dim=2).transpose(1, 2).flatten(2).flatten(0, 1)


@cache
def _band(queries: int, keys: int, offset: int, left: int, right: int, device: str) -> Tensor | None:
    """True where query i sees key j: offset + i - left <= j <= offset + i + right; None if everywhere."""
    i = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)
    band = (j >= i - left) & (j <= i + right)
    return None if bool(band.all()) else band


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool, softcap: float | None
) -> Tensor:
    """q[N, H, L, C], k and v[N, G, S, C] -> [N, H, L, C]."""
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and q.shape[2] > 1, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v


def _attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    causal: bool,
    window: Window | None,
    softcap: float | None,
) -> Tensor | None:
    """The same through FlashAttention on packed tokens; None where it does not apply.

    It needs 16-bit inputs, heads of at most 256 channels, no softcap, and compute capability 8.0.
    """
    if q.dtype == torch.float32 or q.shape[2] > 256 or softcap is not None:
        return None
    if compute_capability(q.device) < (8, 0):
        return None
    from torch.nn.attention.varlen import varlen_attn

    left, right = window or (-1, -1)
    reach: Any = (left, 0 if causal else right)
    starts, longest = layout.starts, layout.longest
    tokens = layout.tokens
    mixed = varlen_attn(
        q[:tokens].contiguous(),
        k[:tokens].contiguous(),
        v[:tokens].contiguous(),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=reach,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    flat: Tensor = mixed.flatten(1)  # type: ignore[union-attr]
    return flat if layout.filled == tokens else F.pad(flat, (0, 0, 0, layout.filled - tokens))
