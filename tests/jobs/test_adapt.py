"""`gemb adapt` from recipe or command to folder and report."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from gemb import Encoder
from gemb.errors import GembError, MismatchError
from gemb.jobs import info, train
from gemb.jobs.adapt import AdaptRecipe, plan, run
from gemb.model.folder import read_folder
from gemb.recipe import load, shipped_recipes
from tests.conftest import DATA, Finished, modules_after
from tests.models import OWN_MODES, random_texts, tiny_folder

STORIES = DATA / "models" / "stories260K-hf"
RECIPES = {recipe.name: yaml.safe_load(recipe.text) for recipe in shipped_recipes()}
NAMES = [
    name
    for name, keys in RECIPES.items()
    if keys.get("kind") == "adapt" and keys.get("to") != "encoder-decoder"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and an encoder."""
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "decoder", "gemma3 as a decoder")
    tiny_folder(folder / "encoder", "gemma3")
    return folder


def test_the_recipes_are_those_of_the_sources() -> None:
    assert NAMES == ["embeddinggemma/3-encoder", "gemma_encoder/1-adapt"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name: str, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = load(name, AdaptRecipe, (), {"source": str(models / "decoder"), "output": output})
    planned = plan(recipe)
    assert not output.exists()
    report = run(recipe)
    folder = read_folder(output)
    assert folder.dims == (768 if name.startswith("embeddinggemma") else 64)
    assert dict(planned.rows)["dims"] == dict(report.rows)["dims"]
    config = json.loads((output / "config.json").read_text())
    rate = 0.1 if name.startswith("gemma_encoder") else 0.0
    assert (config["attention_dropout"], config.get("hidden_dropout_prob", 0.0)) == (rate, rate)
    kept = json.loads((output / "adapt_report.json").read_text())
    assert kept["recipe"]["kind"] == "adapt"
    assert set(kept["versions"]) >= {"gemb", "torch", "transformers"}


def test_the_table_has_every_tensor_once(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = AdaptRecipe(source=str(models / "decoder"), output=output, projections=(32,))
    (table,) = plan(recipe).tables
    count = sum(int(row[1]) for row in table.rows if row[3] != "left out")
    assert table.title == f"{count} tensors"
    assert ["layers.*.self_attn.q_norm.weight", "4", "16", "copied", "layers.*.self_attn.q_norm.weight"] in (
        list(map(list, table.rows))
    )
    report = run(recipe)
    assert isinstance(report.data["tensors"], list)
    assert len(report.data["tensors"]) == count + 1  # and the projection
    told = dict(report.rows)["tensors"]
    assert told == f"{count + 1}: {count} copied, 1 new, random; each in adapt_report.json"
    assert report.tables == ()  # a report that is read, not scrolled through


def test_an_encoder_is_cut_but_not_adapted(models: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("w5 w6 w7\nw8 w9\n", "utf-8")
    source, output = str(models / "encoder"), tmp_path / "out"
    cut = AdaptRecipe(
        source=source, output=output, keep_layers=(0, 2), keep_vocab=(str(tmp_path / "texts.txt"),)
    )
    planned = dict(plan(cut).rows)
    report = run(cut)
    assert dict(report.rows)["layers"] == planned["layers"] == "4 → 2"
    assert dict(report.rows)["vocabulary"] == planned["vocabulary"]
    assert len(list(output.glob("*.safetensors"))) == 1
    assert json.loads((output / "adapt_report.json").read_text())["layers"] == [4, 2]
    for recipe in (
        AdaptRecipe(source=source, output=tmp_path / "other", keep_layers=(0,), pooling="cls", dropout=0.1),
        AdaptRecipe(source=source, output=tmp_path / "other"),
    ):
        for job in (plan, run):
            with pytest.raises(MismatchError) as told:
                job(recipe)
            given = " (pooling, dropout given)" if recipe.dropout else ""
            assert str(told.value) == (
                f"{source}: gemma3_text is bidirectional already; of an encoder only --keep-layers and "
                f"--keep-vocab make another one{given}"
            )


@pytest.mark.parametrize("source", ["decoder", "encoder"])
def test_a_text_that_cannot_be_read_is_told_before_the_vocabulary_is_cut(
    source: str, models: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    recipe = AdaptRecipe(source=str(models / source), output=tmp_path / "out", keep_vocab=(str(texts),))
    texts.write_text('{"text": "w5"}\n{"text": ""}\n{"text": 7}\n', "utf-8")
    for job in (plan, run):
        with pytest.raises(GembError) as told:
            job(recipe)
        assert str(told.value) == (
            f'{texts}:3: "text" is the number 7, not a string; mend the row, or take it out: keep_vocab '
            "keeps the tokens of every text"
        )
    texts.write_text('{"text": "w5"}\n{"text": ""}\n', "utf-8")
    plan(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


@pytest.mark.parametrize("source", ["decoder", "encoder"])
def test_a_layer_that_is_not_there_is_told_before_anything_is_written(
    source: str, models: Path, tmp_path: Path
) -> None:
    recipe = AdaptRecipe(source=str(models / source), output=tmp_path / "out", keep_layers=(0, 4))
    for job in (plan, run):
        with pytest.raises(MismatchError) as told:
            job(recipe)
        assert str(told.value) == f"keep_layers has 4, but {models / source} has layers 0 to 3"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooling", OWN_MODES)
def test_an_encoder_with_a_pooling_of_gemb_keeps_it_when_it_is_cut(pooling: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "bert", pooling=pooling)
    texts = random_texts([9, 20])
    (tmp_path / "texts.txt").write_text("\n".join(texts), "utf-8")
    recipe = AdaptRecipe(
        source=str(source), output=tmp_path / "out", keep_vocab=(str(tmp_path / "texts.txt"),)
    )
    run(recipe)
    before, after = (Encoder.load(tmp_path / name).embed(texts) for name in ("source", "out"))
    assert np.array_equal(before, after)
    assert read_folder(tmp_path / "out").pooling == read_folder(source).pooling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_layers": "2,1"}, "keep_layers is [2, 1]; give each layer once, ascending from 0"),
        ({"projections": "64,x"}, "'64,x' is not a list of whole numbers such as 0,2,4"),
        ({"projections": (0,)}, "projections is [0]; a width is 1 or more"),
        ({"vocabulary": 9}, "vocabulary is counted over the texts of keep_vocab; give those, too"),
        (
            {"attention": "causal", "pooling": "cls"},
            "the first token of a causal model has seen nothing; choose another pooling",
        ),
        (
            {"attention": "causal", "pooling": "first-k", "pool_tokens": 4},
            "the first token of a causal model has seen nothing; choose another pooling",
        ),
        ({"pooling": "last-k"}, "last-k needs pool_tokens, the number of tokens it takes"),
        ({"pool_tokens": 3}, "pool_tokens has no meaning for the pooling mean; leave it out"),
        (
            {"pooling": "attention-query", "pool_probes": 9},
            "pool_probes has no meaning for the pooling attention-query; leave it out",
        ),
    ],
)
def test_settings_that_cannot_be_are_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GembError) as told:
        load(None, AdaptRecipe, (), changes)
    assert message in str(told.value)


def test_what_is_not_given_is_asked_for(models: Path) -> None:
    with pytest.raises(GembError, match="no source given; name a decoder, such as gemb adapt"):
        run(AdaptRecipe())
    with pytest.raises(GembError, match="no output given; pass -o FOLDER"):
        run(AdaptRecipe(source=str(models / "decoder")))


def test_the_command_adapts_and_refuses_to_write_twice(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ["adapt", models / "decoder", "-o", output, "projections=[32, 16]", "--keep-layers", "0,2"]
    dry = gemb(*words, "--dry-run")
    assert dry.code == 0, dry.err
    assert f"would adapt {models / 'decoder'} into {output}" in dry.out
    assert not output.exists()
    done = gemb(*words, "--set", "prompts.query=w7 ", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["proofs"]["source_difference"] == 0
    assert (data["kept_layers"], data["attention"]) == ([0, 2], "bidirectional")
    assert read_folder(output).prompts == {"query": "w7"}
    for again in (gemb(*words), gemb(*words, "--dry-run")):
        assert (again.code, again.out) == (2, "")
        assert again.err == f"gemb: {output} exists; choose another path for the model, or move it away\n"


def test_a_recipe_that_has_the_source_is_changed_by_words(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"kind: adapt\nsource: {models / 'decoder'}\noutput: out\n", "utf-8")
    done = gemb("adapt", "--recipe", recipe, "normalise=false", "max_tokens=9", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["max_tokens"] == 9
    wrong = gemb("adapt", "--recipe", recipe, "poling=cls", "--dry-run")
    assert (wrong.code, wrong.out) == (2, "")
    assert "poling: no such key; did you mean pooling?" in wrong.err


def test_the_command_proves_a_model_larger_than_the_memory_layer_by_layer(
    gemb: Callable[..., Finished], models: Path, tmp_path: Path
) -> None:
    words = ["adapt", models / "decoder", "-o", tmp_path / "out", "--max-memory", "0.00001"]
    done = gemb(*words)
    assert done.code == 0, done.err
    assert "each layer alone, since the model is larger than the memory" in " ".join(done.err.split())
    proofs = json.loads((tmp_path / "out" / "adapt_report.json").read_text())["proofs"]
    assert proofs["by_layer"] is True
    assert len(proofs["reaches"]) == 4


@pytest.mark.parametrize("mode", ["attention-query", "attention-kv"])
def test_an_attention_pooling_is_adapted_trained_and_embedded_with(
    gemb: Callable[..., Finished], mode: str, models: Path, tmp_path: Path
) -> None:
    words = ["--pooling", mode, "--pool-heads", "2", "--json"]
    done = gemb("adapt", models / "decoder", "-o", tmp_path / "encoder", *words)
    assert done.code == 0, done.err
    rows = [{"query": f"w{n} w{n + 1}", "positive": f"w{n} w{n + 2} w9"} for n in range(10, 26)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    changes = [f"data.0.path={pairs}", "batch.pairs=8", "steps=2", "threads=1", "precision=fp32"]
    given = {"model": str(tmp_path / "encoder"), "output": tmp_path / "tuned"}
    train.run(load("gemma_encoder/2-finetune", train.TrainRecipe, changes, given))
    before, after = (
        load_file(tmp_path / name / "1_Pooling/model.safetensors") for name in ("encoder", "tuned")
    )
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    told = info.run(str(tmp_path / "tuned"))
    rows_told = dict(told.rows)
    assert rows_told["pooling"].startswith(f"{mode} of 2 heads")
    assert rows_told["loads in"].startswith("gemb (sentence-transformers has no such pooling)")
    assert told.data["pooling_heads"] == 2
    counted = sum(tensor.numel() for tensor in load_file(tmp_path / "tuned/model.safetensors").values())
    assert told.data["parameters"] == counted + sum(tensor.numel() for tensor in after.values())
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "from gemb import Encoder" in card
    assert "SentenceTransformer" not in card
    vectors = Encoder.load(tmp_path / "tuned").embed(["w10 w11", "w12"])
    assert vectors.shape == (2, 64)
    others = Encoder.load(tmp_path / "encoder").embed(["w10 w11", "w12"])
    assert np.abs(vectors - others).max() > 1e-4


def test_training_takes_the_dropout_of_the_folder_unless_it_is_given(models: Path, tmp_path: Path) -> None:
    for name, rate in (("plain", 0.0), ("dropping", 0.3)):
        run(AdaptRecipe(source=str(models / "decoder"), output=tmp_path / name, dropout=rate))
    rows = [{"query": f"w{n} w{n + 1}", "positive": f"w{n} w{n + 2} w9"} for n in range(10, 26)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def tuned(model: str, *more: str) -> dict[str, torch.Tensor]:
        output = tmp_path / "-".join(["tuned", model, *more])
        changes = [f"data.0.path={pairs}", "batch.pairs=8", "steps=2", "threads=1", "precision=fp32", *more]
        given = {"model": str(tmp_path / model), "output": output}
        train.run(load("gemma_encoder/2-finetune", train.TrainRecipe, changes, given))
        return load_file(output / "model.safetensors")

    plain, dropping, told, none = (
        tuned("plain"), tuned("dropping"), tuned("plain", "dropout=0.3"), tuned("dropping", "dropout=0")
    )  # fmt: skip
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    for one, other in ((plain, dropping), (plain, told), (told, dropping)):
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_help_shows_an_example(gemb: Callable[..., Finished]) -> None:
    done = gemb("adapt", "--help")
    assert "gemb adapt google/gemma-3-270m -o runs/encoder" in done.out
    for option in ("--attention", "--pooling", "--keep-layers", "--keep-vocab", "--projections"):
        assert option in done.out


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs {STORIES}")
def test_a_real_decoder_is_adapted_and_fine_tuned(tmp_path: Path) -> None:
    run(
        load(
            "gemma_encoder/1-adapt", AdaptRecipe, (), {"source": str(STORIES), "output": tmp_path / "encoder"}
        )
    )
    rows = [{"query": f"a red ball {n}", "positive": f"the ball {n} is red"} for n in range(16)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    changes = [f"data.0.path={pairs}", "batch.pairs=8", "steps=2", "threads=1", "precision=fp32"]
    given = {"model": str(tmp_path / "encoder"), "output": tmp_path / "tuned"}
    train.run(load("gemma_encoder/2-finetune", train.TrainRecipe, changes, given))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("encoder", "tuned"))
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert read_folder(tmp_path / "tuned").family == "eurobert"


def test_the_job_loads_no_torch() -> None:
    assert not {"torch", "transformers"} & modules_after("import gemb.jobs.adapt")
