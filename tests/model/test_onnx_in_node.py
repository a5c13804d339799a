"""The ONNX graph in transformers.js under Node, with its own tokenizer, on real texts."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gemb.engine.encoder import load_tokeniser
from gemb.engine.onnx_engine import OnnxEngine
from gemb.model.folder import read_folder
from gemb.model.hub import minilm_folder
from gemb.model.onnx.encoder import WeightKind, write_graph
from gemb.text.batches import token_batches

VERSION = "4.3.1"
PLACE = Path.home() / ".cache" / "gemb-bench" / f"transformers.js-{VERSION}"
# Their post-install scripts download CUDA libraries from elsewhere; what the packages hold is enough.
QUIET = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
PROGRAM = """\
import { readFileSync } from 'node:fs';
import { AutoModel, AutoTokenizer, env, pipeline } from '@huggingface/transformers';
const { root, name, dtype, texts } = JSON.parse(readFileSync(0, 'utf-8'));
env.localModelPath = root;
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype });
const { sentence_embedding } = await model(tokenizer(texts, { padding: true, truncation: true }));
const extract = await pipeline('feature-extraction', name, { dtype });
const pooled = await extract(texts, { pooling: 'mean', normalize: true });
console.log(JSON.stringify({ vectors: sentence_embedding.tolist(), pooled: pooled.tolist() }));
"""
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Гагарин полетел в космос",
    "def add_one(x):\n    return x + 1",
    "東京は日本の首都です",
    "a",
    " ".join(["a long text about many things, and then some more"] * 40),
]


@pytest.fixture(scope="module")
def node() -> Path:
    """A folder with transformers.js and the program, installed once into the user's cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    program = PLACE / "embed.mjs"
    if not program.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        (PLACE / "package.json").write_text('{"private": true, "type": "module"}')
        command = ["npm", "install", "--no-audit", "--no-fund", f"@huggingface/transformers@{VERSION}"]
        done = subprocess.run(
            command, cwd=PLACE, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"transformers.js cannot be installed: {done.stderr.strip()[-200:]}")
    program.write_text(PROGRAM)
    return program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "name", "dtype"),
    [
        ("f32", "model.onnx", "fp32"),
        ("int8", "model_quantized.onnx", "q8"),
        ("int4", "model_q4.onnx", "q4"),
    ],
)
def test_transformers_js_gives_the_vectors_of_the_graph(
    weights: WeightKind, name: str, dtype: str, node: Path, tmp_path: Path
) -> None:
    source = minilm_folder()
    if source is None:
        pytest.skip("the model minilm is not installed")
    place = tmp_path / "minilm"
    (place / "onnx").mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, place)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["transformers.js_config"] = {"use_external_data_format": {name: True}}
    (place / "config.json").write_text(json.dumps(config), "utf-8")
    folder = read_folder(source)
    write_graph(folder, place / "onnx" / name, weights)
    asked = {"root": f"{tmp_path}/", "name": "minilm", "dtype": dtype, "texts": TEXTS}
    done = subprocess.run(
        ["node", node], input=json.dumps(asked), capture_output=True, text=True, check=False, cwd=node.parent
    )
    assert done.returncode == 0, done.stderr
    theirs = {key: np.array(value) for key, value in json.loads(done.stdout).items()}
    engine = OnnxEngine.load(folder, place / "onnx" / name, reason="", threads=1, batch_tokens=None)
    ours = np.empty((len(TEXTS), folder.dims))
    for batch in token_batches(load_tokeniser(folder).encode(TEXTS), 100_000):
        ours[batch.rows] = engine.forward(batch)
    assert np.sum(ours * theirs["vectors"], axis=1)[:-1].min() >= 0.999999
    # The long one is cut at 256 tokens here, as the folder says; transformers.js takes the tokenizer's limit.
    np.testing.assert_allclose(theirs["pooled"], theirs["vectors"], atol=1e-6, rtol=0)
