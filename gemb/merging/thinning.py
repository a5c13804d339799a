"""What is left of a delta: its largest entries, a random choice, or those in between.

`density` is the share that stays, above 0 and at most 1; at 1 a delta stays as it is. A random choice is that
of the generator alone. `Rescale` says how what is left makes up for what is gone: by `probability` each entry
is divided by its own chance to stay, so that the expected delta is the delta (the papers); by `norm` the sum
of absolute values is brought back (mergekit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor

Rescale: TypeAlias = Literal["probability", "norm", "none"]

_COARSE_BITS, _FINE_BITS = 16, 15
"""Of the 31 bits that tell the size of a float32: two counts of so many bits find any entry exactly."""
_ENTRIES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Bounds:
    """Magnitudes that stay: at least `least`, and less than `below`."""

    least: float = 0.0
    below: float = float("inf")


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """[S], the int(density * entries) entries of largest magnitude, zeros elsewhere (TIES, arXiv 2306.01708).

    Of equal magnitudes at the border all stay. The trim of one tensor by itself; the authors trim over the
    whole model: `largest`, then `keep_within`.
    """
    return keep_within(delta, largest(lambda: [delta], delta.numel(), density))


def keep_within(delta: Tensor, bounds: Bounds) -> Tensor:
    """[S], the entries whose magnitude lies within the bounds, zeros elsewhere."""
    size = delta.abs()
    return torch.where((size >= bounds.least) & (size < bounds.below), delta, 0.0)


def largest(deltas: Callable[[], Iterable[Tensor]], entries: int, density: float) -> Bounds:
    """The bounds of the int(density * entries) largest entries, at least one; `deltas` as in nth_largest."""
    if density >= 1:
        return Bounds()
    return Bounds(least=nth_largest(deltas, max(1, int(density * entries))))


def between(deltas: Callable[[], Iterable[Tensor]], entries: int, density: float, outliers: float) -> Bounds:
    """The bounds of `keep_between`; `deltas` as in `nth_largest`."""
    if density >= 1:
        return Bounds()
    kept = int(density * entries)
    top = min(int(outliers * entries), entries - kept)
    below = nth_largest(deltas, top) if top else float("inf")
    return Bounds(nth_largest(deltas, max(1, top + kept)), below)


def nth_largest(deltas: Callable[[], Iterable[Tensor]], rank: int) -> float:
    """The magnitude of the `rank`-th largest entry of all tensors together, exactly; the largest has rank 1.

    `deltas` gives the float32 tensors one by one, twice; no more than one is held. The bits of positive
    floats are in the order of the numbers, so counting them by their upper bits finds the bin, and counting
    the lower bits of what is in it finds the entry.
    """
    coarse = torch.zeros(1 << _COARSE_BITS, dtype=torch.int64)
    for bits in _magnitude_bits(deltas()):
        _count(coarse, bits >> _FINE_BITS)
    bin_, left = _place(coarse, rank)
    fine = torch.zeros(1 << _FINE_BITS, dtype=torch.int64)
    for bits in _magnitude_bits(deltas()):
        inside = bits[(bits >> _FINE_BITS) == bin_] & (len(fine) - 1)
        _count(fine, inside)
    lower, _ = _place(fine, left)
    return float(torch.tensor([bin_ << _FINE_BITS | lower], dtype=torch.int32).view(torch.float32))


def drop_at_random(
    delta: Tensor, density: float, generator: Generator, *, rescale: Rescale = "probability"
) -> Tensor:
    """[S], each entry kept with chance `density`, divided by it (DARE, arXiv 2311.03099, eq. 3-4).

    The paper's drop rate p is 1 - density. The expected delta is the delta, its variance delta^2 p / (1 - p).
    """
    if density >= 1:
        return delta
    chance = torch.full_like(delta, density)
    return _rescaled(delta, torch.bernoulli(chance, generator=generator), chance, rescale)


def drop_by_rank(
    delta: Tensor, density: float, epsilon: float, generator: Generator, *, rescale: Rescale = "probability"
) -> Tensor:
    """[S], each entry kept with a chance that grows with its rank in its row (DELLA, arXiv 2406.11617).

    See `keep_chances`. What stays is divided by its own chance, so that the expected delta is the delta;
    epsilon 0 is DARE.
    """
    if density >= 1:
        return delta
    chance = keep_chances(delta, density, epsilon)
    return _rescaled(delta, torch.bernoulli(chance, generator=generator), chance, rescale)


def keep_chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """[S], chances linear in the rank of magnitude: density - epsilon for a row's smallest, + its largest.

    A tensor of one dimension is one row. Their mean is the density. `epsilon` is half of the paper's window.

    Raises ValueError unless 0 < density - epsilon and density + epsilon < 1.
    """
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise ValueError(f"density {density:g} -+ epsilon {epsilon:g} leaves the open range from 0 to 1")
    rows = delta.reshape(1 if delta.ndim < 2 else len(delta), -1)
    if rows.shape[1] < 2:
        return torch.full_like(delta, density)
    ranks = rows.abs().argsort(dim=1).argsort(dim=1)
    shares = ranks.to(delta.dtype) / (rows.shape[1] - 1)
    return (density - epsilon + shares * (2 * epsilon)).reshape(delta.shape)


def keep_between(delta: Tensor, density: float, outliers: float) -> Tensor:
    """[S], without the largest share `outliers` and as many of the smallest as leave `density` (breadcrumbs).

    Model breadcrumbs, arXiv 2312.06795, section 3: large outliers and small perturbations of a layer are left
    out. If density and outliers make more than the whole, fewer outliers are left out.
    """
    return keep_within(delta, between(lambda: [delta], delta.numel(), density, outliers))


def _magnitude_bits(deltas: Iterable[Tensor]) -> Iterable[Tensor]:
    """int32 bits of the magnitudes, in blocks."""
    for delta in deltas:
        for block in torch.split(delta.reshape(-1), _ENTRIES_AT_ONCE):
            yield block.abs().view(torch.int32)


def _count(counts: Tensor, bins: Tensor) -> None:
    """Adds how often each bin occurs; a few bins are counted without passing over all."""
    if len(bins) < len(counts):
        counts.index_add_(0, bins, torch.ones((), dtype=counts.dtype).expand(len(bins)))
    else:
        counts += torch.bincount(bins, minlength=len(counts))


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the entry of `rank` (1 = the largest), and its rank within that bin."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, rank))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - above


def _rescaled(delta: Tensor, kept: Tensor, chance: Tensor, rescale: Rescale) -> Tensor:
    left = delta * kept
    if rescale == "probability":
        return left / chance
    if rescale == "norm":
        before, after = delta.abs().sum(), left.abs().sum()
        if min(float(before), float(after)) > 1e-7:  # mergekit's limit
            return left * (before / after)
    return left
