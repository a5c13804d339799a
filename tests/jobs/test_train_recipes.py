"""Every training recipe of gemb can be planned on small data of the shape it asks for."""

import json
from pathlib import Path

import pytest
import yaml

from gemb.jobs.train import TrainRecipe, plan, run
from gemb.recipe import load, shipped_recipes
from tests.models import random_texts, tiny_folder

NAMES = [
    recipe.name
    for recipe in shipped_recipes()
    if (values := yaml.safe_load(recipe.text)).get("kind") == "train" and "objective" not in values
]


def test_the_training_recipes_are_those_of_the_sources() -> None:
    assert NAMES == [
        "embeddinggemma/4-prefinetune",
        "embeddinggemma/5-finetune",
        "gecko/finetune",
        "gemini_embedding/1-prefinetune",
        "gemini_embedding/2-finetune",
        "gemma_encoder/2-finetune",
        "quickstart",
        "samtone/finetune",
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "base", "gemma3")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_a_recipe_can_be_planned(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(name, TrainRecipe)
    texts = iter(random_texts([6] * 400, seed=3))
    for data in recipe.data:
        rows: list[dict[str, str]] = [
            {"query": next(texts), "positive": next(texts), "negative": next(texts)} for _ in range(16)
        ]
        if "classification" in data.paths[0]:
            rows = [{"text": next(texts), "label": f"label {row % 4}"} for row in range(16)]
        file = Path(data.paths[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = ["batch.pairs=8", "matryoshka.sizes=[32, 16]", "threads=1", f"model={model}"]
    planned = plan(load(name, TrainRecipe, changes, {"output": tmp_path / "out"}))
    assert planned.data["pairs"] == 8
    assert planned.data["steps"] == recipe.steps
    assert [row[0] for row in planned.tables[0].rows] == [Path(data.paths[0]).stem for data in recipe.data]


@pytest.mark.slow
def test_quickstart_runs_and_learns(tmp_path: Path) -> None:
    changes = ["steps=12", "batch.pairs=32", "evaluation.limit=150", "threads=1"]
    report = run(load("quickstart", TrainRecipe, changes, {"output": tmp_path / "first"}))
    assert report.data["verdict"] == "WIN"
    assert (tmp_path / "first/model.safetensors").is_file()
