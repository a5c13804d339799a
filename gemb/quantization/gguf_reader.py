"""Reads GGUF files: metadata and tensors, with every length checked against the file before it is used."""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemb.errors import MismatchError, UnavailableError
from gemb.files import os_errors_explained
from gemb.quantization.gguf_layout import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARRAY,
    BF16,
    DIGEST_KEY,
    F16,
    F32,
    KINDS,
    MAGIC,
    NO_DIGEST,
    NUMBER_FORMATS,
    STRING,
    TensorKind,
    Value,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gemb.quantization.grids import Quantised

_BY_CODE = {kind.code: kind for kind in KINDS.values()}
_MAX_SIZES = 4  # GGML_MAX_DIMS


@dataclass(frozen=True, slots=True)
class GgufTensorSpec:
    """One tensor as the file declares it; `start` and `stop` are byte positions in the file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: rows first."""
    kind: TensorKind
    start: int
    stop: int


class GgufFile:
    """An open GGUF file whose header has been read and checked; tensors are read on demand."""

    def __init__(
        self,
        path: Path,
        content: mmap.mmap,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, GgufTensorSpec],
        digest_at: int | None = None,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._content = content
        self._digest_at = digest_at

    def tensor(self, name: str) -> Tensor:
        """float32 [shape] of `name`: what its codes or its floats stand for.

        Raises MismatchError if there is no such tensor.
        """
        import torch

        spec = self.spec(name)
        if spec.kind.grid is not None:
            return spec.kind.grid.dequantise(self.quantised(name))
        dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[spec.kind]
        return self._stored(spec).view(dtype).reshape(spec.shape).float()

    def quantised(self, name: str) -> Quantised:
        """Codes and scales of `name`.

        Raises MismatchError if there is no such tensor, or it is stored as floats.
        """
        spec = self.spec(name)
        if spec.kind.grid is None:
            raise MismatchError(f"{self.path}: {name} is stored as {spec.kind.name}, which has no codes")
        return spec.kind.grid.unpack(self.rows(name))

    def rows(self, name: str) -> Tensor:
        """uint8 [..., bytes of a row], `name` as it stands in the file, mapped: only rows used are read.

        Raises MismatchError if there is no such tensor.
        """
        spec = self.spec(name)
        return self._stored(spec).reshape(*spec.shape[:-1], spec.kind.size_bytes(spec.shape[-1:]))

    def spec(self, name: str) -> GgufTensorSpec:
        """What the header says of `name`. Raises MismatchError if there is no such tensor."""
        if name not in self.tensors:
            raise MismatchError(f"{self.path} has no tensor {name}")
        return self.tensors[name]

    def _stored(self, spec: GgufTensorSpec) -> Tensor:
        """uint8 [bytes], mapped copy-on-write, so that nothing can write into the file's pages."""
        import torch

        count = spec.stop - spec.start
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._content, dtype=torch.uint8, count=count, offset=spec.start)

    def verify(self) -> None:
        """Compare the whole file with the checksum that `write_gguf` puts in; files of others have none.

        Raises UnavailableError if it is another one.
        """
        if self._digest_at is not None:
            _verify(self.path, self._content, self.metadata[DIGEST_KEY], self._digest_at)


def read_gguf(path: Path, *, verify: bool = True) -> GgufFile:
    """The GGUF file at `path`, its header read and checked.

    With `verify` the whole file is compared with the checksum that `write_gguf` puts in; files of other
    programs have none and pass.

    Raises UnavailableError if it is missing, cut short, damaged or no GGUF file, MismatchError if it is of a
    version or holds tensors of a kind that gemb does not read.
    """
    if not path.exists():
        raise UnavailableError(f"{path} does not exist; export the model again")
    with os_errors_explained(path, "read"), path.open("rb") as file:
        # An empty file cannot be mapped.
        if not file.read(1):
            raise UnavailableError(f"{path} is damaged: it is empty; export or copy it again")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    cursor = _Cursor(path, content)
    if cursor.take(4, "its first bytes") != MAGIC:
        raise UnavailableError(
            f"{path} is no GGUF file: it starts with {content[:4]!r}, not {MAGIC!r}; export or copy it again"
        )
    (version,) = cursor.unpack("I", "its version")
    if version not in {2, 3}:  # 2 differs only in that nothing of it is big-endian
        raise MismatchError(f"{path} is of GGUF version {version}; gemb reads 2 and 3")
    tensor_count, value_count = cursor.unpack("QQ", "its counts")
    metadata: dict[str, Value] = {}
    digest_at = None
    for _ in range(value_count):
        key = cursor.string("a key of its metadata")
        metadata[key] = cursor.value(key)
        if key == DIGEST_KEY:
            digest_at = cursor.position - len(NO_DIGEST)
    if verify and digest_at is not None:
        _verify(path, content, metadata[DIGEST_KEY], digest_at)
    return GgufFile(path, content, metadata, _tensors(cursor, tensor_count, metadata), digest_at)


class _Cursor:
    """A place in the file that only moves forward, and never past its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.position = 0

    def damaged(self, what: str) -> UnavailableError:
        return UnavailableError(f"{self.path} is damaged: {what}; export or copy it again")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes, which hold `what`."""
        size = len(self.content)
        if count > size - self.position:
            raise self.damaged(
                f"{what}: {count:,} bytes at position {self.position:,}, but the file ends at {size:,}"
            )
        taken = self.content[self.position : self.position + count]
        self.position += count
        return taken

    def unpack(self, letters: str, what: str) -> tuple[int, ...]:
        form = "<" + letters
        return struct.unpack(form, self.take(struct.calcsize(form), what))

    def string(self, what: str) -> str:
        (length,) = self.unpack("Q", f"the length of {what}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} before position {self.position:,} is not UTF-8") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; a vocabulary has hundreds of thousands, so nothing is checked twice."""
        found: list[str] = []
        content, position, size = self.content, self.position, len(self.content)
        for _ in range(count):
            start = position + 8
            position = start + int.from_bytes(content[position:start], "little")
            if position > size or start > size:
                raise self.damaged(f"{what} ends at {position:,}, but the file at {size:,}")
            try:
                found.append(content[start:position].decode())
            except UnicodeDecodeError:
                raise self.damaged(f"{what} before position {position:,} is not UTF-8") from None
        self.position = position
        return found

    def value(self, key: str) -> Value:
        """One value of the metadata, its kind first."""
        what = f"the value of {key!r}"
        (kind,) = self.unpack("I", what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            return self.unpack(self._letter(kind, what), what)[0]
        inner, count = self.unpack("IQ", what)
        if inner == STRING:
            return self.strings(count, what)
        letter = self._letter(inner, what)
        taken = self.take(count * struct.calcsize(letter), what)
        return list(struct.unpack(f"<{count}{letter}", taken))

    def _letter(self, kind: int, what: str) -> str:
        if kind not in NUMBER_FORMATS:
            raise self.damaged(f"{what} is of the unknown kind {kind}")
        return NUMBER_FORMATS[kind]


def _tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Value]) -> dict[str, GgufTensorSpec]:
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"{ALIGNMENT_KEY} is {alignment!r}, not a power of two")
    found: list[tuple[str, tuple[int, ...], TensorKind, int]] = []
    for _ in range(count):
        name = cursor.string("the name of a tensor")
        (dimensions,) = cursor.unpack("I", f"the shape of {name}")
        if dimensions > _MAX_SIZES:
            raise cursor.damaged(f"{name} has {dimensions:,} sizes; GGUF has at most {_MAX_SIZES}")
        shape = tuple(reversed(cursor.unpack(f"{dimensions}Q", f"the shape of {name}")))
        code, offset = cursor.unpack("IQ", f"the kind and place of {name}")
        if code not in _BY_CODE:
            raise MismatchError(
                f"{cursor.path} holds {name} as ggml type {code}; gemb reads {', '.join(KINDS)}"
            )
        found.append((name, shape, _BY_CODE[code], offset))
    data_start = -(-cursor.position // alignment) * alignment
    specs: dict[str, GgufTensorSpec] = {}
    free_from = data_start
    for name, shape, kind, offset in sorted(found, key=lambda one: one[3]):
        start = data_start + offset
        try:
            stop = start + kind.size_bytes(shape)
        except ValueError as error:
            raise cursor.damaged(f"{name}: {error}") from None
        if name in specs:
            raise cursor.damaged(f"{name} is there twice")
        if offset % alignment or start < free_from:
            raise cursor.damaged(f"{name} starts at {start:,}, inside of another tensor or between places")
        if stop > len(cursor.content):
            raise cursor.damaged(
                f"{name} ends at {stop:,}, but the file at {len(cursor.content):,}: it was cut short"
            )
        specs[name] = GgufTensorSpec(name, shape, kind, start, stop)
        free_from = stop
    return {name: specs[name] for name, *_ in found}


def _verify(path: Path, content: mmap.mmap, expected: Value, digest_at: int) -> None:
    after = digest_at + len(NO_DIGEST)
    digest = hashlib.sha256(content[:digest_at])
    digest.update(NO_DIGEST.encode())
    with memoryview(content) as view:
        digest.update(view[after:])
    if digest.hexdigest() != expected:
        raise UnavailableError(
            f"{path} is damaged: its content does not have the checksum {str(expected)[:12]} it was written "
            "with; export or copy it again"
        )
