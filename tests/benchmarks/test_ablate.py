"""The ablations: arms that differ in one thing, lines that outlive a crash, a table of what is there."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablate
from gemb.jobs.distill import DistillRecipe
from gemb.jobs.merge import MergeRecipe
from gemb.jobs.train import TrainRecipe
from gemb.recipe import Recipe, load, resolved
from gemb.report import Report
from gemb.training.recipe import flat

DIFFERENCES = {
    ("contrastive", "spread_out"): {"losses.1"},
    ("hardness_0", "contrastive"): {"losses.0.hardness"},
    ("no_mask", "mask"): {"losses.0.mask_duplicates"},
    ("matching_no_negatives", "matching"): {"losses.0.hard_negatives"},
}


def recipe_of(arm: str) -> dict[str, object]:
    file = ablate.recipe_of(arm)
    kinds: dict[str, type[Recipe]] = {
        "kind: distill": DistillRecipe,
        "kind: merge": MergeRecipe,
        "kind: train": TrainRecipe,
    }
    kind = next(kind for line, kind in kinds.items() if line in file.read_text())
    return flat(resolved(load(file, kind)))


def line(arm: str, seed: int, **measures: float) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "recipe": ablate.digest_of(arm), "measures": measures}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablate, "LINES", tmp_path / "results" / "ablations.jsonl")
    monkeypatch.setattr(ablate, "TABLE", tmp_path / "results" / "ablations.md")
    return tmp_path / "results"


def test_every_recipe_is_an_arm_and_every_arm_has_a_recipe() -> None:
    arms = {arm for comparison in ablate.COMPARISONS for arm in comparison.arms}
    assert arms == {file.stem for file in ablate.ARMS.glob("*.yaml")}
    assert len(list(ablate.wanted())) == 3 * len(arms) == 42


@pytest.mark.parametrize("arms", DIFFERENCES)
def test_the_arms_of_a_comparison_differ_in_one_thing(arms: tuple[str, str]) -> None:
    one, other = map(recipe_of, arms)
    different = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert {next((name for name in DIFFERENCES[arms] if key.startswith(name)), key) for key in different} == (
        DIFFERENCES[arms]
    )


def test_all_arms_of_a_comparison_see_the_same_data_for_as_many_steps() -> None:
    for comparison in ablate.COMPARISONS[:-1]:  # the last one compares mixtures
        shared = [
            {
                key: value
                for key, value in recipe_of(arm).items()
                if key.startswith(("data", "steps", "batch"))
            }
            for arm in comparison.arms
        ]
        assert all(one == shared[0] for one in shared), comparison.title


def test_a_line_that_a_crash_left_half_written_is_passed_over(place: Path) -> None:
    ablate.append(line("mask", 1, a=0.5), ablate.LINES)
    with ablate.LINES.open("ab") as file:
        file.write(b'{"arm": "mask", "seed": 2, "measures": {"a": 0.1}')
    assert set(ablate.finished()) == {("mask", 1)}
    ablate.append(line("mask", 3, a=0.7), ablate.LINES)
    assert set(ablate.finished()) == {("mask", 1), ("mask", 3)}


def test_a_changed_recipe_is_missing_again(place: Path) -> None:
    ablate.append({**line("mask", 1, a=0.5), "recipe": "another"}, ablate.LINES)
    assert ablate.finished() == {}


@pytest.mark.parametrize(
    ("arm", "job", "own"), [("mask", "train", {"after": {"x": 0.3}}), ("both", "distill", {})]
)
def test_a_line_holds_what_the_run_measured_and_what_the_views_gave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arm: str, job: str, own: dict[str, dict[str, float]]
) -> None:
    asked: list[TrainRecipe] = []

    def run(recipe: TrainRecipe) -> Report:
        asked.append(recipe)
        data = {"measures": own, "steps": 2, "tokens": 9, "step_seconds": 1.0, "versions": {}}
        return Report(title="", data=data)

    monkeypatch.setattr(f"gemb.jobs.{job}.run", run)
    monkeypatch.setattr(ablate, "folder_of", lambda arm, seed: tmp_path / f"{arm}-{seed}")
    monkeypatch.setattr(ablate, "measures", lambda model, sets: {f"{len(sets)} sets [int8]": 0.2})
    found = ablate.run_arm(arm, 2)
    sets = 3 if arm == "both" else 0
    assert found["measures"] == {f"{sets} sets [int8]": 0.2, **({"x [f32]": 0.3} if own else {})}
    assert (asked[0].seed, asked[0].threads, asked[0].evaluation.sets) == (2, 1, ())


def test_a_soup_is_made_of_models_that_went_on_from_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, object]] = []

    def train(recipe: TrainRecipe) -> Report:
        asked.append((Path(recipe.output or "").parent.name, recipe.model))
        return Report(title="", data={"measures": {}, "versions": {}})

    def merge(recipe: MergeRecipe) -> Report:
        asked.append(("soup-1", [Path(one.model).parent.name for one in recipe.models]))
        return Report(title="", data={"versions": {}})

    monkeypatch.setattr("gemb.jobs.train.run", train)
    monkeypatch.setattr("gemb.jobs.merge.run", merge)
    monkeypatch.setattr(ablate, "folder_of", lambda arm, seed: tmp_path / f"{arm}-{seed}")
    monkeypatch.setattr(ablate, "measures", lambda model, sets: {f"{len(sets)} sets [f32]": 0.2})
    assert ablate.run_arm("soup", 1)["measures"] == {"3 sets [f32]": 0.2}
    begin = str(tmp_path / "contrastive-1" / "model")
    mixtures = ["mixture_nli-1", "mixture_tldr-1", "mixture_bash-1"]
    assert asked == [
        ("contrastive-1", "tiny-gemma3"),
        *((mixture, begin) for mixture in mixtures),
        ("soup-1", mixtures),
    ]
    ablate.run_arm("mixture_nli", 1)
    assert len(asked) == 5, "what is there is not made again"


def test_a_model_goes_when_all_that_need_it_have_their_lines(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ablate, "folder_of", lambda arm, seed: tmp_path / f"{arm}-{seed}")
    arms = ("contrastive", "mask", "mixture_nli", "mixture_tldr", "mixture_bash", "soup")
    for arm in arms:
        ablate.folder_of(arm, 1).mkdir()

    def left() -> set[str]:
        ablate.clear_away()
        return {arm for arm in arms if ablate.folder_of(arm, 1).is_dir()}

    for arm in ("contrastive", "mask", "mixture_nli"):
        ablate.append(line(arm, 1, a=0.5), ablate.LINES)
    assert left() == set(arms) - {"mask"}
    for arm in ("mixture_tldr", "mixture_bash"):
        ablate.append(line(arm, 1, a=0.5), ablate.LINES)
    assert left() == set(arms) - {"mask"}, "the soup needs them all"
    ablate.append(line("soup", 1, a=0.5), ablate.LINES)
    assert left() == set()


def test_only_what_is_missing_is_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def run_arm(arm: str, seed: int) -> dict[str, object]:
        ran.append((arm, seed))
        return {**line(arm, seed, a=0.5), "seconds": 1}

    monkeypatch.setattr(ablate, "run_arm", run_arm)
    ablate.append(line("mask", 2, a=0.5), ablate.LINES)
    ablate.main(arm="mask", only_table=False)
    assert ran == [("mask", 1), ("mask", 3)]
    ablate.main(arm="mask", seed=1, only_table=False)
    assert len(ran) == 2


def test_the_table_has_mean_and_spread_and_says_what_is_missing(place: Path) -> None:
    done = {("mask", seed): line("mask", seed, **{"x [f32]": value}) for seed, value in ((1, 0.5), (2, 0.7))}
    done[("no_mask", 1)] = line("no_mask", 1, **{"x [f32]": 0.4, "x [int8]": 0.1})
    page = ablate.table(done)
    assert "Partial: 3 of 42 runs; missing contrastive/1, " in page
    assert "| measure | no_mask (n=1) | mask (n=2) |" in page
    assert "| x | 0.400 | 0.600 ± 0.141 |" in page
    assert "int8" not in page.partition("## Equal texts masked")[2].partition("##")[0]
    assert "## Same-tower negatives\n\nNo run yet." in page
