"""`write_graph`: a model folder as one ONNX file, ready for onnxruntime, transformers.js, TEI and fastembed.

Inputs are `input_ids` and `attention_mask`, int64[B, L], padded on either side; outputs `last_hidden_state`,
fp32[B, L, D], for consumers that pool by themselves, and `sentence_embedding`, fp32[B, K], after all modules
of the folder: a unit vector where the folder normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import orjson
from torch import Tensor, nn

from gemb.errors import MismatchError
from gemb.model.families import FAMILIES, NotPacked
from gemb.model.folder import DenseSettings, LayerNormSettings, ModelFolder, ModuleSpec, fingerprint
from gemb.model.onnx import SAME_VECTORS
from gemb.model.onnx.graph import Graph, Value
from gemb.model.onnx.layers import LayerWriter
from gemb.model.trainable import bert, gated
from gemb.model.trainable.bert import BertBackbone, LayerNorm
from gemb.model.trainable.gated import GatedBackbone
from gemb.model.trainable.parameters import ParameterTree, Tensors
from gemb.quantization.grids import Q4_0, Q8_0, BlockGrid

WeightKind: TypeAlias = Literal["f32", "int8", "int4"]

GRIDS: Mapping[WeightKind, BlockGrid | None] = {"f32": None, "int8": Q8_0, "int4": Q4_0}
"""The grid of the weights; None are plain numbers."""

_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], ParameterTree], GatedBackbone | BertBackbone]] = {
    "bert": bert.bert,
    "gemma2": gated.gemma2,
    "gemma3": gated.gemma3,
    "llama": gated.llama,
    "modernbert": gated.modernbert,
}
"""By the file of the family in `gemb.model.families`."""

_NORM_EPSILON = 1e-5  # of torch.nn.LayerNorm
_LEAST_LENGTH = 1e-12  # of torch.nn.functional.normalize


@dataclass(frozen=True, slots=True)
class WrittenGraph:
    """A graph on disk."""

    files: tuple[Path, Path]
    """The graph and its weights; both must stay side by side under their names."""
    is_exact: bool
    """Whether its weights are those of the folder to the bit, so that both give the same vectors."""


class _ReadTree(ParameterTree):
    """The layers of a folder for reading alone: whole numbers too, as the floats that they stand for."""

    def _read(self, name: str) -> Tensor:
        return self.weights.tensor(name).float()


def write_graph(folder: ModelFolder, path: Path, weights: WeightKind = "f32") -> WrittenGraph:
    """The graph of `folder` at `path`, with its weights in `path`_data.

    The token table and the weights that every format of gemb quantises are on the grid of `weights`; tables
    of positions, norms and biases stay fp32. The metadata of the file tells what it was made from, prompts
    and limits, and under SAME_VECTORS whose weights it has exactly, if anyone's.

    Raises MismatchError, before anything is written, for a family or a module that no graph is written for,
    and for rows that are no whole blocks of the grid.
    """
    backbone, tree = _backbone(folder)
    root = nn.Module()
    steps = [(module, _layers(module, folder, root)) for module in folder.modules[2:]]
    names = {id(value): name for part in (tree, root) for name, value in part.named_parameters()}
    with Graph(path) as graph:
        writer = LayerWriter(graph, names, GRIDS[weights], folder.max_tokens, str(folder.path))
        states = writer.gated(backbone) if isinstance(backbone, GatedBackbone) else writer.bert(backbone)
        graph.output("last_hidden_state", states, ["batch_size", "sequence_length", backbone.width])
        vectors = writer.pooled(states, folder.pooling.modes, folder.pooling.tokens or 1)
        vectors = _all_steps(writer, vectors, steps)
        graph.output("sentence_embedding", vectors, ["batch_size", folder.dims])
        graph.save(
            {
                **({SAME_VECTORS: fingerprint(folder)} if writer.is_exact else {}),
                "gemb.made_from": fingerprint(folder),
                "gemb.weights": weights,
                "gemb.dims": str(folder.dims),
                "gemb.max_tokens": str(folder.max_tokens),
                "gemb.prompts": orjson.dumps(dict(folder.prompts)).decode(),
                "gemb.default_prompt": folder.default_prompt or "",
            }
        )
    return WrittenGraph((path, path.with_name(f"{path.name}_data")), writer.is_exact)


def check_graph(folder: ModelFolder) -> None:
    """Returns if a graph can be written for what `folder` declares; no tensor is read.

    Raises MismatchError if not. What only the tensors tell shows when the graph is written.
    """
    _build_of(folder)


def _build_of(
    folder: ModelFolder,
) -> Callable[[Mapping[str, Any], ParameterTree], GatedBackbone | BertBackbone]:
    """What makes the layers of the folder's backbone."""
    place = folder.transformer.folder / "config.json"
    if not folder.pooling.include_prompt:
        raise MismatchError(
            f"{folder.path}: its pooling leaves the prompt out, whose length no ONNX graph is told; "
            "export a model with include_prompt"
        )
    if folder.pooling.heads is not None:
        raise MismatchError(f"{folder.path}: no ONNX graph is written for {folder.pooling.described} pooling")
    model_type = folder.text_config.get("model_type", folder.family)
    build = _BUILDERS.get(FAMILIES.get(model_type, ""))
    if build is None:
        known = sorted(name for name, file in FAMILIES.items() if file in _BUILDERS)
        raise MismatchError(
            f"{place}: no ONNX graph is written for the model type {model_type!r}; "
            f"there is one for {', '.join(known)}"
        )
    return build


def _backbone(folder: ModelFolder) -> tuple[GatedBackbone | BertBackbone, nn.Module]:
    """The layers of the folder's backbone, and the module that has their parameters by name."""
    build, tree = _build_of(folder), nn.Module()
    config = {"model_type": folder.family, **folder.text_config}
    try:
        return build(config, _ReadTree(tree, folder.weights())), tree
    except NotPacked as error:
        place = folder.transformer.folder / "config.json"
        raise MismatchError(f"{place}: no ONNX graph is written: {error}") from error


def _layers(module: ModuleSpec, folder: ModelFolder, root: nn.Module) -> dict[str, Tensors]:
    """The layers of a module after pooling by name, their parameters below `root`."""
    if module.settings is None:
        return {}
    tree = _ReadTree(root, module.weights(), f"{module.folder.relative_to(folder.path).as_posix()}.")
    return {name: tree.layer(name) for name in ("linear", "residual", "norm") if f"{name}.weight" in tree}


def _all_steps(
    writer: LayerWriter, x: Value, steps: Sequence[tuple[ModuleSpec, Mapping[str, Tensors]]]
) -> Value:
    """All modules after pooling, x[B, D] -> [B, K]."""
    graph = writer.graph
    has_products = any(isinstance(module.settings, DenseSettings) for module, _ in steps)
    if has_products:
        # A second row beside a lone one: the product of a single row is summed in another order.
        x = graph.op("Concat", x, graph.op("Gather", x, graph.constant([0])), axis=0)
    for module, layers in steps:
        x = _step(writer, x, module, layers)
    if has_products:
        x = graph.op("Slice", x, graph.constant([0]), graph.constant([-1]), graph.constant([0]))
    return x


def _step(writer: LayerWriter, x: Value, module: ModuleSpec, layers: Mapping[str, Tensors]) -> Value:
    """One module after pooling."""
    graph, settings = writer.graph, module.settings
    if settings is None:
        length = graph.op("ReduceL2", x, graph.constant([-1]))
        return graph.op("Div", x, graph.op("Max", length, graph.constant(_LEAST_LENGTH)))
    if isinstance(settings, LayerNormSettings):
        return writer.layer_norm(x, LayerNorm(layers["norm"], _NORM_EPSILON))
    if not isinstance(settings, DenseSettings):
        raise TypeError(f"{module.kind} is no module after pooling")
    y = _activated(writer, writer.linear(x, [layers["linear"]]), settings.activation)
    if not settings.residual:
        return y
    if settings.in_features != settings.out_features:
        x = writer.linear(x, [layers["residual"]])
    return graph.op("Add", y, x)


def _activated(writer: LayerWriter, x: Value, name: str) -> Value:
    """X through an activation of a Dense module, by its class name in torch.nn."""
    match name:
        case "Identity":
            return x
        case "Tanh" | "Sigmoid":
            return writer.graph.op(name, x)
        case _:
            return writer.activation(x, name.lower())
