"""The way of EmbeddingGemma on a tiny decoder: train, adapt, denoise, take the encoder, learn from pairs."""

import json
from pathlib import Path

import numpy as np
import pytest

from gemb.engine.encoder import Encoder
from gemb.jobs import adapt, pretrain, train
from gemb.jobs.adapt import AdaptRecipe
from gemb.jobs.pretrain import PretrainRecipe
from gemb.jobs.train import TrainRecipe
from gemb.recipe import load
from tests.conftest import DATA
from tests.jobs.test_pretrain import sentences
from tests.training.pretrain_fakes import write_texts

SHORT = ["threads=1", "precision=fp32", "steps=3"]


def write_pairs(folder: Path, recipe: TrainRecipe) -> None:
    """Rows of the shape that each data set of a recipe asks for."""
    texts = iter(sentences(2000, 5))
    for data in recipe.data:
        rows: list[dict[str, str]] = [
            {"query": next(texts), "positive": next(texts), "negative": next(texts)} for _ in range(12)
        ]
        if "classification" in data.paths[0]:
            rows = [{"text": next(texts), "label": f"label {row % 4}"} for row in range(12)]
        file = folder / data.paths[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
def test_the_recipes_of_embeddinggemma_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/texts").mkdir(parents=True)
    for number, text in enumerate(sentences(60, 1)):
        (tmp_path / f"data/texts/{number}.txt").write_text(text, encoding="utf-8")
    write_texts(tmp_path / "texts.jsonl", sentences(200, 2))

    changes = [*SHORT, "data=[texts.jsonl]", "evaluation.texts=[texts.jsonl]", "evaluation.limit=5"]
    pretrain.run(load("tiny_decoder", PretrainRecipe, changes, {"output": Path("decoder")}))
    adapt.run(load("embeddinggemma/1-adapt", AdaptRecipe, (), {"source": "decoder", "output": Path("ed")}))
    changes = [*SHORT, "model=ed", "max_tokens=64", "batch.tokens=256"]
    pretrain.run(load("embeddinggemma/2-pretrain", PretrainRecipe, changes, {"output": Path("ul2")}))
    adapt.run(load("embeddinggemma/3-encoder", AdaptRecipe, (), {"source": "ul2", "output": Path("encoder")}))
    before = "encoder"
    for name in ("4-prefinetune", "5-finetune"):
        write_pairs(tmp_path, load(f"embeddinggemma/{name}", TrainRecipe))
        changes = [*SHORT, f"model={before}", "max_tokens=64", "batch.pairs=8"]
        train.run(load(f"embeddinggemma/{name}", TrainRecipe, changes, {"output": Path(name)}))
        before = name

    assert (tmp_path / "encoder/adapt_report.json").is_file()
    assert not (tmp_path / "5-finetune/adapt_report.json").exists()
    encoder = Encoder.load(tmp_path / "5-finetune", threads=1)
    vectors = encoder.embed(["w1 w2 w3", "w7 w8"])
    encoder.close()
    assert vectors.shape == (2, 768)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "models/stories260K-hf").is_dir(), reason="no tiny real decoder")
def test_a_real_decoder_is_masked_adapted_and_fine_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(DATA / "models/stories260K-hf")
    write_texts(tmp_path / "texts.jsonl", ["Once upon a time there was a little girl named Lily."] * 40)
    recipe = PretrainRecipe.model_validate_json(
        json.dumps({
            "model": source, "objective": {"name": "mntp", "mask_token": "<unk>"}, "data": ["texts.jsonl"],
            "steps": 3, "max_tokens": 32, "threads": 1, "output": "masked",
        })
    )  # fmt: skip
    pretrain.run(recipe)
    adapt.run(AdaptRecipe(source="masked", output=Path("encoder")))
    (tmp_path / "data").mkdir()
    rows = [{"query": text, "positive": text.upper()} for text in sentences(30, 3)]
    (tmp_path / "data/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    changes = ["model=encoder", "steps=2", "batch.pairs=8", "threads=1"]
    train.run(load("gemma_encoder/2-finetune", TrainRecipe, changes, {"output": Path("finetuned")}))
    assert (tmp_path / "finetuned/modules.json").is_file()
