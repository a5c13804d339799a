"""`gemb quantize --onnx`: a folder that runs in onnxruntime and in torch, with the same numbers in both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb import Encoder
from gemb.engine import onnx_engine
from gemb.engine.onnx_engine import PRECISION, find_graph
from gemb.errors import Exit, GateError, GembError, MachineError, MismatchError
from gemb.jobs import info
from gemb.jobs import quantize as job
from gemb.jobs.quantize import QuantizeRecipe
from gemb.model.folder import fingerprint, read_folder
from tests.models import random_texts, tiny_folder

TEXTS = random_texts([1, 30, 7, 7, 12, 2])
NAMES = {"f32": "model.onnx", "int8": "model_quantized.onnx", "int4": "model_q4.onnx"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", "gemma3", dense=[{"out_features": 96}])


def recipe(model: Path, output: Path, **settings: Any) -> QuantizeRecipe:  # noqa: ANN401
    return QuantizeRecipe(model=str(model), output=output, threads=1, **settings)


@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
def test_graph_and_weights_of_the_folder_are_the_same_numbers(
    weights: str, tmp_path: Path, model: Path, cache: Path
) -> None:
    report = job.run(recipe(model, tmp_path / "out", onnx=weights))
    folder = read_folder(tmp_path / "out")
    assert find_graph(folder) == tmp_path / "out" / "onnx" / NAMES[weights]
    assert not (cache / "onnx").exists()  # what was measured is the graph that was written
    torch = Encoder.load(tmp_path / "out", device="cpu", precision="fp32", threads=1)
    onnx = Encoder.load(tmp_path / "out", threads=1, few_texts=True)
    assert onnx.device_line.endswith("for a few texts it is there before torch is")
    np.testing.assert_allclose(onnx.embed(TEXTS), torch.embed(TEXTS), atol=1e-5, rtol=0)
    assert report.data["format"] == f"onnx {weights}"
    files = {entry["file"] for entry in report.data["files"]}  # type: ignore[attr-defined]
    assert {f"onnx/{NAMES[weights]}", f"onnx/{NAMES[weights]}_data"} <= files


def test_a_graph_of_floats_gives_the_vectors_of_the_source_under_its_fingerprint(
    tmp_path: Path, model: Path
) -> None:
    report = job.run(recipe(model, tmp_path / "out", onnx="f32"))
    assert fingerprint(read_folder(tmp_path / "out")) == fingerprint(read_folder(model))
    assert report.data["gate"]["cosine_min"] >= 0.999999  # type: ignore[index]


def test_transformers_js_is_told_of_the_weights_and_where_to_cut(tmp_path: Path, model: Path) -> None:
    job.run(recipe(model, tmp_path / "out", onnx="int4"))
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["transformers.js_config"] == {"use_external_data_format": {"model_q4.onnx": True}}
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["model_max_length"] == read_folder(model).max_tokens


def test_a_plan_tells_of_the_graph_and_writes_nothing(tmp_path: Path, model: Path) -> None:
    plan = job.plan(recipe(model, tmp_path / "out", onnx="int8"))
    assert plan.title == f"would write {model} as onnx int8 to {tmp_path}/out"
    told = "onnx/model_quantized.onnx, its weights beside it in model_quantized.onnx_data, as large again"
    assert ("graph", told) in plan.rows
    assert not (tmp_path / "out").exists()


def test_what_loses_too_much_is_not_kept(tmp_path: Path, model: Path) -> None:
    with pytest.raises(GateError, match="onnx int4 loses ") as caught:
        job.run(recipe(model, tmp_path / "out", onnx="int4", max_drop=0.0))
    assert caught.value.exit_code == Exit.GATE
    assert not (tmp_path / "out").exists()


def test_a_disk_that_holds_the_weights_once_is_too_small(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(job, "check_writable", lambda _, size: asked.append(size))
    for settings in ({"format": "int8"}, {"onnx": "int8"}):
        job.plan(recipe(model, tmp_path / "out", **settings))
    assert asked[1] == 2 * asked[0] > 0


def test_info_tells_of_the_graph_and_what_runs_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.run(recipe(model, tmp_path / "out", onnx="int4"))
    graph = tmp_path / "out" / "onnx" / "model_q4.onnx"
    report = info.run(str(tmp_path / "out"), device="cpu")
    told = dict(report.rows)
    assert told["graph"] == report.data["graph"] == str(graph)
    few = "a few texts: onnxruntime in fp32, with model_q4.onnx, and no torch"
    assert told["would run"].splitlines()[-1] == few
    assert told["loads in"] == "gemb, onnxruntime and transformers.js (onnx/model_q4.onnx)"
    assert "few texts" not in dict(info.run(str(tmp_path / "out"), precision="bf16").rows)["would run"]
    plain = info.run(str(model), device="cpu")
    assert plain.data["graph"] is None
    assert "onnxruntime" not in f"{plain.rows}"
    monkeypatch.setattr(onnx_engine, "find_spec", lambda _: None)
    told = dict(info.run(str(tmp_path / "out"), device="cpu").rows)
    few = "a few texts: the same; pip install 'gemb[onnx]' to run the graph, sooner"
    assert told["would run"].splitlines()[-1] == few


def refused(tmp_path: Path, model: Path, **settings: Any) -> str:  # noqa: ANN401
    with pytest.raises(GembError) as caught:
        job.plan(recipe(model, tmp_path / "out", **settings))
    return str(caught.value)


def test_a_graph_with_other_numbers_than_the_weights_is_refused(tmp_path: Path, model: Path) -> None:
    assert refused(tmp_path, model, onnx="int8", format="f32") == (
        "--onnx int8 goes with --format int8, so that graph and weights are the same numbers; "
        "leave --format f32 out"
    )
    assert refused(tmp_path, model, onnx="int8", gguf="q8_0") == (
        "onnx gives a folder and gguf a file; give one of them"
    )


def test_without_the_extra_it_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.quantize_onnx.is_installed", lambda: False)
    assert refused(tmp_path, model, onnx="f32") == (
        "--onnx needs onnx and onnxruntime; pip install 'gemb[onnx]'"
    )


def test_a_family_without_a_graph_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", "mpnet")
    with pytest.raises(MismatchError, match="no ONNX graph is written for the model type 'mpnet'"):
        job.plan(recipe(other, tmp_path / "out", onnx="f32"))


def test_a_full_disk_leaves_no_output(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Callable[[], None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemb.model.onnx.graph.Graph.save", full)
    with pytest.raises(MachineError, match="no space left"):
        job.run(recipe(model, tmp_path / "out", onnx="f32"))
    assert not (tmp_path / "out").exists()


def test_the_report_of_embed_says_which_engine_ran(tmp_path: Path, model: Path) -> None:
    from gemb.jobs import embed

    job.run(recipe(model, tmp_path / "out", onnx="int8"))
    (tmp_path / "few.txt").write_text("w5 w6\nw7\n")
    wanted = embed.EmbedRecipe(
        inputs=(str(tmp_path / "few.txt"),), output=tmp_path / "few.npy", model=str(tmp_path / "out")
    )
    assert embed.run(wanted).data["precision"] == PRECISION
