"""Llama, Mistral, EuroBERT, Qwen 2 and Qwen 3: the plain gated layer.

Qwen 2 has biases on queries, keys and values, Qwen 3 norms on queries and keys. EuroBERT is Llama made
bidirectional; the others are causal unless config.json says `is_causal: false`.
"""

from collections.abc import Mapping
from typing import Any

from gemb.model.blocks import Backbone
from gemb.model.families import prefix_of
from gemb.model.families.gated import Traits, gated_backbone
from gemb.model.families.rope import rotary
from gemb.model.kernels import Kernels
from gemb.model.weights import Weights


def build(config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
    """The backbone of a Llama, Mistral, EuroBERT, Qwen 2 or Qwen 3 checkpoint."""
    return gated_backbone(
        {"hidden_act": "silu", **config},
        weights,
        kernels,
        Traits(norms_queries_and_keys=config["model_type"] == "qwen3"),
        prefix=prefix_of(weights, "layers.0.self_attn.q_proj.weight"),
        rotary_of=lambda _, channels: rotary(config, channels),
    )
