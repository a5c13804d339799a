"""`gemb adapt --to encoder-decoder` from recipe or command to folder and report, and the encoder back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemb.errors import GembError
from gemb.jobs.adapt import AdaptRecipe, plan, run
from gemb.model.folder import read_folder
from gemb.recipe import load, shipped_recipes
from tests.conftest import Finished
from tests.models import tiny_folder

RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "embeddinggemma/1-adapt": ("t5gemma2", {}),
    "t5gemma/1-adapt-balanced": ("t5gemma", {}),
    "t5gemma/1-adapt-unbalanced": ("t5gemma", {"decoder": "gemma2"}),
    "t5gemma2/1-adapt": ("t5gemma2", {}),
}
"""What comes out, and the keys that name a tiny model in place of a large one."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two decoders and an encoder."""
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "gemma2", "gemma2 as a decoder")
    tiny_folder(folder / "gemma3", "gemma3 as a decoder")
    tiny_folder(folder / "encoder", "gemma3")
    return folder


def test_the_recipes_are_those_of_the_sources() -> None:
    found = [one.name for one in shipped_recipes() if yaml.safe_load(one.text).get("to") == "encoder-decoder"]
    assert set(RECIPES) <= set(found)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, models: Path, tmp_path: Path) -> None:
    kind, others = RECIPES[name]
    source = models / ("gemma3" if kind == "t5gemma2" else "gemma2")
    given: dict[str, object] = {"source": str(source), "output": tmp_path / "out"}
    given |= {key: str(models / value) for key, value in others.items()}
    recipe = load(name, AdaptRecipe, (), given)
    planned = plan(recipe)
    assert not (tmp_path / "out").exists()
    report = run(recipe)
    for row in ("source", "becomes", "encoder", "decoder", "cross-attention", "weights"):
        assert dict(planned.rows)[row] == dict(report.rows)[row]
    words = f"gemb train {kind}/2-ul2 --model {tmp_path / 'out'} -o RUN"
    warm_up = " --set cross_attention_only=1000; new weights learn alone first"
    is_balanced = not others
    assert dict(report.rows)["next"] == words + (
        "; as it is, the halves do not know each other" if is_balanced else warm_up
    )
    kept = json.loads((tmp_path / "out" / "adapt_report.json").read_text())
    assert kept["recipe"]["to"] == "encoder-decoder"
    assert kept["cross_attention_only"] == (0 if is_balanced else 1000)
    assert set(kept["versions"]) >= {"gemb", "torch", "transformers"}
    assert set(kept["seconds"]) == {"writing", "proofs"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind


def test_the_table_has_every_tensor_once_and_a_vision_tower_in_one_line(models: Path, tmp_path: Path) -> None:
    wanted = AdaptRecipe(source=str(models / "gemma3"), output=tmp_path / "out", to="encoder-decoder")
    planned = plan(wanted)
    (table,) = planned.tables
    rows = list(map(list, table.rows))
    assert sum(int(row[1]) for row in rows) == int(str(table.title).partition(" ")[0])
    norm = "model.decoder.layers.*.pre_self_attn_layernorm.weight"
    assert [norm, "4", "64", "copied", "layers.*.input_layernorm.weight"] in rows
    (tower,) = (row for row in rows if "vision_tower" in row[0])
    assert tower == ["model.encoder.vision_tower.*", tower[1], "", "new, zeros", ""]
    assert int(tower[1]) > 20


def test_the_command_makes_an_encoder_decoder_and_takes_its_encoder(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    words = ["adapt", models / "gemma2", "--to", "encoder-decoder", "-o", both, "--dropout", "0.1"]
    dry = gemb(*words, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert json.loads(dry.out)["config"]["dropout_rate"] == 0.1
    assert not both.exists()
    done = gemb(*words)
    assert done.code == 0, done.err
    assert f"adapted {models / 'gemma2'} into {both}" in done.err
    assert "without the encoder the decoder's logits are its source's (difference 0e+00)" in done.err
    again = gemb(*words)
    message = f"gemb: {both} exists; choose another path for the model, or move it away\n"
    assert (again.code, again.err) == (2, message)
    taken = gemb("adapt", both, "-o", tmp_path / "taken", "--keep-layers", "0,2", "--json")
    assert taken.code == 0, taken.err
    data = json.loads(taken.out)
    assert (data["proofs"]["source_difference"], data["kept_layers"]) == (0, [0, 2])
    assert read_folder(tmp_path / "taken").family == "gemma2"


def test_what_was_seen_of_an_encoder_with_other_windows_is_told(models: Path, tmp_path: Path) -> None:
    run(AdaptRecipe(source=str(models / "gemma3"), output=tmp_path / "both", to="encoder-decoder"))
    report = run(AdaptRecipe(source=str(tmp_path / "both"), output=tmp_path / "taken", to="encoder"))
    rows = dict(report.rows)
    assert rows["source"] == f"{tmp_path / 'both'} (the encoder of t5gemma2)"
    assert rows["proved"] == (
        "its states are those of the source's encoder for texts of up to 4 tokens (difference 0)"
    )
    assert any(said.startswith("a longer text differs by ") for _, said in report.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "x"}, "decoder is half of an encoder-decoder; pass --to encoder-decoder, too"),
        (
            {"to": "encoder-decoder", "pooling": "max", "keep_layers": "0,1"},
            "pooling, keep_layers given, which an encoder-decoder has no use for; "
            "give them when its encoder is taken",
        ),
    ],
)
def test_settings_that_cannot_be_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GembError) as told:
        load(None, AdaptRecipe, (), changes)
    assert message in str(told.value)


def test_an_encoder_becomes_no_encoder_decoder(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    done = gemb("adapt", models / "encoder", "--to", "encoder-decoder", "-o", tmp_path / "out")
    assert (done.code, done.out) == (5, "")
    assert done.err == (
        f"gemb: {models / 'encoder'}: gemma3_text is bidirectional already; an encoder-decoder is made of a "
        "decoder, such as google/gemma-2-2b\n"
    )
    assert list(tmp_path.iterdir()) == []
