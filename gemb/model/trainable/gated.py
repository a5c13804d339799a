"""Trainable Gemma 2 and 3, the towers of T5Gemma 1 and 2, Qwen, Llama, Mistral, EuroBERT and ModernBERT.

The rules of each family are those of its file in `gemb.model.families`; what is different here is that gains
stay apart from the weights that follow them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from gemb.model.families import NotPacked, activation_of, prefix_of
from gemb.model.families.gated import GEMMA_NORMS, Norms, Traits, layer_reaches, layer_type
from gemb.model.families.rope import rotary
from gemb.model.kernels import Rotary
from gemb.model.layout import Layout
from gemb.model.trainable.attention import AttentionSettings
from gemb.model.trainable.blocks import (
    Attention,
    Computation,
    FeedForward,
    GatedLayer,
    RunLayer,
    fuse_layer,
    run_layers,
)
from gemb.model.trainable.functions import Norm, norm_rows
from gemb.model.trainable.parameters import ParameterTree, Tensors
from gemb.model.trainable.quantised import looked_up

RotaryOf = Callable[[str, int], Rotary]
"""Rotary positions by layer type and channels of a head."""
Tower = Literal["encoder", "decoder"]
"""Of an encoder-decoder, as its tensors are called."""

# What transformers takes where config.json leaves it out.
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
_T5GEMMA_NORMS = replace(
    GEMMA_NORMS, before_attention="pre_self_attn_layernorm", after_attention="post_self_attn_layernorm"
)


class GatedBackbone:
    """Token embeddings, layers and the final norm, differentiable."""

    def __init__(
        self,
        *,
        table: Tensors,
        embedding_scale: float,
        embedding_gain: Tensors | None = None,
        layers: Sequence[GatedLayer],
        final_gain: Tensors,
        norm: Norm,
        marker: int | None = None,
    ) -> None:
        self.table = table
        self.width = table.matrix.shape[1]
        self.embedding_scale = embedding_scale
        self.embedding_gain = embedding_gain
        self.layers = tuple(layers)
        self.final_gain = final_gain
        self.norm = norm
        self.marker = marker
        """The token that has a vector of its own, the `shift` of the table (T5Gemma 2's end of an image)."""

    def fuse(self) -> None:
        """Lay queries, keys and values together, and gate and up."""
        for layer in self.layers:
            fuse_layer(layer.attention, layer.feed_forward)

    def forward(self, ids: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """int64 ids[T] of packed texts -> states[T, D] after the final norm."""
        return self.through(self.layers, ids, layout, computation)

    def through(
        self, layers: Sequence[RunLayer], ids: Tensor, layout: Layout, computation: Computation
    ) -> Tensor:
        """The same through other layers."""
        x = run_layers(layers, computation.drop(self._entered(ids, computation)), layout, computation)
        return self._normed(x, self.final_gain)

    def _entered(self, ids: Tensor, computation: Computation) -> Tensor:
        """The embeddings of the tokens, [T, D]."""
        x = looked_up(self.table, ids, self.embedding_scale, is_sparse=computation.sparse_table)
        if self.embedding_gain is not None:
            x = self._normed(x, self.embedding_gain)
        if self.marker is None or not (is_marker := ids == self.marker).any():
            return x
        own = self.table.shift
        return x if own is None else torch.where(is_marker[:, None], own, x)

    def _normed(self, x: Tensor, gain: Tensors) -> Tensor:
        return norm_rows(x, gain.matrix, self.norm)


def gemma3(config: Mapping[str, Any], tree: ParameterTree) -> GatedBackbone:
    """Gemma 3 and EmbeddingGemma."""
    prefix = prefix_of(tree.weights, "layers.0.self_attn.q_norm.weight")
    return _gemma3(config, tree, prefix, GEMMA_NORMS)


def _gemma3(
    config: Mapping[str, Any],
    tree: ParameterTree,
    prefix: str,
    norms: Norms,
    table: Tensors | None = None,
    marker: int | None = None,
) -> GatedBackbone:
    given = {**_GEMMA_DEFAULTS, **config}

    def rotary_of(kind: str, channels: int) -> Rotary:
        if kind == "sliding_attention":
            return rotary(given, channels, kind, theta_key="rope_local_base_freq", is_scaled=False)
        return rotary(given, channels, kind, default_theta=1_000_000.0)

    traits = Traits(
        norms=norms,
        gain_offset=1.0,
        scales_embeddings=True,
        norms_queries_and_keys=True,
        score_scale=float(given["query_pre_attn_scalar"]) ** -0.5,
    )
    return gated(given, tree, traits, prefix=prefix, rotary_of=rotary_of, table=table, marker=marker)


def t5gemma2(
    config: Mapping[str, Any],
    tree: ParameterTree,
    tower: Tower,
    *,
    marker: int,
    table: Tensors | None = None,
) -> GatedBackbone:
    """A tower of T5Gemma 2 by its own part of config.json; without a `table` that of its tensors.

    `marker` is the token with a vector of its own beside the table.
    """
    prefix = prefix_of(tree.weights, f"{tower}.layers.0.self_attn.q_norm.weight") + f"{tower}."
    if tower == "decoder":
        config = {**config, "model_type": "gemma3_text", "is_causal": True}  # sees what Gemma 3 sees
    if table is None:
        table = tree.layer(f"{prefix}embed_tokens", ("weight", "eoi_embedding"))
    return _gemma3(config, tree, prefix, _T5GEMMA_NORMS, table, marker)


def gemma2(config: Mapping[str, Any], tree: ParameterTree) -> GatedBackbone:
    """Gemma 2, or the encoder of T5Gemma."""
    if config["model_type"] != "gemma2":
        return t5gemma(config, tree, "encoder")
    prefix = prefix_of(tree.weights, "layers.0.self_attn.q_proj.weight")
    return _gemma2(config, tree, prefix, GEMMA_NORMS)


def t5gemma(config: Mapping[str, Any], tree: ParameterTree, tower: Tower) -> GatedBackbone:
    """A tower of T5Gemma by its own part of config.json; the cross-attention of a decoder is left out."""
    prefix = prefix_of(tree.weights, f"{tower}.layers.0.self_attn.q_proj.weight") + f"{tower}."
    if tower == "decoder":
        config = {**config, "model_type": "gemma2", "is_causal": True}  # sees what Gemma 2 sees
    return _gemma2(config, tree, prefix, _T5GEMMA_NORMS)


def _gemma2(config: Mapping[str, Any], tree: ParameterTree, prefix: str, norms: Norms) -> GatedBackbone:
    given = {**_GEMMA_DEFAULTS, **config}
    softcap = given["attn_logit_softcapping"]
    traits = Traits(
        norms=norms,
        gain_offset=1.0,
        scales_embeddings=True,
        score_scale=float(given["query_pre_attn_scalar"]) ** -0.5,
        softcap=None if softcap is None else float(softcap),
    )
    return gated(given, tree, traits, prefix=prefix, rotary_of=lambda _, channels: rotary(given, channels))


def llama(config: Mapping[str, Any], tree: ParameterTree) -> GatedBackbone:
    """Llama, Mistral, EuroBERT, Qwen 2 or Qwen 3."""
    return gated(
        {"hidden_act": "silu", **config},
        tree,
        Traits(norms_queries_and_keys=config["model_type"] == "qwen3"),
        prefix=prefix_of(tree.weights, "layers.0.self_attn.q_proj.weight"),
        rotary_of=lambda _, channels: rotary(config, channels),
    )


def gated(
    config: Mapping[str, Any],
    tree: ParameterTree,
    traits: Traits,
    *,
    prefix: str,
    rotary_of: RotaryOf,
    table: Tensors | None = None,
    marker: int | None = None,
) -> GatedBackbone:
    """The backbone of a gated transformer whose tensors are called `prefix` and the usual names."""
    norm = Norm(float(config.get("rms_norm_eps", 1e-6)), traits.gain_offset)
    heads = int(config["num_attention_heads"])
    activation = activation_of(config.get("hidden_activation") or config.get("hidden_act"))
    rotaries: dict[tuple[str, int], Rotary] = {}
    names = traits.norms

    def gain(name: str | None, at: str) -> Tensors | None:
        return None if name is None else tree.layer(f"{at}{name}")

    layers = []
    for index, reach in enumerate(layer_reaches(config)):
        at = f"{prefix}layers.{index}."
        query, key, value, output = (tree.layer(f"{at}self_attn.{part}_proj") for part in "qkvo")
        gate, up, down = (tree.layer(f"{at}mlp.{part}_proj") for part in ("gate", "up", "down"))
        channels = len(query.matrix) // heads
        kind = (layer_type(reach), channels)
        if kind not in rotaries:
            rotaries[kind] = rotary_of(*kind)
        settings = AttentionSettings(
            heads=heads,
            shared=len(key.matrix) // channels,
            channels=channels,
            scale=channels**-0.5 if traits.score_scale is None else traits.score_scale,
            reach=reach,
            softcap=traits.softcap,
            norm=norm if traits.norms_queries_and_keys else None,
        )
        has_gains = traits.norms_queries_and_keys
        attention = Attention(
            (query, key, value),
            output,
            settings,
            rotaries[kind],
            tree.layer(f"{at}self_attn.q_norm") if has_gains else None,
            tree.layer(f"{at}self_attn.k_norm") if has_gains else None,
        )
        layers.append(
            GatedLayer(
                attention,
                FeedForward((gate, up), down, activation),
                norm,
                attention_gain=tree.layer(f"{at}{names.before_attention}"),
                feed_forward_gain=tree.layer(f"{at}{names.before_feed_forward}"),
                after_attention=gain(names.after_attention, at),
                after_feed_forward=gain(names.after_feed_forward, at),
            )
        )
    table = tree.layer(f"{prefix}embed_tokens") if table is None else table
    return GatedBackbone(
        table=table,
        embedding_scale=table.matrix.shape[1] ** 0.5 if traits.scales_embeddings else 1.0,
        layers=layers,
        final_gain=tree.layer(f"{prefix}norm"),
        norm=norm,
        marker=marker,
    )


def modernbert(config: Mapping[str, Any], tree: ParameterTree) -> GatedBackbone:
    """ModernBERT: layer norms without bias; queries, keys and values in one matrix, and gate and up."""
    prefix = prefix_of(tree.weights, "embeddings.tok_embeddings.weight")
    if f"{prefix}final_norm.bias" in tree:
        raise NotPacked("its norms have biases")
    norm = Norm(float(config.get("norm_eps", 1e-5)), is_centred=True)
    heads = int(config.get("num_attention_heads", 12))
    channels = int(config["hidden_size"]) // heads
    rotaries = {
        "sliding_attention": rotary(config, channels, "sliding_attention", theta_key="local_rope_theta"),
        "full_attention": rotary(
            config, channels, "full_attention", theta_key="global_rope_theta", default_theta=160_000.0
        ),
    }
    layers = []
    for index, reach in enumerate(layer_reaches(config)):
        at = f"{prefix}layers.{index}."
        settings = AttentionSettings(heads, heads, channels, channels**-0.5, reach)
        has_norm = f"{at}attn_norm.weight" in tree  # not in the first layer
        layers.append(
            GatedLayer(
                Attention(
                    (tree.layer(f"{at}attn.Wqkv"),),
                    tree.layer(f"{at}attn.Wo"),
                    settings,
                    rotaries[layer_type(reach)],
                ),
                FeedForward(
                    (tree.layer(f"{at}mlp.Wi"),),
                    tree.layer(f"{at}mlp.Wo"),
                    activation_of(config.get("hidden_activation", "gelu")),
                ),
                norm,
                attention_gain=tree.layer(f"{at}attn_norm") if has_norm else None,
                feed_forward_gain=tree.layer(f"{at}mlp_norm"),
            )
        )
    return GatedBackbone(
        table=tree.layer(f"{prefix}embeddings.tok_embeddings"),
        embedding_scale=1.0,
        embedding_gain=tree.layer(f"{prefix}embeddings.norm"),
        layers=layers,
        final_gain=tree.layer(f"{prefix}final_norm"),
        norm=norm,
    )
