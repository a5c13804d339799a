"""Tokenizers of tokenizer.json as llama.cpp knows them: WordPiece, byte-level BPE, and Unigram.

llama.cpp has its own code for each, with fewer settings; what it would do otherwise is refused by name.
Gemma's BPE is in `gguf_gemma`.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from gemb.errors import MismatchError
from gemb.quantization.gguf_gemma import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, special_around
from gemb.quantization.gguf_layout import Value

_CHUNKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHUNKINGS: Mapping[str, str] = {_CHUNKS % "": "qwen2", _CHUNKS % "{1,3}": "llama-bpe"}
"""llama.cpp's name of a way to cut text before merging, by the expression in tokenizer.json."""


def word_piece(
    name: str, config: Mapping[str, Any], tokenizer: Mapping[str, Any], *, lower_cases: bool
) -> dict[str, Value]:
    """The metadata of BERT's tokenizer: pieces that begin a word have a mark, others none.

    Raises MismatchError for settings that llama.cpp has not.
    """
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    problems = []
    if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix", "##") != "##":
        problems.append(f"its tokenizer is {model.get('type')}, not BERT's WordPiece")
    elif normalizer.get("type") != "BertNormalizer" or not normalizer.get("handle_chinese_chars", True):
        problems.append("its texts are not normalised as BERT's are")
    elif (tokenizer.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        problems.append("its texts are not cut into words as BERT's are")
    _refuse(name, problems)
    before, after = special_around(tokenizer)
    if len(before) != 1 or len(after) != 1:
        problems.append(
            f"its tokenizer puts tokens {before} before a text and {after} after it, not one each"
        )
    _refuse(name, problems)
    vocabulary: dict[str, int] = model["vocab"]
    tokens, kinds = _listed(name, vocabulary, tokenizer, int(config["vocab_size"]))
    for token, index in vocabulary.items():
        if kinds[index] == NORMAL:
            tokens[index] = token[2:] if token.startswith("##") else f"\u2581{token}"
    lower = bool(normalizer.get("lowercase", True)) or lower_cases
    accents = normalizer.get("strip_accents")
    ids = {
        "bos_token_id": before[0],
        "cls_token_id": before[0],
        "seperator_token_id": after[0],  # as llama.cpp spells it
        "unknown_token_id": vocabulary.get(model.get("unk_token") or ""),
        "padding_token_id": config.get("pad_token_id"),
    }
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{key}": index for key, index in ids.items() if index is not None},
        "tokenizer.ggml.normalizer.lowercase": lower,
        # BERT strips accents where it lower-cases, unless it is told otherwise.
        "tokenizer.ggml.normalizer.strip_accents": lower if accents is None else bool(accents),
    }


def byte_bpe(name: str, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of the byte-level BPE of Qwen 2, Qwen 3, Llama 3 and EuroBERT.

    Raises MismatchError for settings that llama.cpp has not.
    """
    model = tokenizer["model"]
    chunking = next((_CHUNKINGS[one] for one in _expressions(tokenizer) if one in _CHUNKINGS), None)
    if model.get("type") != "BPE" or model.get("byte_fallback") or chunking is None:
        raise MismatchError(
            f"{name} cannot be written for llama.cpp: its tokenizer is not the byte-level BPE of Qwen "
            "or Llama 3"
        )
    before, after = special_around(tokenizer)
    if len(before) > 1 or len(after) > 1:
        raise MismatchError(
            f"{name} cannot be written for llama.cpp: its tokenizer puts tokens {before} before a text and "
            f"{after} after it, not one each at most"
        )
    tokens, kinds = _listed(name, model["vocab"], tokenizer, int(config["vocab_size"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    first, last = config.get("bos_token_id"), config.get("eos_token_id")
    ids = {
        "bos_token_id": before[0] if before else first[0] if isinstance(first, list) else first,
        "eos_token_id": after[0] if after else last[0] if isinstance(last, list) else last,
        "padding_token_id": config.get("pad_token_id"),
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": chunking,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": index for key, index in ids.items() if index is not None},
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }


def unigram(name: str, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of the Unigram tokenizer of XLM-RoBERTa and CamemBERT.

    Raises MismatchError for settings that llama.cpp has not, and for RoBERTa's own BPE.
    """
    model = tokenizer["model"]
    if model.get("type") != "Unigram":
        raise MismatchError(
            f"{name} cannot be written for llama.cpp: its tokenizer is {model.get('type')}, and gemb writes "
            "only Unigram for RoBERTa and its kin"
        )
    before, after = special_around(tokenizer)
    if len(before) != 1 or len(after) != 1:
        raise MismatchError(
            f"{name} cannot be written for llama.cpp: its tokenizer puts tokens {before} before a text and "
            f"{after} after it, not one each"
        )
    pieces: list[tuple[str, float]] = model["vocab"]
    rows = int(config["vocab_size"])
    tokens, kinds = _listed(name, {piece: index for index, (piece, _) in enumerate(pieces)}, tokenizer, rows)
    unknown = int(model.get("unk_id") or 0)
    kinds[unknown] = UNKNOWN
    scores = [-10_000.0] * rows
    for index, (_, score) in enumerate(pieces):
        scores[index] = float(score)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": before[0],
        "tokenizer.ggml.eos_token_id": after[0],
        "tokenizer.ggml.unknown_token_id": unknown,
        "tokenizer.ggml.padding_token_id": int(config.get("pad_token_id", 1)),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    charsmap = next(_found(tokenizer.get("normalizer"), "precompiled_charsmap"), None)
    if charsmap:
        # llama.cpp wants bytes here; a list of integers of gemb would be 4 bytes each.
        metadata["tokenizer.ggml.precompiled_charsmap"] = b64decode(charsmap)
    return metadata


def _listed(
    name: str, vocabulary: Mapping[str, int], tokenizer: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, one a row of the table; rows without a token are unused."""
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    count = max([*vocabulary.values(), *added]) + 1
    if count > rows:
        raise MismatchError(f"{name}: its tokenizer has {count:,} tokens, but vocab_size is {rows:,}")
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in vocabulary.items():
        tokens[index], kinds[index] = token, NORMAL
    for index, token in added.items():
        tokens[index], kinds[index] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return tokens, kinds


def _expressions(tokenizer: Mapping[str, Any]) -> list[str]:
    """The expressions that cut a text before the merges."""
    return [str(one) for one in _found(tokenizer.get("pre_tokenizer"), "Regex")]


def _found(value: object, key: str) -> Any:  # noqa: ANN401  # of JSON
    """The values of `key` at every depth."""
    if isinstance(value, Mapping):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from _found(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _found(inner, key)


def _refuse(name: str, problems: list[str]) -> None:
    if problems:
        raise MismatchError(f"{name} cannot be written for llama.cpp: {'; '.join(problems)}")
