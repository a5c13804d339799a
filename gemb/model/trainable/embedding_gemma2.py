"""Trainable EmbeddingGemma 2, its text part: see gemb.model.families.embedding_gemma2 for what is its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gemb.model.families import activation_of, prefix_of
from gemb.model.families.embedding_gemma2 import DEFAULTS, TRAITS
from gemb.model.families.rope import rotary
from gemb.model.kernels import Rotary, activation
from gemb.model.layout import Layout
from gemb.model.trainable.blocks import Computation, GatedLayer, run_layers
from gemb.model.trainable.functions import Norm, norm_rows
from gemb.model.trainable.gated import GatedBackbone, gated
from gemb.model.trainable.parameters import ParameterTree, Tensors


@dataclass(frozen=True, slots=True)
class PerLayerLayer:
    """A gated layer, then the bottleneck that the token embeddings gate, all times a scalar."""

    layer: GatedLayer
    index: int
    signal: Tensors
    """[layers * S, D], the projections of the embeddings of all layers below each other."""
    signal_gain: Tensors
    gate: Tensors
    output: Tensors
    output_gain: Tensors
    scalar: float
    activation: str

    def __call__(self, embedded: Tensor, x: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """The stream x[T, D] after the layer; embedded[T, D] are the token embeddings."""
        x, dtype, norm = self.layer(x, layout, computation), computation.of(x), self.layer.norm
        width = len(self.signal_gain.matrix)
        weight = self.signal.matrix[self.index * width : (self.index + 1) * width]
        raw = F.linear(embedded.to(dtype), weight.to(dtype)).to(x.dtype) * embedded.shape[1] ** -0.5
        signal = norm_rows(raw, self.signal_gain.matrix, norm).to(dtype)
        gated = activation(self.activation)(F.linear(x.to(dtype), self.gate.matrix.to(dtype))) * signal
        back = F.linear(gated, self.output.matrix.to(dtype)).to(x.dtype)
        back = computation.drop(norm_rows(back, self.output_gain.matrix, norm))
        return (x + back) * self.scalar


class PerLayerBackbone(GatedBackbone):
    """Gated layers with per-layer embeddings, and a projection of the states to the width of the vectors."""

    def __init__(self, base: GatedBackbone, layers: list[PerLayerLayer], projection: Tensors) -> None:
        super().__init__(
            table=base.table,
            embedding_scale=base.embedding_scale,
            layers=base.layers,
            final_gain=base.final_gain,
            norm=base.norm,
        )
        self.width = len(projection.matrix)
        self._per_layer = layers
        self._projection = projection

    def forward(self, ids: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """int64 ids[T] of packed texts -> states[T, E] after the final norm and the projection."""
        embedded = self._entered(ids, computation)
        layers = [partial(layer, embedded) for layer in self._per_layer]
        x = self._normed(run_layers(layers, computation.drop(embedded), layout, computation), self.final_gain)
        dtype, projection = computation.of(x), self._projection
        shift = None if projection.shift is None else projection.shift.to(dtype)
        return F.linear(x.to(dtype), projection.matrix.to(dtype), shift).to(x.dtype)


def embedding_gemma2(config: Mapping[str, Any], tree: ParameterTree) -> PerLayerBackbone:
    """The text backbone of an EmbeddingGemma 2 checkpoint."""
    given = {**DEFAULTS, **config}
    prefix = prefix_of(tree.weights, "ple.per_layer_model_projection.weight")

    def rotary_of(kind: str, channels: int) -> Rotary:
        theta = 10_000.0 if kind == "sliding_attention" else 1_000_000.0
        return rotary(given, channels, kind, default_theta=theta)

    base = gated(given, tree, TRAITS, prefix=prefix, rotary_of=rotary_of)
    values = Norm(float(given.get("rms_norm_eps", 1e-6)))
    base.layers = tuple(
        replace(layer, attention=replace(layer.attention, value_norm=values)) for layer in base.layers
    )
    signal = tree.layer(f"{prefix}ple.per_layer_model_projection")
    signal_gain = tree.layer(f"{prefix}ple.per_layer_projection_norm")
    layers = [
        PerLayerLayer(
            layer,
            index,
            signal,
            signal_gain,
            gate=tree.layer(f"{prefix}layers.{index}.ple_block.per_layer_input_gate"),
            output=tree.layer(f"{prefix}layers.{index}.ple_block.per_layer_projection"),
            output_gain=tree.layer(f"{prefix}layers.{index}.ple_block.post_per_layer_input_norm"),
            scalar=float(tree.weights.tensor(f"{prefix}layers.{index}.layer_scalar")),
            activation=activation_of(given["hidden_activation"]),
        )
        for index, layer in enumerate(base.layers)
    ]
    return PerLayerBackbone(base, layers, tree.layer(f"{prefix}embedding_projection"))
