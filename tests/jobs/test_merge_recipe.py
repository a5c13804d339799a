"""The keys of mergekit, and what they mean for each tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemb.errors import GembError
from gemb.jobs.merge_recipe import MergeRecipe, layers_of, place_of
from gemb.recipe import load, shipped_recipes


def recipe(**values: Any) -> MergeRecipe:  # noqa: ANN401
    return MergeRecipe.model_validate_json(json.dumps({"models": ["a", "b"], **values}))


def weights(tensor: str, **values: Any) -> tuple[float, ...]:  # noqa: ANN401
    return recipe(**values).settings(tensor, 5).weights


def test_a_model_goes_before_all_and_all_before_the_default() -> None:
    models = [{"model": "a", "parameters": {"weight": 3}}, "b"]
    assert weights("norm.weight", models=models) == (3, 1)
    assert weights("norm.weight", models=models, parameters={"weight": 2}) == (3, 2)


def test_numbers_over_the_layers_are_interpolated() -> None:
    models = [{"model": "a", "parameters": {"weight": [0, 1, 0.5]}}, "b"]
    found = [weights(f"layers.{layer}.mlp.weight", models=models)[0] for layer in range(5)]
    assert found == [0, 0.5, 1, 0.75, 0.5]


def test_what_is_outside_the_layers_takes_the_first_number_and_a_dense_module_the_last() -> None:
    assert place_of("embed_tokens.weight", 4) == place_of("norm.weight", 4) == 0
    assert place_of("2_Dense.linear.weight", 4) == 1
    assert place_of("encoder.layer.1.output.weight", 3) == 0.5
    assert layers_of(["encoder.layer.0.x", "encoder.layer.11.y", "norm"]) == 12


def test_the_first_filter_that_fits_holds_and_where_none_fits_the_default() -> None:
    value = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 7}]
    assert weights("layers.4.self_attn.q.weight", parameters={"weight": value})[0] == 1
    assert weights("layers.4.mlp.up.weight", parameters={"weight": value})[0] == 7
    assert weights("norm.weight", parameters={"weight": value})[0] == 1
    assert weights("norm.weight", parameters={"weight": [*value, {"filter": "*", "value": 9}]})[0] == 9
    assert weights("norm.weight", parameters={"weight": [*value, {"value": 8}]})[0] == 8


def test_the_variant_decides_defaults() -> None:
    settings = {"merge_method": "dare_ties", "base_model": "c"}
    paper = recipe(**settings).settings("norm.weight", 1)
    theirs = recipe(variant="mergekit", **settings).settings("norm.weight", 1)
    assert (paper.normalise, paper.rescale, paper.densities) == (True, "probability", (0.5, 0.5))
    assert (theirs.normalise, theirs.rescale, theirs.densities) == (False, "norm", (1, 1))
    assert recipe(parameters={"rescale": False}, **settings).settings("norm.weight", 1).rescale == "none"


@pytest.mark.parametrize("key", ["slices", "modules", "tokenizer", "chat_template"])
def test_what_is_not_supported_is_refused_by_name(key: str, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(f"merge_method: linear\n{key}: [x]\n")
    with pytest.raises(GembError) as caught:
        load(file, MergeRecipe)
    assert str(caught.value) == (
        f"{file}: 1 problem\n  line 2: {key}: not supported: gemb merges whole models with one tokenizer; "
        "list them in models"
    )


def test_the_recipes_of_gemb_can_be_read() -> None:
    names = [one.name for one in shipped_recipes() if yaml.safe_load(one.text).get("kind") == "merge"]
    assert names == [
        "embeddinggemma/7-soup", "merge/breadcrumbs", "merge/checkpoints", "merge/dare", "merge/della",
        "merge/greedy", "merge/karcher", "merge/model_stock", "merge/slerp", "merge/soup",
        "merge/task_arithmetic", "merge/ties",
    ]  # fmt: skip
    for name in names:
        wanted = load(name, MergeRecipe)
        if wanted.last is None:
            wanted.settings("layers.0.mlp.weight", 2)
