"""What quickstart makes on the spot: pairs from docstrings, and a small model with random weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemb.engine.encoder import Encoder
from gemb.jobs import quickstart
from gemb.jobs.quickstart import DOCSTRINGS, HELD_OUT, docstring_pairs, write_docstrings, write_tiny_gemma3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_docstrings(tmp_path_factory.mktemp("docstrings"))


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_every_machine_has_thousands_of_pairs_and_hundreds_held_out(files: dict[str, Path]) -> None:
    counts = {name: len(rows_of(file)) for name, file in files.items()}
    assert counts[DOCSTRINGS] > 4000
    assert 400 < counts[HELD_OUT] < counts[DOCSTRINGS] / 5
    for row in rows_of(files[DOCSTRINGS])[:100]:
        assert row["query"].strip()
        assert len(row["positive"]) <= 800
        assert row["query"] != row["positive"]


MODULE = '''"""The module {0} of the library, long enough to count.

And a second paragraph about {0} that says more than the first one does."""


def read_oneLine():
    """Read one line of {0}, and say so at some length."""
'''


def test_pairs_are_names_with_docstrings_and_summaries_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "alpha.py").write_text(MODULE.format("alpha"), "utf-8")
    assert [pair[1:] for pair in docstring_pairs(tmp_path)] == [
        ("alpha", MODULE.format("alpha").partition('"""')[2].partition('"""')[0]),
        (
            "The module alpha of the library, long enough to count.",
            "alpha: And a second paragraph about alpha that says more than the first one does.",
        ),
        ("alpha read one Line", "Read one line of alpha, and say so at some length."),
    ]


def test_equal_docstrings_and_both_pairs_of_one_are_on_the_same_side(tmp_path: Path) -> None:
    for number in range(80):  # 40 docstrings of modules, each twice
        (tmp_path / f"m{number}.py").write_text(MODULE.format(f"name{number % 40}"), "utf-8")
    sides: dict[str, set[str]] = {}
    for side, query, positive in docstring_pairs(tmp_path):
        word = next(
            word for word in f"{query} {positive}".replace(",", "").split() if word.startswith("name")
        )
        kind = "line" if "Line" in query else "module"
        sides.setdefault(f"{word} {kind}", set()).add(side)
    assert len(sides) == 80
    assert all(len(one) == 1 for one in sides.values())
    assert {side for one in sides.values() for side in one} == {DOCSTRINGS, HELD_OUT}


def test_files_that_are_there_are_left_alone(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "docstring_pairs", None)
    assert write_docstrings(files[DOCSTRINGS].parent) == files


def texts() -> Iterator[str]:
    for number in range(300):
        yield f"read the file number {number} and write line {number % 7} of it"


def test_the_same_texts_and_seed_give_the_same_model_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_gemma3(tmp_path / name, texts(), seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    tokenizers = {name: (tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"}
    assert tokenizers["a"] == tokenizers["b"] == tokenizers["c"]


def test_the_model_loads_in_sentence_transformers_with_the_same_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write_tiny_gemma3(tmp_path / "base", texts(), 1)
    asked = ["read the file", "write line 3 of it, and nothing else"]
    theirs = SentenceTransformer(str(tmp_path / "base"), device="cpu").encode(asked)
    ours = Encoder.load(tmp_path / "base", device="cpu", precision="fp32").embed(asked)
    assert ours.shape == (2, 192)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
