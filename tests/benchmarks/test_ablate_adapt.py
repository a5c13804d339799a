"""The ablations of adapting: chains that differ in one stage, and a table of what is there."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablate, ablate_adapt
from benchmarks.ablate_adapt import ARMS, DECODER, ENCODER, PAIRS, Stage
from gemb.jobs.adapt import AdaptRecipe
from gemb.jobs.train import recipe_for
from gemb.recipe import Recipe, load, load_one_of
from tests.conftest import DATA


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablate_adapt, "LINES", tmp_path / "results" / "lines.jsonl")
    monkeypatch.setattr(ablate_adapt, "TABLE", tmp_path / "results" / "table.md")
    monkeypatch.setenv("GEMB_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_stage_of_a_chain_is_a_recipe_and_every_recipe_is_used() -> None:
    stages = {stage for chain in ARMS.values() for stage in chain}
    assert {stage.recipe for stage in stages} == {file.stem for file in ablate_adapt.STAGES.glob("*.yaml")}
    for recipe, changes in stages - {ablate_adapt.UNTRAINED}:
        file = ablate_adapt.STAGES / f"{recipe}.yaml"
        loaded: Recipe
        if "kind: adapt\n" in file.read_text("utf-8"):
            loaded = load(file, AdaptRecipe, changes)
        else:
            loaded = load_one_of(file, recipe_for, changes)
        assert loaded.kind in ("adapt", "train")


def test_the_comparisons_have_all_arms_and_the_arms_are_fine_tuned_alike() -> None:
    assert {arm for comparison in ablate_adapt.COMPARISONS for arm in comparison.arms} == set(ARMS)
    assert len(list(ablate_adapt.wanted())) == 3 * len(ARMS) == 42
    assert {chain[-1].recipe for chain in ARMS.values()} == {"pairs"}
    texts = {
        name: (ablate_adapt.STAGES / f"{name}.yaml").read_text("utf-8").partition("\n")[2]
        for name in ("causal", "ul2", "prefix_lm")
    }
    assert len({text.replace(name, "") for name, text in texts.items()}) == 1


def test_a_chain_is_told_from_one_with_another_stage() -> None:
    chains = [
        (DECODER, ENCODER, PAIRS),
        (DECODER, ENCODER, Stage("pairs", ("dropout=0.1",))),
        (DECODER, Stage("encoder", ("pooling=cls",)), PAIRS),
        (DECODER, ENCODER),
    ]
    assert len({ablate_adapt.digest_of(chain) for chain in chains}) == 4
    assert ablate_adapt.folder_of((DECODER,), 1) == ablate_adapt.folder_of((DECODER,), 2)
    assert ablate_adapt.folder_of((DECODER, ENCODER), 1) != ablate_adapt.folder_of((DECODER, ENCODER), 2)


def line(arm: str, seed: int, value: float) -> dict[str, Any]:
    digest = ablate_adapt.digest_of(ARMS[arm])
    return {"arm": arm, "seed": seed, "recipe": digest, "measures": {"stsb spearman [f32]": value}}


def test_the_table_has_means_and_says_what_is_missing(place: Path) -> None:
    for seed, value in ((1, 0.5), (2, 0.7)):
        ablate.append(line("ul2", seed, value), ablate_adapt.LINES)
    ablate.append({**line("decoder", 1, 0.4), "recipe": "another"}, ablate_adapt.LINES)
    page = ablate_adapt.table(ablate_adapt.finished())
    assert "Partial: 2 of 42 runs; missing random/1, decoder/1, " in page
    assert "| measure | prefix_lm (n=0) | ul2 (n=2) |\n| --- | --- | --- |\n" in page
    assert "| stsb spearman |  | 0.600 ± 0.141 |" in page


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "text").is_dir(), reason="no ../shared/data/text")
@pytest.mark.parametrize("arm", ["random", "ul2", "attention_dropout"])
def test_an_arm_runs_from_its_decoder_to_its_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    stages = place / "stages"
    stages.mkdir()
    for file in ablate_adapt.STAGES.glob("*.yaml"):
        text = file.read_text("utf-8").replace("../../../shared/data", str(DATA))
        for steps in ("400", "50", "120"):
            text = text.replace(f"steps: {steps}\n", "steps: 2\n")
        for large, small in (
            ("tokens: 4096", "tokens: 512"),
            ("limit: 100", "limit: 4"),
            ("docs.train", "docs.valid"),
        ):
            text = text.replace(large, small)
        (stages / file.name).write_text(text, "utf-8")
    monkeypatch.setattr(ablate_adapt, "STAGES", stages)
    monkeypatch.setattr(ablate, "measures", lambda model, sets: {f"{len(sets)} sets [f32]": 1.0})
    found = ablate_adapt.run_arm(arm, 1)
    assert found["measures"] == {"3 sets [f32]": 1.0}
    assert found["steps"] == 2
    kept = {path.name.rpartition("-")[0] for path in (place / "cache/adapt").iterdir() if path.is_dir()}
    assert "decoder-0" in kept
