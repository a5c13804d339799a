"""Tiny models with the real kinds of tokenizers, as folders that can be written for llama.cpp."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModel

from gemb.jobs.quantize_probes import PROBES

CHUNKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen 2 cuts text before merging; Llama 3 cuts numbers in threes, with {1,3} at the gap."""
WIDTH = 64
ROWS = 700
_SMALL: Mapping[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 600, "vocab_size": ROWS,
}  # fmt: skip
_GATED = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"pad_token_id": 0, "type_vocab_size": 2}
FAMILIES: Mapping[str, tuple[Mapping[str, Any], str, str]] = {
    "bert": (_BERT, "word_piece", "mean"),
    "distilbert": (
        {"dim": WIDTH, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}, "word_piece", "cls",
    ),
    "xlm-roberta": ({"pad_token_id": 1, "type_vocab_size": 1}, "unigram", "mean"),
    "qwen2": ({**_GATED, "use_sliding_window": False}, "qwen", "lasttoken"),
    "qwen3": (_GATED, "qwen", "lasttoken"),
    "llama": (_GATED, "llama3", "mean"),
    "eurobert": ({**_GATED, "mask_token_id": 3, "rms_norm_eps": 1e-5}, "llama3", "mean"),
    "gemma3_text": (
        {**_GATED, "query_pre_attn_scalar": 16, "sliding_window": 16, "use_bidirectional_attention": True,
         "layer_types": ["sliding_attention", "full_attention"]}, "gemma", "mean",
    ),
}  # fmt: skip
"""What a config differs in, the kind of tokenizer, and the pooling, by model type."""


def gguf_folder(place: Path, family: str) -> Path:
    """A sentence-transformers folder of `family`; of Gemma with both Dense modules. Gives `place`."""
    settings, tokenizer, pooling = FAMILIES[family]
    config = AutoConfig.for_model(family, **{**_SMALL, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        model = AutoModel.from_config(config).eval()  # type: ignore[no-untyped-call]
        for name, weight in model.named_parameters():
            near_one = weight.ndim == 1 and float(weight.detach().mean()) == 1
            with torch.no_grad():
                scale = 0.1 if weight.ndim == 1 else weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape) * (1 if "embed" in name else scale) + near_one)
        model.save_pretrained(place)
        dense = [] if family != "gemma3_text" else [(WIDTH, 128), (128, WIDTH)]
        for number, (inputs, outputs) in enumerate(dense, start=2):
            _dense(place / f"{number}_Dense", inputs, outputs)
    made_tokenizer(tokenizer).save(str(place / "tokenizer.json"))
    _write(place / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    steps = ["Transformer", "Pooling", *(["Dense"] * len(dense)), "Normalize"]
    paths = ["", *(f"{number}_{step}" for number, step in enumerate(steps) if number)]
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{step}"}
        for number, (step, path) in enumerate(zip(steps, paths, strict=True))
    ]
    _write(place / "modules.json", entries)
    modes = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    _write(
        place / "1_Pooling/config.json",
        {"word_embedding_dimension": WIDTH, f"pooling_mode_{modes[pooling]}": True, "include_prompt": True},
    )
    _write(place / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    _write(place / "config_sentence_transformers.json", {"prompts": {"query": "find: ", "document": ""}})
    return place


def made_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer of the given kind, trained on the probe texts."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    if kind == "word_piece":
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=ROWS, special_tokens=specials, show_progress=False
        )
        around = ("[CLS]", "[SEP]", 2, 3)
    elif kind == "unigram":
        specials = ["<s>", "<pad>", "</s>", "<unk>"]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=ROWS, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
        around = ("<s>", "</s>", 0, 2)
    elif kind == "gemma":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=ROWS, special_tokens=[*specials, *bytes_], limit_alphabet=150, show_progress=False
        )
        around = ("<s>", "</s>", 1, 2)
    else:
        tokenizer = Tokenizer(models.BPE())
        chunks = CHUNKS % ("" if kind == "qwen" else "{1,3}")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(chunks), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=ROWS,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        around = ("<s>", "</s>", 1, 2)
    tokenizer.train_from_iterator(PROBES, trainer)
    if kind == "gemma":
        made = json.loads(tokenizer.to_str())
        made["added_tokens"] = [token for token in made["added_tokens"] if "<0x" not in token["content"]]
        tokenizer = Tokenizer.from_str(json.dumps(made))
    first, last, first_id, last_id = around
    before = "" if kind == "qwen" else f"{first} "
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A {last}", special_tokens=[(first, first_id), (last, last_id)]
    )
    return tokenizer


def _dense(place: Path, inputs: int, outputs: int) -> None:
    from safetensors.torch import save_file

    identity = "torch.nn.modules.linear.Identity"
    settings = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": False,
        "activation_function": identity,
    }
    _write(place / "config.json", settings)
    save_file({"linear.weight": torch.randn(outputs, inputs) * inputs**-0.5}, place / "model.safetensors")


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
