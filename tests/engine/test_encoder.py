from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gemb.engine import encoder as module
from gemb.engine.encoder import Encoder, load_tokeniser
from gemb.engine.opening import stdout_guarded
from gemb.errors import GembError, MismatchError
from gemb.model.folder import read_folder
from gemb.model.hub import find_model
from gemb.vectors import cut
from tests.fakes import FakeEngine, expected, fake_folder, words


def encoder_of(folder: Path, engine: FakeEngine | None = None) -> Encoder:
    read = read_folder(folder)
    return Encoder(read, load_tokeniser(read), engine or FakeEngine(workers=2))


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return encoder_of(fake_folder(tmp_path / "model"))


def test_the_example_of_the_class_runs() -> None:
    try:
        find_model("minilm")
    except GembError as error:
        pytest.skip(str(error))
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=4)


def test_every_text_has_its_vector_in_the_order_given(encoder: Encoder) -> None:
    texts = [list(range(row % 9 + 1)) for row in range(50)]
    found = encoder.embed([words(*numbers) for numbers in texts])
    np.testing.assert_array_equal(found, [expected(*numbers) for numbers in texts])


def test_no_texts_give_no_rows(encoder: Encoder) -> None:
    assert encoder.embed([]).shape == (0, 8)


def test_fewer_dims_are_cut_and_brought_to_unit_length(encoder: Encoder) -> None:
    found = encoder.embed([words(1)], dims=4)
    np.testing.assert_array_equal(found, cut(expected(1)[None], 4, normalise=True))
    raw = encoder.embed([words(1)], dims=4, normalise=False)
    np.testing.assert_array_equal(raw, expected(1)[None, :4])


def test_prompt_and_title_stand_in_front_of_the_text(tmp_path: Path) -> None:
    encoder = encoder_of(
        fake_folder(tmp_path, prompts={"query": "w7 ", "document": "title: {title} | text: "})
    )
    np.testing.assert_array_equal(encoder.embed([words(1)], as_="query"), [expected(7, 1)])
    np.testing.assert_array_equal(encoder.embed([words(1)], as_="none"), [expected(1)])
    with pytest.raises(MismatchError, match="query"):
        encoder.embed([words(1)], as_="questions")


@pytest.mark.parametrize("dims", [0, -1, 9])
def test_dims_that_the_model_does_not_give(encoder: Encoder, dims: int) -> None:
    with pytest.raises(GembError, match=rf"^dims is {dims}, but the model gives 8$"):
        encoder.embed([words(1)], dims=dims)


def test_a_title_stands_for_a_text_that_is_empty(encoder: Encoder) -> None:
    # BEIR folders have such documents.
    alone, titled = encoder.embed([words(1)], as_="none"), encoder.embed([" "], titles=[words(1)], as_="none")
    assert titled.shape == alone.shape
    np.testing.assert_allclose(titled, encoder.embed([f"{words(1)}  "], as_="none"), atol=1e-6)
    with pytest.raises(GembError, match=r"^text 0 is empty; leave it out$"):
        encoder.embed([""], titles=[" "])
    with pytest.raises(GembError, match=r"^text 0 is empty; leave it out$"):
        encoder.embed([""], titles=[words(1)], as_="query")  # queries have no titles


def test_texts_without_a_vector_are_told_by_number(encoder: Encoder) -> None:
    with pytest.raises(GembError, match=r"^text 1 is empty; leave it out$"):
        encoder.embed(["w1", " \n"])
    with pytest.raises(GembError, match=r"^text 1 has a lone surrogate"):
        encoder.embed(["w1", "\ud800"])
    with pytest.raises(GembError, match=r"^there are 1 titles for 2 texts$"):
        encoder.embed(["w1", "w2"], titles=["w3"])
    with pytest.raises(TypeError, match=r"^texts is one string; pass a list of strings$"):
        encoder.embed("w1")


def test_a_text_that_the_engine_cannot_compute_is_told_by_number(tmp_path: Path) -> None:
    engine = FakeEngine(spoils=lambda ids: np.nan if 9 in ids else None)
    with pytest.raises(GembError, match=r"^text 3 gives no vector: its vector is not finite$"):
        encoder_of(fake_folder(tmp_path), engine).embed([words(number) for number in (1, 2, 3, 5)])


def test_a_text_of_no_tokens_has_no_vector(tmp_path: Path) -> None:
    folder = fake_folder(tmp_path)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = None
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "gone"}, "content": ""}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(GembError, match=r"^text 1 gives no vector: the tokenizer finds no token in it$"):
        encoder_of(folder).embed(["w1", "gone"])


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stdout_or_stderr_needs_no_guard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, name, None)
    with stdout_guarded():
        pass
