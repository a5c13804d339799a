"""`gemb train` with `qat`: trained, scored and killed with the weights that the export has."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

from gemb.engine.encoder import Encoder
from gemb.errors import GembError, MismatchError
from gemb.jobs import quantize
from gemb.jobs.train import TrainRecipe, plan, run
from gemb.model.folder import read_folder
from gemb.model.trainable import TrainableEncoder
from gemb.quantization.roles import WeightFormat, grid_of, role_of
from gemb.recipe import load
from gemb.report import Report
from gemb.training.loop import Training
from tests.conftest import Finished
from tests.jobs.test_train import RECIPE, metrics, same, weights, write_pairs
from tests.jobs.test_train_ranks import train_one_rank
from tests.models import packed, random_texts, tiny_folder

STEPS = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a recipe whose batches are encoded twice."""
    folder = tmp_path_factory.mktemp("qat")
    tiny_folder(folder / "base", "gemma3", dense=[{"out_features": 96}, {"out_features": 64}])
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "held-out.jsonl", 20, seed=1)
    text = RECIPE.replace("pairs: 8}", "pairs: 8, memory_gib: 0.001}") + "qat: {format: int4}\n"
    (folder / "r.yaml").write_text(text.replace("matryoshka: {sizes: [32]}\n", ""), "utf-8")
    return folder


def trained(place: Path, output: Path, *changes: str) -> Report:
    return run(load(place / "r.yaml", TrainRecipe, changes, {"output": output}))


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Report, Path]:
    """The uninterrupted run."""
    return trained(place, place / "whole"), place / "whole"


def exported(folder: Path, place: Path, weight_format: WeightFormat = "int4") -> Path:
    """The folder with its weights moved onto the grids, as `unquantized` exports have them."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "run" not in file.parts:
            target = place / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    for file in sorted(place.rglob("model.safetensors")):
        moved = {}
        for name, weight in load_file(file).items():
            role = role_of(name, weight.shape)
            moved[name] = weight if role is None else grid_of(role, weight_format).snap(weight)
        save_file(moved, file, metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("weight_format", ["int4", "int8", "mixed"])
def test_a_trained_model_computes_in_training_what_its_export_computes(
    place: Path, tmp_path: Path, weight_format: WeightFormat
) -> None:
    output = tmp_path / "model"
    trained(place, output, f"qat.format={weight_format}", "evaluation.pairs=[]")
    ids, lengths = torch.arange(4, 64), np.array([40, 1, 19], np.int32)
    model = TrainableEncoder.load(read_folder(output)).eval()
    export = TrainableEncoder.load(read_folder(exported(output, tmp_path / "export", weight_format))).eval()
    with torch.no_grad():
        plain, expected = model(ids, lengths), export(ids, lengths)
        with model.quantisation(weight_format).applied():
            vectors = model(ids, lengths)
    assert float((vectors - expected).abs().max()) == 0
    assert float((vectors - plain).abs().max()) > 1e-5

    settings = {"model": str(output), "output": str(tmp_path / "written"), "format": weight_format}
    quantize.run(quantize.QuantizeRecipe.model_validate_json(json.dumps(settings)))
    texts = random_texts((1, 9, 30))
    written, snapped = (
        Encoder.load(tmp_path / name, threads=1, precision="fp32") for name in ("written", "export")
    )
    found = written.embed(texts, as_="none")
    assert np.array_equal(found, snapped.embed(texts, as_="none"))
    np.testing.assert_allclose(found, _in_training(model, weight_format, texts), atol=2e-6)


def _in_training(
    model: TrainableEncoder, weight_format: WeightFormat, texts: list[str]
) -> NDArray[np.float32]:
    """The vectors that training computes."""
    ids, lengths, rows = packed(model.folder.path, texts)
    with torch.no_grad(), model.quantisation(weight_format).applied():
        vectors: NDArray[np.float32] = model(torch.from_numpy(ids), lengths).numpy()[rows]
    return vectors


def score(place: Path, folder: Path) -> float:
    """nDCG@10 of the held-out pairs: each query finds one positive among all."""
    held_out = [json.loads(line) for line in (place / "held-out.jsonl").read_text("utf-8").splitlines()]
    encoder = Encoder.load(folder, threads=1, precision="fp32")
    queries = encoder.embed([row["query"] for row in held_out], as_="query")
    passages = encoder.embed([row["positive"] for row in held_out], as_="document")
    encoder.close()
    cosines = queries @ passages.T
    ranks = (cosines > np.diag(cosines)[:, None]).sum(1)
    return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())


def test_scores_after_the_first_step_are_those_of_the_export_and_the_folder_keeps_the_floats(
    place: Path, whole: tuple[Report, Path], tmp_path: Path
) -> None:
    report, output = whole
    measures: Any = report.data["measures"]
    export = exported(output, tmp_path / "export")
    assert measures["before"]["held-out/nDCG@10"] == pytest.approx(score(place, place / "base"))
    assert measures["after"]["held-out/nDCG@10"] == pytest.approx(score(place, export))
    assert not same(output, export)


def test_the_first_half_is_that_of_a_run_without_it_and_every_later_step_is_marked(
    place: Path, whole: tuple[Report, Path], tmp_path: Path
) -> None:
    trained(place, tmp_path / "plain", "qat=null")
    steps = [line for line in metrics(whole[1]) if "loss" in line]
    plain = [line for line in metrics(tmp_path / "plain") if "loss" in line]
    assert [line.get("quantised", False) for line in steps] == [False] * 4 + [True] * 3  # from 3.5 steps on
    assert steps[:4] == plain[:4]
    assert steps[4]["loss"] != plain[4]["loss"]
    assert not same(whole[1], tmp_path / "plain")


def test_a_tokens_long_run_begins_at_its_share_of_the_tokens(place: Path, tmp_path: Path) -> None:
    report = trained(
        place, tmp_path / "out", "steps=null", "tokens=1500", "qat.start=0.3", "evaluation.pairs=[]"
    )
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    before = [0, *(int(str(line["tokens"])) for line in lines[:-1])]
    assert [line.get("quantised", False) for line in lines] == [done >= 450 for done in before]
    assert 0 < sum(done >= 450 for done in before) < len(lines) == report.data["steps"]


def test_record_report_and_card_say_what_the_model_was_trained_for(whole: tuple[Report, Path]) -> None:
    report, output = whole
    assert json.loads((output / "gemb.json").read_text("utf-8"))["qat"] == {"format": "int4", "start": 0.5}
    told = "int4 from 50 % of the run on; scores are those of the quantised model"
    assert ("qat", told) in report.rows
    card = (output / "README.md").read_text("utf-8")
    assert "Trained for the format int4 from 50 % of the run on;" in card
    assert f"gemb quantize {output} --format int4 -o {output}-int4" in card


def test_a_sum_of_low_rank_is_trained_and_scored_as_its_export_has_it(place: Path, tmp_path: Path) -> None:
    changes = ('lora={rank: 2, targets: ["*q_proj*", "*mlp*"]}', "qat.start=0.3", "ema=null")
    report = trained(place, tmp_path / "out", *changes)
    before, after = weights(place / "base"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "mlp" in name}
    for name in changed:  # what is kept is the sum in floats, on no grid
        assert int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4)) == 2
    steps = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert [line.get("quantised", False) for line in steps] == [False] * 3 + [True] * 4
    measures: Any = report.data["measures"]
    export = exported(tmp_path / "out", tmp_path / "export")
    assert measures["after"]["held-out/nDCG@10"] == pytest.approx(score(place, export))

    trained(place, tmp_path / "floats", *changes, "qat=null")
    plain = [line for line in metrics(tmp_path / "floats") if "loss" in line]
    assert steps[:3] == plain[:3]
    assert steps[3]["loss"] != plain[3]["loss"]
    assert not same(tmp_path / "out", tmp_path / "floats")


class Halt(Exception):
    """The process is gone."""


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_killed_on_either_side_of_the_start_ends_the_same_to_the_bit(
    place: Path, whole: tuple[Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    plain = Training._after_step

    def halting(self: Training[Any]) -> None:
        plain(self)
        if self.progress.step == step:
            raise Halt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_after_step", halting)
        with pytest.raises(Halt):
            trained(place, tmp_path / "out")
    trained(place, tmp_path / "out")
    assert same(whole[1], tmp_path / "out")
    assert metrics(whole[1]) == metrics(tmp_path / "out")


def test_every_batch_size_of_chunks_gives_nearly_the_same_model(
    place: Path, whole: tuple[Report, Path], tmp_path: Path
) -> None:
    trained(place, tmp_path / "out", "batch.memory_gib=1", "batch_tokens=null", "dropout=0")
    trained(place, tmp_path / "cut", "dropout=0")
    assert {bool(line.get("encoded_twice")) for line in metrics(tmp_path / "cut") if "loss" in line} == {True}
    assert not any(line.get("encoded_twice") for line in metrics(tmp_path / "out"))
    first, last = (weights(tmp_path / name) for name in ("out", "cut"))
    for name, expected in first.items():
        # AdamW divides by the root of small numbers, and a code may round the other way.
        torch.testing.assert_close(last[name], expected, rtol=1e-2, atol=2e-3, msg=name)


def test_the_plan_says_it_and_measures_with_it(place: Path) -> None:
    made = plan(load(place / "r.yaml", TrainRecipe, (), {"output": place / "new"}))
    assert ("qat", "int4 from 50 % of the run on; loss and time here are with it") in made.rows
    plain = plan(load(place / "r.yaml", TrainRecipe, ("qat=null",), {"output": place / "new"}))
    assert made.data["terms"] != plain.data["terms"]


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one(place: Path, tmp_path: Path) -> None:
    text = (place / "r.yaml").read_text("utf-8").replace("dropout: 0.1\n", "")
    recipe = place / "ranks.yaml"
    recipe.write_text(text.replace("steps: 7", "steps: 3"), "utf-8")
    run(load(recipe, TrainRecipe, (), {"output": tmp_path / "one"}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(train_one_rank, args=(2, port, recipe, tmp_path / "two"), nprocs=2)  # type: ignore[no-untyped-call]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=2e-4, atol=2e-5, msg=name)
    lines = [line for line in metrics(tmp_path / "two") if "loss" in line]
    assert [line.get("quantised", False) for line in lines] == [False, False, True]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A recipe whose model has a projection of 40 rows, which no blocks of 32 fit."""
    tiny_folder(tmp_path / "base", "gemma3", dense=[{"out_features": 40}, {"out_features": 32}])
    write_pairs(tmp_path / "pairs.jsonl")
    text = RECIPE.replace("evaluation:\n", "").replace("  pairs: [{path: held-out", "#")
    (tmp_path / "r.yaml").write_text(text + "qat: {format: int4}\n", "utf-8")
    return tmp_path


def test_a_model_that_the_format_cannot_hold_is_refused_by_plan_and_run(odd: Path) -> None:
    recipe = load(odd / "r.yaml", TrainRecipe, (), {"output": odd / "out"})
    messages = []
    attempts: list[Callable[[TrainRecipe], object]] = [plan, run]
    for attempt in attempts:
        with pytest.raises(MismatchError) as error:
            attempt(recipe)
        messages.append(str(error.value))
    told = (
        "qat: the model has weights that int4 cannot hold; train without qat, or for the format mixed:\n"
        "  3_Dense.linear.weight: q4_0 has blocks of 32, but the rows are 40 wide"
    )
    assert messages == [told, told]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("qat.format=int2", "qat.format: 'int2' is not one of int4, int8, mixed"),
        ("qat.start=1", "qat.start: 1 is too large; less than 1"),
        ("qat={start: 0.1}", "qat: missing: what `gemb quantize` will make of the model"),
    ],
)
def test_a_wrong_setting_is_told(place: Path, change: str, told: str) -> None:
    with pytest.raises(GembError) as error:
        load(place / "r.yaml", TrainRecipe, (change,), {"output": place / "new"})
    assert told in str(error.value)


def test_the_command_trains_for_a_format(gemb: Callable[..., Finished], place: Path, tmp_path: Path) -> None:
    done = gemb(
        "train",
        place / "r.yaml",
        "qat.format=int8",
        "qat.start=0",
        "steps=2",
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["qat"] == {"format": "int8", "start": 0.0}
    refused = gemb("train", place / "r.yaml", "qat.format=int2", "-o", tmp_path / "other")
    assert refused.code == 2
    assert "qat.format" in refused.err
