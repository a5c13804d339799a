"""BERT, MiniLM, RoBERTa, XLM-R, CamemBERT and DistilBERT: learned positions, a norm after each sub-layer.

The stream is normed anew after each sub-layer, so it is kept in the dtype of the kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.model.blocks import Backbone, Projection, stacked
from gemb.model.families import NotPacked, activation_of, prefix_of
from gemb.model.families.gated import projection_of
from gemb.model.kernels import Kernels, Linear
from gemb.model.layout import Layout
from gemb.model.packed_attention import attend
from gemb.model.table import Table
from gemb.model.weights import Weights


@dataclass(frozen=True)
class _Names:
    """The names of a layer's parts; a family has them before `layers` and the number of the layer."""

    layers: str = "encoder.layer."
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"


_DISTILBERT = _Names(
    layers="transformer.layer.",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm="output_layer_norm",
)
# The keys of config.json that DistilBERT calls otherwise.
_DISTILBERT_KEYS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "activation": "hidden_act",
}
_COUNTS_FROM_ZERO = frozenset({"bert", "distilbert"})

Norm = Callable[[Tensor], Tensor]


class _Layer:
    """Attention and feed-forward of one layer."""

    def __init__(
        self, heads: int, activation: str, parts: Mapping[str, Linear], norms: tuple[Norm, Norm]
    ) -> None:
        self._heads = heads
        self._activation = activation
        self._parts = parts
        self._norms = norms

    def __call__(self, x: Tensor, layout: Layout, pieces: Sequence[slice]) -> Tensor:
        """x[T, D] -> [T, D]; what follows the mixing of tokens goes piece by piece over the rows."""
        inputs = torch.unflatten(self._parts["inputs"](x), -1, (3, self._heads, -1))  # [T, 3, H, C]
        query, key, value = inputs.unbind(1)
        mixed = attend(query, key, value, layout)
        rest = [self._rest(mixed[piece], x[piece]) for piece in pieces]
        return rest[0] if len(rest) == 1 else torch.cat(rest)

    def _rest(self, mixed: Tensor, x: Tensor) -> Tensor:
        x = self._norms[0](self._parts["output"].plus(mixed, x))
        wide = self._parts["up"].activated(x, self._activation)
        return self._norms[1](self._parts["down"].plus(wide, x))


class BertBackbone:
    """Word, position and type embeddings, then the layers."""

    projection: Linear | None = None

    def __init__(
        self,
        kernels: Kernels,
        *,
        table: Table,
        positions: Tensor,
        first_position: int,
        padding: int | None,
        norm: Norm,
        layers: Sequence[_Layer],
    ) -> None:
        self._table = table.on(kernels.device)
        self._positions = positions.to(kernels.device)  # with the type embedding of a single text added
        self._first_position = first_position
        self._padding = padding
        self._norm = norm
        self._layers = tuple(layers)
        self._kernels = kernels
        self.width = table.width

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64 ids[filled] of packed texts -> fp32 states[filled, D]."""
        words = self._table.rows(ids)
        x = self._norm((words + self._positions[self._positions_of(ids, layout)]).to(self._kernels.dtype))
        pieces = self._kernels.pieces(len(x))
        for layer in self._layers:
            x = layer(x, layout, pieces)
        return x.float()

    def _positions_of(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64[filled], the row of each token in the table of positions."""
        if self._padding is None or not (is_padding := ids == self._padding).any():
            return layout.positions + self._first_position
        # A text that spells `<pad>` out: RoBERTa gives that token no position and does not count it.
        before = is_padding.cumsum(0) - is_padding.long()
        first_of_text = torch.arange(len(ids), device=ids.device) - layout.positions
        positions = layout.positions + self._first_position - (before - before[first_of_text])
        return positions.masked_fill(is_padding, self._padding)


def build(config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
    """The backbone of a checkpoint of BERT and its kin."""
    config = {_DISTILBERT_KEYS.get(key, key): value for key, value in config.items()}
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise NotPacked(f"its positions are {config['position_embedding_type']!r}, not absolute")
    if config.get("is_decoder"):
        raise NotPacked("it is set up as a decoder")
    names = _DISTILBERT if config["model_type"] == "distilbert" else _Names()
    activation = activation_of(config.get("hidden_act", "gelu"))
    heads = int(config.get("num_attention_heads", 12))
    prefix = prefix_of(weights, "embeddings.word_embeddings.weight")
    epsilon = float(config.get("layer_norm_eps", 1e-12))

    def linear(part: Projection) -> Linear:
        return kernels.linear(part.weight, part.bias)

    def norm(name: str) -> Norm:
        return _norm(kernels, weights, name, epsilon)

    layers = []
    for index in range(int(config["num_hidden_layers"])):
        at = f"{prefix}{names.layers}{index}."
        query, key, value = (
            projection_of(weights, at + name) for name in (names.query, names.key, names.value)
        )
        channels = len(query.weight) // heads
        parts = {
            "inputs": linear(stacked([query.times(channels**-0.5), key, value])),
            "output": linear(projection_of(weights, at + names.output)),
            "up": linear(projection_of(weights, at + names.up)),
            "down": linear(projection_of(weights, at + names.down)),
        }
        layers.append(
            _Layer(heads, activation, parts, (norm(at + names.attention_norm), norm(at + names.norm)))
        )

    embeddings = f"{prefix}embeddings."
    positions = weights.tensor(f"{embeddings}position_embeddings.weight").float()
    types = f"{embeddings}token_type_embeddings.weight"
    if types in weights:
        positions = positions + weights.tensor(types).float()[0]
    # RoBERTa and its kin count from the padding id + 1.
    counts_from_zero = config["model_type"] in _COUNTS_FROM_ZERO
    padding = None if counts_from_zero else int(config.get("pad_token_id", 1))
    return BertBackbone(
        kernels,
        table=weights.table(f"{embeddings}word_embeddings.weight"),
        positions=positions,
        first_position=0 if padding is None else padding + 1,
        padding=padding,
        norm=norm(f"{embeddings}LayerNorm"),
        layers=layers,
    )


def _norm(kernels: Kernels, weights: Weights, name: str, epsilon: float) -> Norm:
    """A LayerNorm, in and out in the dtype of the kernels; its statistics are fp32."""
    # Checkpoints of 2018 call gain and bias gamma and beta.
    old = f"{name}.gamma" in weights
    gain, bias = (
        weights.tensor(f"{name}.{part}").to(kernels.device, kernels.dtype)
        for part in (("gamma", "beta") if old else ("weight", "bias"))
    )
    return lambda x: F.layer_norm(x, gain.shape, gain, bias, epsilon)
