"""The jobs on the engine without torch: what is loaded, what is written, and what may follow upon what."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb.engine import onnx_engine
from gemb.engine.onnx_engine import OnnxEngine, cached_graph, write_cached_graph
from gemb.errors import Exit, GembError, MismatchError
from gemb.jobs import embed, index, search
from gemb.jobs.embed import EmbedRecipe
from gemb.jobs.index import IndexRecipe
from gemb.jobs.search import SearchRecipe
from gemb.model.folder import fingerprint, read_folder
from gemb.report import Event
from gemb.text.batches import Batch
from gemb.vectors import open_vectors
from tests.conftest import modules_after
from tests.models import random_texts, tiny_folder

FAST: dict[str, Any] = {"device": "cpu", "threads": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", "bert")


def write(path: Path, count: int) -> str:
    random = np.random.default_rng(count)
    texts = random_texts(random.integers(1, 40, count).tolist())
    rows = ({"id": str(row), "text": text} for row, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def recipe(source: str, output: Path, model: Path, **settings: Any) -> EmbedRecipe:  # noqa: ANN401
    return EmbedRecipe(inputs=(source,), output=output, model=str(model), **{**FAST, **settings})


def vectors_of(path: Path) -> Any:  # noqa: ANN401
    with open_vectors(path) as vectors:
        return np.array(vectors.block(0, vectors.rows))


def made_index(place: Path, model: Path, **settings: Any) -> Path:  # noqa: ANN401
    source = write(place / "docs.jsonl", 30)
    output = place / "docs.gemb"
    given = {**FAST, "precision": "fp32", **settings}
    index.run(IndexRecipe(inputs=(source,), output=output, model=str(model), **given))
    return output


# --- no torch


def test_search_and_embed_load_neither_torch_nor_transformers(tmp_path: Path, model: Path) -> None:
    docs = made_index(tmp_path, model)
    source = write(tmp_path / "few.jsonl", 3)
    for arguments in (
        ["search", str(docs), "w5 w9", "--format", "jsonl"],
        ["embed", source, "-o", str(tmp_path / "few.npy"), "-m", str(model)],
    ):
        statement = f"""
import contextlib, io
from importlib import import_module
sys.argv = ['gemb', *{arguments!r}]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
        import_module('gemb.commands').main()
    except SystemExit as end:
        assert not end.code, end.code
"""
        loaded = modules_after(statement)
        assert "onnxruntime" in loaded
        assert {"torch", "transformers", "onnx"}.isdisjoint(loaded)


def test_hits_are_those_of_torch(tmp_path: Path, model: Path) -> None:
    docs = made_index(tmp_path, model)
    found = {}
    for engine in ("torch", "onnx", "auto"):
        output = io.StringIO()
        wanted = SearchRecipe(
            indexes=(docs,), query="w5 w9 w17", format="jsonl", engine=engine, precision="fp32", **FAST
        )
        search.run(wanted, output=output)
        found[engine] = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [hit["id"] for hit in found["torch"]] == [hit["id"] for hit in found["onnx"]]
    for one, other in zip(found["torch"], found["onnx"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=2e-6)
    assert found["auto"] == found["onnx"]


# --- gemb index --onnx


def test_an_index_of_a_small_model_keeps_its_graph_in_the_cache_and_the_plan_says_so(
    tmp_path: Path, model: Path
) -> None:
    note = (
        "the ONNX graph of the model (0 M parameters) goes into the cache, with which gemb search starts "
        "without torch; --no-onnx leaves it out"
    )
    source, graph = write(tmp_path / "docs.jsonl", 5), cached_graph(fingerprint(read_folder(model)))
    wanted = IndexRecipe(inputs=(source,), output=tmp_path / "docs.gemb", model=str(model), **FAST)
    assert note in index.plan(wanted).data["notes"]  # type: ignore[operator]
    assert not graph.exists()
    events: list[Event] = []
    index.run(wanted, events.append)
    assert graph.exists()
    assert note in [event.note for event in events]
    assert note not in index.plan(wanted).data["notes"]  # type: ignore[operator]  # it is there


def test_no_graph_is_kept_when_it_is_not_wanted_or_the_model_is_large(
    tmp_path: Path, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_index(tmp_path, model, onnx=False)
    assert not (cache / "onnx").exists()
    (tmp_path / "large").mkdir()
    monkeypatch.setattr("gemb.jobs.index_graph.SMALL_PARAMETERS", 1000)
    made_index(tmp_path / "large", model)
    assert not (cache / "onnx").exists()
    (tmp_path / "asked").mkdir()
    made_index(tmp_path / "asked", model, onnx=True)
    assert cached_graph(fingerprint(read_folder(model))).exists()


def test_a_family_without_a_graph_is_indexed_all_the_same_unless_a_graph_is_asked_for(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "mpnet")
    assert made_index(tmp_path, model).exists()
    (tmp_path / "asked").mkdir()
    with pytest.raises(MismatchError, match="no ONNX graph is written for the model type 'mpnet'"):
        made_index(tmp_path / "asked", model, onnx=True)


def test_a_graph_is_for_texts_that_are_embedded_here(tmp_path: Path, model: Path) -> None:
    embed.run(recipe(write(tmp_path / "docs.jsonl", 3), tmp_path / "docs.npy", model))
    with pytest.raises(GembError) as caught:
        index.run(IndexRecipe(vectors=tmp_path / "docs.npy", output=tmp_path / "docs.gemb", onnx=True))
    assert str(caught.value) == "--onnx is for the model of texts that are embedded here, not for --vectors"


def test_without_the_extra_a_graph_that_is_asked_for_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.index_graph.is_installed", lambda: False)
    assert made_index(tmp_path, model).exists()
    (tmp_path / "asked").mkdir()
    with pytest.raises(GembError) as caught:
        made_index(tmp_path / "asked", model, onnx=True)
    assert str(caught.value) == "--onnx needs onnx and onnxruntime; pip install 'gemb[onnx]'"


# --- gemb embed


def test_few_texts_are_embedded_with_it_and_many_with_torch(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cached_graph(read_folder(model))
    source = write(tmp_path / "docs.jsonl", 20)
    few = embed.run(recipe(source, tmp_path / "few.npy", model))
    assert few.data["precision"] == onnx_engine.PRECISION
    assert "for a few texts it is there before torch is" in str(few.data["device"])
    monkeypatch.setattr("gemb.jobs.setup.FEW_BYTES", 100)
    many = embed.run(recipe(source, tmp_path / "many.npy", model, precision="fp32"))
    assert many.data["precision"] == "fp32"
    np.testing.assert_allclose(
        vectors_of(tmp_path / "few.npy"), vectors_of(tmp_path / "many.npy"), atol=1e-6, rtol=0
    )


def test_a_job_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "docs.jsonl", 300)
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", 1500)
    monkeypatch.setattr("gemb.engine.windows.GROWTH", 1.0)
    whole = embed.run(recipe(source, tmp_path / "whole.npy", model, engine="onnx"))
    assert whole.data["rows"] == 300
    # In parts that divide the texts otherwise, and in batches of another size.
    for rows in (70, 111):
        part = embed.run(
            recipe(source, tmp_path / "parts.npy", model, engine="onnx", limit_rows=rows, batch_tokens=200)
        )
        assert part.exit_code == Exit.MORE
    embed.run(recipe(source, tmp_path / "parts.npy", model, engine="onnx"))
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_job_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "docs.jsonl", 300)
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", 1500)
    monkeypatch.setattr("gemb.engine.windows.GROWTH", 1.0)
    embed.run(recipe(source, tmp_path / "whole.npy", model, engine="onnx"))
    forward, calls = OnnxEngine.forward, 0

    def dying(self: OnnxEngine, batch: Batch) -> object:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyError("killed")  # nothing in gemb catches it
        return forward(self, batch)

    monkeypatch.setattr(OnnxEngine, "forward", dying)
    with pytest.raises(KeyError):
        embed.run(recipe(source, tmp_path / "killed.npy", model, engine="onnx"))
    assert (tmp_path / "killed.npy.partial" / "journal.jsonl").stat().st_size > 0
    embed.run(recipe(source, tmp_path / "killed.npy", model, engine="onnx"))
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_rows_of_both_engines_do_not_go_into_one_file(tmp_path: Path, model: Path, cache: Path) -> None:
    source, output = write(tmp_path / "docs.jsonl", 40), tmp_path / "docs.npy"
    write_cached_graph(read_folder(model))
    embed.run(recipe(source, output, model, precision="fp32", limit_rows=15))
    shutil.rmtree(cache / "onnx")
    with pytest.raises(MismatchError) as caught:
        embed.run(recipe(source, output, model, precision="fp32"))
    before = f"{output}.partial holds rows computed in fp32 onnx, but here it would be fp32 ("
    assert str(caught.value).startswith(before)
    assert str(caught.value).endswith(f"; pass --engine onnx, or remove {output}.partial to start anew")
    embed.run(recipe(source, output, model, precision="fp32", engine="onnx"))
    assert len(vectors_of(output)) == 40


def test_a_finished_output_of_the_other_engine_is_kept(tmp_path: Path, model: Path) -> None:
    source, output = write(tmp_path / "docs.jsonl", 10), tmp_path / "docs.npy"
    embed.run(recipe(source, output, model, engine="onnx"))
    made = output.read_bytes()
    embed.run(recipe(source, output, model))  # auto takes what is there
    with pytest.raises(GembError) as caught:
        embed.run(recipe(source, output, model, engine="torch"))
    assert "engine was onnx, now torch" in str(caught.value)
    assert caught.value.exit_code == Exit.MISMATCH
    assert output.read_bytes() == made
