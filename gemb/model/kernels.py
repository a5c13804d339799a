"""The operators of the packed forward: linear layers, norms, rotary positions.

T packed tokens, D width, H query heads, G key/value heads, C channels of a head.

On a CPU linear layers run through oneDNN with weights packed once at load, which fuses activation, gate
and residual into the product. The packing operators are private to torch: where they are missing, or
refuse the processor, `F.linear` takes their place, slower and equal.

A row of a product must not depend on the other rows, or a text's vector would depend on its neighbours in
the batch. oneDNN picks how it sums over the inputs by the number of rows; within the row counts of
`_row_limits` it is one way, so that products of more rows are cut and products of fewer are filled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.model.layout import Layout

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
_POINTWISE = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
}


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
        parts = zip(*(x.tensor_split(pieces) for x in inputs), strict=True)
        return torch.cat([self._cut(product, *part) for part in parts])


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

    Found by comparing row counts up to 1,100, for 256 to 3,072 outputs, on processors with AMX (oneDNN of
    torch 2.13, on one thread, as the engine runs it). fp32 changes at 1 row only. bf16 changes nowhere above
    36 rows with up to 384 inputs, else at 36 and again at 256 (up to 2,048 inputs) or 166 (3,072); with 4,096
    inputs it changes everywhere, so there every product has the same number of rows.
    """
    if dtype == torch.float32:
        return 16, 1 << 30
    if inputs <= 384:
        return 64, 1024
    if inputs <= 2048:
        return 64, 240
    return (64, 160) if inputs <= 3072 else (64, 64)


ROW_STEP = 8
"""What the rows of a batch are a multiple of.

oneDNN makes code for every number of rows of a product and keeps it, 1,024 times some 100 KiB.
"""
PIECE_ROWS = 240
"""Rows of a piece in bf16: within the limits of most products, and small enough for the second-level cache.

In fp32 the products dominate, and they gain more from many rows than the rest from small pieces.
"""


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

    @property
    def row_step(self) -> int:
        """What the rows of a batch are a multiple of."""
        return ROW_STEP if self.packs else 1

    def pieces(self, rows: int) -> list[slice]:
        """Even parts of `rows` that a layer goes through one by one; all at once where that is faster."""
        count = -(-rows // PIECE_ROWS) if self.device == "cpu" and self.dtype == torch.bfloat16 else 1
        steps = -(-rows // self.row_step)
        edges = [min(rows, steps * part // count * self.row_step) for part in range(count + 1)]
        return [slice(first, last) for first, last in pairwise(edges)]

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
        """The turns of each token of a batch, complex64[filled, 1, C/2]; made once a batch."""
        if self not in layout.shared:
            layout.shared[self] = self._long_enough(layout)[layout.positions][:, None]
        turns: Tensor = layout.shared[self]
        return turns

    def _long_enough(self, layout: Layout) -> Tensor:
        """The turns of all positions of this batch, and of longer ones before it."""
        table, device = self._table, layout.positions.device  # other threads may put another in its place
        if len(table) < max(1, layout.longest) or table.device != device:
            size = 1 << max(8, (layout.longest - 1).bit_length())
            # transformers multiplies fp32 positions and frequencies; so do we, for equal angles.
            angles = torch.arange(size).float()[:, None] * self._frequencies.float()
            table = torch.polar(torch.full_like(angles, self._factor), angles).to(device)
            self._table = table
        return table


def interleave(channels: int) -> Tensor:
    """The order that puts channel c and c + C/2 of a head side by side, int64[C]."""
    return torch.arange(channels).view(2, channels // 2).T.reshape(-1)


def turn(heads: Tensor, turns: Tensor) -> Tensor:
    """heads[T, H, C], fp32 and contiguous in C, turned by complex `turns`[T, 1, C/2]."""
    pairs = torch.view_as_complex(torch.unflatten(heads, -1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)
