"""EmbeddingGemma in GGUF: the names and metadata that llama.cpp reads for `gemma-embedding`.

Follows llama.cpp's convert_hf_to_gguf.py (EmbeddingGemma, with its dense modules). What its graph cannot
compute is refused by name, so that no file gives other vectors than its source. Everything here works on what
the folder's JSON files say; nothing is read from disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemb.errors import MismatchError
from gemb.quantization.gguf_layout import F16, TensorKind, Value

ARCHITECTURE = "gemma-embedding"
DENSE_TENSORS = ("dense_2.weight", "dense_3.weight")
"""The two projections after pooling, in their order."""
POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}
"""llama_pooling_type by the name that folders have for it."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama_token_type."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<unused\d+>")
# What transformers takes where config.json leaves it out.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}

_WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm"}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def gguf_name(name: str) -> str:
    """The GGUF name of the backbone tensor `name` of Gemma 3, which starts at `layers.`, without a prefix.

    Raises MismatchError if `gemma-embedding` has no such tensor, as for a bias or an adapter.
    """
    match = _LAYER_NAME.fullmatch(name)
    if match is not None and match[2] in _OF_LAYER:
        return f"blk.{match[1]}.{_OF_LAYER[match[2]]}.weight"
    stem = name.removesuffix(".weight")
    if stem != name and stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    raise MismatchError(f"{ARCHITECTURE} has no place for {name}")


def gemma_metadata(
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    *,
    name: str,
    kind: TensorKind,
    max_tokens: int,
    pooling: str,
    dense: Sequence[tuple[int, int]],
    prompts: Mapping[str, str],
    default_prompt: str | None,
) -> dict[str, Value]:
    """The metadata of a `gemma-embedding` file whose matrices are of `kind`.

    `config` is config.json of a `gemma3_text` model, its sliding_window as in the original folder (not
    halved), `tokenizer` its tokenizer.json, `dense` the in and out features of the two projections, or
    nothing. GGUF has no keys for prompts: they are stored as `gemb.prompt_names`, `gemb.prompt_texts` and
    `gemb.default_prompt`, and whoever calls llama.cpp puts them before the text.

    Raises MismatchError for what llama.cpp would compute differently, all of it at once.
    """
    config = {**_DEFAULTS, **config}
    problems = _problems(config, pooling, dense, kind)
    if problems:
        raise MismatchError(f"{name} cannot be written as {ARCHITECTURE}: {'; '.join(problems)}")
    own: dict[str, Value] = {
        "context_length": max_tokens,
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": int(config["num_attention_heads"]),
        "attention.head_count_kv": int(config["num_key_value_heads"]),
        "attention.key_length": int(config["head_dim"]),
        "attention.value_length": int(config["head_dim"]),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.causal": False,
        "attention.sliding_window": int(config["sliding_window"]),
        "attention.sliding_window_pattern": _sliding_period(config) or 0,
        "rope.freq_base": _rope_base(config, "full_attention", "rope_theta", 1_000_000.0),
        "rope.freq_base_swa": _rope_base(config, "sliding_attention", "rope_local_base_freq", 10_000.0),
        "pooling_type": POOLINGS[pooling],
    }
    for tensor, (inputs, outputs) in zip(DENSE_TENSORS, dense, strict=False):
        stem = tensor.removesuffix(".weight")
        own |= {f"{stem}_feat_in": inputs, f"{stem}_feat_out": outputs}
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": kind.file_type,
        "general.quantization_version": 2,
        **{f"{ARCHITECTURE}.{key}": value for key, value in own.items()},
        **_tokenizer_metadata(config, tokenizer, name),
        "gemb.prompt_names": list(prompts),
        "gemb.prompt_texts": list(prompts.values()),
        "gemb.default_prompt": default_prompt or "",
    }


def _problems(
    config: Mapping[str, Any], pooling: str, dense: Sequence[tuple[int, int]], kind: TensorKind
) -> list[str]:
    """What llama.cpp would compute differently, a clause each."""
    if config.get("model_type") != "gemma3_text":  # the other keys have another meaning then
        return [f"its model_type is {config.get('model_type')!r}, not 'gemma3_text'"]
    problems = []
    if not config.get("use_bidirectional_attention"):
        problems.append("its attention is causal (use_bidirectional_attention is not set)")
    if config.get("is_causal") is False:
        problems.append("is_causal=false widens its windows by one token on each side")
    if config["hidden_activation"] != "gelu_pytorch_tanh":
        problems.append(f"its hidden_activation is {config['hidden_activation']!r}, not 'gelu_pytorch_tanh'")
    if config["query_pre_attn_scalar"] != config["head_dim"]:
        problems.append(
            f"its query_pre_attn_scalar is {config['query_pre_attn_scalar']}, "
            f"but its head_dim {config['head_dim']}; llama.cpp takes the head_dim for both"
        )
    if config.get("attention_bias"):
        problems.append("its attention has biases")
    parameters = config.get("rope_parameters") or {}
    scaled = [config.get("rope_scaling"), parameters, *parameters.values()]
    for rope in scaled:
        rope_type = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
        if rope_type not in {None, "default"}:
            problems.append(f"its rotary scaling is {rope_type!r}")
    if _sliding_period(config) is None:
        problems.append("its layers with full attention do not come at one fixed distance")
    if pooling not in POOLINGS:
        problems.append(f"its pooling is {pooling!r}, not one of {', '.join(POOLINGS)}")
    if len(dense) not in {0, 2}:
        problems.append(f"it has {len(dense)} Dense modules; llama.cpp knows none or two")
    if kind is F16:
        problems.append("Gemma's activations overflow f16 in llama.cpp (take bf16 or f32)")
    return problems


def _sliding_period(config: Mapping[str, Any]) -> int | None:
    """The p where layers p, 2p, ... (from 1) are full and the others slide; None if there is no such p."""
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types")
    if kinds is None:
        return int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    full = [layer for layer, kind in enumerate(kinds, start=1) if kind == "full_attention"]
    period = full[0] if full else layers + 1
    return period if full == list(range(period, layers + 1, period)) else None


def _rope_base(config: Mapping[str, Any], layer_type: str, older_key: str, default: float) -> float:
    """The rotary base of layers of `layer_type`, in either spelling."""
    parameters = config.get("rope_parameters") or {}
    given = parameters.get(layer_type) if layer_type in parameters else parameters
    return float((given or {}).get("rope_theta") or config.get(older_key) or default)


def _tokenizer_metadata(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], name: str
) -> dict[str, Value]:
    """Gemma's BPE as the `llama` tokenizer of llama.cpp, which merges by score and knows no rules."""
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise MismatchError(
            f"{name}: its tokenizer is {model.get('type')}, not the BPE with byte_fallback that Gemma has"
        )
    vocabulary: dict[str, int] = model["vocab"]
    count = max(vocabulary.values()) + 1
    rows = int(config["vocab_size"])
    if count > rows:
        raise MismatchError(f"{name}: its tokenizer has {count:,} tokens, but vocab_size is {rows:,}")
    # EmbeddingGemma's tokenizer knows an image token past the last row of its table, which no text can use.
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ()) if token["id"] < rows}
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    for token, index in vocabulary.items():
        tokens[index] = token
        kinds[index] = BYTE if _BYTE_TOKEN.fullmatch(token) else NORMAL
    for index, token in added.items():
        special = token["special"] or _LOOKS_SPECIAL.fullmatch(token["content"])
        kinds[index] = CONTROL if special else USER_DEFINED
        # llama.cpp looks for these in the raw text, before it writes spaces as Gemma's mark.
        tokens[index] = token["content"] if special else token["content"].replace("\u2581", " ")
    unknown = vocabulary.get(model.get("unk_token") or "")
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    ids = {
        "bos_token_id": _first(config.get("bos_token_id")),
        "eos_token_id": _first(config.get("eos_token_id")),
        "padding_token_id": _first(config.get("pad_token_id")),
        "unknown_token_id": unknown,
    }
    before, after = special_around(tokenizer)
    if before not in ([], [ids["bos_token_id"]]) or after not in ([], [ids["eos_token_id"]]):
        raise MismatchError(
            f"{name}: its tokenizer puts tokens {before} before a text and {after} after it; "
            f"{ARCHITECTURE} can put {ids['bos_token_id']} (bos) and {ids['eos_token_id']} (eos) there"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": _scores(vocabulary, model["merges"], rows),
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{key}": index for key, index in ids.items() if index is not None},
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
        "tokenizer.ggml.add_space_prefix": False,
    }


def _first(token_id: int | Sequence[int] | None) -> int | None:
    """A generating model may name several ends of a text."""
    return token_id[0] if isinstance(token_id, Sequence) else token_id


def _scores(vocabulary: Mapping[str, int], merges: Sequence[Any], rows: int) -> list[float]:
    """-(1 + rank) of the first merge that makes a token, and less than all of those where none does."""
    scores = [-float(len(merges) + 1)] * rows
    for rank in range(len(merges) - 1, -1, -1):
        pair = merges[rank]
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        index = vocabulary.get(left + right)
        if index is not None:
            scores[index] = -float(rank + 1)
    return scores


def special_around(tokenizer: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    processor = tokenizer.get("post_processor")
    parts = (processor or {}).get("processors", [processor])  # of a Sequence
    acting = [part for part in parts if part and part.get("type") != "ByteLevel"]  # that one adds no token
    if not acting:
        return [], []
    processor = acting[0]
    if processor.get("type") in {"BertProcessing", "RobertaProcessing"} and len(acting) == 1:
        return [processor["cls"][1]], [processor["sep"][1]]
    if processor.get("type") != "TemplateProcessing" or len(acting) > 1:
        raise MismatchError(f"the tokenizer's post_processor is {json.dumps(processor.get('type'))}")
    known = processor["special_tokens"]
    before: list[int] = []
    after: list[int] = []
    side = before
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = after
        else:
            side += known[piece["SpecialToken"]["id"]]["ids"]
    return before, after
