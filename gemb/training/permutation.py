"""Random order without memory: a keyed permutation of 0 to n - 1, and random numbers by name.

A Feistel network permutes the numbers of 2 h bits; what it throws out of 0 to n - 1 goes through it again
until it falls inside ("cycle walking", Black and Rogaway 2002, section 3). With 2 h bits chosen as
small as can be that takes less than four passes on average. Random enough for shuffling, and no cipher.
"""

from hashlib import blake2b
from struct import pack

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 12  # four are enough for large n (Luby and Rackoff 1988); six left the orders of 4 rows uneven


class Permutation:
    """A permutation of 0 to `size` - 1 (at least 1), decided by `key` (64 bits)."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = [np.uint64(random64(key, number)) for number in range(_ROUNDS)]

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at these positions [n] of the permuted order."""
        values = positions.astype(np.uint64)
        outside = np.arange(len(values))
        while len(outside):
            values[outside] = self._pass(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _pass(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def random64(key: int, *numbers: int) -> int:
    """64 random bits that depend on the key (64 bits) and the numbers (64 bits each), and on nothing else."""
    return int.from_bytes(blake2b(pack(f"<{len(numbers) + 1}Q", key, *numbers), digest_size=8).digest())


def scattered32(number: int, key: int) -> int:
    """32 bits for a number below 2^32: no two numbers have the same, and neighbours look nothing alike.

    The finaliser of MurmurHash3 (Appleby 2011), in which every operation can be undone.
    """
    value = (number * 0x9E3779B1 + key) & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)


def key_of(*parts: object) -> int:
    """A 64-bit key for these parts, by their texts."""
    return int.from_bytes(blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest())


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
