"""The ablation of training for a format: arms that differ in `qat` alone, and the share of a gap."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ablate_qat
from gemb.jobs.train import TrainRecipe
from gemb.quantization.roles import grid_of, role_of
from gemb.recipe import load, resolved
from gemb.training.recipe import flat
from tests.models import tiny_folder


def recipe_of(arm: str) -> dict[str, object]:
    return flat(resolved(load(ablate_qat.ARMS / f"{arm}.yaml", TrainRecipe)))


def test_the_arms_differ_in_qat_alone_and_each_is_a_recipe() -> None:
    arms = ("float", "int4", "mixed")
    assert {file.stem for file in ablate_qat.ARMS.glob("*.yaml")} == set(arms)
    assert len(list(ablate_qat.wanted())) == 9
    plain = recipe_of("float")
    for arm in arms[1:]:
        trained = recipe_of(arm)
        different = {key for key in plain.keys() | trained.keys() if plain.get(key) != trained.get(key)}
        assert different <= {"qat", "qat.format", "qat.start"}
        assert trained["qat.format"] == arm


def test_a_snapped_folder_holds_the_weights_on_the_grids_of_their_roles(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "gemma3", dense=[{}])
    (tmp_path / "model/run").mkdir()
    target = ablate_qat.snapped_folder(tmp_path / "model", tmp_path / "int4", "int4")
    for part in ("", "2_Dense"):
        before, after = (
            load_file(place / part / "model.safetensors") for place in (tmp_path / "model", target)
        )
        for name, weight in before.items():
            role = role_of(name, weight.shape)
            expected = weight if role is None else grid_of(role, "int4").snap(weight)
            assert torch.equal(after[name], expected)
    assert not (target / "run").exists()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablate_qat, "LINES", tmp_path / "results" / "ablations-qat.jsonl")
    return tmp_path / "results"


def line(arm: str, seed: int, **measures: float) -> dict[str, Any]:
    forms = {f"sts [{form}]": value for form, value in measures.items()}
    return {"arm": arm, "seed": seed, "recipe": ablate_qat.digest_of(arm), "measures": forms}


def test_the_share_is_that_of_the_mean_gap_over_seeds_that_have_both_arms(place: Path) -> None:
    for one in (
        line("float", 1, float=0.70, int4=0.60, mixed=0.5),
        line("float", 2, float=0.72, int4=0.70, mixed=0.6),
        line("float", 3, float=0.10, int4=0.05, mixed=0.0),  # its other arm is missing
        line("int4", 1, float=0.66, int4=0.66),
        line("int4", 2, float=0.70, int4=0.70),
    ):
        ablate_qat.append(one)
    ((name, found),) = ablate_qat.shares(ablate_qat.finished(), "int4")
    assert name == "sts"
    assert found == pytest.approx({"float": 0.71, "without": 0.65, "with": 0.68, "share": 0.5, "seeds": 2})
    assert list(ablate_qat.shares(ablate_qat.finished(), "mixed")) == []
    page = ablate_qat.table(ablate_qat.finished())
    assert "| sts | 0.7100 | 0.6500 | 0.6800 | 50% |" in page
    assert "Partial: 5 of 9 runs; missing mixed/1, mixed/2, int4/3, mixed/3." in page
    assert page.rstrip().endswith("No run yet.")


def test_lines_of_a_changed_recipe_or_half_a_line_are_missing(place: Path) -> None:
    ablate_qat.append(line("int4", 1, int4=0.5))
    ablate_qat.append({**line("int4", 2, int4=0.5), "recipe": "other"})
    with ablate_qat.LINES.open("ab") as file:
        file.write(b'{"arm": "int4", "se')
    assert set(ablate_qat.finished()) == {("int4", 1)}
    ablate_qat.append(line("int4", 3, int4=0.5))
    assert set(ablate_qat.finished()) == {("int4", 1), ("int4", 3)}
