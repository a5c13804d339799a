"""Trainable BERT, MiniLM, RoBERTa, XLM-R, CamemBERT and DistilBERT: a norm after each sub-layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.model.attention import FULL
from gemb.model.families import NotPacked, activation_of, prefix_of
from gemb.model.layout import Layout
from gemb.model.trainable.attention import AttentionSettings
from gemb.model.trainable.blocks import Attention, Computation, FeedForward, fuse_layer, run_layers
from gemb.model.trainable.functions import embedded
from gemb.model.trainable.parameters import ParameterTree, Tensors
from gemb.model.trainable.quantised import looked_up

_BERT = {
    "layers": "encoder.layer.",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_DISTILBERT = {
    "layers": "transformer.layer.",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm": "output_layer_norm",
}
# The keys of config.json that DistilBERT calls otherwise.
_DISTILBERT_KEYS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "activation": "hidden_act",
}
_COUNTS_FROM_ZERO = frozenset({"bert", "distilbert"})


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A LayerNorm with gain and bias."""

    layer: Tensors
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return F.layer_norm(x, (x.shape[-1],), self.layer.matrix, self.layer.shift, self.epsilon)


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and feed-forward, each added to its input and normed."""

    attention: Attention
    attention_norm: LayerNorm
    feed_forward: FeedForward
    norm: LayerNorm

    def __call__(self, x: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """[T, D] -> [T, D]."""
        x = self.attention_norm(self.attention(x, None, None, layout, computation))
        return self.norm(self.feed_forward(x, None, None, computation))


class BertBackbone:
    """Word, position and type embeddings, then the layers, differentiable."""

    def __init__(
        self,
        *,
        table: Tensors,
        positions: Tensors,
        types: Tensors | None,
        first_position: int,
        padding: int | None,
        norm: LayerNorm,
        layers: Sequence[Layer],
    ) -> None:
        self.table = table
        self.width = table.matrix.shape[1]
        self.positions = positions
        self.types = types
        self.first_position = first_position
        self.padding = padding
        self.norm = norm
        self.layers = tuple(layers)

    def fuse(self) -> None:
        """Lay queries, keys and values together."""
        for layer in self.layers:
            fuse_layer(layer.attention, layer.feed_forward)

    def forward(self, ids: Tensor, layout: Layout, computation: Computation) -> Tensor:
        """int64 ids[T] of packed texts -> states[T, D]."""
        x = looked_up(self.table, ids, is_sparse=computation.sparse_table)
        x = x + embedded(self.positions.matrix, self._positions_of(ids, layout), is_sparse=False)
        if self.types is not None:
            x = x + self.types.matrix[0]  # texts stand alone: all tokens are of the first type
        return run_layers(self.layers, computation.drop(self.norm(x)), layout, computation)

    def _positions_of(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64[T], the row of each token in the table of positions."""
        if self.padding is None or not (is_padding := ids == self.padding).any():
            return layout.positions + self.first_position
        # A text that spells `<pad>` out: RoBERTa gives that token no position and does not count it.
        before = is_padding.cumsum(0) - is_padding.long()
        first_of_text = torch.arange(len(ids), device=ids.device) - layout.positions
        positions = layout.positions + self.first_position - (before - before[first_of_text])
        return positions.masked_fill(is_padding, self.padding)


def bert(config: Mapping[str, Any], tree: ParameterTree) -> BertBackbone:
    """The backbone of BERT and its kin."""
    config = {_DISTILBERT_KEYS.get(key, key): value for key, value in config.items()}
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise NotPacked(f"its positions are {config['position_embedding_type']!r}, not absolute")
    if config.get("is_decoder"):
        raise NotPacked("it is set up as a decoder")
    names = _DISTILBERT if config["model_type"] == "distilbert" else _BERT
    heads = int(config.get("num_attention_heads", 12))
    prefix = prefix_of(tree.weights, "embeddings.word_embeddings.weight")
    epsilon = float(config.get("layer_norm_eps", 1e-12))

    def norm(name: str) -> LayerNorm:
        # Checkpoints of 2018 call gain and bias gamma and beta.
        old = f"{name}.gamma" in tree
        return LayerNorm(tree.layer(name, ("gamma", "beta") if old else ("weight", "bias")), epsilon)

    layers = []
    for index in range(int(config["num_hidden_layers"])):
        parts = {name: f"{prefix}{names['layers']}{index}.{part}" for name, part in names.items()}
        query, key, value = (tree.layer(parts[name]) for name in ("query", "key", "value"))
        channels = len(query.matrix) // heads
        settings = AttentionSettings(heads, heads, channels, channels**-0.5, FULL)
        layers.append(
            Layer(
                Attention((query, key, value), tree.layer(parts["output"]), settings),
                norm(parts["attention_norm"]),
                FeedForward(
                    (tree.layer(parts["up"]),),
                    tree.layer(parts["down"]),
                    activation_of(config.get("hidden_act", "gelu")),
                    is_gated=False,
                ),
                norm(parts["norm"]),
            )
        )

    embeddings = f"{prefix}embeddings."
    types = f"{embeddings}token_type_embeddings"
    # RoBERTa and its kin count from the padding id + 1.
    counts_from_zero = config["model_type"] in _COUNTS_FROM_ZERO
    padding = None if counts_from_zero else int(config.get("pad_token_id", 1))
    return BertBackbone(
        table=tree.layer(f"{embeddings}word_embeddings"),
        positions=tree.layer(f"{embeddings}position_embeddings"),
        types=tree.layer(types) if f"{types}.weight" in tree else None,
        first_position=0 if padding is None else padding + 1,
        padding=padding,
        norm=norm(f"{embeddings}LayerNorm"),
        layers=layers,
    )
