"""`gemb train --search` on a tiny model: its folder, a kill in the middle of a run, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemb.errors import GembError, Interrupted, LockedError
from gemb.files import Lock
from gemb.jobs import train
from gemb.jobs.train import TrainRecipe
from gemb.jobs.train_search import SearchRecipe, plan, run
from gemb.recipe import load
from gemb.report import Event, Report
from tests.conftest import Finished
from tests.jobs.test_train import write_pairs
from tests.models import tiny_folder

RECIPE = """model: ./base
data:
  - {path: one.jsonl, prompts: none, weight: 1}
  - {path: two.jsonl, prompts: none, weight: 3}
evaluation:
  pairs: [{path: held-out.jsonl, prompts: none}]
matryoshka: {sizes: [32]}
batch: {pairs: 4}
optimizer: {learning_rate: 3e-3}
steps: 2
precision: fp32
threads: 1
"""
SETTINGS = SearchRecipe(trials=4, random=2, best=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    tiny_folder(folder / "base", "gemma3")
    for seed, name in enumerate(("one", "two", "held-out")):
        write_pairs(folder / f"{name}.jsonl", 16, seed)
    (folder / "r.yaml").write_text(RECIPE, "utf-8")
    return folder


def recipe(place: Path, output: Path, *changes: str) -> TrainRecipe:
    return load(place / "r.yaml", TrainRecipe, changes, {"output": output})


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Report, Path]:
    output = place / "whole"
    return run(recipe(place, output), SETTINGS), output


def test_a_search_trains_a_model_for_each_mixture_and_lists_the_best(whole: tuple[Report, Path]) -> None:
    report, output = whole
    assert sorted(path.name for path in output.iterdir()) == [
        "best.json", "search.json", *(f"trial-00{number}" for number in range(4)), "trials.jsonl",
    ]  # fmt: skip
    trials = report.data["trials"]
    assert isinstance(trials, list)
    assert trials[0]["weights"] == {"one": 0.25, "two": 0.75}
    best = json.loads((output / "best.json").read_text())["runs"]
    assert best == sorted(trials, key=lambda one: -one["score"])[:2]
    assert dict(report.rows)["to merge"] == " ".join(one["model"] for one in best)
    assert report.title == "searched a mixture of 2 data sets with 4 runs"


def test_the_score_of_a_run_is_the_mean_of_its_measures_at_full_width(whole: tuple[Report, Path]) -> None:
    report, output = whole
    record = json.loads((output / "trial-002" / "gemb.json").read_text())
    after = record["measures"]["after"]
    full, small = sorted(after)
    assert small == f"{full}/32"
    trials = report.data["trials"]
    assert isinstance(trials, list)
    assert trials[2]["score"] == after[full]
    assert record["recipe"]["data.0.weight"] == trials[2]["weights"]["one"]


def test_a_search_stopped_in_a_run_goes_on_in_it_and_ends_the_same(
    place: Path, tmp_path: Path, whole: tuple[Report, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "stopped"
    real = train.run
    calls: list[str] = []

    def stopped(wanted: TrainRecipe, *rest: object, **more: object) -> Report:
        assert wanted.output is not None
        calls.append(wanted.output.name)
        if len(calls) == 2:
            raise Interrupted("stopped", Interrupted.exit_code)
        return real(wanted)

    monkeypatch.setattr(train, "run", stopped)
    with pytest.raises(Interrupted):
        run(recipe(place, output), SETTINGS)
    report = run(recipe(place, output), SETTINGS)
    assert calls == ["trial-000", "trial-001", "trial-001", "trial-002", "trial-003"]
    scores = [[(one["origin"], one["score"]) for one in found.data["trials"]] for found in (report, whole[0])]  # type: ignore[attr-defined]
    assert scores[0] == scores[1]


def test_a_run_that_ended_before_its_score_was_noted_is_not_trained_again(
    place: Path, tmp_path: Path, whole: tuple[Report, Path]
) -> None:
    output = tmp_path / "late"
    shutil.copytree(whole[1], output)
    ledger = output / "trials.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    # The folder has another name now; the runs know theirs.
    before = (output / "trial-003" / "model.safetensors").stat().st_mtime_ns
    report = run(recipe(place, output), SETTINGS)
    assert report.data["trials"][3]["score"] == whole[0].data["trials"][3]["score"]  # type: ignore[index]
    assert (output / "trial-003" / "model.safetensors").stat().st_mtime_ns == before


def test_people_hear_which_mixture_is_trained(place: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def hear(event: Event) -> None:
        if event.note.startswith("run "):
            notes.append(event.note)

    run(recipe(place, tmp_path / "told"), SearchRecipe(trials=1), hear)
    assert notes == ["run 1 of 1 (given): one 0.250, two 0.750"]


def test_a_plan_tells_of_all_runs_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "planned"
    found = plan(recipe(place, output), SETTINGS)
    assert found.title == f"would search a mixture with 4 runs in {output}; the first one:"
    assert found.rows[0] == ("search", "4 runs: the recipe's mixture, 2 drawn at random, 1 proposed")
    assert found.data["all_seconds"] == pytest.approx(4 * found.data["seconds"], abs=0.01)  # type: ignore[operator]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["evaluation.pairs=[]"],
            "a search compares runs, but nothing is evaluated; give evaluation.pairs or evaluation.sets",
        ),
        (
            ["steps=null", "epochs=2"],
            "a search compares runs of one length; give steps or tokens, not epochs",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    place: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(GembError) as caught:
        run(recipe(place, tmp_path / "out", *changes), SETTINGS)
    assert str(caught.value) == message


def test_another_search_of_the_folder_is_refused_unless_it_is_overwritten(
    place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(recipe(place, output), SearchRecipe(trials=1))
    with pytest.raises(GembError) as caught:
        run(recipe(place, output, "steps=1"), SearchRecipe(trials=1, seed=7))
    assert str(caught.value).splitlines() == [
        f"{output} holds another search:",
        "  search.seed was 42, now 7",
        "  steps was 2, now 1",
        "give the same recipe to go on, another output, or --overwrite to start anew",
    ]
    report = run(recipe(place, output, "steps=1"), SearchRecipe(trials=1), overwrite=True)
    assert len(report.data["best"]) == 1  # type: ignore[arg-type]


def test_a_folder_of_something_else_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(GembError) as caught:
        run(recipe(place, tmp_path / "out"), SETTINGS, overwrite=True)
    assert str(caught.value) == f"{tmp_path / 'out'} exists and is no search; choose another output"


def test_two_searches_of_one_folder_are_refused(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Lock(tmp_path / "out.lock", str(output)), pytest.raises(LockedError):
        run(recipe(place, output), SETTINGS)


def test_a_search_from_the_command_line(place: Path, tmp_path: Path, gemb: Callable[..., Finished]) -> None:
    (tmp_path / "search.yaml").write_text("trials: 2\nrandom: 1\n", "utf-8")
    output = tmp_path / "out"
    done = gemb("train", place / "r.yaml", "--search", tmp_path / "search.yaml", "-o", output, "--json")
    assert done.code == 0, done.err
    assert [one["origin"] for one in json.loads(done.out)["trials"]] == ["given", "dirichlet"]
    assert (output / "trial-001" / "model.safetensors").is_file()


def test_a_wrong_key_of_the_search_is_told_with_its_line(
    place: Path, tmp_path: Path, gemb: Callable[..., Finished]
) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("trials: 2\nconcentraton: 1\n", "utf-8")
    done = gemb("train", place / "r.yaml", "--search", file, "-o", tmp_path / "out")
    assert done.code == 2
    assert f"{file}: 1 problem" in done.err
    assert "line 2: concentraton: no such key; did you mean concentration?" in done.err
