"""The ONNX graph of a model folder, run by onnxruntime, against the packed forward of the same folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from gemb.errors import MismatchError
from gemb.model.encoder import PackedEncoder
from gemb.model.folder import fingerprint, read_folder
from gemb.model.kernels import Kernels
from gemb.model.onnx import SAME_VECTORS
from gemb.model.onnx.encoder import GRIDS, WeightKind, write_graph
from gemb.quantization.roles import role_of
from tests.models import MODES, SORTS, packed, random_texts, tiny_folder

LENGTHS = (1, 3, 30, 17, 17, 2)
WRITTEN = [name for name, sort in SORTS.items() if sort.is_packed and name != "embedding_gemma2"]
ABSOLUTE = ("bert", "distilbert")
"""Their positions count from the left edge, padding included, in transformers as here."""
# The last bits of sums in another order, over a few layers.
SAME = 1e-6


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(
    graph: onnxruntime.InferenceSession, texts: Sequence[NDArray[np.int32]], *, left: bool = False
) -> NDArray[np.float32]:
    """Vectors[B, K] of texts padded to the longest; the padding has an id that texts use, too."""
    longest = max(map(len, texts))
    ids = np.ones((len(texts), longest), dtype=np.int64)  # the padding of RoBERTa, which counts on it
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    vectors: NDArray[np.float32]
    (vectors,) = graph.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})
    return vectors


def split(ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def rich_folder(place: Path, name: str) -> Path:
    """A tiny model with every pooling mode and every kind of module after it."""
    dense: list[dict[str, object]] = [
        {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"},
        {"use_residual": True, "out_features": 96},
        {"in_features": 96, "activation_function": "torch.nn.modules.activation.GELU"},
        {"use_residual": True},
    ]
    return tiny_folder(place, name, pooling=MODES, dense=dense, layer_norm=True)


def snap(folder: Path, weights: WeightKind) -> None:
    """Move every weight that gemb quantises onto the grid, in fp32."""
    grid = GRIDS[weights]
    assert grid is not None
    for file in folder.rglob("model.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if role_of(name, tensor.shape) is not None:
                tensors[name] = grid.snap(tensor)
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", WRITTEN)
def test_a_graph_gives_the_vectors_of_the_packed_forward(name: str, tmp_path: Path) -> None:
    place = rich_folder(tmp_path / "model", name)
    folder = read_folder(place)
    assert write_graph(folder, tmp_path / "model.onnx").is_exact
    ids, lengths, _ = packed(place, random_texts(LENGTHS))
    expected = PackedEncoder(folder, Kernels("cpu", torch.float32)).forward(ids, lengths).numpy()
    graph, texts = session(tmp_path / "model.onnx"), split(ids, lengths)
    alone = np.concatenate([run(graph, [text]) for text in texts])
    np.testing.assert_allclose(alone, expected, atol=SAME, rtol=0)
    np.testing.assert_allclose(run(graph, texts), expected, atol=SAME, rtol=0)
    if name not in ABSOLUTE:
        np.testing.assert_allclose(run(graph, texts, left=True), expected, atol=SAME, rtol=0)
    reversed_texts = [text[::-1] for text in texts]
    assert np.abs(run(graph, reversed_texts) - expected).max() > 0.01  # the comparison can fail


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["bert", "gemma3", "qwen3", "modernbert"])
def test_whole_numbers_give_the_vectors_of_the_same_numbers_in_floats(
    name: str, weights: WeightKind, tmp_path: Path
) -> None:
    place = tiny_folder(tmp_path / "model", name, dense=[{"out_features": 128}, {"in_features": 128}])
    rough = write_graph(read_folder(place), tmp_path / "rough.onnx", weights)
    snap(place, weights)
    folder = read_folder(place)
    exact = write_graph(folder, tmp_path / "exact.onnx", weights)
    assert (rough.is_exact, exact.is_exact) == (False, True)
    # The grid gives back its own numbers, so both files hold the same weights.
    assert rough.files[1].read_bytes() == exact.files[1].read_bytes()
    ids, lengths, _ = packed(place, random_texts(LENGTHS))
    expected = PackedEncoder(folder, Kernels("cpu", torch.float32)).forward(ids, lengths).numpy()
    graph = session(exact.files[0])
    alone = np.concatenate([run(graph, [text]) for text in split(ids, lengths)])
    np.testing.assert_allclose(alone, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(run(graph, split(ids, lengths)), alone, atol=SAME, rtol=0)
    smaller = exact.files[1].stat().st_size
    assert smaller < write_graph(folder, tmp_path / "f32.onnx").files[1].stat().st_size


@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
def test_vectors_do_not_depend_on_texts_of_the_same_length_in_the_batch(
    weights: WeightKind, tmp_path: Path
) -> None:
    place = tiny_folder(tmp_path / "model", "gemma3", dense=[{"out_features": 128}])
    write_graph(read_folder(place), tmp_path / "model.onnx", weights)
    graph = session(tmp_path / "model.onnx")
    texts = split(*packed(place, random_texts([9] * 7))[:2])
    together = run(graph, texts)
    for rows in ([0], [0, 1, 2], [6, 0], [3, 2, 1, 0]):
        np.testing.assert_allclose(
            run(graph, [texts[row] for row in rows]), together[rows], atol=SAME, rtol=0
        )


def test_token_states_are_those_of_the_packed_forward(tmp_path: Path) -> None:
    place = tiny_folder(tmp_path / "model", "gemma3")
    folder = read_folder(place)
    write_graph(folder, tmp_path / "model.onnx")
    ids, lengths, _ = packed(place, random_texts([12]))
    expected = PackedEncoder(folder, Kernels("cpu", torch.float32)).states(ids, lengths).numpy()
    feed = {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
    outputs = session(tmp_path / "model.onnx")
    # fastembed takes the first output, transformers.js and TEI this name.
    assert [output.name for output in outputs.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    np.testing.assert_allclose(outputs.run(None, feed)[0][0], expected, atol=1e-5, rtol=0)


def test_a_graph_of_floats_is_plain_onnx_and_passes_its_checker(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "gemma3"))
    write_graph(folder, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import] == [""]
    used = {name for node in model.graph.node for name in node.input}
    assert used >= {weight.name for weight in model.graph.initializer}


def test_the_file_tells_whose_graph_it_is(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "bert"))
    write_graph(folder, tmp_path / "model.onnx", "int8")
    known = session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert known["gemb.made_from"] == fingerprint(folder)
    assert (known["gemb.weights"], known["gemb.dims"]) == ("int8", "64")
    assert SAME_VECTORS not in known
    write_graph(folder, tmp_path / "f32.onnx")
    known = session(tmp_path / "f32.onnx").get_modelmeta().custom_metadata_map
    assert known[SAME_VECTORS] == fingerprint(folder)
    assert '"query"' in known["gemb.prompts"]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "bert"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_graph(folder, tmp_path / name / "model.onnx", "int4")
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_family_without_a_graph_is_refused_by_name(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "mpnet"))
    with pytest.raises(MismatchError) as caught:
        write_graph(folder, tmp_path / "model.onnx")
    assert str(caught.value) == (
        f"{tmp_path}/model/config.json: no ONNX graph is written for the model type 'mpnet'; there is one "
        "for bert, camembert, distilbert, eurobert, gemma2, gemma3, gemma3_text, llama, mistral, modernbert, "
        "qwen2, qwen3, roberta, t5_gemma_module, t5gemma, xlm-roberta"
    )
    assert list(tmp_path.glob("*.onnx*")) == []


def test_a_pooling_without_the_prompt_is_refused(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "bert", include_prompt=False))
    with pytest.raises(MismatchError) as caught:
        write_graph(folder, tmp_path / "model.onnx")
    assert str(caught.value) == (
        f"{tmp_path}/model: its pooling leaves the prompt out, whose length no ONNX graph is told; "
        "export a model with include_prompt"
    )


def test_rows_that_are_no_whole_blocks_are_refused_by_name(tmp_path: Path) -> None:
    dense = [{"out_features": 80}, {"in_features": 80, "out_features": 64}]
    folder = read_folder(tiny_folder(tmp_path / "model", "bert", dense=dense))
    with pytest.raises(MismatchError) as caught:
        write_graph(folder, tmp_path / "model.onnx", "int4")
    assert str(caught.value) == (
        f"{tmp_path}/model: 3_Dense.linear.weight: q4_0 has blocks of 32, but the rows are 80 wide; "
        "export f32 instead"
    )


@pytest.mark.parametrize("mode", ["first-k", "last-k"])
def test_the_first_or_last_tokens_are_pooled_on_either_side_of_the_padding(mode: str, tmp_path: Path) -> None:
    place = tiny_folder(tmp_path / "model", "gemma3", pooling=mode)
    folder = read_folder(place)
    write_graph(folder, tmp_path / "model.onnx")
    ids, lengths, _ = packed(place, random_texts(LENGTHS))
    expected = PackedEncoder(folder, Kernels("cpu", torch.float32)).forward(ids, lengths).numpy()
    graph, texts = session(tmp_path / "model.onnx"), split(ids, lengths)
    for left in (False, True):
        np.testing.assert_allclose(run(graph, texts, left=left), expected, atol=SAME, rtol=0)


def test_attention_pooling_is_refused(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "gemma3", pooling="attention-kv"))
    with pytest.raises(MismatchError) as caught:
        write_graph(folder, tmp_path / "model.onnx")
    assert str(caught.value) == (
        f"{tmp_path}/model: no ONNX graph is written for attention-kv of 4 heads, 6 probes pooling"
    )
