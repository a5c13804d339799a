"""ModernBERT (arXiv 2412.13663): gated feed-forward, layer norms without bias before each sub-layer.

Every third layer is full, the others slide; each kind has a rotary base of its own. The first layer's
attention takes the normed embeddings as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gemb.model.blocks import Attention, Backbone, GatedFeedForward, Layer, Projection, run_layer
from gemb.model.families import NotPacked, activation_of, prefix_of
from gemb.model.families.gated import (
    Traits,
    attention_shape,
    layer_reaches,
    layer_type,
    projection_of,
)
from gemb.model.families.rope import rotary
from gemb.model.kernels import Kernels, Linear, Rotary
from gemb.model.layout import Layout
from gemb.model.table import Table
from gemb.model.weights import Weights

_KINDS = ("full_attention", "sliding_attention")


class ModernBertBackbone:
    """Normed token embeddings, the layers on an fp32 stream, and the final norm."""

    projection: Linear | None = None

    def __init__(
        self,
        kernels: Kernels,
        *,
        table: Table,
        embedding_gain: Tensor,
        layers: Sequence[Layer],
        norms_first: bool,
        final_gain: Tensor,
        epsilon: float,
    ) -> None:
        self._table = table.on(kernels.device, kernels.dtype)
        self._embedding_gain = kernels.vector(embedding_gain)
        self._layers = tuple(layers)
        self._final_gain = kernels.vector(final_gain)
        self._epsilon = epsilon
        self._kernels = kernels
        self._norms_first = norms_first
        self.width = table.width

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64 ids[filled] of packed texts -> fp32 states[filled, D] after the final norm."""
        stream = self._norm(self._table.rows(ids), self._embedding_gain)
        for number, layer in enumerate(self._layers):
            run_layer(
                layer,
                stream,
                layout,
                self._kernels,
                norm=self._norm,
                input_norm=self._norm if number or self._norms_first else None,
                epsilon=self._epsilon,
            )
        return self._norm(stream, self._final_gain)

    def _norm(self, stream: Tensor, gain: Tensor | None = None) -> Tensor:
        """LayerNorm in fp32; the gains before linear layers are in their weights."""
        return F.layer_norm(stream, (self.width,), gain, None, self._epsilon)


def build(config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
    """The backbone of a ModernBERT checkpoint."""
    prefix = prefix_of(weights, "embeddings.tok_embeddings.weight")
    if f"{prefix}final_norm.bias" in weights:
        raise NotPacked("its norms have biases")
    heads = int(config.get("num_attention_heads", 12))
    activation = activation_of(config.get("hidden_activation", "gelu"))

    def gain(name: str) -> Tensor:
        return weights.tensor(f"{prefix}{name}.weight").float()

    rotaries = {kind: _rotary(config, kind, int(config["hidden_size"]) // heads) for kind in _KINDS}
    layers = []
    for index, reach in enumerate(layer_reaches(config)):
        at = f"layers.{index}."
        query, key, value = _parts(projection_of(weights, f"{prefix}{at}attn.Wqkv"), 3)
        gate, up = _parts(projection_of(weights, f"{prefix}{at}mlp.Wi"), 2)
        norms_input = f"{prefix}{at}attn_norm.weight" in weights  # not in the first layer
        attention = Attention(
            kernels,
            attention_shape(
                reach,
                heads=heads,
                shared=heads,
                channels=len(query.weight) // heads,
                rotary=rotaries[layer_type(reach)],
                traits=Traits(),
            ),
            query=query,
            key=key,
            value=value,
            output=projection_of(weights, f"{prefix}{at}attn.Wo"),
            input_gain=gain(f"{at}attn_norm") if norms_input else None,
        )
        feed_forward = GatedFeedForward(
            kernels,
            activation,
            gate=gate,
            up=up,
            down=projection_of(weights, f"{prefix}{at}mlp.Wo"),
            input_gain=gain(f"{at}mlp_norm"),
        )
        layers.append(Layer(attention, feed_forward))
    return ModernBertBackbone(
        kernels,
        table=weights.table(f"{prefix}embeddings.tok_embeddings.weight"),
        embedding_gain=gain("embeddings.norm"),
        layers=layers,
        norms_first=f"{prefix}layers.0.attn_norm.weight" in weights,
        final_gain=gain("final_norm"),
        epsilon=float(config.get("norm_eps", 1e-5)),
    )


def _rotary(config: Mapping[str, Any], kind: str, channels: int) -> Rotary:
    """The rotary positions of the layers of one kind."""
    if kind == "sliding_attention":
        return rotary(config, channels, kind, theta_key="local_rope_theta")
    return rotary(config, channels, kind, theta_key="global_rope_theta", default_theta=160_000.0)


def _parts(fused: Projection, count: int) -> list[Projection]:
    """A projection whose outputs are `count` equal parts, one after another, as its parts."""
    biases = [None] * count if fused.bias is None else fused.bias.chunk(count)
    return [Projection(*part) for part in zip(fused.weight.chunk(count), biases, strict=True)]
