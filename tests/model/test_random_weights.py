import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
from safetensors.torch import load_file

from gemb import Encoder
from gemb.errors import GembError, MismatchError
from gemb.model.folder import read_folder
from gemb.model.pruned import write_pruned
from gemb.model.random_weights import write_random
from tests.models import random_texts, tiny_folder

TEXTS = random_texts([3, 9, 17], seed=4)
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GEMMA: dict[str, Any] = {
    **BERT,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "num_key_value_heads": 1,
    "use_bidirectional_attention": True,
    "sliding_window": 8,
}


@pytest.mark.parametrize("config", [BERT, GEMMA])
def test_the_folder_runs_here_and_in_sentence_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    tokenizer = tiny_folder(tmp_path / "tokenizer", "bert")
    count = write_random(config, tokenizer, tmp_path / "new", seed=1, max_tokens=40)
    ours = Encoder.load(tmp_path / "new", threads=1, precision="fp32").embed(TEXTS, as_="none")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "new"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # two implementations in fp32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    assert count == sum(tensor.numel() for tensor in load_file(tmp_path / "new/model.safetensors").values())
    assert json.loads((tmp_path / "new/config.json").read_text())["vocab_size"] == 200


def test_the_weights_follow_from_the_seed_alone(tmp_path: Path) -> None:
    tokenizer = tiny_folder(tmp_path / "tokenizer", "bert")
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_random(BERT, tokenizer, tmp_path / name, seed=seed)
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["embeddings.word_embeddings.weight"].equal(other["embeddings.word_embeddings.weight"])


def test_its_vocabulary_can_be_cut(tmp_path: Path) -> None:
    tokenizer = tiny_folder(tmp_path / "tokenizer", "bert")
    write_random(GEMMA, tokenizer, tmp_path / "new", seed=1)
    pruned = write_pruned(read_folder(tmp_path / "new"), tmp_path / "cut", texts=TEXTS)
    assert pruned.vocabulary[1] < 200
    whole, cut = (
        Encoder.load(tmp_path / name, threads=1, precision="fp32").embed(TEXTS) for name in ("new", "cut")
    )
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bart-like"}, "transformers knows no model_type 'bart-like'; check the config"),
        ({"vocab_size": 100}, "the config's vocab_size is 100, but the tokenizer in {tokenizer} has 200 "
                              "entries; leave vocab_size out"),
        ({"hiden_size": 64}, "a bert has no hiden_size; did you mean hidden_size?"),
        ({"num_attention_heads": 3}, "transformers cannot build a bert of this config: The hidden size (32) "
                                     "is not a multiple of the number of attention heads (3)"),
        ({"hidden_size": "64"}, "transformers cannot build a bert of this config: Validation error for field "
                                "'hidden_size': TypeError: Field 'hidden_size' expected int, got str "
                                "(value: '64')"),
        ({"hidden_act": "nope"}, "transformers cannot build a bert of this config: 'nope'"),
        ({"intermediate_size": -1}, "transformers cannot build a bert of this config: Trying to create "
                                    "tensor with negative dimension -1: [-1, 32]"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tokenizer = tiny_folder(tmp_path / "tokenizer", "bert")
    with pytest.raises(MismatchError) as caught:
        write_random({**BERT, **change}, tokenizer, tmp_path / "new", seed=1)
    assert str(caught.value) == message.format(tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        write_random(BERT, tmp_path, tmp_path / "new", seed=1)
    assert str(caught.value) == f"{tmp_path} has no tokenizer.json; name a folder with one"
