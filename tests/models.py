"""Tiny models with random weights in every family, saved as folders that sentence-transformers loads.

Widths are small and windows smaller, so that heads, windows and norms all matter; weights are scaled so that
no state vanishes or explodes. A backbone is made once a process and copied by every folder that uses it.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

# As the engine runs: products on several threads sum in another order, and tiny ones wait for each other.
torch.set_num_threads(1)

VOCABULARY = 200
"""Entries, the special tokens and `w4` to `w199`."""
MAX_TOKENS = 48
PROMPTS = {"query": "w7 w8 w9 ", "document": "w11 "}
PROMPT_TOKENS = {"query": 3, "document": 1}
"""Without the special tokens before them."""

_SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_SHARED = {"num_key_value_heads": 2, "head_dim": 16}
_GEMMA = {**_SHARED, "num_attention_heads": 4, "query_pre_attn_scalar": 16}
_GEMMA3 = {**_GEMMA, "num_key_value_heads": 1, "sliding_window": 8, "sliding_window_pattern": 3}
_BERT = {"type_vocab_size": 2}
_ROBERTA = {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ENCODER = {**_SMALL, **_GEMMA, "sliding_window": 5}


@dataclass(frozen=True)
class Sort:
    """How a sort of tiny model is made."""

    family: str
    """Config and model classes of transformers are called after it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    """Model class, where its name does not follow from the family."""
    special: bool = True
    """Whether `<s>` and `</s>` stand around a text."""
    is_causal: bool = False
    is_packed: bool = True


SORTS: Mapping[str, Sort] = {
    "gemma3": Sort("Gemma3Text", {**_GEMMA3, "use_bidirectional_attention": True}),
    "gemma3 without causality": Sort("Gemma3Text", {**_GEMMA3, "is_causal": False}),
    "gemma3 with both": Sort(
        "Gemma3Text", {**_GEMMA3, "is_causal": False, "use_bidirectional_attention": True}
    ),
    "gemma3 as a decoder": Sort("Gemma3Text", _GEMMA3, is_causal=True),
    "embedding_gemma2": Sort(
        "EmbeddingGemma2Text",
        {
            **_SHARED,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "hidden_size_per_layer_input": 24,
            "embedding_dim": 80,
        },
    ),
    "gemma2": Sort("Gemma2", {**_GEMMA, "sliding_window": 5, "is_causal": False}),
    "gemma2 as a decoder": Sort("Gemma2", {**_GEMMA, "sliding_window": 5}, is_causal=True),
    "t5gemma": Sort(
        "T5Gemma",
        {"encoder": _ENCODER, "decoder": _ENCODER, "is_encoder_decoder": False},
        model="T5GemmaEncoderModel",
    ),
    "llama": Sort("Llama", _SHARED, special=False, is_causal=True),
    "llama without causality": Sort(
        "Llama",
        {
            **_SHARED,
            "is_causal": False,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        special=False,
    ),
    "mistral": Sort("Mistral", {**_SHARED, "sliding_window": 6, "is_causal": False}),
    "mistral as a decoder": Sort("Mistral", {**_SHARED, "sliding_window": 6}, is_causal=True),
    "eurobert": Sort("EuroBert", {**_SHARED, "mask_token_id": 4, "rms_norm_eps": 1e-5}),
    "qwen2": Sort("Qwen2", {"num_key_value_heads": 2, "is_causal": False}),
    "qwen2 with a window": Sort(
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        special=False,
        is_causal=True,
    ),
    "qwen3": Sort("Qwen3", _SHARED, special=False, is_causal=True),
    "qwen3 without causality": Sort("Qwen3", {**_SHARED, "is_causal": False}, special=False),
    "bert": Sort("Bert", _BERT),
    "roberta": Sort("Roberta", _ROBERTA),
    "xlm-roberta": Sort("XLMRoberta", _ROBERTA),
    "camembert": Sort("Camembert", _ROBERTA),
    "distilbert": Sort("DistilBert", {"n_layers": 4, "n_heads": 4, "dim": 64, "hidden_dim": 96}),
    "modernbert": Sort("ModernBert", {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}),
    "mpnet": Sort("MPNet", _ROBERTA, is_packed=False),
}
"""The tiny models by name; `mpnet` stands for the families that run through transformers."""


def tiny_folder(
    place: Path,
    name: str = "gemma3",
    *,
    pooling: str | Sequence[str] = "mean",
    include_prompt: bool = True,
    dense: Sequence[Mapping[str, Any]] = (),
    normalises: bool = True,
    layer_norm: bool = False,
    is_old: bool = True,
    max_tokens: int = MAX_TOKENS,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Make a sentence-transformers folder at `place` around the tiny model `name` of SORTS; gives `place`.

    `pooling` names modes as sentence-transformers 6 does, or one of OWN_MODES, which gives the sizes.
    `dense` holds the keys of a Dense config.json that
    differ from a square one without bias or activation; `config` overrides keys of the model's config.json.
    `is_old` takes the spelling of EmbeddingGemma's time, else that of sentence-transformers 6.
    """
    shutil.copytree(_backbone(name), place, dirs_exist_ok=True)
    if config is not None:
        settings = json.loads((place / "config.json").read_text("utf-8"))
        _write(place / "config.json", {**settings, **config})
    modes = [pooling] if isinstance(pooling, str) else list(pooling)
    width = 80 if name == "embedding_gemma2" else 64
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]
    steps += [("Dense", f"{2 + index}_Dense") for index in range(len(dense))]
    steps += [("LayerNorm", f"{len(steps)}_LayerNorm")] if layer_norm else []
    steps += [("Normalize", f"{len(steps)}_Normalize")] if normalises else []
    kinds = {kind: f"sentence_transformers.models.{kind}" if is_old else _NEW[kind] for kind, _ in steps}
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": kinds[kind]}
        for index, (kind, path) in enumerate(steps)
    ]
    own = OWN_MODES.get(modes[0])
    if own is not None:
        entries[1]["type"] = "gemb.Pooling"
    _write(place / "modules.json", entries)
    if is_old:
        flags = {f"pooling_mode_{_FLAGS.get(mode, mode)}": mode in modes for mode in MODES}
        _write(
            place / "1_Pooling/config.json",
            {"word_embedding_dimension": width, **flags, "include_prompt": include_prompt},
        )
        _write(place / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    else:
        _write(
            place / "1_Pooling/config.json",
            {
                "embedding_dimension": width,
                "pooling_mode": modes[0] if len(modes) == 1 else modes,
                "include_prompt": include_prompt,
            },
        )
        _write(
            place / "sentence_bert_config.json",
            {
                "transformer_task": "feature-extraction",
                "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "module_output_name": "token_embeddings",
            },
        )
    if own is not None:
        settings = {"pooling_mode": modes[0], "embedding_dimension": width, "include_prompt": include_prompt}
        _write(place / "1_Pooling/config.json", {**settings, **own})
        tensors = own_tensors(modes[0], width)
        if tensors:
            save_file(tensors, place / "1_Pooling/model.safetensors")
    random = torch.Generator().manual_seed(len(dense))
    dims = width * len(modes)
    for index, given in enumerate(dense):
        settings = {
            "in_features": dims,
            "out_features": dims,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            **given,
        }
        dims = settings["out_features"]
        _write(place / f"{2 + index}_Dense/config.json", settings)
        shape = (dims, settings["in_features"])
        tensors = {"linear.weight": torch.randn(shape, generator=random) * shape[1] ** -0.5}
        if settings["bias"]:
            tensors["linear.bias"] = torch.randn(dims, generator=random) * 0.3
        if settings.get("use_residual") and shape[0] != shape[1]:
            tensors["residual.weight"] = torch.randn(shape, generator=random) * shape[1] ** -0.5
        save_file(tensors, place / f"{2 + index}_Dense/model.safetensors")
    for kind, path in steps:
        if kind == "LayerNorm":
            _write(place / path / "config.json", {"dimension": dims})
            norm = {"norm.weight": torch.rand(dims, generator=random) + 0.5}
            norm["norm.bias"] = torch.randn(dims, generator=random) * 0.1
            save_file(norm, place / path / "model.safetensors")
    _write(
        place / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    return place


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Every pooling mode, in the order in which folders list them."""
OWN_MODES: Mapping[str, Mapping[str, int]] = {
    "first-k": {"tokens": 3},
    "last-k": {"tokens": 3},
    "attention-query": {"heads": 4},
    "attention-kv": {"heads": 4, "probes": 6},
}
"""The pooling modes that only gemb has, with the sizes that tiny folders have."""


def own_tensors(mode: str, width: int) -> dict[str, torch.Tensor]:
    """Random weights of an attention pooling of that width with the sizes of OWN_MODES; {} for the others."""
    random = torch.Generator().manual_seed(11)
    square, probes = (width, width), (OWN_MODES[mode].get("probes", 1), width)
    shapes: dict[str, dict[str, tuple[int, int]]] = {
        "attention-query": {"probe": probes, "key": square, "value": square},
        "attention-kv": {"query": square, "key_probes": probes, "value_probes": probes},
    }
    return {
        f"{name}.weight": torch.randn(shape, generator=random) * (1 if "probe" in name else width**-0.5)
        for name, shape in shapes.get(mode, {}).items()
    }


_FLAGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "weightedmean": "weightedmean_tokens",
}
_NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Texts of so many words each, which are as many tokens without the special ones."""
    random = np.random.default_rng(seed)
    return [" ".join(f"w{number}" for number in random.integers(4, VOCABULARY, length)) for length in lengths]


def packed(
    folder: Path, texts: Sequence[str], max_tokens: int = MAX_TOKENS
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """int32 ids[T] and lengths[B] of `texts` packed longest first, and the row that each text has there."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(texts)), key=lambda row: -len(tokens[row]))
    rows = np.empty(len(texts), dtype=np.int64)
    rows[order] = np.arange(len(texts))
    ids = np.concatenate([np.array(tokens[row], dtype=np.int32) for row in order])
    return ids, np.array([len(tokens[row]) for row in order], dtype=np.int32), rows


_ROOT = Path(tempfile.mkdtemp(prefix="gemb-tests-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


@cache
def _backbone(name: str) -> Path:
    """The transformers folder of a tiny model, with its tokenizer."""
    sort = SORTS[name]
    place = _ROOT / name.replace(" ", "-")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = tiny_model(name)
    model.save_pretrained(place)
    _write_tokenizer(place, model.config.get_text_config().pad_token_id, special=sort.special)
    return place


@cache
def tiny_model(name: str) -> Any:  # noqa: ANN401  # any model class of transformers
    """The tiny model `name` of SORTS as transformers has it, in fp32 and not in training."""
    sort = SORTS[name]
    small = {} if sort.family in ("T5Gemma", "DistilBert") else _SMALL
    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0} if not small else {}
    config = getattr(transformers, f"{sort.family}Config")(**{**small, **shared, **sort.settings})
    model = getattr(transformers, sort.model or f"{sort.family}Model")(config).eval()
    random = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _fill(key, tensor, random)
    return model.requires_grad_(False)


_COMES_BACK = ("o_proj.weight", "down_proj.weight", "Wo.weight", "output.dense.weight", "lin2.weight")


def _fill(name: str, tensor: torch.Tensor, random: torch.Generator) -> None:
    """Random numbers that keep states at about unit size; what is computed from the config stays."""
    noise = torch.randn(tensor.shape, generator=random)
    if name.endswith("layer_scalar"):
        tensor.copy_(1 + 0.2 * noise)
    elif "inv_freq" in name or "embed_scale" in name or "position_ids" in name or "token_type_ids" in name:
        return
    elif tensor.ndim >= 2:
        is_table = "embed" in name and "projection" not in name and "relative" not in name
        # What comes back to the stream is small beside it, as at the start of a training (GPT-2).
        share = 0.4 if name.endswith(_COMES_BACK) else 1.0
        tensor.copy_(noise if is_table else noise * share * tensor.shape[-1] ** -0.5)
    elif name.endswith("bias"):
        tensor.copy_(0.1 * noise)
    else:
        tensor.add_(0.2 * noise)  # gains; their neutral value depends on the family


def _write_tokenizer(place: Path, padding: int, *, special: bool) -> None:
    names = ["<s>", "<pad>", "</s>", "<unk>"] if padding == 1 else ["<pad>", "</s>", "<s>", "<unk>"]
    words = {word: number for number, word in enumerate([*names, *(f"w{n}" for n in range(4, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names)
    if special:
        around = [(name, words[name]) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    _write(place / "tokenizer_config.json", settings)


def _write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), "utf-8")


def renamed(source: Path, place: Path, rename: Mapping[str, str], config: Mapping[str, Any]) -> Path:
    """A copy of the folder `source` at `place` with new tensor prefixes and a new config.json.

    `rename` maps a beginning of a tensor name to another; the first that fits is taken.
    """
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    new = {}
    for name, tensor in tensors.items():
        start = next(start for start in rename if name.startswith(start))
        new[rename[start] + name[len(start) :]] = tensor
    save_file(new, place / "model.safetensors", metadata={"format": "pt"})
    _write(place / "config.json", config)
    return place
