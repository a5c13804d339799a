"""`gemb train` with an objective: a decoder learns, however often it is stopped; errors name their cause."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from gemb.errors import Exit, GembError, Interrupted, MismatchError
from gemb.jobs.adapt import AdaptRecipe
from gemb.jobs.adapt import run as adapt
from gemb.jobs.pretrain import PretrainRecipe, plan, run
from gemb.jobs.tiny_decoder import write_tiny_decoder
from gemb.jobs.train import TrainRecipe, recipe_for
from gemb.recipe import load, load_one_of, shipped_recipes
from gemb.report import Event, Report
from tests.conftest import ROOT
from tests.models import tiny_folder
from tests.training.pretrain_fakes import WORDS, write_texts

NAMES = [recipe.name for recipe in shipped_recipes() if "objective" in yaml.safe_load(recipe.text)]
GRAMMAR = [f"w{number} w{number + 1} w{number + 2}" for number in range(WORDS - 2)]
"""What can be learned: a word is followed by the next one."""


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(GRAMMAR[int(place)] for place in torch.randint(len(GRAMMAR), (8,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a decoder, texts and recipes."""
    folder = tmp_path_factory.mktemp("pretrain")
    write_tiny_decoder(folder / "decoder", iter(sentences(200, 0)), 3)
    config = json.loads((folder / "decoder/config.json").read_text("utf-8"))
    small = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**{
            **config, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
        })
    )  # fmt: skip
    small.save_pretrained(folder / "decoder")
    write_texts(folder / "texts.jsonl", [*sentences(120, 1), ""])
    write_texts(folder / "held-out.jsonl", sentences(20, 2))
    recipe: dict[str, Any] = {
        "kind": "train",
        "model": "./decoder",
        "objective": {"name": "causal"},
        "data": ["texts.jsonl"],
        "evaluation": {"texts": ["held-out.jsonl"], "samples": 2, "sample_tokens": 6},
        "max_tokens": 32,
        "batch": {"tokens": 128},
        "optimizer": {"name": "muon", "learning_rate": 0.01},
        "batch_tokens": 64,
        "dropout": 0.1,
        "steps": 8,
        "checkpoint": {"every": 3},
        "threads": 1,
        "precision": "fp32",
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def trained(place: Path, output: Path, *changes: str) -> Report:
    return run(load(place / "r.yaml", PretrainRecipe, changes, {"output": output}))


def same(first: Path, second: Path) -> bool:
    own, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text("utf-8").splitlines())
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Report, Path]:
    """The uninterrupted run."""
    return trained(place, place / "whole"), place / "whole"


def test_a_decoder_learns_and_its_folder_is_one_of_transformers(whole: tuple[Report, Path]) -> None:
    report, output = whole
    data: Mapping[str, Any] = report.data
    assert data["objective"] == "causal"
    assert dict(report.rows)["next"] == f"gemb adapt {output} -o ENCODER makes an encoder of it"
    assert data["verdict"] == "WIN"
    before, after = (data["measures"][when]["held-out/perplexity"] for when in ("before", "after"))
    assert after < before
    assert data["data_counts"]["rejected"] == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    log_likelihood = []
    for text in sentences(20, 2):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 1][:31]])
        with torch.no_grad():
            log_likelihood.append(-float(model(ids, labels=ids).loss))
    final = json.loads((output / "run/final.json").read_text("utf-8"))
    assert final["scores"]["held-out/log likelihood"] == pytest.approx(log_likelihood, rel=1e-5)


def test_the_run_folder_has_samples_metrics_and_a_card(whole: tuple[Report, Path]) -> None:
    output = whole[1]
    samples = [json.loads(line) for line in (output / "run/samples.jsonl").read_text("utf-8").splitlines()]
    assert [sorted(one) for one in samples] == [["expected", "read", "text", "written"]] * 2
    first = next(line for line in metrics(output) if line["step"] == 1)
    assert {"loss", "accuracy", "rows", "targets", "grad_norm"} <= first.keys()
    assert first["tokens"] <= 128
    card = (output / "README.md").read_text("utf-8")
    assert "| held-out/perplexity |" in card
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "config.json", "gemb.json", "generation_config.json", "model.safetensors", "run",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_terminated_run_goes_on_to_the_same_weights(
    whole: tuple[Report, Path], place: Path, tmp_path: Path
) -> None:
    def on_progress(event: Event) -> None:
        if event.stage == "training" and event.done == 4:
            signal.raise_signal(signal.SIGTERM)

    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(load(place / "r.yaml", PretrainRecipe, (), {"output": output}), on_progress)
    trained(place, output)
    assert same(output, whole[1])
    assert metrics(output) == metrics(whole[1])


@pytest.mark.faults
@pytest.mark.parametrize(("where", "count"), [("step", 5), pytest.param("write", 5, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_weights(
    whole: tuple[Report, Path], place: Path, tmp_path: Path, where: str, count: int
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tests/training/killed_train.py"), where, str(count)]
    killed = subprocess.run(
        [*command, "train", str(place / "r.yaml"), "-o", str(output)],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    trained(place, output)
    assert same(output, whole[1])
    assert metrics(output) == metrics(whole[1])


def test_the_same_command_again_has_nothing_to_do(whole: tuple[Report, Path], place: Path) -> None:
    assert trained(place, whole[1]).title == f"{whole[1]} was trained before; nothing to do"
    with pytest.raises(GembError) as error:
        trained(place, whole[1], "objective={name: mntp}")
    assert "  objective.name was causal, now mntp\n" in str(error.value)


def test_masked_tokens_are_learned_with_all_tokens_seen(place: Path, tmp_path: Path) -> None:
    report = trained(place, tmp_path / "out", "objective={name: mntp}", "steps=2")
    assert report.data["notes"] == [
        f"{place / 'decoder'} is causal; it learns with all tokens seen, but its folder stays that of a "
        "causal model: run gemb adapt on the result"
    ]
    assert not (tmp_path / "out/run/samples.jsonl").exists()


def test_an_adapted_encoder_is_trained_by_masking(place: Path, tmp_path: Path) -> None:
    adapt(AdaptRecipe(source=str(place / "decoder"), output=tmp_path / "encoder"))
    report = trained(
        place, tmp_path / "out", "objective={name: mntp}", "steps=2", f"model={tmp_path / 'encoder'}"
    )
    assert report.data["notes"] == []
    assert (tmp_path / "out/modules.json").is_file()
    with pytest.raises(MismatchError) as error:
        trained(place, tmp_path / "causal", f"model={tmp_path / 'encoder'}")
    assert str(error.value) == (
        f"objective causal is for decoders, but the tokens of {tmp_path / 'encoder'} see what comes after "
        "them; choose mntp"
    )


def test_a_teacher_of_the_same_vocabulary_teaches(place: Path, tmp_path: Path) -> None:
    teacher = f"teacher={{model: {place / 'decoder'}, weight: 0.5}}"
    report = trained(place, tmp_path / "out", teacher, "steps=2")
    assert report.data["steps"] == 2
    assert all("cross_entropy" in line for line in metrics(tmp_path / "out") if "loss" in line)
    shutil.copytree(place / "decoder", tmp_path / "other")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "other")
    config.vocab_size += 1
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError) as error:
        trained(place, tmp_path / "two", f"teacher={{model: {tmp_path / 'other'}}}")
    assert str(error.value) == (
        f"teacher.model: {tmp_path / 'other'} has {config.vocab_size} tokens, but the model has "
        f"{config.vocab_size - 1}; both need the same tokenizer"
    )
    file = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    one, two = sorted(words)[-2:]
    words[one], words[two] = words[two], words[one]
    file.write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(MismatchError) as error:
        trained(place, tmp_path / "three", f"teacher={{model: {tmp_path / 'other'}}}")
    assert str(error.value) == (
        f"teacher.model: {one!r} is token {words[one]} of {tmp_path / 'other'}, but {words[two]} of the "
        "model; both need the same tokenizer"
    )


def test_epochs_end_after_that_many_tokens(place: Path, tmp_path: Path) -> None:
    report = trained(place, tmp_path / "out", "steps=null", "epochs=0.25", "evaluation.texts=[]")
    tokens = json.loads((tmp_path / "out/gemb.json").read_text("utf-8"))["tokens"]
    assert report.data["tokens"] == tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "decoder")
    wanted = 0.25 * sum(len(tokenizer(text)["input_ids"]) - 1 for text in sentences(120, 1))
    assert wanted - 1 <= tokens < wanted + 128


def test_a_plan_trains_nothing(place: Path, tmp_path: Path) -> None:
    planned = plan(load(place / "r.yaml", PretrainRecipe, (), {"output": tmp_path / "out"}))
    data: Mapping[str, Any] = planned.data
    assert data["steps"] == 8
    assert data["targets"] > data["rows"] >= 4
    assert list(tmp_path.iterdir()) == []


def refused(place: Path, *changes: str) -> str:
    with pytest.raises(GembError) as error:
        plan(load(place / "r.yaml", PretrainRecipe, changes, {"output": place / "refused"}))
    return str(error.value)


def test_models_that_do_not_fit_the_objective_are_refused(place: Path, tmp_path: Path) -> None:
    decoder = place / "decoder"
    for objective in ("ul2", "prefix_lm"):
        assert refused(place, f"objective={{name: {objective}}}") == (
            f"objective {objective} is for encoder-decoders, but {decoder} (gemma3_text) has one tower; "
            "make one with gemb adapt --to encoder-decoder, or choose causal or mntp"
        )
    bert = tiny_folder(tmp_path / "bert", "bert")
    assert "model type 'bert' cannot be trained as a language model" in refused(
        place, f"model={bert}", "objective={name: mntp, mask_token: w5}"
    )
    assert refused(place, "max_tokens=513") == (
        "max_tokens is 513, but the model takes 512 at most; lower it"
    )


def test_recipes_that_make_no_sense_are_refused_with_their_line(place: Path) -> None:
    recipe = place / "r.yaml"
    told = refused(place, "objective={name: ul2, denoisers: [{name: spins, rate: 0.5}]}")
    assert told.startswith(f"{recipe}: 1 problem")
    assert "spins" in told
    assert "spans" in told
    for rate, rule in (("0.0", "is too small; more than 0"), ("1.0", "is too large; less than 1")):
        with pytest.raises(GembError) as error:
            load("t5gemma/2-ul2", PretrainRecipe, [f"objective.denoisers.2.rate={rate}"])
        assert str(error.value) == f"t5gemma/2-ul2: 1 problem\n  objective.denoisers.2.rate: {rate} {rule}"
    assert "denoisers is empty" in refused(place, "objective={name: ul2, denoisers: []}")
    assert "a teacher reads texts as they are, which ul2 does not" in refused(
        place, "objective={name: ul2}", "teacher={model: x}"
    )
    assert "cross_attention_only is for encoder-decoders, and causal for decoders" in refused(
        place, "cross_attention_only=3"
    )
    assert refused(place, "data=[]") == "no data given; pretraining needs texts, such as data: [texts.jsonl]"
    assert refused(place, "evaluation.texts=[]", "checkpoint.result=best") == (
        "checkpoint.result is best, but nothing is evaluated; give evaluation.texts"
    )


def test_the_objective_tells_which_recipe_it_is(place: Path) -> None:
    assert isinstance(load_one_of(place / "r.yaml", recipe_for), PretrainRecipe)
    assert isinstance(load_one_of("quickstart", recipe_for), TrainRecipe)


def test_check_and_search_are_for_pairs(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gemb", "train", str(place / "r.yaml"), "--check"],
        capture_output=True, check=False, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == Exit.USAGE
    assert done.stderr == ("gemb: --check and --search are for recipes of pairs; this one has an objective\n")


@pytest.fixture(scope="module")
def encoder_decoder(place: Path) -> Path:
    """The decoder as a T5Gemma 2."""
    adapt(AdaptRecipe(source=str(place / "decoder"), output=place / "ed", to="encoder-decoder"))
    return place / "ed"


@pytest.mark.parametrize("objective", ["ul2", "prefix_lm"])
def test_an_encoder_decoder_learns_and_generates(
    place: Path, tmp_path: Path, encoder_decoder: Path, objective: str
) -> None:
    changes = (f"model={encoder_decoder}", f"objective={{name: {objective}}}", "dropout=0.0", "steps=6")
    report = trained(place, tmp_path / "out", *changes)
    assert report.data["verdict"] == "WIN"
    assert len((tmp_path / "out/run/samples.jsonl").read_text("utf-8").splitlines()) == 2
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_an_encoder_decoder_is_not_for_causal_pretraining_or_a_warm_up_it_has_no_part_for(
    place: Path, encoder_decoder: Path
) -> None:
    assert refused(place, f"model={encoder_decoder}") == (
        f"objective causal is for decoders, but {encoder_decoder} (t5gemma2) is an encoder-decoder; "
        "choose ul2 or prefix_lm"
    )
    assert refused(place, f"model={encoder_decoder}", "objective={name: ul2}", "cross_attention_only=2") == (
        f"cross_attention_only: {encoder_decoder} (t5gemma2) has no cross-attention of its own that is "
        "trained; leave it out"
    )


def test_a_warm_up_leaves_all_but_the_cross_attention_as_it_was(place: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "gemma2", "gemma2 as a decoder")
    made = tmp_path / "t5gemma"
    adapt(AdaptRecipe(source=str(tmp_path / "gemma2"), output=made, to="encoder-decoder"))
    changes = (f"model={made}", "objective={name: prefix_lm}", "dropout=0.0", "evaluation.texts=[]")
    before = load_file(made / "model.safetensors")
    for steps, changed in ((2, {"cross_attn"}), (3, {"cross_attn", "self_attn", "mlp", "embed_tokens"})):
        output = tmp_path / f"after {steps}"
        trained(place, output, *changes, f"steps={steps}", "cross_attention_only=2")
        after = load_file(output / "model.safetensors")
        moved = {name for name, one in after.items() if not torch.equal(one, before[name].float())}
        assert all("cross_attn" in name for name in moved) == (steps == 2)
        assert all(any(part in name for name in moved) for part in changed)


def test_the_pretraining_recipes_are_those_of_the_sources() -> None:
    assert NAMES == [
        "embeddinggemma/2-pretrain",
        "t5gemma/2-prefix-lm",
        "t5gemma/2-ul2",
        "t5gemma2/2-ul2",
        "tiny_decoder",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_planned(
    name: str, place: Path, encoder_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl", sentences(30, 4))
    model = place / "decoder" if name == "tiny_decoder" else encoder_decoder
    changes = [f"model={model}", "data=[texts.jsonl]", "max_tokens=64", "batch.tokens=256", "threads=1"]
    changes += ["evaluation.texts=[texts.jsonl]"] if name == "tiny_decoder" else []
    changes += [f"teacher.model={place / 'decoder'}"] if "prefix" in name else []
    recipe = load(name, PretrainRecipe, changes, {"output": tmp_path / "out"})
    data: Mapping[str, Any] = plan(recipe).data
    assert data["rows"] >= 4
    assert data["steps"] == recipe.steps
