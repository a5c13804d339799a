"""Every distillation recipe of gemb can be planned on small data of the shape it asks for."""

import gzip
import json
from pathlib import Path

import pytest
import yaml

from gemb.jobs.distill import DistillRecipe, plan
from gemb.recipe import load, shipped_recipes
from tests.models import random_texts, tiny_folder

NAMES = [recipe.name for recipe in shipped_recipes() if yaml.safe_load(recipe.text).get("kind") == "distill"]


def test_the_distillation_recipes_are_those_of_the_sources() -> None:
    assert NAMES == ["distill_minilm", "embeddinggemma/6-distill"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "student", "gemma3")
    tiny_folder(folder / "teacher", "bert")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_planned(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    recipe = load(name, DistillRecipe)
    texts = iter(random_texts([6] * 800, seed=3))
    for data in recipe.data:
        rows: list[dict[str, str]] = [
            {"query": next(texts), "positive": next(texts), "negative": next(texts)} for _ in range(16)
        ]
        if "classification" in data.paths[0]:
            rows = [{"text": next(texts), "label": f"label {row % 4}"} for row in range(16)]
        file = Path(data.paths[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    changes = ["batch.pairs=8", "matryoshka.sizes=[32, 16]", "threads=1", "max_tokens=48", "student=null"]
    changes += [f"model={models / 'student'}", f"teacher.model={models / 'teacher'}"]
    planned = plan(load(name, DistillRecipe, [*changes, "evaluation.sets=[]"], {"output": tmp_path / "out"}))
    assert planned.data["pairs"] == 8
    assert planned.data["steps"] == recipe.steps
    terms = planned.data["terms"]
    assert isinstance(terms, dict)
    assert "matching" in terms
