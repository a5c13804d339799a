"""Whole models merged: folders in, a folder out."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemb.engine.encoder import Encoder
from gemb.errors import Exit, GembError, MachineError, MismatchError, UnavailableError
from gemb.jobs.merge import MergeRecipe, plan, run, split_words
from gemb.jobs.merge_scores import Scored, scored
from gemb.jobs.merge_streaming import BLOCK_ENTRIES
from gemb.merging.averages import soup
from gemb.merging.election import elected_mean
from gemb.merging.merged import merged
from gemb.merging.spheres import slerp
from gemb.model.folder import fingerprint, read_folder
from gemb.model.weights import TensorSpec
from gemb.recipe import load
from tests.conftest import Finished
from tests.models import random_texts, tiny_folder

PARTS = ("", "2_Dense")
FROZEN = "norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `a`, `b`, `c` near it, which share the last norm with it."""
    place = tmp_path_factory.mktemp("models")
    tiny_folder(place / "base", "gemma3", dense=[{"bias": True}])
    for seed, name in enumerate("abc"):
        shutil.copytree(place / "base", place / name)
        change(place / name, seed)
    return place


def change(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for part in PARTS:
        rewrite(
            folder / part,
            lambda name, tensor: (
                tensor if name == FROZEN else tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            ),
        )


def rewrite(folder: Path, changed: Callable[[str, Tensor], Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({name: changed(name, tensor) for name, tensor in load_file(file).items()}, file)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}.{name}".lstrip("."): tensor
        for part in PARTS
        for name, tensor in load_file(folder / part / "model.safetensors").items()
    }


def recipe(models: Path, output: Path, *names: str, **settings: Any) -> MergeRecipe:  # noqa: ANN401
    values = {
        "models": [str(models / name) for name in names or ("a", "b", "c")],
        "output": str(output),
        "threads": 1,
        **settings,
    }
    if "base_model" in settings:
        values["base_model"] = str(models / settings["base_model"])
    return MergeRecipe.model_validate_json(json.dumps(values))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)


def by_tensor(models: Path, names: str, merge: Callable[..., Tensor]) -> dict[str, Tensor]:
    every = [tensors(models / name) for name in names]
    return {name: merge(*(one[name] for one in every)) for name in every[0]}


def test_a_soup_is_the_mean_of_every_tensor_dense_included(models: Path, tmp_path: Path) -> None:
    run(recipe(models, tmp_path / "soup"))
    assert_same(tensors(tmp_path / "soup"), by_tensor(models, "abc", lambda *each: soup(each, [1, 1, 1])))


def test_a_soup_does_not_depend_on_the_order_and_weights_count(models: Path, tmp_path: Path) -> None:
    run(recipe(models, tmp_path / "one", "a", "b", weights=[1, 3]))
    run(recipe(models, tmp_path / "two", "b", "a", weights=[3, 1]))
    assert_same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    run(recipe(models, tmp_path / "plain", "a", "b"))
    assert not torch.equal(
        tensors(tmp_path / "one")["2_Dense.linear.weight"],
        tensors(tmp_path / "plain")["2_Dense.linear.weight"],
    )


@pytest.mark.parametrize(
    "method",
    "linear task_arithmetic slerp karcher multislerp ties dare_ties della breadcrumbs model_stock".split(),
)
def test_what_no_model_changed_is_kept_to_the_bit(method: str, models: Path, tmp_path: Path) -> None:
    names = ("a", "b") if method == "slerp" else ("a", "b", "c")
    base = {} if method in ("linear", "slerp", "karcher", "multislerp") else {"base_model": "base"}
    run(recipe(models, tmp_path / "out", *names, merge_method=method, **base))
    assert torch.equal(tensors(tmp_path / "out")[FROZEN], tensors(models / "base")[FROZEN])
    assert not torch.equal(
        tensors(tmp_path / "out")["2_Dense.linear.bias"], tensors(models / "a")["2_Dense.linear.bias"]
    )


def test_copies_merge_to_the_same_model_to_the_bit(models: Path, tmp_path: Path) -> None:
    for name in ("d", "e"):
        shutil.copytree(models / "a", tmp_path / name)
    names = [str(models / "a"), str(tmp_path / "d"), str(tmp_path / "e")]
    run(recipe(models, tmp_path / "out", *names, weights=[1, 2, 4]))
    assert Encoder.load(str(tmp_path / "out")).fingerprint == Encoder.load(str(models / "a")).fingerprint


def test_task_arithmetic_with_lambda_one_third_is_the_soup(models: Path, tmp_path: Path) -> None:
    settings = {"merge_method": "task_arithmetic", "base_model": "base"}
    run(recipe(models, tmp_path / "sum", parameters={"lambda": 1 / 3}, **settings))
    run(recipe(models, tmp_path / "soup"))
    assert_same(tensors(tmp_path / "sum"), tensors(tmp_path / "soup"))
    run(recipe(models, tmp_path / "base", parameters={"lambda": 0}, **settings))
    assert_same(tensors(tmp_path / "base"), tensors(models / "base"))
    run(recipe(models, tmp_path / "one", "a", **settings))
    assert_same(tensors(tmp_path / "one"), tensors(models / "a"))


def test_slerp_begins_at_its_base(models: Path, tmp_path: Path) -> None:
    run(recipe(models, tmp_path / "out", "a", "b", merge_method="slerp", parameters={"t": 0.25}))
    expected = by_tensor(models, "ab", lambda one, two: slerp(one, two, 0.25))
    assert_same(tensors(tmp_path / "out"), expected)
    settings = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.25}}
    run(recipe(models, tmp_path / "listed", "b", "a", **settings))
    assert_same(tensors(tmp_path / "listed"), expected)


def test_ties_trims_over_the_whole_model(models: Path, tmp_path: Path) -> None:
    settings = {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.3}}
    run(recipe(models, tmp_path / "whole", **settings))
    run(recipe(models, tmp_path / "each", variant="mergekit", **settings))
    base = tensors(models / "base")
    flat = [
        torch.cat([(tensor - base[name]).reshape(-1) for name, tensor in tensors(models / one).items()])
        for one in "abc"
    ]
    kept = [
        torch.where(delta.abs() >= delta.abs().topk(int(0.3 * len(delta))).values[-1], delta, 0.0)
        for delta in flat
    ]
    mean = elected_mean(kept, [1, 1, 1])
    parts = torch.split(mean, [tensor.numel() for tensor in base.values()])
    expected = {
        name: tensor + part.reshape(tensor.shape)
        for (name, tensor), part in zip(base.items(), parts, strict=True)
    }
    assert_same(tensors(tmp_path / "whole"), expected)
    assert not torch.equal(
        tensors(tmp_path / "whole")["embed_tokens.weight"], tensors(tmp_path / "each")["embed_tokens.weight"]
    )


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della_linear", "breadcrumbs_ties"])
def test_blocks_give_what_whole_tensors_give(
    method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"merge_method": method, "base_model": "base", "parameters": {"density": 0.7}}
    run(recipe(models, tmp_path / "whole", **settings))
    assert BLOCK_ENTRIES > 200 * 64
    monkeypatch.setattr("gemb.jobs.merge_streaming.BLOCK_ENTRIES", 640)
    run(recipe(models, tmp_path / "blocks", **settings))
    whole, blocks = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    # Torch draws in groups of 16, so that blocks of 640 entries draw what the whole does.
    assert all(torch.equal(tensor, blocks[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "breadcrumbs"])
def test_less_memory_makes_smaller_blocks_and_the_same_model(
    method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {} if method == "linear" else {"base_model": "base"}
    run(recipe(models, tmp_path / "free", merge_method=method, **base))
    sizes = []

    def watching(*arguments: Any, **more: Any) -> Tensor:  # noqa: ANN401
        sizes.append(arguments[2][0].numel())
        return merged(*arguments, **more)

    monkeypatch.setattr("gemb.merging.merged.merged", watching)
    gib = 30 * 4 * 2000 / 2**30  # 2,000 entries of three models and a base
    run(recipe(models, tmp_path / "little", merge_method=method, max_memory=gib, **base))
    assert 1024 <= max(sizes) <= (2000 if base else 2000 * 4 // 3)
    free, little = tensors(tmp_path / "free"), tensors(tmp_path / "little")
    assert all(torch.equal(tensor, little[name]) for name, tensor in free.items())


def test_a_tensor_that_is_needed_whole_and_does_not_fit_is_told_before_anything_is_read(
    models: Path, tmp_path: Path
) -> None:
    with pytest.raises(GembError) as caught:
        plan(recipe(models, tmp_path / "out", merge_method="karcher", max_memory=0.001))
    assert str(caught.value) == (
        "karcher needs whole tensors, and embed_tokens.weight takes about 2.2 MiB at work, but max_memory is "
        "0.001 GiB; raise it, or take a method that works in blocks, such as linear"
    )
    run(recipe(models, tmp_path / "out", merge_method="karcher", max_memory=0.0025))


PEAK = """
import json, sys, threading, time
import torch
from gemb.jobs.merge import MergeRecipe, run
import gemb.jobs.merge_streaming, gemb.merging.merged, gemb.model.trainable.saving
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)
settings = json.loads(sys.argv[1])
run(MergeRecipe.model_validate_json(json.dumps({**settings, "output": settings["output"] + "-first"})))
done, before, peaks = False, anonymous(), []
thread = threading.Thread(target=watch)
thread.start()
run(MergeRecipe.model_validate_json(sys.argv[1]))
done = True
thread.join()
print(max(peaks) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the anonymous memory of a process")
@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties"])
def test_a_merge_stays_within_its_memory(method: str, tmp_path: Path) -> None:
    config = {"vocab_size": 40_000}
    tiny_folder(tmp_path / "base", "gemma3", config=config)
    for seed, name in enumerate(["base", "a", "b", "c"]):
        if seed:
            shutil.copytree(tmp_path / "base", tmp_path / name)
        table = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(seed))
        rewrite(tmp_path / name, lambda key, tensor, table=table: table if "embed" in key else tensor)  # type: ignore[misc]
    mib: list[float] = []
    for allowed in (None, 0.006):
        settings = {
            "models": [str(tmp_path / name) for name in "abc"],
            "base_model": str(tmp_path / "base"),
            "merge_method": method,
            "max_memory": allowed,
            "output": str(tmp_path / f"out-{allowed}"),
        }
        command = [sys.executable, "-c", PEAK, json.dumps(settings)]
        # So that what is freed goes back to the system, and the second merge shows its own peak.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        mib.append(int(done.stdout) / 2**20)
    assert mib[1] < 0.006 * 1024 < mib[0]


def test_dropping_at_random_is_the_seeds_alone(models: Path, tmp_path: Path) -> None:
    settings = {"merge_method": "dare_linear", "base_model": "base", "parameters": {"density": 0.5}}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(recipe(models, tmp_path / name, seed=seed, **settings))
    one, again, other = (tensors(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])


def test_the_dtype_may_be_chosen_and_sums_are_float32(models: Path, tmp_path: Path) -> None:
    run(recipe(models, tmp_path / "half", dtype="bfloat16"))
    expected = by_tensor(models, "abc", lambda *each: soup(each, [1, 1, 1]).bfloat16())
    found = tensors(tmp_path / "half")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name != FROZEN)
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_shards_and_tied_tables_come_out_as_one_file_with_both(models: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(models / name, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
        (tmp_path / name / "model.safetensors").unlink()
        names = sorted(weights)
        files = {one: f"model-0000{1 + (place > 5)}-of-00002.safetensors" for place, one in enumerate(names)}
        for file in set(files.values()):
            save_file({one: weights[one] for one in names if files[one] == file}, tmp_path / name / file)
        index = {"metadata": {}, "weight_map": files}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(models / "base", tmp_path / "base")
    rewritten = load_file(tmp_path / "base/model.safetensors")
    rewritten["lm_head.weight"] = rewritten["embed_tokens.weight"].clone()
    save_file(rewritten, tmp_path / "base/model.safetensors")
    settings = {"merge_method": "dare_linear", "base_model": "base", "parameters": {"density": 0.5}}
    run(recipe(tmp_path, tmp_path / "out", "a", "b", **settings))
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["embed_tokens.weight"])
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_the_folder_is_whole_and_sentence_transformers_gives_the_same_vectors(
    models: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    report = run(recipe(models, tmp_path / "out"))
    texts = random_texts([3, 9, 20])
    with closing(Encoder.load(str(tmp_path / "out"), threads=1, precision="fp32")) as encoder:
        ours = encoder.embed(texts, as_="query")
        assert encoder.fingerprint == report.data["fingerprint"]
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts, prompt_name="query")
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    card = (tmp_path / "out/README.md").read_text()
    assert all(str(models / name) in card for name in "abc")
    record = json.loads((tmp_path / "out/gemb.json").read_text())
    assert [len(one["fingerprint"]) for one in record["ingredients"]] == [64, 64, 64]
    assert record["recipe"]["merge_method"] == "linear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {"dtype": "bfloat16"}),
        ("ties", {"base_model": "base", "parameters": {"density": 0.3}}),
        ("karcher", {}),
    ],
)
def test_fingerprints_are_taken_in_passing_and_are_those_of_the_files(
    method: str,
    settings: dict[str, Any],
    threads: int,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gemb.jobs.merge_streaming.BLOCK_ENTRIES", 640)
    with monkeypatch.context() as patch:
        patch.setattr("gemb.model.identity._hash_tensor", unexpected)
        report = run(recipe(models, tmp_path / "out", merge_method=method, threads=threads, **settings))
        assert fingerprint(read_folder(tmp_path / "out")) == report.data["fingerprint"]
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "other"))
    assert fingerprint(read_folder(tmp_path / "out")) == report.data["fingerprint"]
    named: Any = [*report.data["ingredients"], *filter(None, [report.data["base"]])]  # type: ignore[misc]
    assert len(named) == (4 if method == "ties" else 3)
    for one in named:
        assert one["fingerprint"] == fingerprint(read_folder(Path(one["model"])))


def unexpected(spec: TensorSpec) -> str:
    raise AssertionError(f"{spec.name} of {spec.file} is read once more")


def test_models_trained_for_a_grid_are_merged_with_a_warning(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "trained")
    (tmp_path / "trained/gemb.json").write_text('{"qat": {"format": "int4", "start": 0.5}}')
    report = run(recipe(models, tmp_path / "out", str(tmp_path / "trained"), "b"))
    told = (
        f"{tmp_path / 'trained'} was trained for the int4 grid, and a mean of weights lies off it: "
        "gemb quantize will cost the merged model what it costs any other"
    )
    assert ("note", told) in report.rows
    assert told in (tmp_path / "out/README.md").read_text()
    assert plan(recipe(models, tmp_path / "new", "b", str(tmp_path / "trained"))).data["notes"] == [told]
    assert plan(recipe(models, tmp_path / "new", "a", "b")).data["notes"] == []


def test_a_plan_writes_nothing(models: Path, tmp_path: Path) -> None:
    planned = plan(recipe(models, tmp_path / "out"))
    assert planned.title == f"would merge 3 models into {tmp_path / 'out'}"
    assert list(tmp_path.iterdir()) == []


# --- data --------------------


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    """Pairs of texts whose scores are the cosines that model `a` gives, so that it is the best one."""
    return tmp_path / "sts.jsonl"


def write_sts(file: Path, model: Path) -> str:
    pairs = [random_texts([6, 8], seed) for seed in range(40)]
    with closing(Encoder.load(str(model), threads=1, precision="fp32")) as encoder:
        vectors = [encoder.embed(pair) for pair in pairs]
    rows = [
        {"sentence1": pair[0], "sentence2": pair[1], "score": float(two[0] @ two[1])}
        for pair, two in zip(pairs, vectors, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_merged_model_gets_a_verdict_against_the_best_one(
    models: Path, tmp_path: Path, sts: Path
) -> None:
    data = write_sts(sts, models / "a")
    report = run(recipe(models, tmp_path / "out", "b", "a", weights=[1, 0], data=[data]))
    verdict: Any = report.data["verdict"]
    assert verdict["verdict"] == "REGRESSION"
    assert report.exit_code == Exit.DONE
    failing = {"weights": [1, 0], "data": [data], "fail_on_regression": True}
    assert run(recipe(models, tmp_path / "gate", "b", "a", **failing)).exit_code == Exit.GATE
    assert "REGRESSION against the best model" in (tmp_path / "out/README.md").read_text()
    scores: Any = report.data["scores"]
    assert scores[str(models / "a")] == max(scores.values())


def test_a_greedy_soup_keeps_what_does_not_harm(models: Path, tmp_path: Path, sts: Path) -> None:
    data = write_sts(sts, models / "a")
    report = run(recipe(models, tmp_path / "out", "c", "a", "b", data=[data], choose="greedy"))
    assert report.data["weights"] == [0, 1, 0]
    assert_same(tensors(tmp_path / "out"), tensors(models / "a"))
    trials: Any = report.data["trials"]
    assert [trial["origin"] for trial in trials] == ["model"] * 3 + ["greedy"] * 2
    assert report.tables[1].columns == ["origin", *(str(models / name) for name in "cab"), "score"]


def test_a_search_for_weights_is_bounded_and_never_worse_than_the_recipe(
    models: Path, tmp_path: Path, sts: Path
) -> None:
    data = write_sts(sts, models / "a")
    report = run(recipe(models, tmp_path / "out", "a", "b", data=[data], choose="weights", budget=7))
    trials: Any = report.data["trials"]
    assert [trial["origin"] for trial in trials][:5] == ["recipe"] + ["drawn"] * 3 + ["refined"]
    assert len(trials) <= 7
    scores: Any = report.data["scores"]
    assert scores["out"] == pytest.approx(max(trial["score"] for trial in trials))
    assert scores["out"] >= trials[0]["score"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sts.jsonl"]


class Halt(Exception):
    """The process is gone."""


@pytest.mark.parametrize("choose", ["greedy", "weights"])
def test_a_search_that_was_killed_goes_on_with_the_scores_that_it_had(
    choose: str, models: Path, tmp_path: Path, sts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_sts(sts, models / "a")
    settings = {"data": [data], "choose": choose, "budget": 6}
    whole = run(recipe(models, tmp_path / "whole", **settings))
    tried: list[str] = []

    def counting(name: str, *arguments: Any) -> Scored:  # noqa: ANN401
        if name == "a trial":
            tried.append(name)
            if len(tried) == halts_at:
                raise Halt
        return scored(name, *arguments)

    monkeypatch.setattr("gemb.jobs.merge.scored", counting)
    halts_at = 2
    with pytest.raises(Halt):
        run(recipe(models, tmp_path / "out", **settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "sts.jsonl", "whole"]
    halts_at, tried = 0, []
    report = run(recipe(models, tmp_path / "out", **settings))
    searched = [trial for trial in whole.data["trials"] if trial["origin"] != "model"]  # type: ignore[attr-defined]
    assert len(tried) == len(searched) - 1
    assert report.data["trials"] == whole.data["trials"]
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert not (tmp_path / "out.partial").exists()


def test_scores_of_other_data_models_or_parameters_are_not_taken(
    models: Path, tmp_path: Path, sts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_sts(sts, models / "a")
    computed: list[str] = []

    def counting(name: str, *arguments: Any) -> Scored:  # noqa: ANN401
        if name == "out":
            raise Halt
        computed.append(name)
        return scored(name, *arguments)

    monkeypatch.setattr("gemb.jobs.merge.scored", counting)

    def newly_scored(names: str = "ab", **settings: Any) -> int:  # noqa: ANN401
        """How many merged models are evaluated by a search of one that is killed at its end."""
        computed.clear()
        with pytest.raises(Halt):
            run(recipe(models, tmp_path / "out", *names, data=[data], choose="weights", budget=1, **settings))
        return computed.count("a trial")

    assert newly_scored() == 1
    assert newly_scored() == 0
    assert newly_scored(threads=2, max_memory=1) == 0
    assert newly_scored("ba") == 1
    assert newly_scored(merge_method="karcher") == 1
    sts.write_text("".join(sts.read_text().splitlines(keepends=True)[:-1]))
    assert newly_scored() == 1


# --- one run --------------------


def with_checkpoints(models: Path, place: Path) -> Path:
    shutil.copytree(models / "base", place)
    for step, name in enumerate("abc"):
        folder = place / f"run/checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(tensors(models / name), folder / "weights.safetensors")
    return place


def test_the_last_checkpoints_of_a_run_are_averaged(models: Path, tmp_path: Path) -> None:
    with_checkpoints(models, tmp_path / "run")
    run(recipe(tmp_path, tmp_path / "last", "run", last=2))
    assert_same(tensors(tmp_path / "last"), by_tensor(models, "bc", lambda *each: soup(each, [1, 1])))
    run(recipe(tmp_path, tmp_path / "decayed", "run", last=3, decay=0.5))
    assert_same(
        tensors(tmp_path / "decayed"), by_tensor(models, "abc", lambda *each: soup(each, [0.25, 0.5, 1]))
    )
    read_folder(tmp_path / "last")


def test_a_run_with_too_few_checkpoints_says_how_to_keep_them(models: Path, tmp_path: Path) -> None:
    with_checkpoints(models, tmp_path / "run")
    with pytest.raises(GembError) as caught:
        run(recipe(tmp_path, tmp_path / "out", "run", last=4))
    assert str(caught.value) == (
        f"{tmp_path / 'run/run/checkpoints'} has 3 checkpoints, and last is 4; "
        "train with checkpoint.keep_after: true and checkpoint.keep: 4 or more"
    )


# --- mistakes --------------------


@pytest.mark.parametrize(
    ("names", "settings", "error", "message"),
    [
        (
            "a",
            {},
            GembError,
            "linear merges two models at least, and 1 is given; name more, or a run's checkpoints by --last",
        ),
        (
            "ab",
            {"weights": [1, -1]},
            GembError,
            "the weights sum to 0 at {first}; their sum divides, so change one",
        ),
        ("ab", {"weights": [1]}, GembError, "1 weight for 2 models; give one a model"),
        (
            "ab",
            {"merge_method": "slerp", "parameters": {"t": 7}},
            GembError,
            "t is 7; it must be from 0, the first model, to 1, the second",
        ),
        (
            "abc",
            {"merge_method": "slerp"},
            GembError,
            "slerp merges two models, not 3; karcher merges any number",
        ),
        (
            "ab",
            {"merge_method": "ties"},
            GembError,
            "ties starts from the model that the others were trained from; "
            "name it with --base-model (base_model in a recipe)",
        ),
        (
            "ab",
            {"base_model": "base"},
            GembError,
            "linear has no base; leave out base_model, or list {base} in models",
        ),
        (
            "ab",
            {"merge_method": "ties", "base_model": "base", "parameters": {"density": 1.5}},
            GembError,
            "density is 1.5; it must be above 0 and at most 1",
        ),
        (
            "ab",
            {"merge_method": "dare_ties", "base_model": "base", "parameters": {"density": 0}},
            GembError,
            "density is 0; it must be above 0 and at most 1",
        ),
        (
            "ab",
            {"merge_method": "della", "base_model": "base", "parameters": {"density": 0.9}},
            GembError,
            "density 0.9 and epsilon 0.15 give chances from 0.75 to 1.05; they must lie between 0 and 1",
        ),
        (
            "ab",
            {"merge_method": "ties", "base_model": "base", "parameters": {"density": [0.1, 0.5]}},
            GembError,
            "density of {a} differs between tensors (0.1 to 0.5), but TIES trims over the whole model; "
            "give one density, or variant: mergekit, which trims each tensor",
        ),
        (
            "ab",
            {"choose": "greedy"},
            GembError,
            "--choose compares merged models on data; name some with --data",
        ),
        (
            "ab",
            {"choose": "greedy", "data": ["x.jsonl"], "weights": [1, 2]},
            GembError,
            "--choose looks for the weights; leave out --weights",
        ),
        (
            "ab",
            {"data": ["nothing.jsonl"]},
            GembError,
            "there is no nothing.jsonl to evaluate on; check the path",
        ),
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(
    names: str, settings: dict[str, Any], error: type[GembError], message: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        run(recipe(models, tmp_path / "out", *names, **settings))
    first = next(iter(load_file(models / "a/model.safetensors")))
    assert str(caught.value) == message.format(a=models / "a", base=models / "base", first=first)
    assert type(caught.value) is error
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_number_are_refused(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(f"models: [{models / 'a'}, {models / 'b'}]\nweights: [1, .nan]\n")
    with pytest.raises(GembError, match=r"^weight is nan; it must be a finite number$"):
        run(load(file, MergeRecipe, (), {"output": tmp_path / "out"}))


def test_an_unknown_filter_is_told_with_the_words_of_the_names(models: Path, tmp_path: Path) -> None:
    weight = [{"filter": "self_atn", "value": 1}, {"value": 2}]
    with pytest.raises(GembError) as caught:
        run(recipe(models, tmp_path / "out", "a", "b", parameters={"weight": weight}))
    said = "the filter 'self_atn' is in no tensor's name; names have 2_Dense, "
    assert str(caught.value).startswith(said)
    file = tmp_path / "f.yaml"
    values = {"models": [str(models / "a"), str(models / "b")], "parameters": {"weight": weight}}
    file.write_text(yaml.safe_dump(values), "utf-8")
    with pytest.raises(GembError) as caught:
        run(load(file, MergeRecipe, (), {"output": tmp_path / "out"}))
    assert str(caught.value).startswith(f"{file}: {said}")
    assert caught.value.exit_code == Exit.USAGE


@pytest.fixture
def altered(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "b", tmp_path / "altered")
    return tmp_path / "altered"


def refused(models: Path, altered: Path) -> list[str]:
    with pytest.raises(MismatchError) as caught:
        run(recipe(models, altered.parent / "out", "a", str(altered)))
    head, *lines = str(caught.value).splitlines()
    assert head == f"cannot be merged with {models / 'a'}:"
    assert caught.value.exit_code == Exit.MISMATCH
    assert not (altered.parent / "out").exists()
    return [line.removeprefix(f"  {altered}: ") for line in lines]


def test_other_shapes_are_refused_by_name(models: Path, altered: Path) -> None:
    rewrite(altered, lambda name, tensor: tensor[:100].clone() if name == "embed_tokens.weight" else tensor)
    assert refused(models, altered) == ["embed_tokens.weight is [100, 64], not [200, 64]"]


def test_missing_tensors_are_refused_by_name(models: Path, altered: Path) -> None:
    file = altered / "model.safetensors"
    weights = load_file(file)
    weights["rope.table"] = weights.pop(FROZEN)
    save_file(weights, file)
    assert refused(models, altered) == [
        f"lacks 1 tensor: {FROZEN}",
        "has, beyond the other, 1 tensor: rope.table",
    ]


def test_other_prompts_and_another_pooling_are_refused_together(models: Path, altered: Path) -> None:
    file = altered / "config_sentence_transformers.json"
    file.write_text(file.read_text().replace("w11 ", "w12 "))
    file = altered / "1_Pooling/config.json"
    file.write_text(file.read_text().replace('"include_prompt": true', '"include_prompt": false'))
    pooling, prompt = refused(models, altered)
    assert pooling == "pooling include_prompt is false, not true"
    file.write_text(
        file.read_text().replace('"pooling_mode_mean_tokens": true', '"pooling_mode_cls_token": true')
    )
    assert "pooling is cls, not mean" in refused(models, altered)
    assert prompt == "prompt document is 'w12 ', not 'w11 '"


def test_a_prompt_that_one_model_lacks_is_told_in_words(models: Path, altered: Path) -> None:
    file = altered / "config_sentence_transformers.json"
    config = json.loads(file.read_text())
    config["prompts"] = {"query": config["prompts"].get("query", "w12 "), "other": "w13 "}
    file.write_text(json.dumps(config))
    told = refused(models, altered)
    assert "prompt document is not there, and 'w11 ' in the first" in told
    assert "prompt other is 'w13 ', and the first has none" in told


def test_a_model_that_is_given_twice_is_noted_and_sizes_are_in_bytes(models: Path, tmp_path: Path) -> None:
    planned = plan(recipe(models, tmp_path / "out", "a", "a"))
    assert planned.data["notes"] == [f"{models / 'a'} is given 2 times"]
    assert dict(planned.rows)["weights"].endswith("iB to write")
    assert plan(recipe(models, tmp_path / "out", "a", "b")).data["notes"] == []


def test_a_first_word_may_be_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_words(["merge/soup", "a", "b"], None) == ("merge/soup", ["a", "b"])
    assert split_words(["ties.yaml"], None) == ("ties.yaml", [])
    assert split_words(["a", "merge/soup"], None) == (None, ["a", "merge/soup"])
    assert split_words(["merge/soup"], "mine.yaml") == ("mine.yaml", ["merge/soup"])
    (tmp_path / "merge/soup").mkdir(parents=True)
    assert split_words(["merge/soup", "a"], None) == (None, ["merge/soup", "a"])


def test_another_tokenizer_is_refused(models: Path, altered: Path) -> None:
    file = altered / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w4"], vocabulary["w5"] = vocabulary["w5"], vocabulary["w4"]
    file.write_text(json.dumps(content))
    assert refused(models, altered) == [
        "another tokenizer; a merge needs one, since tokens are rows of the table"
    ]


def test_another_setting_of_the_backbone_is_refused(models: Path, altered: Path) -> None:
    file = altered / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rms_norm_eps": 0.5, "transformers_version": "0"}))
    assert refused(models, altered) == [f"config.json: rms_norm_eps is 0.5, not {config['rms_norm_eps']!r}"]


def test_another_family_is_refused(models: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "bert", "bert")
    assert refused(models, tmp_path / "bert") == ["a bert model, not gemma3_text"]


def test_a_weight_that_is_not_finite_is_told_with_its_file(models: Path, altered: Path) -> None:
    rewrite(altered, lambda name, tensor: torch.full_like(tensor, float("nan")) if name == FROZEN else tensor)
    with pytest.raises(UnavailableError) as caught:
        run(recipe(models, altered.parent / "out", "a", str(altered)))
    assert str(caught.value) == (
        f"{altered / 'model.safetensors'} is damaged: {FROZEN} holds NaN or infinity; "
        "download the model again, or train it anew"
    )
    assert not (altered.parent / "out").exists()


def test_a_number_that_is_not_finite_is_told_by_a_method_that_drops_it(models: Path, altered: Path) -> None:
    # TIES keeps the largest changes, and NaN is not larger than anything.
    rewrite(altered, lambda name, tensor: torch.full_like(tensor, float("nan")) if name == FROZEN else tensor)
    with pytest.raises(UnavailableError) as caught:
        run(recipe(models, altered.parent / "out", "a", str(altered), merge_method="ties", base_model="base"))
    assert str(caught.value) == (
        f"{altered / 'model.safetensors'} is damaged: 64 of the 64 numbers of {FROZEN} are NaN or infinite; "
        "download the model again, or train it anew"
    )
    assert not (altered.parent / "out").exists()


def test_a_result_that_its_dtype_cannot_hold_is_refused(models: Path, tmp_path: Path) -> None:
    settings = {"dtype": "float16", "weights": [1e6, 1e6], "parameters": {"normalize": False}}
    with pytest.raises(
        GembError, match=r"is too large for float16; take dtype: float32, or smaller weights$"
    ):
        run(recipe(models, tmp_path / "out", "a", "b", **settings))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(GembError) as caught:
        run(recipe(models, tmp_path / "out"))
    assert str(caught.value) == (
        f"{tmp_path / 'out'} exists; choose another path for the model, or pass --overwrite"
    )
    with pytest.raises(GembError) as caught:
        run(recipe(models, tmp_path / "out"), overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path / 'out'} is no model, so it is not overwritten; choose another path for the model"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_model_is_overwritten_when_the_new_one_is_whole_and_not_before(
    models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "c", tmp_path / "out")
    planned = plan(recipe(models, tmp_path / "out", "a", "b"))
    assert planned.rows[-1] == ("note", f"{tmp_path / 'out'} exists; the merge will need --overwrite")
    settings = {"dtype": "float16", "weights": [1e6, 1e6], "parameters": {"normalize": False}}
    with pytest.raises(GembError, match=r"is too large for float16"):
        run(recipe(models, tmp_path / "out", "a", "b", **settings), overwrite=True)
    assert_same(tensors(tmp_path / "out"), tensors(models / "c"))
    run(recipe(models, tmp_path / "out", "a", "b"), overwrite=True)
    assert_same(tensors(tmp_path / "out"), by_tensor(models, "ab", lambda *each: soup(each, [1, 1])))
    # The output may be one of the models.
    run(recipe(models, tmp_path / "out", str(tmp_path / "out"), "c", weights=[2, 1]), overwrite=True)
    assert_same(tensors(tmp_path / "out"), by_tensor(models, "abc", lambda *each: soup(each, [1, 1, 1])))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.faults
def test_a_disk_that_is_full_leaves_nothing(models: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MachineError, match=r"^cannot write .*: the file grew past a size limit"):
            run(recipe(models, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# --- the command --------------------


def test_the_command_merges_and_tells_a_mistake(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    done = gemb("merge", models / "a", models / "b", "-o", tmp_path / "out", "--weights", "1,3", "--json")
    assert done.code == 0
    assert json.loads(done.out)["output"] == str(tmp_path / "out")
    expected = by_tensor(models, "ab", lambda *each: soup(each, [1, 3]))
    assert_same(tensors(tmp_path / "out"), expected)
    again = gemb("merge", models / "a", models / "b", "-o", tmp_path / "out")
    assert (again.code, again.out) == (2, "")
    assert again.err == (
        f"gemb: {tmp_path / 'out'} exists; choose another path for the model, or pass --overwrite\n"
    )
    done = gemb("merge", models / "a", models / "b", "-o", tmp_path / "out", "--overwrite", "-q")
    assert (done.code, done.err) == (0, "")
    assert_same(tensors(tmp_path / "out"), by_tensor(models, "ab", lambda *each: soup(each, [1, 1])))


def test_the_command_reads_a_recipe_of_mergekit(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    file = models / "ties.yml"
    file.write_text(
        "models:\n"
        "  - model: ./base\n"
        "  - model: ./a\n    parameters: {density: 0.5, weight: 0.5}\n"
        "  - model: ./b\n    parameters:\n      density: 0.5\n      weight: 0.3\n"
        "merge_method: ties\nbase_model: ./base\n"
        "parameters:\n  normalize: true\n  int8_mask: true\ndtype: float32\ntokenizer_source: base\n"
    )
    done = gemb("merge", file, "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["models"] == [str(models / "a"), str(models / "b")]
