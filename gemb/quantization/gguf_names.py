"""How gemb finds the tensors of a model folder again in a GGUF file: names of its own, and what was changed.

The full name of a tensor is the folder of its module, a slash where that is not the model's own folder, and
its name in the plain weights: `2_Dense/linear.weight`. A file lists them in the order of its tensors. Nothing
here loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemb.quantization.gguf_layout import Value

if TYPE_CHECKING:
    from torch import Tensor

NAMES_KEY = "gemb.tensor_names"
"""The full names, one a tensor, in the order of the file."""
ROWS_CUT_KEY = "gemb.position_rows_cut"
"""How many first rows of the table of positions the file lacks; RoBERTa uses none but that of padding."""
OWN_ARCHITECTURE = "gemb"
"""Of a file that only gemb reads; its names and numbers are those of the folder."""
READ_ARCHITECTURES = frozenset({
    OWN_ARCHITECTURE, "gemma-embedding", "bert", "eurobert", "llama", "qwen2", "qwen3",
})  # fmt: skip
"""What gemb reads back; a test holds that it writes no other."""
_GAINS_WITH_1 = frozenset({"gemma-embedding"})
_TURNED = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}}
"""Tensors whose rows llama.cpp wants in another order, and the metadata that tells their heads."""


def full_name(part: str, name: str) -> str:
    """The full name of the tensor `name` of the module in the folder `part` ("" or 2_Dense)."""
    return f"{part}/{name}" if part else name


def part_of(name: str) -> tuple[str, str]:
    """Part and name of a full name."""
    part, _, own = name.rpartition("/")
    return part, own


def to_gguf(architecture: str, name: str, weight: Tensor, metadata: Mapping[str, Value]) -> Tensor:
    """`weight` as a file of `architecture` holds it under the GGUF name `name`.

    The gain of a norm of Gemma is stored as 1 + weight, as llama.cpp multiplies; the channels of a head of
    Llama as neighbouring pairs, as it turns them; the rows of positions that RoBERTa leaves unused are cut.
    """
    if architecture in _GAINS_WITH_1 and name.endswith("norm.weight"):
        return weight.float() + 1
    heads = _heads(architecture, name, metadata)
    if heads:
        return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    cut = _rows_cut(name, metadata)
    return weight[cut:] if cut else weight


def from_gguf(architecture: str, name: str, weight: Tensor, metadata: Mapping[str, Value]) -> Tensor:
    """The inverse of `to_gguf`; rows that were cut come back as zeros.

    A gain comes back so that adding the 1 again gives the gain of the file to the bit: a number of float32
    below -0.5 is a multiple of 2**-24, and so is its sum with 1.
    """
    if architecture in _GAINS_WITH_1 and name.endswith("norm.weight"):
        return weight - 1
    heads = _heads(architecture, name, metadata)
    if heads:
        return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    cut = _rows_cut(name, metadata)
    if cut:
        import torch

        return torch.cat([weight.new_zeros(cut, weight.shape[1]), weight])
    return weight


def shape_in_folder(name: str, shape: Sequence[int], metadata: Mapping[str, Value]) -> tuple[int, ...]:
    """The shape that `from_gguf` gives back."""
    cut = _rows_cut(name, metadata)
    return (shape[0] + cut, *shape[1:]) if cut else tuple(shape)


def _rows_cut(name: str, metadata: Mapping[str, Value]) -> int:
    cut = metadata.get(ROWS_CUT_KEY, 0)
    return cut if name == "position_embd.weight" and isinstance(cut, int) else 0


def _heads(architecture: str, name: str, metadata: Mapping[str, Value]) -> int:
    """Heads of a tensor whose rows are put in another order, else 0."""
    for part, key in _TURNED.get(architecture, {}).items():
        if f".{part}." in name:
            heads = metadata[f"{architecture}.{key}"]
            return heads if isinstance(heads, int) else 0
    return 0
