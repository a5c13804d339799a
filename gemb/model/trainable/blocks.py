"""What trainable backbones share: linear layers, attention, dropout and the way a layer is run.

T packed tokens, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gemb.model.kernels import Rotary
from gemb.model.layout import Group, Layout
from gemb.model.trainable.attention import (
    AttentionSettings,
    packed_attention,
    pair_order,
    source_attention,
)
from gemb.model.trainable.functions import Norm, feed_forward, normed_linear, returned
from gemb.model.trainable.parameters import Tensors, lay_together

Recompute = Literal["nothing", "feed_forward", "layers"]
"""What the backward pass computes again instead of keeping it: the first product of each feed-forward (an
eighth more work, less than half of the memory), or each layer whole (a third more work)."""


@dataclass(slots=True)
class Computation:
    """How a trainable backbone computes; may be changed between two batches."""

    dtype: torch.dtype | None = None
    """Of products and attention; None is that of the parameters. Norms and the stream stay in theirs."""
    dropout: float = 0.0
    """Share of numbers dropped from what each sub-layer brings back, and from the embeddings."""
    recompute: Recompute = "nothing"
    sparse_table: bool = True
    """Whether the gradient of the token table holds only the rows that are used."""
    trains: bool = True
    """Whether dropout is on."""
    attention_dropout: float = 0.0
    """Share of the weights of self-attention that is dropped; attention is then not fused, and slower."""

    def of(self, x: Tensor) -> torch.dtype:
        """The dtype of products of `x`."""
        return x.dtype if self.dtype is None else self.dtype

    @property
    def drops(self) -> bool:
        """Whether dropout is on."""
        return self.trains and self.dropout > 0

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, where it is on."""
        return F.dropout(x, self.dropout) if self.drops else x


class TrainableBackbone(Protocol):
    """Token ids to token states, differentiable."""

    @property
    def width(self) -> int:
        """D of the states."""
        ...

    @property
    def table(self) -> Tensors:
        """The token embeddings."""
        ...

    def fuse(self) -> None:
        """Lay parameters that are used together side by side, after they were moved or made anew."""
        ...

    def forward(self, ids: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """int64 ids[T] of packed texts -> states[T, D] in the dtype of the parameters."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """What the rows of a decoder attend to: states[S, D] of an encoder, and which row goes with which.

    `pairs` are groups of rows of one length and their sources, as `source_attention` takes them.
    """

    states: Tensor
    pairs: Sequence[tuple[Group, Group]]

    def keys_and_values(
        self, layers: Sequence[Tensors], computation: Computation, order: Tensor | None
    ) -> Tensor:
        """The states through the layers of keys and values, [S, 2G * C]."""
        weights, biases = [part.matrix for part in layers], [part.shift for part in layers]
        return normed_linear(self.states, None, None, weights, biases, computation.of(self.states), order)


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a layer; `inputs` are query, key and value, or all three in one."""

    inputs: Sequence[Tensors]
    output: Tensors
    settings: AttentionSettings
    rotary: Rotary | None = None
    query_gain: Tensors | None = None
    key_gain: Tensors | None = None
    value_norm: Norm | None = None
    """Of values, which have no gain (EmbeddingGemma 2)."""

    def __call__(
        self,
        x: Tensor,
        gain: Tensor | None,
        norm: Norm | None,
        layout: Layout,
        computation: Computation,
        after: tuple[Tensor, Norm] | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """The stream x[T, D] and what attention brings back of norm(x) * gain, normed by `after` if given.

        With a `source` tokens attend to the whole row of it too, through the same keys and values but without
        positions, in one softmax (merged attention; T5Gemma 2, arXiv 2512.14856). `inputs` are then three.
        """
        settings, has_turns = self.settings, self.rotary is not None
        raw = normed_linear(
            x,
            gain,
            norm,
            [part.matrix for part in self.inputs],
            [part.shift for part in self.inputs],
            computation.of(x),
            pair_order(settings) if has_turns else None,
        )
        query_gain, key_gain = (
            None if part is None else part.matrix for part in (self.query_gain, self.key_gain)
        )
        turns = None if self.rotary is None else turns_of(self.rotary, layout, x.dtype)
        if self.value_norm is not None:
            raw = _unit_values(raw, settings, self.value_norm)
        if source is None:
            if computation.trains and computation.attention_dropout:
                settings = replace(settings, dropout=computation.attention_dropout)
            mixed = packed_attention(raw, query_gain, key_gain, settings, layout, turns)
        else:
            order = pair_order(replace(settings, heads=0)) if has_turns else None
            other = source.keys_and_values(self.inputs[1:], computation, order)
            mixed = source_attention(raw, other, query_gain, key_gain, settings, source.pairs, turns)
        return _brought_back(mixed, x, self.output, after, computation)


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Attention to the rows of a source alone, without positions; `inputs` are key and value."""

    query: Tensors
    inputs: Sequence[Tensors]
    output: Tensors
    settings: AttentionSettings

    def __call__(
        self,
        x: Tensor,
        gain: Tensor,
        norm: Norm,
        source: Source,
        computation: Computation,
        after: tuple[Tensor, Norm],
    ) -> Tensor:
        """The stream x[T, D] and what comes back of norm(x) * gain, normed by `after`."""
        raw = normed_linear(x, gain, norm, [self.query.matrix], [self.query.shift], computation.of(x))
        other = source.keys_and_values(self.inputs, computation, None)
        mixed = source_attention(raw, other, None, None, self.settings, source.pairs, None)
        return _brought_back(mixed, x, self.output, after, computation)


def _unit_values(raw: Tensor, settings: AttentionSettings, norm: Norm) -> Tensor:
    """raw[T, (H + 2G) * C] with its values, the last G * C, at unit size in each head."""
    shared, channels = settings.shared, settings.channels
    rest, values = torch.split(raw, [raw.shape[1] - shared * channels, shared * channels], dim=1)
    heads = F.rms_norm(values.reshape(-1, shared, channels), (channels,), eps=norm.epsilon)
    return torch.cat([rest, heads.flatten(1)], dim=1)


def _brought_back(
    mixed: Tensor,
    stream: Tensor,
    output: Tensors,
    after: tuple[Tensor, Norm] | None,
    computation: Computation,
) -> Tensor:
    """The stream[T, D] and mixed values through the output layer, normed by `after` if given."""
    after_gain, after_norm = (None, None) if after is None else after
    layer = (output.matrix, output.shift)
    back = returned(mixed, stream, layer, after_gain, after_norm, adds=not computation.drops)
    return stream + computation.drop(back) if computation.drops else back


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The feed-forward of a layer; `inputs` are gate and up (or both in one), or up alone if not gated."""

    inputs: Sequence[Tensors]
    down: Tensors
    activation: str
    is_gated: bool = True

    def __call__(
        self,
        x: Tensor,
        gain: Tensor | None,
        norm: Norm | None,
        computation: Computation,
        after_gain: Tensor | None = None,
    ) -> Tensor:
        """The stream x[T, D] and what comes back of norm(x) * gain, normed with `after_gain` if given."""
        back = feed_forward(
            x,
            gain,
            norm,
            [(part.matrix, part.shift) for part in self.inputs],
            (self.down.matrix, self.down.shift),
            activation_name=self.activation,
            is_gated=self.is_gated,
            after_gain=after_gain,
            dtype=computation.of(x),
            recomputes=computation.recompute == "feed_forward",
            adds=not computation.drops,
        )
        return x + computation.drop(back) if computation.drops else back


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """Attention, then a gated feed-forward, each on a normed stream; Gemma norms what comes back too."""

    attention: Attention
    feed_forward: FeedForward
    norm: Norm
    attention_gain: Tensors | None
    """Before attention; None where the first layer takes the stream as it is (ModernBERT)."""
    feed_forward_gain: Tensors
    after_attention: Tensors | None = None
    after_feed_forward: Tensors | None = None

    def __call__(self, x: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """Stream[T, D] -> stream[T, D]."""
        return self.fed(self.attended(x, layout, computation), computation)

    def attended(
        self, x: Tensor, layout: Layout, computation: Computation, source: Source | None = None
    ) -> Tensor:
        """The stream after attention, merged with that to a `source` if given."""
        gain = None if self.attention_gain is None else self.attention_gain.matrix
        norm = None if gain is None else self.norm
        after = None if self.after_attention is None else (self.after_attention.matrix, self.norm)
        return self.attention(x, gain, norm, layout, computation, after, source)

    def fed(self, x: Tensor, computation: Computation) -> Tensor:
        """The stream after the feed-forward."""
        last = None if self.after_feed_forward is None else self.after_feed_forward.matrix
        return self.feed_forward(x, self.feed_forward_gain.matrix, self.norm, computation, last)


RunLayer = Callable[[Tensor, Layout, Computation], Tensor]
"""A layer as it is run: stream[T, D] -> stream[T, D]."""


def run_layers(
    layers: Sequence[RunLayer],
    x: Tensor,
    layout: Layout,
    computation: Computation,
) -> Tensor:
    """The stream[T, D] through all layers, each kept or computed again as `computation` says."""
    for layer in layers:
        if computation.recompute == "layers" and torch.is_grad_enabled():
            x = checkpoint(layer, x, layout, computation, use_reentrant=False)
        else:
            x = layer(x, layout, computation)
    return x


def fuse_layer(attention: Attention, feed_forward: FeedForward) -> None:
    """Lay the weights of one input together."""
    lay_together(attention.inputs)
    lay_together(feed_forward.inputs)


def turns_of(rotary: Rotary, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The turns of each token, complex[T, 1, C/2]; made once a batch.

    Angles, cosines and sines are fp32, as in transformers and to its bits, whatever `dtype` is.
    """
    key = (rotary, dtype)
    if key not in layout.shared:
        frequencies = rotary._frequencies.float().to(layout.positions.device)
        distinct = torch.arange(max(1, layout.longest), device=layout.positions.device)
        angles = distinct.float()[:, None] * frequencies
        parts = ((part * rotary._factor).to(dtype) for part in (angles.cos(), angles.sin()))
        layout.shared[key] = torch.complex(*parts)[layout.positions][:, None]
    turns: Tensor = layout.shared[key]
    return turns
