"""The shared pieces of gated transformer backbones: Gemma, Qwen, Llama, Mistral, EuroBERT.

A layer is attention, then a gated feed-forward, each on a normed copy of the residual stream; Gemma norms
what comes back too. The stream and the norms are fp32, products run in the dtype of the kernels. Norm
gains and the score scale are folded into the weights that follow them.

T packed tokens, D width, H query heads, G key/value heads, C channels of a head, F feed-forward width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemb.model.attention import FULL, Reach
from gemb.model.kernels import (
    Kernels,
    Linear,
    Rotary,
    add_normed_,
    interleave,
    inverse_rms,
    rms_norm,
    turn,
)
from gemb.model.layout import Layout
from gemb.model.packed_attention import attend
from gemb.model.table import Table


class Backbone(Protocol):
    """Token ids to token states."""

    @property
    def width(self) -> int:
        """D of the states before `projection`."""
        ...

    @property
    def projection(self) -> Linear | None:
        """A linear map of states that may run after pooling instead, where pooling is linear."""
        ...

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64 ids[filled] of packed texts -> fp32 states[filled, D], before `projection`."""
        ...


@dataclass(frozen=True)
class AttentionShape:
    """The form of one attention layer."""

    heads: int
    """H."""
    shared: int
    """G, key/value heads."""
    channels: int
    """C of each head."""
    scale: float
    """Multiplies the scores."""
    rotary: Rotary
    reach: Reach = FULL
    softcap: float | None = None


@dataclass(frozen=True)
class Projection:
    """weight[O, I] and bias[O] as a checkpoint keeps them."""

    weight: Tensor
    bias: Tensor | None = None

    def after(self, gain: Tensor | None) -> "Projection":
        """The same on inputs that still lack `gain`[I]."""
        return self if gain is None else Projection(self.weight.float() * gain.float(), self.bias)

    def times(self, scale: float) -> "Projection":
        """Outputs times `scale`."""
        if scale == 1:
            return self
        return Projection(
            self.weight.float() * scale, None if self.bias is None else self.bias.float() * scale
        )

    def with_pairs_adjacent(self, channels: int) -> "Projection":
        """Output channels of each head reordered for `turn`."""
        order = interleave(channels)
        heads = len(self.weight) // channels
        index = (torch.arange(heads)[:, None] * channels + order).reshape(-1)
        return Projection(self.weight[index], None if self.bias is None else self.bias[index])


def stacked(parts: Sequence[Projection]) -> Projection:
    """Several projections of one input as one."""
    weight = torch.cat([part.weight.float() for part in parts])
    if all(part.bias is None for part in parts):
        return Projection(weight)
    biases = [torch.zeros(len(part.weight)) if part.bias is None else part.bias.float() for part in parts]
    return Projection(weight, torch.cat(biases))


class Attention:
    """Rotary attention over packed texts, with optional norms on queries, keys and values."""

    def __init__(
        self,
        kernels: Kernels,
        shape: AttentionShape,
        *,
        query: Projection,
        key: Projection,
        value: Projection,
        output: Projection,
        input_gain: Tensor | None,
        query_gain: Tensor | None = None,
        key_gain: Tensor | None = None,
        norms_values: bool = False,
        epsilon: float = 1e-6,
    ) -> None:
        self.shape = shape
        self._dtype = kernels.dtype
        self._epsilon = epsilon
        self._norms_values = norms_values
        self._gains: Tensor | None = None
        if query_gain is not None and key_gain is not None:
            order = interleave(shape.channels)
            gains = [query_gain.float()[order] * shape.scale] * shape.heads
            gains += [key_gain.float()[order]] * shape.shared
            self._gains = kernels.vector(torch.stack(gains))  # [H + G, C]
        else:
            query = query.times(shape.scale)
        query, key = (part.with_pairs_adjacent(shape.channels) for part in (query, key))
        inputs = stacked([query, key, value]).after(input_gain)
        self._inputs = kernels.linear(inputs.weight, inputs.bias)
        self.output = kernels.linear(output.weight, output.bias)

    def inputs(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Normed stream x[T, D] -> queries and keys[T, H + G, C], turned, and values[T, G, C]."""
        shape = self.shape
        heads = torch.unflatten(self._inputs(x), -1, (-1, shape.channels))  # [T, H + 2G, C]
        queries_keys = heads[:, : shape.heads + shape.shared].float()
        values = heads[:, shape.heads + shape.shared :]
        if self._gains is not None:
            queries_keys = queries_keys * inverse_rms(queries_keys, self._epsilon)
            queries_keys *= self._gains
        if self._norms_values:
            values = rms_norm(values.float(), None, self._epsilon).to(self._dtype)
        return turn(queries_keys, turns).to(self._dtype), values

    def mix(self, queries_keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
        """What `inputs` gave, for all tokens -> mixed values[T, H * C], before the output projection."""
        shape = self.shape
        queries, keys = torch.split(queries_keys, [shape.heads, shape.shared], dim=1)
        return attend(queries, keys, values, layout, shape.reach, shape.softcap)


class GatedFeedForward:
    """down(activation(gate(x)) * up(x)): [T, D] -> [T, D]."""

    def __init__(
        self,
        kernels: Kernels,
        activation: str,
        *,
        gate: Projection,
        up: Projection,
        down: Projection,
        input_gain: Tensor | None,
    ) -> None:
        gate, up = gate.after(input_gain), up.after(input_gain)
        self._activation = activation
        self._gate = kernels.linear(gate.weight, gate.bias)
        self._up = kernels.linear(up.weight, up.bias)
        self.down = kernels.linear(down.weight, down.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x[T, D] -> gated[T, F], before `down`."""
        return self._up.times(x, self._gate.activated(x, self._activation))


class LayerExtra(Protocol):
    """What a family adds to the end of a layer."""

    def __call__(self, stream: Tensor, embedded: Tensor) -> None:
        """Change stream[T, D] in place; `embedded`[T, D] are the token embeddings, in the kernels' dtype."""
        ...


@dataclass(frozen=True)
class Layer:
    """One layer; the gains before attention and feed-forward are already in their weights."""

    attention: Attention
    feed_forward: GatedFeedForward
    attention_gain: Tensor | None = None
    """Gain of the norm on what attention brings back; None where the family has none."""
    feed_forward_gain: Tensor | None = None
    extra: LayerExtra | None = None


Norm = Callable[[Tensor], Tensor]
"""The norm before a sub-layer, without its gain: fp32[T, D] -> fp32[T, D]."""


def run_layer(
    layer: Layer,
    stream: Tensor,
    layout: Layout,
    kernels: Kernels,
    *,
    norm: Norm,
    input_norm: Norm | None,
    epsilon: float,
    embedded: Tensor | None = None,
) -> None:
    """One layer on the fp32 stream[T, D], in place.

    All but the mixing of tokens goes piece by piece over the rows, so that a piece stays in the cache from
    one operator to the next. `input_norm` is the norm before attention, None where a layer has none.
    """
    pieces = kernels.pieces(len(stream))
    turns = layer.attention.shape.rotary.at(layout)
    inputs = []
    for piece in pieces:
        x = stream[piece] if input_norm is None else input_norm(stream[piece])
        inputs.append(layer.attention.inputs(x.to(kernels.dtype), turns[piece]))
    queries_keys, values = inputs[0] if len(inputs) == 1 else map(torch.cat, zip(*inputs, strict=True))
    mixed = layer.attention.mix(queries_keys, values, layout)
    for piece in pieces:
        part = stream[piece]
        _join_(part, layer.attention.output(mixed[piece]), layer.attention_gain, epsilon)
        gated = layer.feed_forward(norm(part).to(kernels.dtype))
        _join_(part, layer.feed_forward.down(gated), layer.feed_forward_gain, epsilon)
        if layer.extra is not None and embedded is not None:
            layer.extra(part, embedded[piece])


def _join_(stream: Tensor, x: Tensor, gain: Tensor | None, epsilon: float) -> None:
    """Add to the stream what a sub-layer brings back, normed first where there is a gain."""
    if gain is None:
        stream += x
    else:
        add_normed_(stream, x, gain, epsilon)


class GatedBackbone:
    """Token embeddings, layers and the final norm of a gated transformer."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        table: Table,
        embedding_scale: float,
        layers: Sequence[Layer],
        final_gain: Tensor,
        epsilon: float,
        projection: Projection | None = None,
    ) -> None:
        self._table = table.on(kernels.device, kernels.dtype)
        self._kernels = kernels
        self._embedding_scale = embedding_scale
        self._layers = tuple(layers)
        self._final_gain = kernels.vector(final_gain)
        self._epsilon = epsilon
        self.projection = None if projection is None else kernels.linear(projection.weight, projection.bias)
        self.width = table.width

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64 ids[filled] of packed texts -> fp32 states[filled, D] after the final norm."""
        stream = self._table.rows(ids)
        if self._embedding_scale != 1:
            stream *= self._embedding_scale
        has_extra = any(layer.extra is not None for layer in self._layers)
        embedded = stream.to(self._kernels.dtype, copy=True) if has_extra else None
        for layer in self._layers:
            run_layer(
                layer,
                stream,
                layout,
                self._kernels,
                norm=self._norm,
                input_norm=self._norm,
                epsilon=self._epsilon,
                embedded=embedded,
            )
        return rms_norm(stream, self._final_gain, self._epsilon)

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self._epsilon)
