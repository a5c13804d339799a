"""Which weights go onto which grid: the three formats of EmbeddingGemma (arXiv 2509.20354)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from gemb.quantization.formats import WeightFormat as WeightFormat
from gemb.quantization.grids import INT4_ROW, INT8_ROW, Q4_0, Q8_0, Grid

Role: TypeAlias = Literal["embedding", "attention", "feed_forward", "projection"]

# As transformers names them in the families that gemb packs: Gemma, Llama, Qwen, BERT, RoBERTa, ModernBERT.
_NAMES: Mapping[Role, re.Pattern[str]] = {
    "embedding": re.compile(r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings)\.weight$"),
    "attention": re.compile(
        r"\.(self_attn|cross_attn|attention|attn)\."
        r"([qkvo]_proj|self\.(query|key|value)|output\.dense|Wqkv|Wo|[qkv]_lin|out_lin)\.weight$"
    ),
    "feed_forward": re.compile(
        r"\.(mlp\.(gate_proj|up_proj|down_proj|Wi|Wo)|\d+\.intermediate\.dense|\d+\.output\.dense|ffn\.lin[12]"
        r"|ple_block\.(per_layer_input_gate|per_layer_projection))\.weight$"
    ),
    # Of a Dense module of sentence-transformers, and those that EmbeddingGemma 2 has in its backbone.
    "projection": re.compile(r"(^|\.)(linear|embedding_projection|per_layer_model_projection)\.weight$"),
}
# "e4_a8_f4_p4" of the model card: embedding, attention, feed-forward, projections.
_MIXED: Mapping[Role, Grid] = {
    "embedding": INT4_ROW,
    "attention": INT8_ROW,
    "feed_forward": INT4_ROW,
    "projection": INT4_ROW,
}


def role_of(name: str, shape: Sequence[int]) -> Role | None:
    """The part that the tensor `name` of `shape` plays, None if it stays in floats.

    Norms, biases, and tables of positions and token types stay: they are small, and the paper names none.
    """
    if len(shape) != 2:
        return None
    return next((role for role, pattern in _NAMES.items() if pattern.search(name)), None)


def grid_of(role: Role, weight_format: WeightFormat) -> Grid:
    """The grid of weights of `role`: GGUF's blocks for int4 and int8, one scale a row for mixed."""
    if weight_format == "mixed":
        return _MIXED[role]
    return Q4_0 if weight_format == "int4" else Q8_0
