"""Every family equals transformers token by token, and sentence-transformers vector by vector."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from gemb.device import processor
from gemb.errors import MismatchError
from gemb.model.attention import reach_of_layers
from gemb.model.encoder import PackedEncoder
from gemb.model.families import FAMILIES, NotPacked, activation_of, family, prefix_of
from gemb.model.families.rope import rotary
from gemb.model.folder import read_folder
from gemb.model.kernels import Kernels, can_pack
from gemb.model.weights import Weights
from tests.conftest import DATA, ROOT
from tests.models import (
    MODES,
    PROMPT_TOKENS,
    PROMPTS,
    SORTS,
    VOCABULARY,
    packed,
    random_texts,
    renamed,
    tiny_folder,
    tiny_model,
)

FP32 = 2e-5
"""The bar for the largest difference in fp32; what is seen is below 1e-6."""
BF16 = 0.9999
"""The bar for the least cosine of bf16 vectors to fp32 ones."""
# One word, as long as a window and one more, equal lengths, wildly unequal ones, at and above the maximum.
LENGTHS = (1, 7, 4, 5, 6, 44, 2, 46, 60, 5, 20, 21, 2)
TEXTS = random_texts(LENGTHS)
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(
        torch.bfloat16,
        id="bf16",
        marks=pytest.mark.skipif(not processor().has_bf16, reason="this processor has no bf16 instructions"),
    ),
]

Vectors = NDArray[np.float32]


def encoder(folder: Path, dtype: torch.dtype = torch.float32) -> PackedEncoder:
    """The packed encoder of a folder on the CPU."""
    return PackedEncoder(read_folder(folder), Kernels("cpu", dtype))


def vectors_of(model: PackedEncoder, folder: Path, texts: list[str], prompt_tokens: int = 0) -> Vectors:
    """Vectors of `texts`, all in one batch, in their order."""
    ids, lengths, rows = packed(folder, texts)
    found: Vectors = model.forward(ids, lengths, prompt_tokens).numpy()[rows]
    return found


def reference(folder: Path) -> Any:  # noqa: ANN401  # sentence-transformers is untyped here
    """The folder in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # Qwen's tokenizer class would read the words of our small vocabulary as bytes.
    model[0].processor = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return model


def cosines(left: Vectors, right: Vectors) -> Vectors:
    """Cosine of each row of one with the same row of the other."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    result: Vectors = (left * right).sum(axis=1) / norms
    return result


# --- equal to sentence-transformers


@pytest.fixture(scope="session")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[Path, Vectors]]:
    """A folder that pools in every mode, and its vectors of TEXTS with the query prompt by their code."""

    @cache
    def make(name: str, include_prompt: bool) -> tuple[Path, Vectors]:
        place = tmp_path_factory.mktemp("pooled") / "model"
        tiny_folder(place, name, pooling=MODES, include_prompt=include_prompt, normalises=False)
        return place, reference(place).encode(TEXTS, prompt_name="query", batch_size=len(TEXTS))

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include_prompt", [True, False], ids=["with prompt", "without prompt"])
@pytest.mark.parametrize("name", SORTS)
def test_every_pooling_of_every_family_equals_sentence_transformers(
    name: str,
    include_prompt: bool,
    dtype: torch.dtype,
    pooled: Callable[[str, bool], tuple[Path, Vectors]],
) -> None:
    folder, theirs = pooled(name, include_prompt)
    prompted = [PROMPTS["query"] + text for text in TEXTS]
    skipped = PROMPT_TOKENS["query"] + SORTS[name].special
    ours = vectors_of(encoder(folder, dtype), folder, prompted, skipped)
    assert ours.shape == theirs.shape
    parts = zip(MODES, np.split(ours, len(MODES), axis=1), np.split(theirs, len(MODES), axis=1), strict=True)
    for mode, our_part, their_part in parts:
        if dtype == torch.float32:
            assert np.abs(our_part - their_part).max() <= FP32, mode
        else:
            assert cosines(our_part, their_part).min() >= BF16, mode


@pytest.mark.parametrize("name", SORTS)
def test_every_family_gives_the_normalised_vectors_of_sentence_transformers(
    name: str, tmp_path: Path
) -> None:
    mode = "lasttoken" if SORTS[name].is_causal else "mean"
    folder = tiny_folder(tmp_path / "model", name, pooling=mode)
    theirs = reference(folder).encode(TEXTS, batch_size=4)
    ours = vectors_of(encoder(folder), folder, TEXTS)
    assert np.abs(ours - theirs).max() <= FP32


# --- equal to transformers


@pytest.mark.parametrize("name", SORTS)
def test_every_token_state_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", name)
    ids, lengths, _ = packed(folder, TEXTS)
    ours = encoder(folder).states(ids, lengths)
    with torch.no_grad():
        theirs = [
            tiny_model(name)(text[None], attention_mask=torch.ones_like(text)[None]).last_hidden_state[0]
            for text in torch.from_numpy(ids).long().split(lengths.tolist())  # type: ignore[no-untyped-call]
        ]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=FP32, rtol=0)


STORIES = DATA / "models" / "stories260K-hf"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES.relative_to(ROOT.parent)} is not on this machine")
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_real_llama_equals_transformers(is_causal: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, "is_causal": is_causal}), "utf-8")
    story = "Once upon a time, there was a little dog named Max. He liked to run in the park. " * 3
    ids, lengths, _ = packed(folder, [story, "Once", story[:90]], 200)
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        theirs = [
            model(text[None]).last_hidden_state[0]
            for text in torch.from_numpy(ids).long().split(lengths.tolist())  # type: ignore[no-untyped-call]
        ]
    scale = torch.cat(theirs).abs().max()  # some channels of a trained Llama are large
    ours = encoder(folder).states(ids, lengths)
    torch.testing.assert_close(ours / scale, torch.cat(theirs) / scale, atol=FP32, rtol=0)


@pytest.mark.parametrize("name", [name for name in SORTS if SORTS[name].is_packed])
def test_no_tensor_of_a_checkpoint_is_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", name))
    read: set[str] = set()
    load = Weights.tensor

    def tensor(self: Weights, tensor_name: str) -> torch.Tensor:
        read.add(tensor_name)
        return load(self, tensor_name)

    monkeypatch.setattr(Weights, "tensor", tensor)
    PackedEncoder(folder, Kernels("cpu", torch.float32))
    left_out = {part for part in set(folder.weights()) - read if "pooler." not in part}
    assert left_out == set()


# --- a text does not see its neighbours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SORTS)
def test_a_vector_is_the_same_to_the_bit_in_every_batch(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if dtype == torch.bfloat16 and not can_pack(dtype):
        pytest.skip("torch packs no bf16 weights here")
    folder = tiny_folder(tmp_path / "model", name, pooling=["mean", "max", "weightedmean"])
    model = encoder(folder, dtype)
    alone = np.concatenate([vectors_of(model, folder, [text]) for text in TEXTS])
    together = vectors_of(model, folder, TEXTS)
    assert np.array_equal(together, alone)
    some = [0, 5, 7, 8, 11, 3]
    assert np.array_equal(
        vectors_of(model, folder, [TEXTS[row] for row in some] * 20), np.tile(alone[some], (20, 1))
    )


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_a_text_that_spells_the_padding_out_equals_sentence_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", name, normalises=False)
    texts = ["w5 <pad> w6 w7 <pad> <pad> w8", "<pad>", "w9 w10 w11 w12", "<pad> w5 w6", "w5 w6 <pad>"]
    theirs = reference(folder).encode(texts)
    assert np.abs(vectors_of(encoder(folder), folder, texts) - theirs).max() <= FP32


# --- windows


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("gemma3", 4, 4),  # sliding_window 8 with the flag: half of it to each side
        ("gemma3 with both", 5, 5),
        ("gemma3 without causality", 8, 8),
        ("gemma3 as a decoder", 7, 0),
        ("embedding_gemma2", 5, 5),
        ("gemma2", 5, 5),
        ("gemma2 as a decoder", 4, 0),
        ("t5gemma", 5, 5),
        ("mistral", 6, 6),
        ("mistral as a decoder", 5, 0),
        ("qwen2 with a window", 5, 0),
        ("modernbert", 4, 4),
    ],
)
@pytest.mark.parametrize("changed", [0, 13, 39])
def test_one_sliding_layer_moves_the_tokens_within_reach_and_no_other(
    name: str, left: int, right: int, changed: int, tmp_path: Path
) -> None:
    one: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    settings = json.loads((tiny_folder(tmp_path / "whole", name) / "config.json").read_text("utf-8"))
    one = {"encoder": {**settings["encoder"], **one}} if name == "t5gemma" else one
    folder = tiny_folder(tmp_path / "model", name, config=one)
    model = encoder(folder)
    text = np.arange(20, 60, dtype=np.int32)
    other = text.copy()
    other[changed] = 99
    # Neighbours of other lengths before and after, so that a wrong edge would show.
    around = np.arange(70, 120, dtype=np.int32), np.arange(5, 8, dtype=np.int32)
    lengths = np.array([50, 40, 3], dtype=np.int32)
    before, after = (
        model.states(np.concatenate((around[0], one_text, around[1])), lengths) for one_text in (text, other)
    )
    moved = np.flatnonzero((before != after).any(dim=1).numpy()) - 50
    # A token sees `left` before it and `right` after it, so the change reaches `right` back and `left` on.
    assert moved.tolist() == list(range(max(0, changed - right), min(40, changed + left + 1)))


def test_an_odd_window_beside_the_flag_is_told(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "gemma3", config={"sliding_window": 257}))
    assert (
        "sliding_window is 257, an odd number: was it halved when saved? "
        "a token sees 128 to each side, as in transformers" in folder.notes
    )


# --- folders that hold more than the text part, and older spellings


def test_the_text_part_of_a_gemma3_folder_gives_the_same_vectors(tmp_path: Path) -> None:
    plain = tiny_folder(tmp_path / "plain", "gemma3")
    settings = json.loads((plain / "config.json").read_text("utf-8"))
    whole = {"model_type": "gemma3", "text_config": settings, "vision_config": {"hidden_size": 8}}
    for prefix in ("language_model.model.", "model.language_model."):
        folder = renamed(plain, tmp_path / prefix, {"": prefix}, whole)
        assert np.array_equal(
            vectors_of(encoder(folder), folder, TEXTS), vectors_of(encoder(plain), plain, TEXTS)
        )


def test_the_text_part_of_an_embedding_gemma2_folder_gives_the_same_vectors(tmp_path: Path) -> None:
    plain = tiny_folder(tmp_path / "plain", "embedding_gemma2")
    text = tiny_model("embedding_gemma2")
    config = transformers.EmbeddingGemma2Config(text_config=text.config)
    whole = transformers.EmbeddingGemma2Model(config)
    whole.language_model.load_state_dict(text.state_dict())
    folder = tmp_path / "whole"
    shutil.copytree(plain, folder)
    whole.save_pretrained(folder)
    assert np.array_equal(
        vectors_of(encoder(folder), folder, TEXTS), vectors_of(encoder(plain), plain, TEXTS)
    )


def test_the_encoder_of_a_whole_t5gemma_folder_gives_the_same_vectors(tmp_path: Path) -> None:
    plain = tiny_folder(tmp_path / "plain", "t5gemma")
    alone = tiny_model("t5gemma")
    config = transformers.T5GemmaConfig(
        encoder=alone.config.encoder.to_dict(), decoder=alone.config.encoder.to_dict(), vocab_size=VOCABULARY
    )
    whole = transformers.T5GemmaModel(config)
    whole.encoder.load_state_dict(alone.encoder.state_dict())
    folder = tmp_path / "whole"
    shutil.copytree(plain, folder)
    whole.save_pretrained(folder)
    assert np.array_equal(
        vectors_of(encoder(folder), folder, TEXTS), vectors_of(encoder(plain), plain, TEXTS)
    )


def _older(settings: Mapping[str, Any], drop: list[str], add: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in settings.items() if key not in drop}, **add}


@pytest.mark.parametrize(
    ("name", "drop", "add"),
    [
        ("gemma3", ["rope_parameters", "layer_types"], {
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window_pattern": 3,
        }),
        ("modernbert", ["rope_parameters", "layer_types"], {
            "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3,
        }),
        ("gemma2", ["rope_parameters", "layer_types", "attn_logit_softcapping", "hidden_activation"], {
            "rope_theta": 1e4,
        }),
        ("mistral", ["rope_parameters"], {"rope_theta": 1e4}),
    ],
)  # fmt: skip
def test_the_spelling_of_an_older_config_gives_the_same_vectors(
    name: str, drop: list[str], add: Mapping[str, Any], tmp_path: Path
) -> None:
    plain = tiny_folder(tmp_path / "plain", name)
    settings = json.loads((plain / "config.json").read_text("utf-8"))
    folder = tmp_path / "older"
    shutil.copytree(plain, folder)
    (folder / "config.json").write_text(json.dumps(_older(settings, drop, add)), "utf-8")
    assert np.array_equal(
        vectors_of(encoder(folder), folder, TEXTS), vectors_of(encoder(plain), plain, TEXTS)
    )


def test_norms_called_gamma_and_beta_are_read(tmp_path: Path) -> None:
    plain = tiny_folder(tmp_path / "plain", "bert")
    folder = tmp_path / "older"
    shutil.copytree(plain, folder)
    tensors = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(
        vectors_of(encoder(folder), folder, TEXTS), vectors_of(encoder(plain), plain, TEXTS)
    )


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        (
            "eurobert",
            {
                "rope_type": "llama3",
                "rope_theta": 250000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        ("gemma3", {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)  # fmt: skip
def test_scaled_rotary_frequencies_are_those_of_transformers(
    name: str, scaling: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model", name, config={"rope_parameters": scaling})
    model = transformers.AutoModel.from_pretrained(folder)
    ids, lengths, _ = packed(folder, TEXTS)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids[: lengths[0]]).long()[None]).last_hidden_state[0]
    torch.testing.assert_close(encoder(folder).states(ids, lengths)[: lengths[0]], theirs, atol=FP32, rtol=0)
    plain = tiny_folder(tmp_path / "plain", name)
    assert not torch.allclose(encoder(plain).states(ids, lengths)[: lengths[0]], theirs, atol=1e-2)


# --- what is not packed


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
         "its rotary scaling 'yarn' is none of default, linear, llama3"),
        ("llama", {"hidden_act": "tanh"}, "its activation is 'tanh'"),
        ("bert", {"hidden_act": "tanh"}, "its activation is 'tanh'"),
        ("mpnet", {}, "model type 'mpnet' is not among its families"),
    ],
)  # fmt: skip
def test_what_the_packed_path_does_not_know_runs_through_transformers_and_is_told(
    name: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model", name, config=config)
    model = encoder(folder)
    assert model.notes == [f"runs through transformers' own module, slower: {reason}"]
    theirs = reference(folder).encode(TEXTS)
    assert np.abs(vectors_of(model, folder, TEXTS) - theirs).max() <= FP32


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "its positions are 'relative_key', not absolute",
        ),
        ("bert", {"is_decoder": True}, "it is set up as a decoder"),
        ("llama", {"partial_rotary_factor": 0.5}, "its rotary positions turn only a part of each head"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "it caps attention scores, which Gemma 3 does not do"),
        (
            "qwen3",
            {"num_hidden_layers": 0, "layer_types": None},
            "config.json does not tell what its layers attend to",
        ),
    ],
)
def test_a_family_says_what_it_does_not_know(
    name: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", name))
    with pytest.raises(NotPacked) as caught:
        family(folder.family).build(
            {**folder.config, **config}, folder.weights(), Kernels("cpu", torch.float32)
        )
    assert str(caught.value) == reason


def test_norms_with_biases_are_not_packed_in_modernbert(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "modernbert")
    tensors = {**load_file(folder / "model.safetensors"), "final_norm.bias": torch.zeros(64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = read_folder(folder)
    with pytest.raises(NotPacked, match=r"^its norms have biases$"):
        family("modernbert").build(settings.config, settings.weights(), Kernels("cpu", torch.float32))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"has no tensor layers\.2\.mlp\.up_proj\.weight"):
        encoder(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, None])
def test_quantised_weights_are_refused(dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    seen = ""
    if dtype is None:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    else:
        tensors = load_file(folder / "model.safetensors")
        tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].to(dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        name = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
        seen = f" (layers.0.mlp.up_proj.weight is {name})"
    with pytest.raises(MismatchError) as caught:
        encoder(folder)
    assert str(caught.value) == (
        f"{folder / 'config.json'}: the weights are quantised{seen}, which gemb does not compute with; "
        "use the model that they were made from"
    )


def test_weights_of_another_family_are_not_packed(tmp_path: Path) -> None:
    weights = read_folder(tiny_folder(tmp_path / "model", "llama")).weights()
    with pytest.raises(NotPacked, match=r"^its weights have no embeddings\.word_embeddings\.weight$"):
        prefix_of(weights, "embeddings.word_embeddings.weight")
    assert prefix_of(weights, "mlp.up_proj.weight") == "layers.0."


def test_every_family_file_builds_and_tells_its_layers() -> None:
    for model_type in FAMILIES:
        assert callable(family(model_type).build)
    with pytest.raises(NotPacked, match=r"^model type 'mamba' is not among its families$"):
        family("mamba")
    assert activation_of("gelu_new") == "gelu_tanh"


def test_rotary_positions_of_a_bare_config_have_the_default_base() -> None:
    bare = rotary({}, 4)
    given = rotary({"rope_theta": 10_000.0}, 4)
    other = rotary({"rope_theta": 500.0}, 4)
    from gemb.model.layout import Layout

    layout = Layout.of(np.array([7], dtype=np.int32))
    assert torch.equal(bare.at(layout), given.at(layout))
    assert not torch.equal(bare.at(layout), other.at(layout))


# --- sizes of the published models


def _sparse_checkpoint(place: Path, model: torch.nn.Module) -> Path:
    """A safetensors file with the header of `model` in bf16 and no bytes on the disk behind it."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    place.mkdir()
    with (place / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return place


EMBEDDING_GEMMA: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262_144,
    "sliding_window": 512,
    "use_bidirectional_attention": True,
}


def test_embedding_gemma_has_302_863_104_numbers_and_307_581_696_with_its_dense_layers(
    tmp_path: Path,
) -> None:
    config = transformers.Gemma3TextConfig(**EMBEDDING_GEMMA)
    with torch.device("meta"):
        model = transformers.Gemma3TextModel(config)
        dense = torch.nn.ModuleList(
            [torch.nn.Linear(768, 3072, bias=False), torch.nn.Linear(3072, 768, bias=False)]
        )
    backbone = Weights.read(_sparse_checkpoint(tmp_path / "backbone", model)).parameters
    assert backbone == 302_863_104
    assert backbone + Weights.read(_sparse_checkpoint(tmp_path / "dense", dense)).parameters == 307_581_696
    layers = reach_of_layers(config.to_dict())
    assert layers is not None
    assert [place for place, reach in enumerate(layers, 1) if reach.left is None] == [6, 12, 18, 24]
    assert {(reach.left, reach.right) for reach in layers if reach.left is not None} == {(256, 256)}


def test_embedding_gemma2_has_271_002_624_numbers_in_its_text_part(tmp_path: Path) -> None:
    config = transformers.EmbeddingGemma2TextConfig()
    with torch.device("meta"):
        model = transformers.EmbeddingGemma2TextModel(config)
    weights = Weights.read(_sparse_checkpoint(tmp_path / "model", model))
    scalars = config.num_hidden_layers  # layer_scalar is a buffer, which the published count leaves out
    assert weights.parameters - scalars == 271_002_624
