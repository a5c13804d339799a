"""Model folders: both spellings, what is declared where, identity, and every message for a bad folder."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from gemb.errors import Exit, GembError, MismatchError, UnavailableError
from gemb.model import identity
from gemb.model.folder import (
    DenseSettings,
    LayerNormSettings,
    ModelFolder,
    PoolingSettings,
    Weights,
    fingerprint,
    read_folder,
)
from gemb.model.identity import content_digest
from gemb.model.weights import TensorSpec
from tests.models import OWN_MODES, tiny_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FolderMaker = Callable[..., Path]


def patch(file: Path, **changes: object) -> None:
    """Change keys of a JSON object; None takes a key out."""
    value = json.loads(file.read_text("utf-8")) if file.exists() else {}
    value.update(changes)
    kept = {key: one for key, one in value.items() if one is not None or key not in changes}
    file.write_text(json.dumps(kept), "utf-8")


def message(path: Path, error: type[GembError]) -> str:
    """What reading `path` says, with the folder's name cut away."""
    with pytest.raises(error) as caught:
        read_folder(path)
    return str(caught.value).replace(f"{path}", "MODEL")


def parts(folder: ModelFolder) -> list[tuple[str, object]]:
    return [(module.kind, module.settings) for module in folder.modules]


# --- equivalence


def test_old_and_new_spelling_read_alike(make_folder: FolderMaker) -> None:
    old, new = (read_folder(make_folder(spelling, spelling=spelling)) for spelling in ("old", "new"))
    assert (
        parts(old)
        == parts(new)
        == [
            ("transformer", None),
            ("pooling", PoolingSettings(("mean",), include_prompt=True, width=8)),
            ("dense", DenseSettings(8, 6, bias=True, activation="Tanh", residual=False)),
            ("layer_norm", LayerNormSettings(6)),
            ("normalize", None),
        ]
    )
    assert (old.dims, old.max_tokens, old.normalizes) == (new.dims, new.max_tokens, True) == (6, 32, True)
    assert old.prompts == new.prompts == {"query": "find: ", "document": "text: "}
    assert fingerprint(old) == fingerprint(new)


@pytest.mark.parametrize("max_seq_length", [None, 32])
def test_dims_and_length_are_those_of_sentence_transformers(
    make_folder: FolderMaker, max_seq_length: int | None
) -> None:
    several = {
        "word_embedding_dimension": 8,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": True,
    }
    path = make_folder(
        max_seq_length=max_seq_length, model_max_length=48, pooling=several, dense={"in_features": 16}
    )
    save_file({"linear.weight": np.ones((6, 16), np.float32), "linear.bias": np.ones(6, np.float32)},
              path / "2_Dense/model.safetensors")  # fmt: skip
    folder = read_folder(path)
    reference = reference_model(path)
    assert folder.pooling.modes == ("cls", "mean")
    assert folder.dims == reference.get_embedding_dimension() == 6
    assert folder.max_tokens == reference.max_seq_length
    assert folder.prompts == reference.prompts


def test_a_folder_saved_again_by_sentence_transformers_keeps_its_fingerprint(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    path = make_folder(max_seq_length=None)
    reference = reference_model(path)
    reference.save_pretrained(str(tmp_path / "first"))  # transformers writes out the defaults of config.json
    reference_model(tmp_path / "first").save_pretrained(str(tmp_path / "second"))
    first, second = read_folder(tmp_path / "first"), read_folder(tmp_path / "second")
    assert parts(first) == parts(second) == parts(read_folder(path))
    assert first.max_tokens == second.max_tokens == 64
    assert fingerprint(first) == fingerprint(second)


def reference_model(path: Path) -> "SentenceTransformer":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(path), device="cpu")


def test_shards_are_the_same_model_as_one_file(make_folder: FolderMaker) -> None:
    single, sharded = make_folder("single"), make_folder("sharded")
    shard(sharded)
    assert fingerprint(read_folder(single)) == fingerprint(read_folder(sharded))
    one, several = Weights.read(single), Weights.read(sharded)
    assert set(one) == set(several)
    for name in one:
        assert torch.equal(one.tensor(name), several.tensor(name))
        assert one.shape(name) == several.shape(name) == tuple(one.tensor(name).shape)
    assert (one.parameters, one.size_bytes, one.dtype) == (several.parameters, 4 * one.parameters, "float32")


def shard(path: Path) -> None:
    """Split model.safetensors into two files and an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves: list[dict[str, Any]] = [{}, {}]
    for place, name in enumerate(tensors):
        halves[place % 2][name] = tensors[name]
    for file, half in zip(files, halves, strict=True):
        save_file(half, path / file)
    table = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}), "utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_and_dtypes_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file as save_torch

    numbers = torch.arange(12, dtype=dtype).reshape(3, 4)
    save_torch({"a": numbers, "b": torch.zeros(2, 0, dtype=dtype)}, str(tmp_path / "model.safetensors"))
    weights = Weights.read(tmp_path)
    assert torch.equal(weights.tensor("a"), numbers)
    assert weights.shape("b") == (2, 0)
    assert f"torch.{weights.dtype}" == str(dtype)


# --- identity: what counts and what does not


def test_names_headers_cards_and_padding_do_not_count(make_folder: FolderMaker, tmp_path: Path) -> None:
    path = make_folder()
    before = fingerprint(read_folder(path))
    moved = tmp_path / "elsewhere"
    shutil.copytree(path, moved)
    save_file(load_file(path / "model.safetensors"), moved / "model.safetensors", {"made": "by a test"})
    (moved / "README.md").write_text("# a card", "utf-8")
    patch(moved / "config.json", transformers_version="9.9", _name_or_path="x", torch_dtype="float32")
    patch(moved / "tokenizer.json", padding={"strategy": "BatchLongest"}, truncation={"max_length": 3})
    assert fingerprint(read_folder(moved)) == before


CHANGES: dict[str, Callable[[Path], None]] = {
    "a weight": lambda path: nudge(path / "model.safetensors", "embeddings.LayerNorm.bias"),
    "a dense weight": lambda path: nudge(path / "2_Dense/model.safetensors", "linear.weight"),
    "the config": lambda path: patch(path / "config.json", layer_norm_eps=1e-5),
    "causality": lambda path: patch(path / "config.json", is_causal=False),
    "the pooling": lambda path: patch(
        path / "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True
    ),
    "the activation": lambda path: patch(
        path / "2_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"
    ),
    "a prompt": lambda path: patch(path / "config_sentence_transformers.json", prompts={"query": "find "}),
    "the length": lambda path: patch(path / "sentence_bert_config.json", max_seq_length=31),
    "lower-casing": lambda path: patch(path / "sentence_bert_config.json", do_lower_case=True),
    "the tokenizer": lambda path: patch(path / "tokenizer.json", normalizer={"type": "Lowercase"}),
}


def nudge(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name] = np.nextafter(tensors[name], np.float32(9))
    save_file(tensors, file)


@pytest.mark.parametrize("what", CHANGES)
def test_every_part_that_moves_a_vector_counts(make_folder: FolderMaker, what: str) -> None:
    path = make_folder()
    before = fingerprint(read_folder(path))
    CHANGES[what](path)
    assert fingerprint(read_folder(path)) != before


def test_a_fingerprint_is_64_hex_digits_and_weights_are_read_once(
    make_folder: FolderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(make_folder())
    reads: list[str] = []
    hash_tensor = identity._hash_tensor

    def counted(spec: TensorSpec) -> str:
        reads.append(spec.name)
        return hash_tensor(spec)

    monkeypatch.setattr(identity, "_hash_tensor", counted)
    first = fingerprint(folder)
    assert len(first) == 64
    assert int(first, 16) >= 0
    read = len(reads)
    assert read > 0
    assert fingerprint(folder) == first
    assert len(reads) == read


def test_a_cache_that_cannot_be_used_only_costs_time(
    make_folder: FolderMaker, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(make_folder())
    first = fingerprint(folder)
    for file in own_cache.rglob("*.txt"):
        file.write_bytes(b"\xff not a digest")
    assert fingerprint(folder) == first
    blocked = own_cache.parent / "file"
    blocked.write_text("in the way", "ascii")
    monkeypatch.setenv("GEMB_CACHE", str(blocked))
    assert fingerprint(folder) == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_in_every_dtype(
    tmp_path: Path, dtype: torch.dtype, bad: float
) -> None:
    from safetensors.torch import save_file as save_torch

    numbers = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)  # the largest finite number is fine
    save_torch({"layer.weight": numbers}, str(tmp_path / "model.safetensors"))
    content_digest([Weights.read(tmp_path)], [], {})
    numbers[1, 2] = bad
    save_torch({"layer.weight": numbers}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UnavailableError) as caught:
        content_digest([Weights.read(tmp_path)], [], {})
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors is damaged: 1 of the 15 numbers of layer.weight are NaN or infinite; "
        "download the model again, or train it anew"
    )


def test_the_digest_of_some_numbers_is_what_it_was_when_indexes_were_made_with_it(tmp_path: Path) -> None:
    save_file({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(2, np.float16)},
              tmp_path / "model.safetensors")  # fmt: skip
    found = content_digest([Weights.read(tmp_path)], [], {"a": 1})
    assert found == "4ef26f47d7ba63e7b300f18fa2cb9dd4def3fec1f045994801299e2d81edf5da"


def test_blocks_that_pass_by_have_the_digest_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.random.default_rng(0).standard_normal((7, 5), np.float32)
    save_file({"a": numbers}, tmp_path / "model.safetensors")
    weights = Weights.read(tmp_path)
    digest = identity.TensorDigest(weights.spec("a"))
    for rows in (numbers[:2], numbers[2:6], numbers[6:]):
        digest.update(memoryview(rows.tobytes()))
    assert digest.hexdigest() == identity._hash_tensor(weights.spec("a"))
    (tmp_path / "empty.json").write_text("{}")
    known = {weights.spec("a"): digest.hexdigest()}
    taken = content_digest([weights], [tmp_path / "empty.json"], {}, known)
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "another"))
    assert taken == content_digest([weights], [tmp_path / "empty.json"], {})


@pytest.mark.parametrize(
    ("dtype", "words", "expected"),
    [
        ("F32", [0xFFC00000, 0x7F7FFFFF, 0xFF7FFFFF, 0x80000000], 1),
        ("F32", [0x7F800001, 0xFF800000, 0x00000001], 2),
        ("BF16", [0xFF81, 0x7F7F, 0xFF7F], 1),
        ("F16", [0x7BFF, 0xFBFF, 0xFC00, 0x7E00], 2),
        ("F64", [0xFFF0000000000000, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF], 1),
        ("I32", [0xFFFFFFFF], 0),
        ("F32", [], 0),
    ],
)
def test_numbers_that_are_not_finite_are_counted_by_their_bits(
    dtype: str, words: list[int], expected: int
) -> None:
    width = {"F16": np.uint16, "BF16": np.uint16, "F64": np.uint64}.get(dtype, np.uint32)
    assert identity.not_finite(memoryview(np.array(words, dtype=width).tobytes()), dtype) == expected


def test_a_model_with_nan_has_no_fingerprint(make_folder: FolderMaker) -> None:
    path = make_folder()
    tensors = load_file(path / "2_Dense/model.safetensors")
    tensors["linear.bias"][3] = np.nan
    save_file(tensors, path / "2_Dense/model.safetensors")
    with pytest.raises(UnavailableError, match=r"1 of the 6 numbers of linear\.bias are NaN"):
        fingerprint(read_folder(path))


# --- what is declared where


def test_a_bare_encoder_is_mean_pooled_and_says_so(make_folder: FolderMaker) -> None:
    folder = read_folder(make_folder(modules=False))
    assert folder.pooling == PoolingSettings(("mean",), include_prompt=True, width=None)
    assert (folder.dims, folder.max_tokens, folder.normalizes) == (8, 64, False)
    assert folder.notes == (
        "no modules.json: pooling mean is assumed because BertModel is an encoder, "
        "as sentence-transformers does",
    )


@pytest.mark.parametrize(("is_causal", "mode"), [(None, "lasttoken"), (True, "lasttoken"), (False, "mean")])
def test_a_bare_decoder_is_pooled_as_sentence_transformers_does(
    make_folder: FolderMaker, is_causal: bool | None, mode: str
) -> None:
    path = make_folder(modules=False)
    patch(path / "config.json", architectures=["LlamaForCausalLM"], model_type="llama", is_causal=is_causal)
    folder = read_folder(path)
    assert folder.pooling.modes == (mode,)
    assert f"pooling {mode} is assumed because LlamaForCausalLM" in folder.notes[0]


def test_roberta_has_two_positions_less_than_its_table(make_folder: FolderMaker) -> None:
    path = make_folder(modules=False, model_max_length=1e30)
    patch(path / "config.json", model_type="xlm-roberta", max_position_embeddings=514)
    folder = read_folder(path)
    assert (folder.max_tokens, folder.max_tokens_reason) == (512, "positions of the model")


def test_a_length_beyond_the_table_of_positions_is_cut_and_said(make_folder: FolderMaker) -> None:
    folder = read_folder(make_folder(max_seq_length=100))
    assert folder.max_tokens == 64
    assert folder.notes == ("max_seq_length 100 is cut to the 64 positions of the model",)


def test_rotary_positions_do_not_cut_the_declared_length(make_folder: FolderMaker) -> None:
    path = make_folder(max_seq_length=100)
    patch(path / "config.json", model_type="qwen3")
    assert read_folder(path).max_tokens == 100


def test_without_any_length_512_tokens_are_assumed_aloud(make_folder: FolderMaker) -> None:
    path = make_folder(max_seq_length=None, model_max_length=1e30)
    patch(path / "config.json", max_position_embeddings=None)
    folder = read_folder(path)
    assert folder.max_tokens == 512
    assert folder.notes == ("no maximum length is declared; 512 tokens are assumed",)


def test_the_transformer_may_live_in_a_folder_of_its_own(make_folder: FolderMaker) -> None:
    path = make_folder()
    inner = path / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "sentence_bert_config.json"):  # fmt: skip
        (path / name).rename(inner / name)
    entries = json.loads((path / "modules.json").read_text("utf-8"))
    entries[0]["path"] = "0_Transformer"
    (path / "modules.json").write_text(json.dumps(entries), "utf-8")
    folder = read_folder(path)
    assert folder.tokenizer_folder == inner
    assert (folder.max_tokens, len(folder.weights())) == (32, 21)


@pytest.mark.parametrize(
    ("file", "key", "sizes"),
    [
        ("config_sentence_transformers.json", "matryoshka_dims", [2, 4, 6]),
        ("config.json", "matryoshka_dimensions", [6, 4, 2, 99]),
    ],
)
def test_matryoshka_sizes_are_read_where_they_are_declared(
    make_folder: FolderMaker, file: str, key: str, sizes: list[int]
) -> None:
    path = make_folder()
    assert read_folder(path).matryoshka_dims == ()
    patch(path / file, **{key: sizes})
    assert read_folder(path).matryoshka_dims == (6, 4, 2)


def test_matryoshka_sizes_are_read_from_the_model_card(make_folder: FolderMaker) -> None:
    path = make_folder()
    card = '{\n    "loss": "CoSENTLoss",\n    "matryoshka_dims": [\n        6,\n        2\n    ]\n}\n'
    (path / "README.md").write_text(card, "utf-8")
    assert read_folder(path).matryoshka_dims == (6, 2)
    (path / "README.md").write_text("---\nmatryoshka_dims:\n- 6\n- 4\nlicense: mit\n---\n", "utf-8")
    assert read_folder(path).matryoshka_dims == (6, 4)


def test_the_sizes_of_embeddinggemma_are_known_by_its_shape(make_folder: FolderMaker) -> None:
    path = make_folder()
    query = "task: search result | query: "
    patch(path / "config.json", model_type="gemma3_text", hidden_size=768)
    patch(path / "1_Pooling/config.json", word_embedding_dimension=768)
    entries = json.loads((path / "modules.json").read_text("utf-8"))
    entries[3] = {**entries[2], "idx": 3, "path": "3_Dense"}
    (path / "modules.json").write_text(json.dumps(entries), "utf-8")
    shutil.copytree(path / "2_Dense", path / "3_Dense")
    patch(path / "2_Dense/config.json", in_features=768, out_features=3072)
    patch(path / "3_Dense/config.json", in_features=3072, out_features=768)
    assert read_folder(path).matryoshka_dims == ()
    patch(path / "config_sentence_transformers.json", prompts={"query": query})
    assert read_folder(path).matryoshka_dims == (768, 512, 256, 128)


def test_settings_of_the_transformer_module_override_its_config(make_folder: FolderMaker) -> None:
    path = make_folder()
    patch(
        path / "sentence_bert_config.json", config_kwargs={"is_causal": False}, model_args={"dtype": "auto"}
    )
    folder = read_folder(path)
    assert folder.config["is_causal"] is False
    assert folder.notes == ("config.json with is_causal of the Transformer module's config_kwargs",)


def test_a_dropout_module_is_left_out_aloud(make_folder: FolderMaker) -> None:
    path = make_folder()
    entries = json.loads((path / "modules.json").read_text("utf-8"))
    entries.insert(2, {"idx": 1.5, "path": "x", "type": "sentence_transformers.models.Dropout"})
    (path / "modules.json").write_text(json.dumps(entries), "utf-8")
    folder = read_folder(path)
    assert [kind for kind, _ in parts(folder)] == [
        "transformer",
        "pooling",
        "dense",
        "layer_norm",
        "normalize",
    ]
    assert folder.notes == ("the Dropout module is left out; it does nothing outside of training",)


def test_a_model_folder_cannot_be_changed(make_folder: FolderMaker) -> None:
    folder = read_folder(make_folder())
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder.dims = 3  # type: ignore[misc]


# --- errors, word for word


def test_a_missing_or_empty_folder_says_what_a_model_is(tmp_path: Path) -> None:
    assert message(tmp_path / "none", UnavailableError) == (
        "MODEL is not a folder; a model is a folder with config.json and model.safetensors"
    )
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty", UnavailableError) == (
        "MODEL is not a model folder: no config.json; it is empty"
    )
    (tmp_path / "empty/notes.txt").write_text("hello", "utf-8")
    assert message(tmp_path / "empty", UnavailableError) == (
        "MODEL is not a model folder: no config.json; it has notes.txt"
    )


def test_a_folder_without_weights_is_told(make_folder: FolderMaker) -> None:
    path = make_folder(weights=False)
    assert message(path, UnavailableError) == (
        "MODEL has no weights: no model.safetensors and no model.safetensors.index.json; "
        "download the model again"
    )
    (path / "other.gguf").write_bytes(b"GGUF")
    assert "index.json (only other.gguf); download" in message(path, UnavailableError)
    assert UnavailableError.exit_code == Exit.UNAVAILABLE


def test_pickle_weights_are_refused_with_the_line_that_converts_them(make_folder: FolderMaker) -> None:
    path = make_folder(weights=False)
    (path / "pytorch_model.bin").write_bytes(b"never opened")
    assert message(path, UnavailableError) == (
        "MODEL has its weights only as pickle (pytorch_model.bin), which can run code when loaded and which "
        'gemb never opens; convert it where you trust it: python -c "from transformers import AutoModel; '
        "AutoModel.from_pretrained('MODEL').save_pretrained('MODEL', safe_serialization=True)\""
    )


def test_an_adapter_is_told_from_a_model(make_folder: FolderMaker) -> None:
    path = make_folder(weights=False)
    (path / "adapter_config.json").write_text("{}", "utf-8")
    assert message(path, UnavailableError) == (
        "MODEL holds an adapter (adapter_config.json), not a whole model; "
        "merge it into its base model and save that folder"
    )


def test_truncated_weights_are_told_with_both_sizes(make_folder: FolderMaker) -> None:
    path = make_folder()
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert message(path, UnavailableError) == (
        f"MODEL/model.safetensors is damaged: cut short at {len(content) - 5:,} of {len(content):,} bytes; "
        "download or copy it again"
    )
    file.write_bytes(content + b"x")
    assert "bytes long, but its tensors end at" in message(path, UnavailableError)
    file.write_bytes(content[:100])
    assert "MODEL/model.safetensors is damaged: cut short at 100 bytes, inside its header of" in message(
        path, UnavailableError
    )
    file.write_bytes(b"abc")
    assert message(path, UnavailableError) == (
        "MODEL/model.safetensors is damaged: its first 8 bytes give no header length (3 bytes in all); "
        "download or copy it again"
    )


def test_a_header_that_lies_about_a_tensor_is_damage(make_folder: FolderMaker) -> None:
    path = make_folder()
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"shape":[31,8]', b'"shape":[30,8]'))
    assert message(path, UnavailableError) == (
        "MODEL/model.safetensors is damaged: embeddings.word_embeddings.weight claims 992 bytes "
        "for F32 [30, 8]; download or copy it again"
    )
    file.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"Q32"', 1))
    assert "has the unknown dtype 'Q32'; known are BOOL, U8" in message(path, UnavailableError)


def test_a_missing_shard_is_named(make_folder: FolderMaker) -> None:
    path = make_folder()
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    assert message(path, UnavailableError) == (
        "MODEL lacks 1 of its 2 weight files: model-00002-of-00002.safetensors; download the model again"
    )


def test_a_shard_index_that_does_not_fit_is_damage(make_folder: FolderMaker) -> None:
    path = make_folder()
    shard(path)
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text("utf-8"))["weight_map"]
    table["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": table}), "utf-8")
    assert message(path, UnavailableError) == (
        "MODEL/model.safetensors.index.json is damaged: it puts ghost into model-00001-of-00002.safetensors, "
        "which does not hold it; download or copy it again"
    )
    index.write_text(json.dumps({"weight_map": {"a": "../../secrets"}}), "utf-8")
    assert "'../../secrets' is not the name of a file beside it" in message(path, UnavailableError)


@pytest.mark.parametrize(
    ("type_name", "expected"),
    [
        (
            "sentence_transformers.models.WeightedLayerPooling",
            "MODEL/modules.json: gemb does not know the module "
            "sentence_transformers.models.WeightedLayerPooling; it knows Transformer, Pooling, Dense, "
            "LayerNorm, Normalize",
        ),
        (
            "sentence_transformers.base.modules.router.Router",
            "MODEL/modules.json: the module sentence_transformers.base.modules.router.Router sends queries "
            "and documents to different models; gemb knows Transformer, Pooling, Dense, LayerNorm, "
            "Normalize; point -m at one of its sub-folders' models instead",
        ),
        (
            "custom_st.Pooling",
            "MODEL/modules.json: the module custom_st.Pooling is code of the folder's author, which gemb "
            "never runs; gemb knows Transformer, Pooling, Dense, LayerNorm, Normalize",
        ),
    ],
)
def test_an_unknown_module_is_named(make_folder: FolderMaker, type_name: str, expected: str) -> None:
    path = make_folder()
    entries = json.loads((path / "modules.json").read_text("utf-8"))
    entries[3]["type"] = type_name
    (path / "modules.json").write_text(json.dumps(entries), "utf-8")
    assert message(path, MismatchError) == expected
    assert MismatchError.exit_code == Exit.MISMATCH


def test_modules_in_an_order_that_gives_no_vector_are_refused(make_folder: FolderMaker) -> None:
    path = make_folder()
    entries = json.loads((path / "modules.json").read_text("utf-8"))
    del entries[1]
    (path / "modules.json").write_text(json.dumps(entries), "utf-8")
    assert message(path, MismatchError) == (
        "MODEL/modules.json: the modules are transformer, dense, layer_norm, normalize; "
        "gemb needs one transformer, one pooling, then any dense, layer_norm and normalize"
    )
    (path / "modules.json").write_text(json.dumps(entries[1:]), "utf-8")
    assert message(path, MismatchError) == (
        "MODEL/modules.json: the first module is sentence_transformers.models.Dense; "
        "gemb needs a Transformer there"
    )
    entries[1]["path"] = "../other"
    (path / "modules.json").write_text(json.dumps(entries), "utf-8")
    assert message(path, UnavailableError) == (
        "MODEL/modules.json: the module folder '../other' is outside of the model folder"
    )


def test_an_unknown_activation_is_named_not_replaced(make_folder: FolderMaker) -> None:
    path = make_folder(dense={"activation_function": "my_code.Swish"})
    assert message(path, MismatchError) == (
        "MODEL/2_Dense/config.json: gemb does not know the activation_function 'my_code.Swish'; "
        "it knows Identity, Tanh, ReLU, GELU, SiLU, Sigmoid of torch.nn"
    )


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode": "attention"},
        {"pooling_mode": ["mean", "attention"]},
        {"pooling_mode_attention": True},
    ],
)
def test_an_unknown_pooling_is_named(make_folder: FolderMaker, pooling: dict[str, object]) -> None:
    path = make_folder(pooling={"word_embedding_dimension": 8, **pooling})
    text = message(path, MismatchError)
    assert text.startswith("MODEL/1_Pooling/config.json: gemb does not know the pooling ")
    assert "attention; it knows cls, max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken" in text


def test_widths_that_do_not_fit_name_both(make_folder: FolderMaker) -> None:
    assert message(make_folder("a", dense={"in_features": 7}), MismatchError) == (
        "MODEL/2_Dense/config.json: takes 7 numbers, but the part before gives 8"
    )
    pooling = {"word_embedding_dimension": 9, "pooling_mode_mean_tokens": True}
    assert message(make_folder("b", pooling=pooling), MismatchError) == (
        "MODEL/1_Pooling/config.json: pools 9 numbers a token, but the backbone of MODEL gives 8"
    )


def test_a_dense_on_tokens_is_refused(make_folder: FolderMaker) -> None:
    path = make_folder(dense={"module_input_name": "token_embeddings"})
    assert message(path, MismatchError) == (
        "MODEL/2_Dense/config.json: module_input_name is 'token_embeddings'; "
        "gemb gives one vector a text and knows only 'sentence_embedding'"
    )


def test_a_model_for_another_task_is_refused(make_folder: FolderMaker) -> None:
    path = make_folder()
    patch(path / "sentence_bert_config.json", transformer_task="fill-mask")
    assert message(path, MismatchError) == (
        "MODEL/sentence_bert_config.json: transformer_task 'fill-mask' with output 'token_embeddings'; "
        "gemb knows 'feature-extraction' with 'token_embeddings'"
    )


def test_broken_json_names_file_and_line(make_folder: FolderMaker) -> None:
    path = make_folder()
    (path / "config.json").write_text('{\n  "model_type": bert\n}', "utf-8")
    assert message(path, UnavailableError).startswith("MODEL/config.json:2: not JSON (")
    (path / "config.json").write_text("[]", "utf-8")
    assert message(path, UnavailableError) == "MODEL/config.json: not a JSON object; download the model again"
    (path / "config.json").write_text("{}", "utf-8")
    assert message(path, UnavailableError) == (
        "MODEL/config.json: no model_type, so the family of the model cannot be told"
    )


def test_a_default_prompt_that_does_not_exist_is_a_mismatch(make_folder: FolderMaker) -> None:
    path = make_folder(declared={"prompts": {"query": "find: "}, "default_prompt_name": "passage"})
    assert message(path, MismatchError) == (
        "MODEL/config_sentence_transformers.json: default_prompt_name is 'passage', but the prompts are query"
    )


def test_a_folder_without_a_tokenizer_is_told(make_folder: FolderMaker) -> None:
    path = make_folder()
    (path / "tokenizer.json").unlink()
    assert message(path, UnavailableError) == (
        "MODEL has no tokenizer: no tokenizer.json; download the model again"
    )


def test_an_unknown_tensor_name_comes_with_near_ones(make_folder: FolderMaker) -> None:
    weights = read_folder(make_folder()).weights()
    with pytest.raises(MismatchError, match=r"has no tensor x\.LayerNorm\.bias; near it: .*\.bias"):
        weights.spec("x.LayerNorm.bias")


# --- poolings that only gemb has


@pytest.mark.parametrize("mode", OWN_MODES)
def test_a_pooling_of_gemb_is_read_with_its_sizes(mode: str, tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", pooling=mode))
    assert folder.pooling == PoolingSettings(
        (mode,),  # type: ignore[arg-type]
        include_prompt=True,
        width=64,
        **OWN_MODES[mode],
    )
    assert folder.dims == 64
    assert folder.modules[1].has_weights == mode.startswith("attention")


def test_the_fingerprint_depends_on_sizes_and_weights_of_the_pooling(tmp_path: Path) -> None:
    seen = {
        fingerprint(read_folder(tiny_folder(tmp_path / mode, pooling=mode))) for mode in ("mean", *OWN_MODES)
    }
    changes: dict[str, int]
    for mode, changes in (
        ("first-k", {"tokens": 4}),
        ("attention-query", {"heads": 2}),
        ("attention-kv", {"heads": 8}),
    ):
        place = tiny_folder(tmp_path / f"other-{mode}", pooling=mode)
        patch(place / "1_Pooling/config.json", **changes)
        seen.add(fingerprint(read_folder(place)))
    tensors = load_file(place / "1_Pooling/model.safetensors")
    tensors["value_probes.weight"] = tensors["value_probes.weight"] + 1
    save_file(tensors, place / "1_Pooling/model.safetensors")
    seen.add(fingerprint(read_folder(place)))
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("mode", "changes", "told"),
    [
        (
            "first-k",
            {"pooling_mode": "middle-k"},
            "gemb does not know the pooling 'middle-k'; of its own it knows first-k, last-k, "
            "attention-query, attention-kv",
        ),
        ("attention-query", {"heads": 5}, "5 heads do not divide the 64 numbers of a token"),
        ("first-k", {"tokens": 0}, "tokens is 0, not a positive whole number"),
        ("attention-kv", {"probes": None}, "probes is None, not a positive whole number"),
    ],
)
def test_settings_of_a_pooling_that_cannot_be_are_told(
    mode: str, changes: dict[str, object], told: str, tmp_path: Path
) -> None:
    place = tiny_folder(tmp_path / "model", pooling=mode)
    patch(place / "1_Pooling/config.json", **changes)
    with pytest.raises(GembError) as error:
        read_folder(place)
    assert str(error.value) == f"{place / '1_Pooling/config.json'}: {told}"


def test_weights_of_a_pooling_that_do_not_fit_its_settings_are_told(tmp_path: Path) -> None:
    place = tiny_folder(tmp_path / "model", pooling="attention-kv")
    patch(place / "1_Pooling/config.json", probes=7)
    with pytest.raises(MismatchError) as error:
        read_folder(place)
    assert str(error.value) == (
        f"{place / '1_Pooling/model.safetensors'}: key_probes.weight is [6, 64], not [7, 64] as in "
        f"{place / '1_Pooling/config.json'}"
    )
    (place / "1_Pooling/model.safetensors").unlink()
    with pytest.raises(UnavailableError, match="1_Pooling has no weights"):
        read_folder(place)


# --- dropout


@pytest.mark.parametrize(
    ("name", "keys", "rates"),
    [
        ("gemma3", {"attention_dropout": 0.2}, (0.0, 0.2)),
        ("gemma3", {"attention_dropout": 0.2, "hidden_dropout_prob": 0.1}, (0.1, 0.2)),
        ("bert", {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.4}, (0.4, 0.3)),
        ("modernbert", {"attention_dropout": 0.1, "mlp_dropout": 0.2}, (0.2, 0.1)),
        ("distilbert", {"attention_dropout": 0.1, "dropout": 0.2}, (0.2, 0.1)),
    ],
)
def test_the_rates_of_the_folder_are_read(
    name: str, keys: dict[str, float], rates: tuple[float, float], tmp_path: Path
) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", name, config=keys))
    assert folder.dropout_rates == rates
