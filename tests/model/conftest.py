"""Tiny model folders: everything a real one has, a few kilobytes each."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "vocab_size": len(VOCABULARY),
    "type_vocab_size": 2,
    "pad_token_id": 0,
}

FolderMaker = Callable[..., Path]


def write_json(path: Path, value: object) -> None:
    """Write `value`, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def bert_tensors() -> dict[str, NDArray[np.float32]]:
    """All tensors of a BertModel of CONFIG, without the pooler's."""
    random = np.random.default_rng(7)
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), 8),
        "embeddings.position_embeddings.weight": (64, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
    }
    for part, outputs, inputs in (
        ("attention.self.query", 8, 8),
        ("attention.self.key", 8, 8),
        ("attention.self.value", 8, 8),
        ("attention.output.dense", 8, 8),
        ("intermediate.dense", 16, 8),
        ("output.dense", 8, 16),
    ):
        shapes[f"encoder.layer.0.{part}.weight"] = (outputs, inputs)
        shapes[f"encoder.layer.0.{part}.bias"] = (outputs,)
    for part in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes[f"encoder.layer.0.{part}.weight"] = (8,)
        shapes[f"encoder.layer.0.{part}.bias"] = (8,)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_tokenizer(folder: Path, model_max_length: float = 64) -> None:
    """A WordPiece tokenizer over single letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordPiece({token: id_ for id_, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "model_max_length": model_max_length, **names},
    )


@pytest.fixture
def make_folder(tmp_path: Path) -> FolderMaker:
    """Make a model folder: transformer, mean pooling, Dense 8 -> 6 with Tanh, LayerNorm, Normalize."""

    def make(
        name: str = "model",
        *,
        spelling: str = "old",
        modules: bool = True,
        config: Mapping[str, Any] = CONFIG,
        pooling: Mapping[str, Any] | None = None,
        dense: Mapping[str, Any] | None = None,
        declared: Mapping[str, Any] | None = None,
        max_seq_length: int | None = 32,
        model_max_length: float = 64,
        weights: bool = True,
    ) -> Path:
        folder = tmp_path / name
        write_json(folder / "config.json", config)
        write_tokenizer(folder, model_max_length)
        random = np.random.default_rng(8)
        if weights:
            save_file(bert_tensors(), folder / "model.safetensors")
        if not modules:
            return folder
        old = spelling == "old"
        kinds = ["Transformer", "Pooling", "Dense", "LayerNorm", "Normalize"]
        folders = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds) if place)]
        entries = [
            {"idx": place, "name": str(place), "path": path, "type": OLD + kind if old else NEW[kind]}
            for place, (kind, path) in enumerate(zip(kinds, folders, strict=True))
        ]
        write_json(folder / "modules.json", entries)
        settings: dict[str, Any] = {}
        if max_seq_length is not None:
            settings["max_seq_length"] = max_seq_length
        if old:
            settings["do_lower_case"] = False
            flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
            pooled: Mapping[str, Any] = {"word_embedding_dimension": 8, **flags}
        else:
            settings["transformer_task"] = "feature-extraction"
            pooled = {"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}
        write_json(folder / "sentence_bert_config.json", settings)
        write_json(folder / "1_Pooling/config.json", pooling or pooled)
        linear = {"in_features": 8, "out_features": 6, "bias": True}
        activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
        write_json(folder / "2_Dense/config.json", {**linear, **activation, **(dense or {})})
        tensors = {
            "linear.weight": random.standard_normal((6, 8), dtype=np.float32),
            "linear.bias": random.standard_normal(6, dtype=np.float32),
        }
        save_file(tensors, folder / "2_Dense/model.safetensors")
        write_json(folder / "3_LayerNorm/config.json", {"dimension": 6})
        norm = {"norm.weight": np.ones(6, np.float32), "norm.bias": np.zeros(6, np.float32)}
        save_file(norm, folder / "3_LayerNorm/model.safetensors")
        prompts = {"prompts": {"query": "find: ", "document": "text: "}, "default_prompt_name": None}
        write_json(folder / "config_sentence_transformers.json", declared or prompts)
        return folder

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache for this test alone."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("GEMB_CACHE", str(cache))
    return cache
