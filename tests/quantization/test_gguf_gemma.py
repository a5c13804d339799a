"""EmbeddingGemma in GGUF: names, metadata and tokenizer as llama.cpp reads them."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, PoolingType, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, Keys, LlamaFileType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gemb.errors import MismatchError
from gemb.quantization.fake import fake_quantise
from gemb.quantization.gguf_gemma import (
    ARCHITECTURE,
    DENSE_TENSORS,
    gemma_metadata,
    gguf_name,
)
from gemb.quantization.gguf_layout import F32, KINDS, TensorKind, Value
from gemb.quantization.gguf_names import from_gguf, to_gguf
from gemb.quantization.gguf_reader import read_gguf
from gemb.quantization.gguf_writer import GgufTensor, write_gguf
from gemb.quantization.grids import GRIDS

CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
    "max_position_embeddings": 64,
    "use_bidirectional_attention": True,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "vocab_size": 320,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TEXTS = [
    "the theme of the thesis", "  two  spaces   three", "Straße, naïve 日本語", "aaaa", "heh the he",
    "\n\n\n", "a", "", "thethethe tthhee", "é e é",
]  # fmt: skip


def gemma_tokenizer() -> Tokenizer:
    """Gemma's tokenizer in small: BPE with byte fallback, spaces as marks, user-defined runs of spaces."""
    letters = ["▁", "t", "h", "e", "a", "m", "s", "i", "o", "f", "é", "ß", "r"]
    made = [
        ("t", "h"),
        ("▁", "th"),
        ("th", "e"),
        ("▁th", "e"),
        ("h", "e"),
        ("▁the", "m"),
        ("e", "s"),
        ("a", "a"),
    ]
    tokens = [*SPECIAL, "▁▁", "▁▁▁", "\n\n", "<unused0>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += letters + [left + right for left, right in made]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, made, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "<unused0>")])
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ("▁▁", "▁▁▁")])
    return tokenizer


def tokenizer_json() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(gemma_tokenizer().to_str())
    return loaded


def metadata(
    config: Mapping[str, Any] = CONFIG, tokenizer: Mapping[str, Any] | None = None, **changed: object
) -> dict[str, Value]:
    given: dict[str, Any] = {
        "name": "tiny",
        "kind": KINDS["q4_0"],
        "max_tokens": 64,
        "pooling": "mean",
        "dense": [(32, 64), (64, 32)],
        "prompts": {"query": "task: search result | query: ", "document": "title: none | text: ", "none": ""},
        "default_prompt": None,
        **changed,
    }
    return gemma_metadata(config, tokenizer or tokenizer_json(), **given)


def scored_tokens(text: str, read: Mapping[str, Any]) -> list[int]:
    """Token ids by llama.cpp's rules (llm_tokenizer_spm): user-defined tokens first, then the best score."""
    tokens, scores, kinds = (read[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    ids = {token: index for index, token in enumerate(tokens)}
    fixed = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.USER_DEFINED]
    pieces: list[str | int] = [text]
    for token in sorted(fixed, key=len, reverse=True):
        split: list[str | int] = []
        for piece in pieces:
            if isinstance(piece, int):
                split.append(piece)
                continue
            for number, part in enumerate(piece.split(token)):
                split += ([ids[token]] if number else []) + ([part] if part else [])
        pieces = split
    out: list[int] = [read["tokenizer.ggml.bos_token_id"]] * read["tokenizer.ggml.add_bos_token"]
    for piece in pieces:
        if isinstance(piece, int):
            out.append(piece)
            continue
        symbols = list(piece.replace(" ", "▁"))
        while True:
            joined = [ids.get(left + right) for left, right in pairwise(symbols)]
            pairs = [(-scores[index], at) for at, index in enumerate(joined) if index is not None]
            if not pairs:
                break
            at = min(pairs)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out + [read["tokenizer.ggml.eos_token_id"]] * read["tokenizer.ggml.add_eos_token"]


def test_the_scores_cut_texts_as_the_merges_do() -> None:
    read, tokenizer = metadata(), gemma_tokenizer()
    assert tokenizer.encode(TEXTS[0]).tokens[1:3] == ["the", "▁them"]
    for text in TEXTS:
        assert scored_tokens(text, read) == tokenizer.encode(text).ids


@pytest.mark.slow
def test_the_real_tokenizer_of_gemma_is_cut_by_its_scores() -> None:
    file = Path(__file__).parents[3] / "shared/data/models/gemma3-tokenizer/tokenizer.json"
    if not file.exists():
        pytest.skip("../shared/data is not there")
    read = metadata({**CONFIG, "vocab_size": 262144}, json.loads(file.read_text(encoding="utf-8")))
    tokenizer = Tokenizer.from_file(str(file))
    texts = [
        "The quick brown fox jumps.",
        "title: none | text: Übergrößenträger",
        "東京の天気は?",
        "x = f(a)",
    ]
    for text in texts:
        assert scored_tokens(text, read) == tokenizer.encode(text).ids


def test_kinds_of_tokens_are_those_of_llama_cpp() -> None:
    read: dict[str, Any] = metadata()
    kinds = dict(zip(read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"], strict=True))
    assert len(kinds) == CONFIG["vocab_size"]
    expected = {
        "<pad>": TokenType.CONTROL, "<bos>": TokenType.CONTROL, "<unk>": TokenType.UNKNOWN,
        "<unused0>": TokenType.CONTROL, "  ": TokenType.USER_DEFINED, "\n\n": TokenType.USER_DEFINED,
        "<0x0A>": TokenType.BYTE, "▁the": TokenType.NORMAL, "[PAD319]": TokenType.UNUSED,
    }  # fmt: skip
    assert {token: kinds[token] for token in expected} == expected


def test_names_of_tensors_are_those_of_gguf_py() -> None:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    with torch.device("meta"):
        names = list(Gemma3TextModel(Gemma3TextConfig(**CONFIG)).state_dict())
    assert len(names) == 2 + 3 * 13
    theirs = get_tensor_name_map(MODEL_ARCH.GEMMA_EMBEDDING, 3)
    assert ARCHITECTURE == MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA_EMBEDDING]
    for name in names:
        assert gguf_name(name) == theirs.get_name(name, try_suffixes=(".weight",))
    for ours in DENSE_TENSORS:
        assert theirs.get_name(ours, try_suffixes=(".weight",)) == ours


def test_keys_are_those_of_gguf_py() -> None:
    keys = {
        value.replace("{arch}", ARCHITECTURE).replace("{dense}", dense)
        for group in vars(Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str)
        for dense in ("dense_2", "dense_3")
    }
    assert {key for key in metadata() if key not in keys} == {
        "gemb.prompt_names", "gemb.prompt_texts", "gemb.default_prompt",
    }  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_the_metadata_say_what_the_folder_says(nested: bool) -> None:
    config = dict(CONFIG)
    if nested:
        del config["rope_theta"], config["rope_local_base_freq"]
        config["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    read = metadata(config)
    own = {key.removeprefix("gemma-embedding."): value for key, value in read.items()}
    expected = {
        "general.file_type": LlamaFileType.MOSTLY_Q4_0, "context_length": 64, "embedding_length": 32,
        "block_count": 3, "feed_forward_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.key_length": 32, "attention.layer_norm_rms_epsilon": 1e-6, "attention.causal": False,
        "attention.sliding_window": 16, "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4, "pooling_type": PoolingType.MEAN, "dense_2_feat_in": 32,
        "dense_2_feat_out": 64, "dense_3_feat_in": 64, "dense_3_feat_out": 32,
        "gemb.prompt_names": ["query", "document", "none"],
        "gemb.prompt_texts": ["task: search result | query: ", "title: none | text: ", ""],
    }  # fmt: skip
    assert {key: own[key] for key in expected} == expected


def test_file_types_are_those_of_llama_cpp() -> None:
    theirs = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    for name, kind in KINDS.items():
        assert kind.file_type == LlamaFileType[theirs.get(name, f"MOSTLY_{name.upper()}")]


@pytest.mark.parametrize("kind", [KINDS["q4_0"], KINDS["q8_0"]], ids=lambda kind: kind.name)
def test_the_exported_file_computes_what_training_through_its_grid_computes(
    kind: TensorKind, tmp_path: Path
) -> None:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    torch.manual_seed(0)
    model = Gemma3TextModel(Gemma3TextConfig(**CONFIG))  # it has no dropout
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight.normal_(0, 0.1)
    tensors = [
        GgufTensor(
            gguf_name(name),
            tuple(weight.shape),
            kind if weight.ndim == 2 else F32,
            lambda name=name, weight=weight: to_gguf(ARCHITECTURE, gguf_name(name), weight, {}),  # type: ignore[misc]
        )
        for name, weight in weights.items()
    ]
    write_gguf(tmp_path / "m.gguf", metadata(kind=kind), tensors)
    read = read_gguf(tmp_path / "m.gguf")
    assert len(GGUFReader(tmp_path / "m.gguf").tensors) == len(read.tensors) == len(weights)
    exported = {
        name: from_gguf(ARCHITECTURE, gguf_name(name), read.tensor(gguf_name(name)), {}) for name in weights
    }
    trained = {
        name: fake_quantise(weight, GRIDS[kind.name]) if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }
    ids = torch.tensor([[2, 280, 270, 281, 1]])
    of_file = torch.func.functional_call(model, exported, (ids,)).last_hidden_state
    in_training = torch.func.functional_call(model, trained, (ids,)).last_hidden_state
    assert float((of_file - in_training).abs().max()) == 0
    with torch.no_grad():
        in_floats = model(ids).last_hidden_state
    assert float((of_file - in_floats).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("config", "changed", "problem"),
    [
        ({"model_type": "bert"}, {}, "its model_type is 'bert', not 'gemma3_text'"),
        ({"use_bidirectional_attention": False}, {},
         "its attention is causal (use_bidirectional_attention is not set)"),
        ({"is_causal": False}, {}, "is_causal=false widens its windows by one token on each side"),
        ({"hidden_activation": "gelu"}, {}, "its hidden_activation is 'gelu', not 'gelu_pytorch_tanh'"),
        ({"query_pre_attn_scalar": 16}, {},
         "its query_pre_attn_scalar is 16, but its head_dim 32; llama.cpp takes the head_dim for both"),
        ({"attention_bias": True}, {}, "its attention has biases"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, {}, "its rotary scaling is 'linear'"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, {},
         "its layers with full attention do not come at one fixed distance"),
        ({}, {"pooling": "max"}, "its pooling is 'max', not one of mean, cls, lasttoken"),
        ({}, {"dense": [(32, 32)]}, "it has 1 Dense modules; llama.cpp knows none or two"),
        ({}, {"kind": KINDS["f16"]}, "Gemma's activations overflow f16 in llama.cpp (take bf16 or f32)"),
        ({"attention_bias": True}, {"pooling": "max"},
         "its attention has biases; its pooling is 'max', not one of mean, cls, lasttoken"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused(
    config: dict[str, Any], changed: dict[str, Any], problem: str
) -> None:
    with pytest.raises(MismatchError) as error:
        metadata({**CONFIG, **config}, **changed)
    assert str(error.value) == f"tiny cannot be written as gemma-embedding: {problem}"


def test_layers_that_all_slide_have_a_period_past_the_last() -> None:
    read = metadata({**CONFIG, "layer_types": ["sliding_attention"] * 3})
    assert read["gemma-embedding.attention.sliding_window_pattern"] == 4


def test_a_tokenizer_that_is_not_gemmas_is_refused() -> None:
    tokenizer = tokenizer_json()
    with pytest.raises(MismatchError) as error:
        metadata(tokenizer={**tokenizer, "model": {"type": "WordPiece", "vocab": {}}})
    told = "tiny: its tokenizer is WordPiece, not the BPE with byte_fallback that Gemma has"
    assert str(error.value) == told
    with pytest.raises(MismatchError) as error:
        metadata({**CONFIG, "vocab_size": 100}, tokenizer)
    assert str(error.value) == "tiny: its tokenizer has 285 tokens, but vocab_size is 100"
    with pytest.raises(MismatchError) as error:
        metadata({**CONFIG, "eos_token_id": 3}, tokenizer)
    assert str(error.value) == (
        "tiny: its tokenizer puts tokens [2] before a text and [1] after it; "
        "gemma-embedding can put 2 (bos) and 3 (eos) there"
    )


def test_an_added_token_past_the_table_is_left_out() -> None:
    tokenizer = tokenizer_json()
    past = {**tokenizer["added_tokens"][0], "id": 320, "content": "<image_soft_token>"}
    tokenizer["added_tokens"].append(past)
    assert metadata(tokenizer=tokenizer) == metadata()


def test_a_tensor_that_has_no_place_is_named() -> None:
    with pytest.raises(
        MismatchError, match=r"^gemma-embedding has no place for layers\.0\.mlp\.up_proj\.bias$"
    ):
        gguf_name("layers.0.mlp.up_proj.bias")
