"""The data part of a recipe: what can be written, and what is said about what cannot."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import pytest
from pydantic import model_validator

from gemb.errors import GembError
from gemb.recipe import Recipe, load
from gemb.training.data_recipe import DataSet, MixtureSettings, RolePrompts, check_shares, name_of_paths


class Whole(Recipe):
    """A recipe with data, as that of `gemb train`."""

    kind: ClassVar[str] = "train"

    data: tuple[DataSet, ...] = ()
    """What to train on."""
    mixture: MixtureSettings = MixtureSettings()
    """How to mix it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_shares(self.data, self.mixture)
        return self


def read(text: str, tmp_path: Path) -> Whole:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load(path, Whole)


def test_paths_are_relative_to_the_recipe_and_defaults_are_those_of_the_papers(tmp_path: Path) -> None:
    recipe = read("data:\n- path: [a.jsonl, b/*.csv]\n  prompts: {query: query, passage: none}\n", tmp_path)
    (data,) = recipe.data
    assert data.paths == (str(tmp_path / "a.jsonl"), str(tmp_path / "b/*.csv"))
    assert data.prompts == RolePrompts(query="query", passage="none")
    # EmbeddingGemma: one hard negative an example; duplicates are no negatives.
    none = read(DATA, tmp_path).data[0].prompts
    assert none == RolePrompts(query="none", passage="none")
    assert (data.negatives, data.drop_prompts, recipe.mixture.no_duplicates) == (1, 0.0, True)


DATA = "data:\n- {path: a.jsonl, prompts: none}\n"

WRONG: Mapping[str, tuple[str, str]] = {
    "no prompts": (
        "data:\n- path: a.jsonl\n",
        "line 2: data.0.prompts: missing: the prompt of each role, {query: ..., passage: ...}, or none for "
        "no prompts at all",
    ),
    "wrong prompts": (
        "data:\n- path: a.jsonl\n  prompts: query\n",
        "line 3: data.0.prompts: 'query' is not a mapping",
    ),
    "one prompt": (
        "data:\n- path: a.jsonl\n  prompts: {query: query}\n",
        "line 3: data.0.prompts.passage: missing: the prompt of positives and negatives, and of the second "
        "texts of scored pairs",
    ),
    "key": (
        "data:\n- {path: a.jsonl, prompts: none, wieght: 1}\n",
        "line 2: data.0.wieght: no such key; did you mean weight?",
    ),
    "role": (
        "data:\n- {path: a.jsonl, prompts: none, columns: {querry: a, positive: b}}\n",
        "line 2: data.0.columns.querry: no such key; did you mean query?",
    ),
    "half": (
        "data:\n- {path: a.jsonl, prompts: none, columns: {query: a}}\n",
        "line 2: data.0.columns: query is not enough; name query and positive, or first, second and score, "
        "or text and label",
    ),
    "two shapes": (
        "data:\n- {path: a.jsonl, prompts: none, columns: {query: a, positive: b, label: c}}\n",
        "line 2: data.0.columns: label cannot stand beside query and positive",
    ),
    "shape": (
        "data:\n- {path: a.jsonl, prompts: none, shape: scored, columns: {query: a, positive: b}}\n",
        "line 2: data.0: shape is scored, but the columns are those of pairs",
    ),
    "probability": (
        "data:\n- {path: a.jsonl, prompts: none, drop_prompts: 1.5}\n",
        "line 2: data.0.drop_prompts: 1.5 is too large; at most 1",
    ),
    "weight and tokens": (
        "data:\n- {path: a.jsonl, prompts: none, weight: 1, tokens: 5}\n",
        "line 2: data.0: weight and tokens are both given; a data set has one of them",
    ),
    "some weights": (
        "data:\n- {path: a.jsonl, prompts: none, weight: 1}\n- {path: b.jsonl, prompts: none}\n",
        "data.1 has no weight, but others have; give it to all or to none",
    ),
    "no weight": (
        "data:\n- {path: a.jsonl, prompts: none, weight: 0}\n",
        "every weight is 0",
    ),
    "temperature": (
        "mixture: {temperature: 2}\ndata:\n- {path: a.jsonl, prompts: none, tokens: 9}\n",
        "temperature has no effect beside tokens; leave one of them out",
    ),
    "nothing": ("data: []\n", "no data set given"),
    "no path": (
        "data:\n- {path: [], prompts: none}\n",
        "line 2: data.0.path: no path given",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    text, message = WRONG[name]
    with pytest.raises(GembError) as error:
        read(text, tmp_path)
    assert str(error.value) == f"{tmp_path / 'r.yaml'}: 1 problem\n  {message}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("texts/a.jsonl.gz", "a"),
        ("data/texts", "texts"),
        ("data/texts/", "texts"),
        ("data/texts/*.jsonl", "texts"),
        ("data/texts/qa-*.jsonl", "qa"),
        ("data/texts/qa[0-9].csv", "qa"),
        ("*.jsonl", "*.jsonl"),
    ],
)
def test_files_are_called_by_a_name_without_suffix_or_wildcard(path: str, name: str) -> None:
    assert name_of_paths([path, "another.jsonl"]) == name
