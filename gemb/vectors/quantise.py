"""Stored forms of a vector that are smaller than float32: two 16-bit floats, int8 and one bit a dim.

B rows, D dims. Float16 and bfloat16 round to nearest even. int8 follows sentence-transformers'
`quantize_embeddings` to the bit, with ranges that are calibrated once and kept; they never come from
the batch at hand.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError

FLOAT16_LIMIT = 65520
"""What rounds to infinity; the largest float16 is 65,504."""


def to_float16(vectors: NDArray[np.float32]) -> NDArray[np.float16]:
    """vectors[B, D] as float16.

    Raises GembError where a value is beyond float16's 65,504.
    """
    worst = max(vectors.max(initial=0), -vectors.min(initial=0))
    if not worst < FLOAT16_LIMIT:
        raise GembError(
            f"a value of {worst:g} does not fit float16 (65504 at most); store f32 or bf16, or normalise"
        )
    with np.errstate(under="ignore"):
        return vectors.astype("<f2")


def to_bfloat16(vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bit patterns of vectors[B, D] in bfloat16, rounded to nearest even; numpy has no such type.

    Every NaN becomes 0x7fc0.
    """
    bits = np.ascontiguousarray(vectors, dtype="<f4").view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    patterns = rounded.astype("<u2")
    if np.isnan(vectors.max(initial=0)):
        patterns[np.isnan(vectors)] = (
            0x7FC0  # the carry of rounding would turn some NaN into infinity or zero
        )
    return patterns


def from_bfloat16(patterns: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bit patterns, exactly."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Ranges:
    """What int8 codes are relative to: minimum[D] <= maximum[D], float32, finite."""

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.minimum.shape != self.maximum.shape or self.minimum.ndim != 1:
            raise ValueError(
                f"minimum is {self.minimum.shape} but maximum is {self.maximum.shape}, not both [D]"
            )
        if not (np.isfinite(self.minimum) & (self.minimum <= self.maximum) & np.isfinite(self.maximum)).all():
            raise GembError(
                "int8 ranges must be finite, each minimum at most its maximum; calibrate them again"
            )

    @classmethod
    def from_array(cls, ranges: NDArray[np.floating]) -> Self:
        """From ranges[2, D], minimum first: what sentence-transformers calls `ranges`."""
        both = np.array(ranges, dtype=np.float32)
        if both.ndim != 2 or len(both) != 2:
            raise GembError(f"int8 ranges must be an array [2, dims], not {list(both.shape)}")
        return cls(both[0], both[1])

    def as_array(self) -> NDArray[np.float32]:
        """Ranges[2, D], minimum first, float32 little-endian."""
        return np.stack([self.minimum, self.maximum]).astype("<f4")

    def joined(self, other: Self) -> Self:
        """The ranges that hold what both hold; so a calibration can go block by block."""
        return type(self)(np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum))

    @property
    def dims(self) -> int:
        """D."""
        return len(self.minimum)


def calibrate(vectors: NDArray[np.float32]) -> Int8Ranges:
    """The per-dim ranges of calibration rows vectors[B, D].

    Raises GembError for fewer than 2 rows: with one row every dim is constant and all codes are equal.
    """
    if len(vectors) < 2:
        raise GembError(
            f"int8 ranges need at least 2 rows to calibrate on, not {len(vectors)}; store f32 or f16"
        )
    return Int8Ranges(vectors.min(axis=0).astype(np.float32), vectors.max(axis=0).astype(np.float32))


def to_int8(vectors: NDArray[np.float32], ranges: Int8Ranges) -> tuple[NDArray[np.int8], int]:
    """The codes[B, D] of vectors[B, D], and how many values lay outside the ranges and were clipped.

    step = (max - min) / 255, or 1 where that is 0; code = clip(floor((x - min) / step), 0, 255) - 128.
    """
    steps = (ranges.maximum - ranges.minimum) / np.float32(255)
    steps[steps == 0] = 1
    scaled = np.subtract(vectors, ranges.minimum, dtype=np.float32)
    scaled /= steps
    np.floor(scaled, out=scaled)
    np.clip(scaled, 0, 255, out=scaled)
    scaled -= 128
    outside = 0
    if (vectors.min(axis=0, initial=np.inf) < ranges.minimum).any():
        outside += int(np.count_nonzero(vectors < ranges.minimum))
    if (vectors.max(axis=0, initial=-np.inf) > ranges.maximum).any():
        outside += int(np.count_nonzero(vectors > ranges.maximum))
    return scaled.astype(np.int8), outside


def from_int8(codes: NDArray[np.int8], ranges: Int8Ranges) -> NDArray[np.float32]:
    """The middle of each code's step, min + (code + 128.5) * step: at most step / 2 from the value coded.

    A dim whose range is one value gives that value.
    """
    steps = (ranges.maximum - ranges.minimum) / np.float32(255)
    values = codes.astype(np.float32)
    values += np.float32(128.5)
    values *= steps
    values += ranges.minimum
    return values


def to_binary(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """One bit a dim, set where x > 0: uint8[B, D / 8], the first dim in the highest bit.

    sentence-transformers calls this "ubinary".

    Raises ValueError where D is not a multiple of 8.
    """
    if vectors.shape[1] % 8:
        raise ValueError(f"binary vectors have a multiple of 8 dims, not {vectors.shape[1]}")
    return np.packbits(vectors > 0, axis=1)


def from_binary(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """+1 and -1 as float32[B, D] from uint8[B, D / 8]."""
    signs = np.unpackbits(packed, axis=1).astype(np.float32)  # [B, D]
    signs *= 2
    signs -= 1
    return signs
