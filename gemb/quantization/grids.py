"""The integer grids of weights, and their bytes: Q4_0 and Q8_0 of GGUF, int4 and int8 with one scale a row.

The same functions serve export, import and training through the grid, so the three agree to the bit.
Every grid is idempotent: quantising what it gave back changes nothing, as long as that stays in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # GGUF Q4_0 and Q8_0


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight as whole numbers times scales."""

    codes: Tensor
    """int8 [..., D], signed: 0 stands for 0."""
    scales: Tensor
    """[..., G] float16 of a block grid, [..., 1] float32 of a row grid."""


class Grid(ABC):
    """A way to write rows of numbers as small whole numbers and scales."""

    name: str
    """What recipes, files and messages call it."""
    bits: int
    """Bits of one code, scales aside."""
    highest: int
    """The largest code; `round_unclamped` can go past it where `clips`."""
    clips: bool
    """Whether a number can fall past the highest code."""

    @abstractmethod
    def round_unclamped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes float32 [..., D] before they are clamped to `highest`, and scales, of float32 [..., D].

        Raises ValueError if the grid has no place for rows of that width.
        """

    @abstractmethod
    def dequantise(self, quantised: Quantised) -> Tensor:
        """float32 [..., D], codes times scales."""

    def quantise(self, weight: Tensor) -> Quantised:
        """`weight`[..., D] of any float dtype on this grid; computed in float32.

        NaN and infinity are the caller's to refuse: they give scales that are not finite, and so do weights
        too large for a scale of float16. Raises ValueError if rows of that width cannot be stored.
        """
        codes, scales = self.round_unclamped(weight.detach().float())
        return Quantised(codes.clamp_(max=self.highest).to(torch.int8), scales)

    def snap(self, weight: Tensor) -> Tensor:
        """float32 [..., D], `weight` moved onto this grid: what a reader of the file gets."""
        return self.dequantise(self.quantise(weight))


class BlockGrid(Grid):
    """A grid of GGUF: each block of 32 neighbours in a row has a float16 scale of its own.

    The bytes of a block are its scale, then its codes; little-endian, as GGUF is.
    """

    block_bytes: int
    """Bytes of one block."""

    @abstractmethod
    def pack(self, quantised: Quantised) -> Tensor:
        """uint8 [..., G * block_bytes], the bytes as they stand in a GGUF file."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Quantised:
        """The inverse of `pack`, exact. Raises ValueError if the last size of `packed` is no whole blocks."""

    def dequantise(self, quantised: Quantised) -> Tensor:
        """float32 [..., D], codes times scales."""
        blocks = _blocks(quantised.codes.float(), self.name)  # a copy; another would cost most of the time
        return blocks.mul_(quantised.scales.float()[..., None]).flatten(-2)

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Scales float16 [..., G] and the other bytes uint8 [..., G, block_bytes - 2]."""
        if packed.shape[-1] % self.block_bytes:
            raise ValueError(
                f"{self.name} has blocks of {self.block_bytes} bytes, "
                f"but a row is {packed.shape[-1]} bytes long"
            )
        blocks = packed.reshape(*packed.shape[:-1], packed.shape[-1] // self.block_bytes, self.block_bytes)
        return blocks[..., :2].contiguous().view(torch.float16).squeeze(-1), blocks[..., 2:]


class _Q4(BlockGrid):
    """Q4_0 (ggml, quantize_row_q4_0_ref): 4.5 bits a weight.

    The number of largest size is -8 scales, so it is kept, and its opposite is clipped to 7 scales.
    """

    name, bits, block_bytes, highest, clips = "q4_0", 4, 18, 7, True

    def round_unclamped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes -8 to 8, of which 8 is past the end, and scales; the codes use the scale before float16."""
        blocks = _blocks(weight, self.name)
        largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))  # [..., G, 1], with its sign
        scales = largest / -8
        # trunc(x + 8.5) - 8, not round(x): it is what ggml does with halves.
        codes = _finite((_over(blocks, scales) + 8.5).trunc_()).sub_(8)
        return codes.flatten(-2), scales.squeeze(-1).half()

    def pack(self, quantised: Quantised) -> Tensor:
        """uint8 [..., G * 18]; the low halves of the bytes hold numbers 0 to 15, the high halves 16 to 31."""
        codes = (_blocks(quantised.codes, self.name) + 8).view(torch.uint8)  # [..., G, 32]
        low, high = codes.chunk(2, dim=-1)
        return torch.cat([_scale_bytes(quantised.scales), low | high << 4], dim=-1).flatten(-2)

    def unpack(self, packed: Tensor) -> Quantised:
        """The inverse of `pack`, exact. Raises ValueError if the last size of `packed` is no whole blocks."""
        scales, pairs = self._split(packed)
        codes = torch.cat([pairs & 15, pairs >> 4], dim=-1).view(torch.int8).sub_(8)
        return Quantised(codes.flatten(-2), scales)


class _Q8(BlockGrid):
    """Q8_0 (ggml, quantize_row_q8_0_ref): 8.5 bits a weight; halves are rounded away from 0."""

    name, bits, block_bytes, highest, clips = "q8_0", 8, 34, 127, False

    def round_unclamped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes -127 to 127 and scales; the codes use the scale before it is cut to float16."""
        blocks = _blocks(weight, self.name)
        scales = blocks.abs().amax(dim=-1, keepdim=True) / 127
        steps = _finite(_over(blocks, scales))
        size = steps.abs()
        whole = size.floor()
        # Not floor(size + 0.5), whose sum rounds the number below 0.5 up to 1.
        codes = (whole + (2 * (size - whole)).floor_()).copysign_(steps)
        return codes.flatten(-2), scales.squeeze(-1).half()

    def pack(self, quantised: Quantised) -> Tensor:
        """uint8 [..., G * 34]."""
        codes = _blocks(quantised.codes, self.name).view(torch.uint8)
        return torch.cat([_scale_bytes(quantised.scales), codes], dim=-1).flatten(-2)

    def unpack(self, packed: Tensor) -> Quantised:
        """The inverse of `pack`, exact. Raises ValueError if the last size of `packed` is no whole blocks."""
        scales, codes = self._split(packed)
        return Quantised(codes.contiguous().view(torch.int8).flatten(-2), scales)


class RowGrid(Grid):
    """Symmetric whole numbers with one scale a row, for the mixed format (EmbeddingGemma, arXiv 2509.20354).

    The paper gives no rule for the scale. Ours is the row's largest size over the highest code, cut to the 8
    significant bits of bfloat16: then code * scale is exact in float32, so that quantising again gives the
    same codes and scales, and a model that runs in bfloat16 has the same scales. Nothing is clipped, halves
    go to the even number, and the lowest code of the type (-8, -128) is not used.
    The bytes are those of transformers' Gemma layout (integrations/gemma_quant.py).
    """

    clips = False

    def __init__(self, bits: int) -> None:
        self.name = f"int{bits}_row"
        self.bits = bits
        self.highest = 2 ** (bits - 1) - 1

    def round_unclamped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes -highest to highest, and scales float32 [..., 1]."""
        scales = (weight.abs().amax(dim=-1, keepdim=True) / self.highest).bfloat16().float()
        return torch.where(scales == 0, 0, weight / scales).round_(), scales

    def dequantise(self, quantised: Quantised) -> Tensor:
        """float32 [..., D], codes times scales."""
        return quantised.codes.float().mul_(quantised.scales)

    def pack(self, codes: Tensor) -> Tensor:
        """int8 [..., D] as it is; int4 as uint8 [..., ceil(D / 2)]: code + 8, the first in the low half."""
        if self.bits == 8:
            return codes
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        pairs = (codes + 8).view(torch.uint8)
        return pairs[..., ::2] | pairs[..., 1::2] << 4

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """int8 [..., width], the inverse of `pack`."""
        if self.bits == 8:
            return packed
        pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
        return pairs.view(torch.int8).sub_(8).flatten(-2)[..., :width]


Q4_0: BlockGrid = _Q4()
Q8_0: BlockGrid = _Q8()
INT4_ROW = RowGrid(4)
INT8_ROW = RowGrid(8)
GRIDS: Mapping[str, Grid] = {grid.name: grid for grid in (Q4_0, Q8_0, INT4_ROW, INT8_ROW)}
"""Every grid by its name."""


def _blocks(rows: Tensor, name: str) -> Tensor:
    """[..., G, 32] of [..., D]."""
    if rows.ndim == 0 or rows.shape[-1] % BLOCK:
        width = rows.shape[-1] if rows.ndim else 1
        raise ValueError(f"{name} has blocks of {BLOCK}, but the rows are {width} wide")
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // BLOCK, BLOCK)


def _over(blocks: Tensor, scales: Tensor) -> Tensor:
    """`blocks` / `scales` by the reciprocal, as ggml divides; scale 0 gives 0.

    Below 2^-128 the reciprocal is infinite, and so may the steps be, or NaN. The scale is then 0 in float16,
    so no code matters; callers write the one that ggml writes on x86.
    """
    return blocks * torch.where(scales == 0, 0, 1 / scales)


def _finite(steps: Tensor) -> Tensor:
    return steps.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _scale_bytes(scales: Tensor) -> Tensor:
    """uint8 [..., G, 2]."""
    return scales[..., None].contiguous().view(torch.uint8)
