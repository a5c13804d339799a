"""A safetensors folder made of byte ranges of another one: no tensor is ever in memory.

What an adaptation does to weights is choosing, renaming, laying side by side along the first axis, and
choosing rows; in a file whose tensors lie row by row all of it is copying ranges of bytes. A tensor that no
source has is made when its place in the file is reached. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import orjson

from gemb.errors import UnavailableError
from gemb.files import os_errors_explained, sync_to_disk, write_json
from gemb.model.weights import ITEM_BYTES, TensorSpec

SHARD_BYTES = 5_000_000_000
"""How large one weight file becomes at most, as hubs like it; one larger tensor has a file of its own."""
_BUFFER_BYTES = 256 << 10  # stays in the cache: 8 MiB take six times the processor time
_ALIGNMENT = 8  # safetensors pads its header so that the numbers begin at a multiple of 8


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop` of `file`."""

    file: Path
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Made:
    """`size_bytes` bytes that no file has; `make` gives them when they are to be written."""

    size_bytes: int
    make: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to write, as bytes of other files in their order, or new ones."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    spans: tuple[Span | Made, ...]

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return sum(span.size_bytes for span in self.spans)


def whole(name: str, spec: TensorSpec) -> Piece:
    """The tensor of `spec` under the name `name`."""
    return Piece(name, spec.dtype, spec.shape, (Span(spec.file, spec.start, spec.stop),))


def joined(name: str, specs: Sequence[TensorSpec]) -> Piece:
    """Tensors of one dtype, [R_i, ...] each, one after the other along the first axis: [sum of R_i, ...]."""
    first = specs[0]
    shape = (sum(spec.shape[0] for spec in specs), *first.shape[1:])
    return Piece(name, first.dtype, shape, tuple(Span(spec.file, spec.start, spec.stop) for spec in specs))


def rows_of(name: str, spec: TensorSpec, rows: Sequence[int]) -> Piece:
    """The rows `rows`, ascending, of the tensor of `spec`: [len(rows), ...]."""
    row_bytes = (spec.stop - spec.start) // spec.shape[0]
    spans = []
    # Neighbours in the source are one range: their number minus their place stays the same.
    for _, run in groupby(enumerate(rows), key=lambda placed: placed[1] - placed[0]):
        numbers = [row for _, row in run]
        start = spec.start + numbers[0] * row_bytes
        spans.append(Span(spec.file, start, start + len(numbers) * row_bytes))
    return Piece(name, spec.dtype, (len(rows), *spec.shape[1:]), tuple(spans))


def new(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], bytes]) -> Piece:
    """A tensor that no source has; `make` gives its bytes, row by row."""
    return Piece(name, dtype, shape, (Made(math.prod(shape) * ITEM_BYTES[dtype], make),))


def write_pieces(pieces: Sequence[Piece], folder: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write `pieces` into `folder` as model.safetensors, or as shards with an index; gives the files.

    Raises GembError if a file cannot be written, UnavailableError if a source became shorter meanwhile.
    """
    shards = _shards(pieces, shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    if len(shards) > 1:
        places = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        total = sum(piece.size_bytes for piece in pieces)
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": places},
        )
    return [folder / name for name in names]


def _shards(pieces: Iterable[Piece], shard_bytes: int) -> list[list[Piece]]:
    """`pieces` in order, as many in each shard as fit."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.size_bytes
    return shards


def _write_file(path: Path, pieces: Sequence[Piece]) -> None:
    # Wide elements first, so that every tensor starts at a multiple of its element, as the format wants.
    ordered = sorted(pieces, key=lambda piece: -ITEM_BYTES[piece.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in ordered:
        end = offset + piece.size_bytes
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [offset, end]}
        offset = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    sources: dict[Path, BinaryIO] = {}
    with os_errors_explained(path), path.open("wb", buffering=0) as target:
        try:
            _write_all(target, memoryview(len(text).to_bytes(8, "little") + text))
            for piece in ordered:
                for span in piece.spans:
                    if isinstance(span, Made):
                        _write_all(target, memoryview(span.make()))
                        continue
                    if span.file not in sources:
                        sources[span.file] = span.file.open("rb", buffering=0)
                    _copy(sources[span.file], span, target, buffer)
        finally:
            for source in sources.values():
                source.close()
        sync_to_disk(target.fileno())


def _copy(source: BinaryIO, span: Span, target: BinaryIO, buffer: memoryview) -> None:
    source.seek(span.start)
    left = span.size_bytes
    while left:
        read = source.readinto(buffer[:left])  # type: ignore[attr-defined]  # of every unbuffered file
        if not read:
            raise UnavailableError(f"{span.file} became shorter while it was copied; download it again")
        _write_all(target, buffer[:read])
        left -= read


def _write_all(target: BinaryIO, content: memoryview) -> None:
    while content:
        content = content[target.write(content) :]
