"""Gemma 3 and EmbeddingGemma (arXiv 2509.20354, section 2; `gemma3_text` in transformers).

Five sliding layers, then a full one, with rotary bases of their own; norms on both sides of attention and
feed-forward, and on queries and keys; stored gains lack 1. Of a `gemma3` folder the text part is taken.
"""

from collections.abc import Mapping
from typing import Any

from gemb.model.blocks import Backbone
from gemb.model.families import NotPacked, prefix_of
from gemb.model.families.gated import GEMMA_NORMS, Traits, gated_backbone
from gemb.model.families.rope import rotary
from gemb.model.kernels import Kernels, Rotary
from gemb.model.weights import Weights

# What transformers takes where config.json leaves it out, as the text part of `gemma3` folders does.
_DEFAULTS = {
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
}


def build(config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
    """The backbone of a Gemma 3 checkpoint."""
    config = {**_DEFAULTS, **config}
    if config.get("attn_logit_softcapping"):
        # transformers 5.23 reads the key and does nothing with it in this family.
        raise NotPacked("it caps attention scores, which Gemma 3 does not do")

    def rotary_of(layer_type: str, channels: int) -> Rotary:
        if layer_type == "sliding_attention":
            return rotary(config, channels, layer_type, theta_key="rope_local_base_freq", is_scaled=False)
        return rotary(config, channels, layer_type, default_theta=1_000_000.0)

    traits = Traits(
        norms=GEMMA_NORMS,
        gain_offset=1.0,
        scales_embeddings=True,
        norms_queries_and_keys=True,
        score_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
    )
    prefix = prefix_of(weights, "layers.0.self_attn.q_norm.weight")
    return gated_backbone(config, weights, kernels, traits, prefix=prefix, rotary_of=rotary_of)
