"""Gemma 2, and the encoder of T5Gemma (arXiv 2504.06225), which has its layer.

Every other layer slides; scores are capped by tanh; norms on both sides of attention and feed-forward;
stored gains lack 1. Gemma 2 is causal unless config.json says `is_causal: false`; T5Gemma's encoder never is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemb.model.blocks import Backbone
from gemb.model.families import prefix_of
from gemb.model.families.gated import GEMMA_NORMS, Traits, gated_backbone
from gemb.model.families.rope import rotary
from gemb.model.kernels import Kernels
from gemb.model.weights import Weights

# What transformers takes where config.json leaves it out.
_DEFAULTS = {
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
_T5GEMMA_NORMS = replace(
    GEMMA_NORMS, before_attention="pre_self_attn_layernorm", after_attention="post_self_attn_layernorm"
)


def build(config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
    """The backbone of a Gemma 2 checkpoint, or the encoder of a T5Gemma one, whole or encoder alone."""
    config = {**_DEFAULTS, **config}
    softcap = config["attn_logit_softcapping"]
    traits = Traits(
        norms=GEMMA_NORMS,
        gain_offset=1.0,
        scales_embeddings=True,
        score_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
        softcap=None if softcap is None else float(softcap),
    )
    if config["model_type"] == "gemma2":
        prefix = prefix_of(weights, "layers.0.self_attn.q_proj.weight")
    else:
        traits = replace(traits, norms=_T5GEMMA_NORMS)
        prefix = prefix_of(weights, "encoder.layers.0.self_attn.q_proj.weight") + "encoder."
    return gated_backbone(
        config,
        weights,
        kernels,
        traits,
        prefix=prefix,
        rotary_of=lambda _, channels: rotary(config, channels),
    )
