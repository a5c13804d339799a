"""The job behind `gemb recipes`."""

from pathlib import Path

import pytest

from gemb.errors import GembError
from gemb.jobs.recipes import copy_recipe, list_recipes
from gemb.recipe import shipped_recipes


def test_every_shipped_recipe_is_listed_and_can_be_copied(tmp_path: Path) -> None:
    listed = [row[0] for table in list_recipes().tables for row in table.rows]
    assert listed == [recipe.name for recipe in shipped_recipes()]
    for recipe in shipped_recipes():
        target = tmp_path / f"{recipe.name.replace('/', '-')}.yaml"
        assert copy_recipe(recipe.name, target).outputs == [target]
        assert target.read_text(encoding="utf-8") == recipe.text


def test_copy_says_when_there_is_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(GembError, match=r"^no recipe no-such-thing"):
        copy_recipe("no-such-thing", tmp_path / "x.yaml")
