"""What stands in a GGUF file (ggml, docs/gguf.md, version 3): its kinds of values and of tensors.

header       magic, version, counts; then the metadata, one key and value after the other
tensor infos name, sizes (the innermost first), kind, offset into the data
data         the tensors, each at a multiple of the alignment

All numbers are little-endian. Nothing here loads torch: a header is read without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from gemb.quantization.grids import BlockGrid

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Bytes, unless `general.alignment` says otherwise."""
ALIGNMENT_KEY = "general.alignment"
DIGEST_KEY = "gemb.sha256"
"""Ours: 64 hex digits over the whole file as it is with 64 zeros in their place. GGUF has no checksum."""
NO_DIGEST = "0" * 64

Value: TypeAlias = (
    bool | int | float | str | bytes
    | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]
)  # fmt: skip
"""A value of the metadata; bytes are a list of uint8."""

NUMBER_FORMATS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Format letter of `struct` by the code of a kind of value."""
UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, INT64 = 0, 4, 5, 6, 7, 8, 9, 11


@dataclass(frozen=True, slots=True)
class TensorKind:
    """How the numbers of a tensor are stored."""

    name: str
    """As in gemb's options and messages."""
    code: int
    """As in the file: `ggml_type`."""
    file_type: int
    """`general.file_type` of a file whose matrices are of this kind: `llama_ftype`."""
    block: int
    """How many neighbours in a row are stored together."""
    block_bytes: int

    @property
    def grid(self) -> BlockGrid | None:
        """The integer grid that the numbers lie on; None where they are floats."""
        from gemb.quantization.grids import Q4_0, Q8_0

        return {grid.name: grid for grid in (Q4_0, Q8_0)}.get(self.name)

    @property
    def is_grid(self) -> bool:
        """Whether the numbers lie on an integer grid."""
        return self.block > 1

    def size_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of `shape`. Raises ValueError if its rows are no whole blocks."""
        width = shape[-1] if shape else 1
        if width % self.block:
            raise ValueError(f"{self.name} has blocks of {self.block}, but the rows are {width} wide")
        return math.prod(shape) // self.block * self.block_bytes


F32 = TensorKind("f32", 0, 0, 1, 4)
F16 = TensorKind("f16", 1, 1, 1, 2)
BF16 = TensorKind("bf16", 30, 32, 1, 2)
KINDS: Mapping[str, TensorKind] = {
    kind.name: kind
    for kind in (
        F32,
        F16,
        BF16,
        TensorKind("q8_0", 8, 7, 32, 34),
        TensorKind("q4_0", 2, 2, 32, 18),
    )
}
"""The kinds of tensor that gemb writes and reads, by name."""
