"""Writes a model.safetensors tensor by tensor, a few rows at a time where asked: no more is in memory.

The writer of the safetensors package gives files that only their owner may read, and its errors are text;
these follow the umask, as all other files of a folder, and a full disk is told as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from gemb.files import atomic_write
from gemb.model.weights import DTYPE_NAMES, ITEM_BYTES

if TYPE_CHECKING:
    from torch import Tensor

_CODES = {name: code for code, name in DTYPE_NAMES.items()} | {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
}  # fmt: skip
_ALIGNMENT = 8  # safetensors pads its header so that the numbers begin at a multiple of 8


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: what the header needs, and where its numbers come from."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]
    """Gives the tensor in pieces along its first axis, of that dtype, when its turn comes."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` by name as `path`, from whatever device they are on, whole or not at all.

    Raises as `write_tensors` does.
    """
    entries = [
        NewTensor(
            name,
            _CODES[str(tensor.dtype).removeprefix("torch.")],
            tuple(tensor.shape),
            partial(_whole, tensor),
        )
        for name, tensor in sorted(tensors.items())
    ]
    write_tensors(path, entries, lambda name: None)


def _whole(tensor: Tensor) -> tuple[Tensor]:
    return (tensor.detach().cpu(),)


def write_tensors(path: Path, tensors: Sequence[NewTensor], on_tensor: Callable[[str], None]) -> None:
    """Write `path` whole or not at all; `on_tensor` hears the name of each tensor when its turn comes.

    Raises GembError or MachineError if the file cannot be written.
    """
    import torch

    # Wide elements first, so that every tensor starts at a multiple of its element.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.size_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            on_tensor(tensor.name)
            written = 0
            for block in tensor.blocks():
                content = block.contiguous().reshape(-1).view(torch.uint8).numpy()
                written += file.write(content.data)
            if written != tensor.size_bytes:
                raise ValueError(f"{tensor.name} was announced as {tensor.shape}, but has {written:,} bytes")
