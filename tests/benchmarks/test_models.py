import json
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.models import MODELS, Work, build_once
from gemb.errors import UnavailableError


def test_linear_work_is_what_the_shapes_say() -> None:
    # MiniLM: 6 layers of 4 x 384^2 + 2 x 384 x 1536 weights; EmbeddingGemma: 101.4 M matrix parameters.
    assert MODELS["minilm"].work.linear_flops() == 2 * 6 * (4 * 384**2 + 2 * 384 * 1536)
    assert MODELS["gemma300m"].work.linear_flops() == pytest.approx(202.9e6, rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9, 20])
def test_attention_work_counts_the_pairs_inside_the_window(tokens: int) -> None:
    work = Work(matrices=(), head_width=5, radii=(3, None))
    pairs = sum(abs(left - right) <= 3 for left in range(tokens) for right in range(tokens))
    assert work.attention_flops(tokens) == 4 * 5 * (pairs + tokens**2)


def test_a_model_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    def write(into: Path) -> None:
        (into / "half").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        build_once(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        build_once(tmp_path / "model", calls.append)
    assert len(calls) == 1


def test_without_the_gemma_tokenizer_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMB_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "GEMMA_TOKENIZER", Path("/nowhere"))
    message = r"^/nowhere: no Gemma tokenizer here, so no Gemma benchmark; use --model minilm$"
    with pytest.raises(UnavailableError, match=message):
        models.gemma300m_folder()


def test_an_unknown_prompt_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
    assert models.prompt_text(tmp_path, "query") == "q: "
    assert models.prompt_text(tmp_path, "none") == ""
    with pytest.raises(UnavailableError, match=r": no prompt 'document'; this model has query$"):
        models.prompt_text(tmp_path, "document")


def test_tokens_are_counted_with_special_tokens_and_cut_at_the_maximum() -> None:
    folder = MODELS["minilm"].folder()
    assert models.token_counts(folder, ["hello world", "word " * 1000]) == [4, 256]
    assert models.token_counts(folder, ["world"], prompt="hello ") == [4]


@pytest.mark.slow
@pytest.mark.skipif(not models.GEMMA_TOKENIZER.is_dir(), reason="../shared/data has no Gemma tokenizer")
def test_the_gemma_tokenizer_puts_both_ends(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    models._write_gemma_tokenizer(tmp_path)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("Hello world").ids
    assert ids == [2, 9259, 1902, 1]
