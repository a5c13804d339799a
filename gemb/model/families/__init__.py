"""The model families of the packed path, one file each over shared pieces.

A family file has `build(config, weights, kernels) -> Backbone`; what its tokens see is told by
`gemb.model.attention`. Where a checkpoint asks for something its family file does not know, `build` raises
`NotPacked`, and the model runs through transformers' own module instead: slower, correct, and said aloud.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from gemb.model.blocks import Backbone
from gemb.model.kernels import Kernels
from gemb.model.weights import Weights

FAMILIES: Mapping[str, str] = {
    "bert": "bert",
    "camembert": "bert",
    "distilbert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "embedding_gemma2": "embedding_gemma2",
    "embedding_gemma2_text": "embedding_gemma2",
    "gemma2": "gemma2",
    "t5_gemma_module": "gemma2",
    "t5gemma": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "eurobert": "llama",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "modernbert": "modernbert",
}
"""File of the family by `model_type` of config.json."""


class NotPacked(Exception):
    """The packed path does not know something a checkpoint asks for; the text says what."""


class Family(Protocol):
    """A family file."""

    def build(self, config: Mapping[str, Any], weights: Weights, kernels: Kernels) -> Backbone:
        """The backbone of a checkpoint, its weights prepared for `kernels`."""
        ...


def family(model_type: str) -> Family:
    """The family file of a `model_type`. Raises NotPacked if there is none."""
    if model_type not in FAMILIES:
        raise NotPacked(f"model type {model_type!r} is not among its families")
    return cast(Family, import_module(f"gemb.model.families.{FAMILIES[model_type]}"))


def prefix_of(weights: Weights, name: str) -> str:
    """What stands before `name` in the tensor names of a checkpoint (`model.`, `bert.`, or nothing).

    Raises NotPacked if no tensor ends in `name`.
    """
    for have in weights:
        if have == name or have.endswith(f".{name}"):
            return have[: -len(name)]
    raise NotPacked(f"its weights have no {name}")


def activation_of(name: object) -> str:
    """The activation of `gemb.model.kernels` for a name of config.json. Raises NotPacked if there is none."""
    known = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
        "silu": "silu",
        "swish": "silu",
    }
    if name not in known:
        raise NotPacked(f"its activation is {name!r}")
    return known[str(name)]
