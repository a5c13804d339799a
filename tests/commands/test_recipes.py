"""`gemb recipes` through the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemb.jobs import recipes as job
from gemb.recipe import ShippedRecipe
from tests.conftest import Finished

OURS = [
    ShippedRecipe("nano/all", "# recipes/nano/all.yaml - all in one.\n#   gemb embed --recipe nano/all\n"),
    ShippedRecipe("quick", "# recipes/quick.yaml - the smallest run.\n#   gemb embed --recipe quick\n"),
]


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shipped recipes and an empty working folder."""
    monkeypatch.setattr(job, "shipped_recipes", lambda: OURS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("ours")
def test_list_shows_name_and_summary_on_stdout(gemb: Callable[..., Finished]) -> None:
    assert gemb("recipes", "list") == Finished(
        0, "2 recipes\n\nname      what it does\nnano/all  all in one\nquick     the smallest run\n", ""
    )
    assert json.loads(gemb("recipes", "list", "--json").out)["recipes"] == [
        {"name": "nano/all", "summary": "all in one"},
        {"name": "quick", "summary": "the smallest run"},
    ]


@pytest.mark.usefixtures("ours")
def test_without_a_subcommand_it_lists(gemb: Callable[..., Finished]) -> None:
    assert gemb("recipes") == gemb("recipes", "list")


def test_list_works_without_any_recipe(
    gemb: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "shipped_recipes", list)
    assert gemb("recipes", "list") == Finished(0, "0 recipes\n", "")


@pytest.mark.usefixtures("ours")
def test_copy_writes_the_file_comments_and_all(gemb: Callable[..., Finished]) -> None:
    assert gemb("recipes", "copy", "nano/all") == Finished(0, "", "copied recipe nano/all to all.yaml\n")
    assert Path("all.yaml").read_text() == OURS[0].text
    done = gemb("recipes", "copy", "quick", "-o", "mine.yaml", "--json")
    assert json.loads(done.out)["output"] == "mine.yaml"
    assert Path("mine.yaml").read_text() == OURS[1].text


@pytest.mark.usefixtures("ours")
def test_copy_replaces_a_file_only_when_told(gemb: Callable[..., Finished]) -> None:
    Path("quick.yaml").write_text("mine")
    done = gemb("recipes", "copy", "quick")
    assert done == Finished(
        2, "", "gemb: quick.yaml exists; pass --overwrite to replace it, or -o to write elsewhere\n"
    )
    assert Path("quick.yaml").read_text() == "mine"
    assert gemb("recipes", "copy", "quick", "--overwrite", "-q") == Finished(0, "", "")
    assert Path("quick.yaml").read_text() == OURS[1].text


@pytest.mark.usefixtures("ours")
def test_copy_of_no_such_recipe_names_the_one_that_was_meant(gemb: Callable[..., Finished]) -> None:
    assert gemb("recipes", "copy", "quik").err == "gemb: no recipe quik; did you mean quick?\n"
    done = gemb("recipes", "copy", "zzz")
    assert done == Finished(2, "", "gemb: no recipe zzz; the recipes are nano/all, quick\n")


@pytest.mark.usefixtures("ours")
def test_copy_into_a_folder_that_is_not_there_is_one_message(gemb: Callable[..., Finished]) -> None:
    done = gemb("recipes", "copy", "quick", "-o", "no/such/mine.yaml")
    assert done == Finished(
        2, "", "gemb: cannot write no/such/mine.yaml: no such file or folder; check the path\n"
    )
