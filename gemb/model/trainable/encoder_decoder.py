"""Trainable T5Gemma and T5Gemma 2: an encoder, and a decoder whose rows attend to the encoder's.

T5Gemma (arXiv 2504.06225) has a cross-attention of its own in each layer of the decoder; T5Gemma 2 (arXiv
2512.14856) merges it with self-attention, whose keys and values also read the encoder's states.

T packed tokens of the decoder, S of the encoder, R rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.model.attention import FULL
from gemb.model.families import prefix_of
from gemb.model.layout import Group, Layout
from gemb.model.trainable import gated
from gemb.model.trainable.blocks import Computation, CrossAttention, GatedLayer, Source
from gemb.model.trainable.gated import GatedBackbone
from gemb.model.trainable.parameters import ParameterTree, Tensors, lay_together


@dataclass(frozen=True, slots=True)
class PairedRows:
    """The order in which the rows of both towers are computed, so that equal lengths are neighbours."""

    order: NDArray[np.int64]
    """[R], of the decoder's rows: the longest first, among equals that with the longest source."""
    source_order: NDArray[np.int64]
    """[R], of the encoder's rows: the other way round."""
    pairs: tuple[tuple[Group, Group], ...]
    """Rows of one length whose sources have one length, side by side in both orders."""

    @classmethod
    def of(cls, lengths: NDArray[np.int32], source_lengths: NDArray[np.int32]) -> Self:
        """The order of rows of these lengths."""
        order = np.lexsort((-source_lengths, -lengths))  # stable: equal rows are in one order in both
        source_order = np.lexsort((-lengths, -source_lengths))
        sizes, source_sizes = lengths[order], source_lengths[order]
        is_first = np.ones(len(order), dtype=np.bool_)
        is_first[1:] = (np.diff(sizes) != 0) | (np.diff(source_sizes) != 0)
        firsts = np.flatnonzero(is_first)
        counts = np.diff(firsts, append=len(order))
        starts = np.cumsum(sizes) - sizes
        source_starts = np.zeros_like(starts)  # by row of the batch
        source_starts[source_order] = np.cumsum(source_lengths[source_order]) - source_lengths[source_order]
        source_rows = np.argsort(source_order)
        pairs = tuple(
            (
                Group(int(starts[first]), int(first), int(count), int(sizes[first])),
                Group(
                    int(source_starts[order[first]]),
                    int(source_rows[order[first]]),
                    int(count),
                    int(source_sizes[first]),
                ),
            )
            for first, count in zip(firsts, counts, strict=True)
        )
        return cls(order, source_order, pairs)


@dataclass(frozen=True, slots=True)
class CrossLayer:
    """A layer of T5Gemma's decoder: self-attention, cross-attention, feed-forward."""

    layer: GatedLayer
    cross: CrossAttention
    gain: Tensors
    after: Tensors

    def decoded(self, source: Source, x: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """Stream[T, D] -> stream[T, D]."""
        norm = self.layer.norm
        x = self.layer.attended(x, layout, computation)
        x = self.cross(x, self.gain.matrix, norm, source, computation, (self.after.matrix, norm))
        return self.layer.fed(x, computation)


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """A layer of T5Gemma 2's decoder: merged attention, feed-forward."""

    layer: GatedLayer

    def decoded(self, source: Source, x: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """Stream[T, D] -> stream[T, D]."""
        return self.layer.fed(self.layer.attended(x, layout, computation, source), computation)


class EncoderDecoder:
    """Both towers, differentiable."""

    def __init__(
        self, encoder: GatedBackbone, decoder: GatedBackbone, layers: Sequence[CrossLayer | MergedLayer]
    ) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self._layers = tuple(layers)

    @property
    def table(self) -> Tensors:
        """The token embeddings of the decoder, to which a head may be tied."""
        return self.decoder.table

    def fuse(self) -> None:
        """Lay parameters that are used together side by side."""
        self.encoder.fuse()
        self.decoder.fuse()
        for layer in self._layers:
            if isinstance(layer, CrossLayer):
                lay_together(layer.cross.inputs)

    def forward(self, ids: Tensor, layout: Layout, source: Source, computation: Computation) -> Tensor:
        """int64 ids[T] of packed rows and what they attend to -> states[T, D] after the final norm."""
        layers = [partial(layer.decoded, source) for layer in self._layers]
        return self.decoder.through(layers, ids, layout, computation)


def t5gemma(config: Mapping[str, Any], tree: ParameterTree) -> EncoderDecoder:
    """T5Gemma, balanced or not."""
    towers: tuple[gated.Tower, ...] = ("encoder", "decoder")
    encoder, decoder = (
        gated.t5gemma({"model_type": "t5_gemma_module", **config[tower]}, tree, tower) for tower in towers
    )
    prefix = prefix_of(tree.weights, "decoder.layers.0.cross_attn.q_proj.weight")
    layers = []
    for index, layer in enumerate(decoder.layers):
        at = f"{prefix}decoder.layers.{index}."
        query, key, value, output = (tree.layer(f"{at}cross_attn.{part}_proj") for part in "qkvo")
        layers.append(
            CrossLayer(
                layer,
                CrossAttention(query, (key, value), output, replace(layer.attention.settings, reach=FULL)),
                gain=tree.layer(f"{at}pre_cross_attn_layernorm"),
                after=tree.layer(f"{at}post_cross_attn_layernorm"),
            )
        )
    return EncoderDecoder(encoder, decoder, layers)


def t5gemma2(config: Mapping[str, Any], tree: ParameterTree) -> EncoderDecoder:
    """T5Gemma 2; the towers share the token table unless the decoder's is stored apart and differs."""
    marker = int(config["encoder"].get("eoi_token_index", 256_000))
    encoder_config = {"model_type": "t5gemma2_text", **config["encoder"]["text_config"]}
    encoder = gated.t5gemma2(encoder_config, tree, "encoder", marker=marker)
    own = prefix_of(tree.weights, "decoder.norm.weight") + "decoder.embed_tokens.weight"
    is_shared = own not in tree or torch.equal(tree.weights.tensor(own).float(), encoder.table.matrix)
    table = encoder.table if is_shared else None
    decoder = gated.t5gemma2(config["decoder"], tree, "decoder", marker=marker, table=table)
    return EncoderDecoder(encoder, decoder, [MergedLayer(layer) for layer in decoder.layers])
