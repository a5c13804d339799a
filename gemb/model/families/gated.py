"""What all gated transformers have in common: a family file says only where it differs from Llama.

Tensor names are those of transformers; sizes are taken from the tensors, so that a config.json that leaves
a key out cannot mislead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemb.model.attention import Reach, reach_of_layers
from gemb.model.blocks import (
    Attention,
    AttentionShape,
    GatedBackbone,
    GatedFeedForward,
    Layer,
    LayerExtra,
    Projection,
)
from gemb.model.families import NotPacked, activation_of
from gemb.model.kernels import Kernels, Rotary
from gemb.model.weights import Weights

RotaryOf = Callable[[str, int], Rotary]
"""Rotary positions by layer type (full_attention, sliding_attention) and channels of a head."""


@dataclass(frozen=True)
class Norms:
    """The names of the norms of a layer; None where there is none."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_feed_forward: str = "post_attention_layernorm"
    after_feed_forward: str | None = None


GEMMA_NORMS = Norms(
    after_attention="post_attention_layernorm",
    before_feed_forward="pre_feedforward_layernorm",
    after_feed_forward="post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Traits:
    """What a family does its own way; the defaults are Llama's."""

    norms: Norms = Norms()
    gain_offset: float = 0.0
    """Added to the weights of every norm; Gemma stores gain - 1."""
    scales_embeddings: bool = False
    """Whether token embeddings are multiplied by the root of their width."""
    norms_queries_and_keys: bool = False
    norms_values: bool = False
    score_scale: float | None = None
    """Multiplies attention scores; None is one over the root of the channels."""
    softcap: float | None = None


def layer_reaches(config: Mapping[str, Any]) -> tuple[Reach, ...]:
    """What the tokens of each layer see. Raises NotPacked if config.json does not tell."""
    reaches = reach_of_layers(config)
    if not reaches:
        raise NotPacked("config.json does not tell what its layers attend to")
    return reaches


def layer_type(reach: Reach) -> str:
    """The name that config.json has for layers of this reach."""
    return "full_attention" if reach.left is None else "sliding_attention"


def attention_shape(
    reach: Reach, *, heads: int, shared: int, channels: int, rotary: Rotary, traits: Traits
) -> AttentionShape:
    """The form of a layer's attention."""
    return AttentionShape(
        heads=heads,
        shared=shared,
        channels=channels,
        scale=channels**-0.5 if traits.score_scale is None else traits.score_scale,
        rotary=rotary,
        reach=reach,
        softcap=traits.softcap,
    )


def projection_of(weights: Weights, name: str) -> Projection:
    """The linear layer `name` of a checkpoint, with its bias if it has one."""
    bias = f"{name}.bias"
    return Projection(weights.tensor(f"{name}.weight"), weights.tensor(bias) if bias in weights else None)


def gated_backbone(
    config: Mapping[str, Any],
    weights: Weights,
    kernels: Kernels,
    traits: Traits,
    *,
    prefix: str,
    rotary_of: RotaryOf,
    extra_of: Callable[[int], LayerExtra] | None = None,
    projection: Projection | None = None,
) -> GatedBackbone:
    """The backbone of a gated transformer whose tensors are called `prefix` and the usual names.

    `extra_of` gives what the family adds to the end of layer i.
    Raises NotPacked for what cannot be packed, MismatchError for a tensor that is missing.
    """
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    heads = int(config["num_attention_heads"])
    activation = activation_of(config.get("hidden_activation") or config.get("hidden_act"))
    rotaries: dict[tuple[str, int], Rotary] = {}

    def gain(name: str) -> Tensor:
        return weights.tensor(f"{name}.weight").float() + traits.gain_offset

    def gain_after(name: str | None, at: str) -> Tensor | None:
        return None if name is None else kernels.vector(gain(f"{at}{name}"))

    layers = []
    for index, reach in enumerate(layer_reaches(config)):
        at = f"{prefix}layers.{index}."
        query, key, value, output = (projection_of(weights, f"{at}self_attn.{part}_proj") for part in "qkvo")
        channels = len(query.weight) // heads
        kind = (layer_type(reach), channels)
        if kind not in rotaries:
            rotaries[kind] = rotary_of(*kind)
        attention = Attention(
            kernels,
            attention_shape(
                reach,
                heads=heads,
                shared=len(key.weight) // channels,
                channels=channels,
                rotary=rotaries[kind],
                traits=traits,
            ),
            query=query,
            key=key,
            value=value,
            output=output,
            input_gain=gain(f"{at}{traits.norms.before_attention}"),
            query_gain=gain(f"{at}self_attn.q_norm") if traits.norms_queries_and_keys else None,
            key_gain=gain(f"{at}self_attn.k_norm") if traits.norms_queries_and_keys else None,
            norms_values=traits.norms_values,
            epsilon=epsilon,
        )
        gate, up, down = (projection_of(weights, f"{at}mlp.{part}_proj") for part in ("gate", "up", "down"))
        feed_forward = GatedFeedForward(
            kernels,
            activation,
            gate=gate,
            up=up,
            down=down,
            input_gain=gain(f"{at}{traits.norms.before_feed_forward}"),
        )
        layers.append(
            Layer(
                attention,
                feed_forward,
                attention_gain=gain_after(traits.norms.after_attention, at),
                feed_forward_gain=gain_after(traits.norms.after_feed_forward, at),
                extra=None if extra_of is None else extra_of(index),
            )
        )
    table = weights.table(f"{prefix}embed_tokens.weight")
    return GatedBackbone(
        kernels,
        table=table,
        embedding_scale=table.width**0.5 if traits.scales_embeddings else 1.0,
        layers=layers,
        final_gain=gain(f"{prefix}norm"),
        epsilon=epsilon,
        projection=projection,
    )
