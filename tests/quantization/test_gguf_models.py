"""The architectures of llama.cpp besides Gemma's: names, turned and cut tensors, tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES, Keys
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gemb.errors import MismatchError
from gemb.quantization.gguf_layout import KINDS
from gemb.quantization.gguf_models import GgufForm, GgufModel, gguf_form, own_form
from gemb.quantization.gguf_names import READ_ARCHITECTURES, from_gguf, full_name, part_of, to_gguf
from gemb.quantization.gguf_reader import read_gguf
from gemb.quantization.gguf_writer import write_gguf
from tests.gguf_models import FAMILIES, gguf_folder

OTHERS = [name for name in FAMILIES if name != "gemma3_text"]


def described(place: Path, **changed: Any) -> GgufModel:  # noqa: ANN401
    config = json.loads((place / "config.json").read_text())
    values: dict[str, Any] = {
        "name": "tiny", "config": config, "tokenizer": json.loads((place / "tokenizer.json").read_text()),
        "lower_cases": False, "prefix": "", "part": "", "pooling": ("mean",), "pools_prompt": True,
        "dense": (), "others": (), "max_tokens": 512, "prompts": {}, "default_prompt": None, **changed,
    }  # fmt: skip
    return GgufModel(**values)


def form_of(place: Path, **changed: Any) -> GgufForm:  # noqa: ANN401
    return gguf_form(described(place, **changed), KINDS["q8_0"])


@pytest.mark.parametrize("family", OTHERS)
def test_names_and_keys_are_those_of_gguf_py(family: str, tmp_path: Path) -> None:
    place = gguf_folder(tmp_path, family)
    form = form_of(place)
    assert form.architecture in READ_ARCHITECTURES
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == form.architecture)
    theirs = get_tensor_name_map(architecture, 2)
    names = [name for name in load_file(place / "model.safetensors") if "pooler" not in name]
    for name in names:
        mapped = theirs.get_name(name, try_suffixes=(".weight", ".bias"))
        mapped = mapped or theirs.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        assert form.name_of("", name) == mapped, name
    own = {key for key in form.metadata if key.startswith(f"{form.architecture}.")}
    known = {
        value.replace("{arch}", form.architecture)
        for group in (Keys.LLM, Keys.Attention, Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert own <= known


def test_the_heads_of_llama_are_turned_and_turned_back() -> None:
    metadata = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    weight = torch.randn(32, 16)
    for name, heads in (("blk.0.attn_q.weight", 4), ("blk.0.attn_k.weight", 2)):
        turned = to_gguf("llama", name, weight, metadata)
        # as llama.cpp's converter (LlamaModel.permute) does it
        expected = weight.reshape(heads, 2, 32 // heads // 2, 16).swapaxes(1, 2).reshape(weight.shape)
        assert torch.equal(turned, expected)
        assert not torch.equal(turned, weight)
        assert torch.equal(from_gguf("llama", name, turned, metadata), weight)
        assert torch.equal(to_gguf("qwen3", name, weight, {}), weight)
    assert torch.equal(to_gguf("llama", "blk.0.attn_v.weight", weight, metadata), weight)


def test_the_positions_of_roberta_begin_after_its_padding(tmp_path: Path) -> None:
    form = form_of(gguf_folder(tmp_path, "xlm-roberta"))
    assert form.metadata["bert.context_length"] == 600 - 2
    table = torch.randn(600, 8)
    cut = to_gguf("bert", "position_embd.weight", table, form.metadata)
    assert torch.equal(cut, table[2:])
    back = from_gguf("bert", "position_embd.weight", cut, form.metadata)
    assert torch.equal(back[2:], table[2:])
    assert not back[:2].any()


def test_word_pieces_have_a_mark_where_a_word_begins(tmp_path: Path) -> None:
    place = gguf_folder(tmp_path, "bert")
    metadata = form_of(place).metadata
    tokens: Any = metadata["tokenizer.ggml.tokens"]
    vocabulary = Tokenizer.from_file(str(place / "tokenizer.json")).get_vocab()
    assert tokens[vocabulary["the"]] == "▁the"
    assert tokens[vocabulary["##s"]] == "s"
    assert tokens[vocabulary["[CLS]"]] == "[CLS]"
    assert metadata["tokenizer.ggml.cls_token_id"] == vocabulary["[CLS]"]
    assert metadata["tokenizer.ggml.seperator_token_id"] == vocabulary["[SEP]"]
    assert metadata["tokenizer.ggml.normalizer.lowercase"] is True


def test_chunks_tell_qwen_from_llama(tmp_path: Path) -> None:
    found = {name: form_of(gguf_folder(tmp_path / name, name)).metadata for name in ("qwen3", "llama")}
    assert found["qwen3"]["tokenizer.ggml.pre"] == "qwen2"
    assert found["llama"]["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["qwen3"]["tokenizer.ggml.add_bos_token"] is False
    assert found["qwen3"]["tokenizer.ggml.add_eos_token"] is True
    assert found["llama"]["tokenizer.ggml.add_bos_token"] is True


def test_a_map_of_characters_is_stored_as_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"map": b"\x00\xff\x07"}, [])
    assert read_gguf(tmp_path / "m.gguf").metadata["map"] == [0, 255, 7]


@pytest.mark.parametrize(
    ("family", "changed", "problem"),
    [
        ("bert", {"tokenizer": {}}, "it has no tokenizer.json"),
        ("bert", {"others": ("layer_norm",)}, "it has a layer_norm module"),
        ("bert", {"pooling": ("mean", "max")},
         "its pooling is mean and max, not one of mean, cls, lasttoken"),
        ("qwen3", {"pools_prompt": False, "pooling": ("max",)},
         "its pooling is max, not one of mean, cls, lasttoken; its pooling leaves out the prompt"),
    ],
)  # fmt: skip
def test_all_that_llama_cpp_lacks_is_told_at_once(
    family: str, changed: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError) as caught:
        form_of(gguf_folder(tmp_path, family), **changed)
    assert str(caught.value) == f"tiny cannot be written for llama.cpp: {problem}"


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    form = form_of(gguf_folder(tmp_path, "bert"))
    with pytest.raises(MismatchError, match=r"^tiny: bert of llama\.cpp has no place for adapter\.weight$"):
        form.name_of("", "adapter.weight")


def test_the_form_of_gemb_keeps_every_name(tmp_path: Path) -> None:
    form = own_form(described(gguf_folder(tmp_path, "bert")), KINDS["q4_0"])
    assert form.name_of("", "adapter.weight") == "adapter.weight"
    assert form.name_of("2_Dense", "linear.weight") == "2_Dense/linear.weight"
    assert "tokenizer.ggml.tokens" not in form.metadata
    assert part_of(full_name("2_Dense", "linear.weight")) == ("2_Dense", "linear.weight")
    assert part_of("norm.weight") == ("", "norm.weight")
