"""Writes GGUF files: metadata, then one tensor after the other, a few rows of it at a time."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gemb.errors import MismatchError
from gemb.files import atomic_write
from gemb.quantization.gguf_layout import (
    ALIGNMENT,
    ARRAY,
    BF16,
    BOOL,
    DIGEST_KEY,
    F16,
    F32,
    FLOAT32,
    INT32,
    INT64,
    MAGIC,
    NO_DIGEST,
    NUMBER_FORMATS,
    STRING,
    UINT8,
    UINT32,
    VERSION,
    TensorKind,
    Value,
)

_NUMBERS_AT_ONCE = 4_000_000  # a grid works in float32 and makes copies: 100 MB instead of 4 GB for a table


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to be written: what the header needs, and where its numbers come from."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: rows first."""
    kind: TensorKind
    load: Callable[[], Tensor]
    """Gives the tensor, of any float dtype, when its turn comes."""
    origin: str = ""
    """Where it comes from, for messages; by default its name in the file that is written."""


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> None:
    """Write `path` whole or not at all: `metadata` in its order, a checksum of ours, and `tensors`.

    Whole numbers are stored as uint32 where they fit, lists of them as int32, bytes as uint8, other numbers
    as float32; empty strings and lists, which GGUF cannot hold, are left out.

    Raises MismatchError if a name is there twice, the rows of a tensor are no whole blocks, or a number is
    not finite or too large for its kind; GembError or MachineError if the file cannot be written.
    """
    _check(path, tensors)
    head, digest_at = _head(metadata, tensors)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for content in chain([head], *(_stored(path, tensor) for tensor in tensors)):
            digest.update(content)
            file.write(content)
        file.seek(digest_at)
        file.write(digest.hexdigest().encode())


def encode(weight: Tensor, kind: TensorKind) -> Tensor:
    """uint8 [bytes], `weight`[..., D] as a GGUF file stores it.

    Raises ValueError if its rows are no whole blocks, or a number is not finite or too large for `kind`.
    """
    weight = weight.detach()
    if kind.grid is not None:
        quantised = kind.grid.quantise(weight)
        scales, stored = quantised.scales, kind.grid.pack(quantised)
    else:
        scales = stored = weight.to({F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind])
    if not bool(scales.isfinite().all()):
        largest = weight.float().abs().max()
        raise ValueError(f"its largest size is {float(largest):g}, which {kind.name} cannot hold")
    return stored.reshape(-1).view(torch.uint8)


def _check(path: Path, tensors: Sequence[GgufTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise MismatchError(f"{path}: {tensor.name} is there twice")
        seen.add(tensor.name)
        try:
            tensor.kind.size_bytes(tensor.shape)
        except ValueError as error:
            raise MismatchError(f"{path}: {tensor.name}: {error}; choose f32, bf16 or f16") from None


def _head(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> tuple[bytes, int]:
    """Everything before the data, padded to the alignment, and where the digits of the checksum go."""
    kept = {key: value for key, value in metadata.items() if not isinstance(value, str | Sequence) or value}
    kept = {key: value for key, value in kept.items() if key != DIGEST_KEY} | {DIGEST_KEY: NO_DIGEST}
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(kept)))
    for key, value in kept.items():
        head += _string(key) + _value(value)
    digest_at = len(head) - len(NO_DIGEST)  # it came last
    offset = 0
    for tensor in tensors:
        head += _string(tensor.name)
        head += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += struct.pack("<IQ", tensor.kind.code, offset)
        offset += _aligned(tensor.kind.size_bytes(tensor.shape))
    return bytes(head).ljust(_aligned(len(head)), b"\0"), digest_at


def _stored(path: Path, tensor: GgufTensor) -> Iterator[bytes]:
    """The bytes of `tensor` a few rows at a time, padded to the alignment at the end."""
    weight = tensor.load()
    if tuple(weight.shape) != tensor.shape:
        raise ValueError(f"{tensor.name} was announced as {tensor.shape}, but is {tuple(weight.shape)}")
    width = tensor.shape[-1] if tensor.shape else 1
    rows = weight.reshape(-1, width)
    for some in torch.split(rows, max(1, _NUMBERS_AT_ONCE // max(1, width))):
        try:
            yield encode(some, tensor.kind).numpy().tobytes()
        except ValueError as error:
            raise MismatchError(f"{tensor.origin or f'{path}: {tensor.name}'}: {error}") from None
    size = tensor.kind.size_bytes(tensor.shape)
    yield bytes(_aligned(size) - size)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Value) -> bytes:
    """Kind and content of one value of the metadata."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bytes):
        return struct.pack("<IIQ", ARRAY, UINT8, len(value)) + value
    if isinstance(value, Sequence):
        first = value[0]
        if isinstance(first, str):
            content = b"".join(_string(text) for text in cast(Sequence[str], value))
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + content
        kind = BOOL if isinstance(first, bool) else FLOAT32 if isinstance(first, float) else INT32
        return struct.pack(f"<IIQ{len(value)}{NUMBER_FORMATS[kind]}", ARRAY, kind, len(value), *value)
    if isinstance(value, bool):
        kind = BOOL
    elif isinstance(value, float):
        kind = FLOAT32
    else:
        kind = UINT32 if 0 <= value < 2**32 else INT64
    return struct.pack(f"<I{NUMBER_FORMATS[kind]}", kind, value)
