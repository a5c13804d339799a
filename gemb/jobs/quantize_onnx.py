"""`gemb quantize --onnx`: the graph of a model beside its weights, for onnxruntime and what is built on it.

The folder runs in torch as well: its weights and those of the graph are the same numbers, on the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from gemb.engine.onnx_engine import FILES, FOLDER, is_installed
from gemb.errors import GembError
from gemb.files import read_json, write_json
from gemb.jobs.quantize_exports import Export, Format, OnTensor
from gemb.model.folder import ModelFolder, read_folder

OnnxWeights = Literal["f32", "int8", "int4"]

NAMES: Mapping[OnnxWeights, str] = dict(zip(("f32", "int8", "int4"), FILES, strict=True))
"""What transformers.js (as fp32, q8 and q4), TEI and fastembed call graphs with these weights."""


def check_onnx(onnx: OnnxWeights, wanted: Format | None) -> None:
    """Returns if a graph with weights `onnx` goes with weights stored as `wanted` and can be written here.

    Raises GembError if not.
    """
    if wanted not in (None, onnx):
        raise GembError(
            f"--onnx {onnx} goes with --format {onnx}, so that graph and weights are the same numbers; "
            f"leave --format {wanted} out"
        )
    if not is_installed() or find_spec("onnx") is None:
        raise GembError("--onnx needs onnx and onnxruntime; pip install 'gemb[onnx]'")


def with_graph(export: Export, source: ModelFolder, onnx: OnnxWeights) -> Export:
    """`export`, which stores the weights of `onnx`, with their graph in the folder `onnx/`.

    Raises MismatchError for a family that no graph is written for.
    """
    from gemb.model.onnx.encoder import check_graph

    check_graph(source)
    name = f"{FOLDER}/{NAMES[onnx]}"

    def write(place: Path, on_tensor: OnTensor) -> None:
        from gemb.model.onnx.encoder import write_graph

        export.write(place, on_tensor)
        _tell_transformers_js(place, source, NAMES[onnx])
        (place / FOLDER).mkdir()
        if not write_graph(read_folder(place), place / FOLDER / NAMES[onnx], onnx).is_exact:
            raise RuntimeError(f"{name} does not have the weights that the folder has")
        on_tensor(name)

    told = ("graph", f"{name}, its weights beside it in {NAMES[onnx]}_data, as large again")
    return replace(export, label=f"onnx {onnx}", rows=[*export.rows, told], write=write)


def _tell_transformers_js(place: Path, source: ModelFolder, name: str) -> None:
    """Let config.json say that the weights are in a file of their own, and the tokenizer where to cut."""
    config = place / source.transformer.folder.relative_to(source.path) / "config.json"
    settings = read_json(config)
    own = settings.setdefault("transformers.js_config", {})
    own["use_external_data_format"] = {**own.get("use_external_data_format", {}), name: True}
    write_json(config, settings)
    tokenizer = place / source.tokenizer_folder.relative_to(source.path) / "tokenizer_config.json"
    if tokenizer.exists():
        write_json(tokenizer, {**read_json(tokenizer), "model_max_length": source.max_tokens})
