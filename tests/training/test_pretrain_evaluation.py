"""Held-out texts: figures that can be worked out by hand, the same for every run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gemb.errors import GembError
from gemb.text.denoising import Row, causal_row
from gemb.training.pretrain_batches import packed
from gemb.training.pretrain_evaluation import HeldOutTexts
from gemb.training.pretrain_rows import frame_of, row_maker
from tests.training.pretrain_fakes import (
    CONFIG,
    VOCABULARY,
    TinyLanguageModel,
    documents,
    texts,
    tokeniser,
    write_texts,
)
from tests.training.test_pretrain_rows import recipe


def held_out(folder: Path, objective: str, limit: int = 30) -> HeldOutTexts:
    file = write_texts(folder / "texts.jsonl", texts(40, seed=3))
    maker = row_maker(recipe(objective), tokeniser(), CONFIG, 34)
    return HeldOutTexts("held-out", documents(file, 32), maker, limit)


def causal_rows(evaluation: HeldOutTexts) -> list[Row]:
    frame = frame_of(tokeniser(), CONFIG)
    return [causal_row(piece.ids, frame, ends=piece.ends) for piece in evaluation.pieces]


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tmp_path: Path) -> None:
    model = TinyLanguageModel()
    torch.nn.init.zeros_(model.head)
    found = held_out(tmp_path, "causal").measure(model)
    assert found.numbers["held-out/perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.scores["held-out/log likelihood"] == pytest.approx(np.full(30, -np.log(VOCABULARY)))


def test_perplexity_is_over_tokens_and_the_scores_are_of_texts(tmp_path: Path) -> None:
    model = TinyLanguageModel()
    evaluation = held_out(tmp_path, "causal")
    found = evaluation.measure(model)
    tokens = np.array(
        [len(piece.ids) + piece.ends for piece in evaluation.pieces]
    )  # the end is predicted, too
    mean = (found.scores["held-out/log likelihood"] * tokens).sum() / tokens.sum()
    assert found.numbers["held-out/perplexity"] == pytest.approx(np.exp(-mean), rel=1e-6)
    own = [model.loss(packed([one])) for one in causal_rows(evaluation)]
    assert found.scores["held-out/accuracy"].tolist() == [one.correct / one.tokens for one in own]
    assert held_out(tmp_path, "causal").measure(model).numbers == found.numbers


def test_each_denoiser_has_a_perplexity_of_its_own(tmp_path: Path) -> None:
    found = held_out(tmp_path, "ul2").measure(TinyLanguageModel())
    names = [name for name in found.numbers if " of " in name]
    assert names == sorted(names)
    assert "held-out/perplexity of suffix 0.75" in names
    assert len(names) == 5


def test_no_text_is_an_error(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.jsonl", ["w1", "w2"])
    maker = row_maker(recipe("causal"), tokeniser(), CONFIG, 34)
    with pytest.raises(GembError) as error:
        HeldOutTexts("held-out", documents(file), maker, 5)
    assert str(error.value) == f"evaluation.texts: {file} has no text of 2 tokens or more"
