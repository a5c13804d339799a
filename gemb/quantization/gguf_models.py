"""Which architecture of llama.cpp computes a model folder, with which metadata and names of tensors.

`gguf_form` gives the form of a file that runs in llama.cpp, or says why there is none; `own_form` that of a
file which only gemb reads. Follows the converters of llama.cpp (conversion/*.py). Works on what JSON files
say; nothing is read from disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemb.errors import MismatchError
from gemb.quantization.gguf_gemma import ARCHITECTURE as GEMMA
from gemb.quantization.gguf_gemma import DENSE_TENSORS, POOLINGS, gemma_metadata
from gemb.quantization.gguf_gemma import gguf_name as gemma_name
from gemb.quantization.gguf_layout import TensorKind, Value
from gemb.quantization.gguf_names import OWN_ARCHITECTURE, ROWS_CUT_KEY
from gemb.quantization.gguf_tokenizers import byte_bpe, unigram, word_piece


@dataclass(frozen=True)
class GgufDense:
    """A Dense module behind the pooling."""

    part: str
    """Its folder."""
    inputs: int
    outputs: int
    is_plain: bool
    """Whether it is a matrix alone: no bias, activation or shortcut."""


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file has to tell of a model folder."""

    name: str
    config: Mapping[str, Any]
    """config.json of the text backbone, `model_type` included."""
    tokenizer: Mapping[str, Any]
    """tokenizer.json; empty if the folder has none."""
    lower_cases: bool
    """Whether texts are lower-cased before the tokenizer."""
    prefix: str
    """What stands before the usual names of the backbone's tensors, such as `model.`."""
    part: str
    """The folder of the backbone."""
    pooling: Sequence[str]
    pools_prompt: bool
    dense: Sequence[GgufDense]
    others: Sequence[str]
    """Kinds of other modules, but for normalisation at the end, which callers of llama.cpp ask for."""
    max_tokens: int
    prompts: Mapping[str, str]
    default_prompt: str | None


@dataclass(frozen=True)
class GgufForm:
    """What a file of one model says of itself, and what it calls the tensors of the folder."""

    architecture: str
    metadata: Mapping[str, Value]
    names: Mapping[str, str]
    """GGUF name of a backbone tensor by its usual name, layers as `*`; empty if names stay."""
    dense: Mapping[str, str]
    """GGUF name of the matrix of a Dense module by its part."""
    model: GgufModel

    def name_of(self, part: str, name: str) -> str:
        """The GGUF name of the tensor `name` of the module `part`.

        Raises MismatchError if the architecture has no such tensor.
        """
        if self.architecture == OWN_ARCHITECTURE:
            return f"{part}/{name}" if part else name
        if part in self.dense and name == "linear.weight":
            return self.dense[part]
        usual = name.removeprefix(self.model.prefix)
        if self.architecture == GEMMA:
            return gemma_name(usual)
        stem, _, kind = usual.rpartition(".")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        layer = next(iter(re.findall(r"\.(\d+)\.", usual)), "")
        theirs = self.names.get(re.sub(r"\.\d+\.", ".*.", stem))
        if part != self.model.part or theirs is None or not name.startswith(self.model.prefix):
            raise MismatchError(
                f"{self.model.name}: {self.architecture} of llama.cpp has no place for {name}"
            )
        return f"{theirs.replace('*', layer)}.{kind}"


def own_form(model: GgufModel, kind: TensorKind) -> GgufForm:
    """The form of a file that gemb alone reads: names as they are, and no tokenizer."""
    metadata = {**_general(OWN_ARCHITECTURE, model, kind)}
    return GgufForm(OWN_ARCHITECTURE, metadata, {}, {}, model)


def gguf_form(model: GgufModel, kind: TensorKind) -> GgufForm:
    """The form of a file that llama.cpp runs, matrices of `kind`.

    Raises MismatchError with all that llama.cpp would compute differently, or that gemb cannot write for it.
    """
    family = str(model.config.get("model_type"))
    if family == "gemma3_text":
        return _gemma(model, kind)
    if family not in _FAMILIES:
        raise MismatchError(
            f"{model.name} cannot be written for llama.cpp: {_REASONS.get(family, f'it has no {family}')}"
        )
    return _FAMILIES[family](model, kind)


_DECODER_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "layers.*.input_layernorm": "blk.*.attn_norm",
    "layers.*.self_attn.q_proj": "blk.*.attn_q",
    "layers.*.self_attn.k_proj": "blk.*.attn_k",
    "layers.*.self_attn.v_proj": "blk.*.attn_v",
    "layers.*.self_attn.o_proj": "blk.*.attn_output",
    "layers.*.self_attn.q_norm": "blk.*.attn_q_norm",
    "layers.*.self_attn.k_norm": "blk.*.attn_k_norm",
    "layers.*.post_attention_layernorm": "blk.*.ffn_norm",
    "layers.*.mlp.gate_proj": "blk.*.ffn_gate",
    "layers.*.mlp.up_proj": "blk.*.ffn_up",
    "layers.*.mlp.down_proj": "blk.*.ffn_down",
}
_BERT_TABLES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_BERT_NAMES = {
    **_BERT_TABLES,
    "encoder.layer.*.attention.self.query": "blk.*.attn_q",
    "encoder.layer.*.attention.self.key": "blk.*.attn_k",
    "encoder.layer.*.attention.self.value": "blk.*.attn_v",
    "encoder.layer.*.attention.output.dense": "blk.*.attn_output",
    "encoder.layer.*.attention.output.LayerNorm": "blk.*.attn_output_norm",
    "encoder.layer.*.intermediate.dense": "blk.*.ffn_up",
    "encoder.layer.*.output.dense": "blk.*.ffn_down",
    "encoder.layer.*.output.LayerNorm": "blk.*.layer_output_norm",
}
_DISTILBERT_NAMES = {
    **_BERT_TABLES,
    "transformer.layer.*.attention.q_lin": "blk.*.attn_q",
    "transformer.layer.*.attention.k_lin": "blk.*.attn_k",
    "transformer.layer.*.attention.v_lin": "blk.*.attn_v",
    "transformer.layer.*.attention.out_lin": "blk.*.attn_output",
    "transformer.layer.*.sa_layer_norm": "blk.*.attn_output_norm",
    "transformer.layer.*.ffn.lin1": "blk.*.ffn_up",
    "transformer.layer.*.ffn.lin2": "blk.*.ffn_down",
    "transformer.layer.*.output_layer_norm": "blk.*.layer_output_norm",
}
_REASONS = {
    "embedding_gemma2": "it has no architecture for EmbeddingGemma 2 yet",
    "embedding_gemma2_text": "it has no architecture for EmbeddingGemma 2 yet",
    "gemma2": "its gemma2 is a causal decoder whose windows reach back only",
    "t5gemma": "it has no architecture for T5Gemma",
    "t5_gemma_module": "it has no architecture for T5Gemma",
    "gemma3": "of this family it runs the text part alone",
    "mistral": "its llama has no sliding windows",
    "modernbert": "gemb does not write its modern-bert",
}
"""Why a family that gemb packs has no file for llama.cpp."""


def _gemma(model: GgufModel, kind: TensorKind) -> GgufForm:
    problems = [*_problems(model)]
    if any(not dense.is_plain for dense in model.dense):
        problems.append("its Dense modules have a bias, an activation or a shortcut")
    _refuse(model, problems)
    metadata = gemma_metadata(
        model.config,
        model.tokenizer,
        name=model.name,
        kind=kind,
        max_tokens=model.max_tokens,
        pooling=" and ".join(model.pooling),
        dense=[(dense.inputs, dense.outputs) for dense in model.dense],
        prompts=model.prompts,
        default_prompt=model.default_prompt,
    )
    names = {dense.part: name for dense, name in zip(model.dense, DENSE_TENSORS, strict=False)}
    return GgufForm(GEMMA, metadata, {}, names, model)


def _bert(model: GgufModel, kind: TensorKind) -> GgufForm:
    """BERT, DistilBERT, RoBERTa and its kin; positions of the last two begin after the padding id."""
    config = model.config
    family = str(config["model_type"])
    is_roberta = family in {"roberta", "xlm-roberta", "camembert"}
    cut = int(config.get("pad_token_id", 1)) + 1 if is_roberta else 0
    problems = [*_problems(model), *_no_dense(model)]
    if config.get("position_embedding_type", "absolute") != "absolute":
        problems.append(f"its positions are {config['position_embedding_type']!r}")
    if _given(config, "hidden_act", "activation", default="gelu") != "gelu":
        problems.append(f"its activation is {_given(config, 'hidden_act', 'activation')!r}, not 'gelu'")
    _refuse(model, problems)
    rows = int(_given(config, "max_position_embeddings", default=512)) - cut
    if is_roberta:
        tokens = unigram(model.name, config, model.tokenizer)
    else:
        tokens = word_piece(model.name, config, model.tokenizer, lower_cases=model.lower_cases)
    own: dict[str, Value] = {
        "context_length": rows,
        "embedding_length": int(_given(config, "hidden_size", "dim")),
        "block_count": int(_given(config, "num_hidden_layers", "n_layers")),
        "feed_forward_length": int(_given(config, "intermediate_size", "hidden_dim")),
        "attention.head_count": int(_given(config, "num_attention_heads", "n_heads")),
        "attention.layer_norm_epsilon": float(config.get("layer_norm_eps", 1e-12)),
        "attention.causal": False,
        "pooling_type": POOLINGS[model.pooling[0]],
    }
    metadata = {
        **_general("bert", model, kind),
        **{f"bert.{key}": value for key, value in own.items()},
        **tokens,
        "tokenizer.ggml.token_type_count": int(config.get("type_vocab_size", 1)),
        **({ROWS_CUT_KEY: cut} if cut else {}),
    }
    return GgufForm("bert", metadata, _DISTILBERT_NAMES if family == "distilbert" else _BERT_NAMES, {}, model)


def _decoder(model: GgufModel, kind: TensorKind) -> GgufForm:
    """Llama, EuroBERT, Qwen 2 and Qwen 3."""
    config = model.config
    architecture = str(config["model_type"])
    problems = [*_problems(model), *_no_dense(model)]
    causal = architecture != "eurobert" and config.get("is_causal") is not False
    if architecture == "llama" and not causal:
        problems.append("its llama is causal")
    if config.get("use_sliding_window"):
        problems.append(f"its {architecture} has no sliding windows")
    if _given(config, "hidden_act", default="silu") != "silu":
        problems.append(f"its activation is {config['hidden_act']!r}, not 'silu'")
    if architecture in {"eurobert", "qwen3"} and config.get("attention_bias"):
        problems.append("its attention has biases")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        problems.append(f"its rotary scaling is {rope_type!r}")
    _refuse(model, problems)
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    own: dict[str, Value] = {
        "context_length": model.max_tokens,
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "attention.causal": causal,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "rope.dimension_count": head_dim,
        "vocab_size": int(config["vocab_size"]),
        "pooling_type": POOLINGS[model.pooling[0]],
    }
    metadata = {
        **_general(architecture, model, kind),
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **byte_bpe(model.name, config, model.tokenizer),
    }
    return GgufForm(architecture, metadata, _DECODER_NAMES, {}, model)


_FAMILIES = {
    "bert": _bert,
    "camembert": _bert,
    "distilbert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "eurobert": _decoder,
    "llama": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
}


def _general(architecture: str, model: GgufModel, kind: TensorKind) -> dict[str, Value]:
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": model.name,
        "general.file_type": kind.file_type,
        "general.quantization_version": 2,
        "gemb.prompt_names": list(model.prompts),
        "gemb.prompt_texts": list(model.prompts.values()),
        "gemb.default_prompt": model.default_prompt or "",
    }


def _problems(model: GgufModel) -> list[str]:
    """What llama.cpp lacks for any family, a clause each."""
    problems = []
    if not model.tokenizer:
        problems.append("it has no tokenizer.json")
    if len(model.pooling) != 1 or model.pooling[0] not in POOLINGS:
        problems.append(f"its pooling is {' and '.join(model.pooling)}, not one of {', '.join(POOLINGS)}")
    if not model.pools_prompt:
        problems.append("its pooling leaves out the prompt")
    problems += [f"it has a {kind} module" for kind in model.others]
    return problems


def _no_dense(model: GgufModel) -> list[str]:
    return [f"llama.cpp knows Dense modules only behind {GEMMA}"] if model.dense else []


def _refuse(model: GgufModel, problems: Sequence[str]) -> None:
    if problems:
        raise MismatchError(f"{model.name} cannot be written for llama.cpp: {'; '.join(problems)}")


def _given(config: Mapping[str, Any], *keys: str, default: object = None) -> Any:  # noqa: ANN401  # of JSON
    """The first of `keys` that config.json has; DistilBERT has other names than BERT."""
    return next((config[key] for key in keys if config.get(key) is not None), default)
