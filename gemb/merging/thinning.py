"""What is left of a delta: its largest entries, a random choice, or those in between.

`density` is the share that stays, above 0 and at most 1; at 1 a delta stays as it is. A random choice is that
of the generator alone. `Rescale` says how what is left makes up for what is gone: by `probability` each entry
is divided by its own chance to stay, so that the expected delta is the delta (the papers); by `norm` the sum
of absolute values is brought back (mergekit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor

Rescale: TypeAlias = Literal["probability", "norm", "none"]

_COARSE_BITS, _FINE_BITS = 16, 15
"""Of the 31 bits that tell the size of a float32: two counts of so many bits find any entry exactly."""
_ENTRIES_AT_ONCE = 1 << 22


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """[S], the int(density * entries) entries of largest magnitude, zeros elsewhere (TIES, arXiv 2306.01708).

    Of equal magnitudes at the border all stay. The trim of one tensor by itself; the authors trim over the
    whole model: `threshold`, then `keep_from`.
    """
    if density >= 1:
        return delta
    return keep_from(delta, threshold(lambda: [delta], density))


def keep_from(delta: Tensor, least: float) -> Tensor:
    """[S], the entries whose magnitude is at least `least`, zeros elsewhere."""
    return torch.where(delta.abs() >= least, delta, torch.zeros((), dtype=delta.dtype))


def threshold(deltas: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude of the int(density * entries)-th largest entry of all tensors, exactly.

    `deltas` gives the float32 tensors one by one, twice; no more than one is held. At least one entry counts.
    The bits of positive floats are in the order of the numbers, so counting them by their upper bits finds
    the bin, and counting the lower bits of what is in it finds the entry.
    """
    coarse = torch.zeros(1 << _COARSE_BITS, dtype=torch.int64)
    for bits in _magnitude_bits(deltas()):
        coarse += torch.bincount(bits >> _FINE_BITS, minlength=len(coarse))
    left = max(1, int(density * int(coarse.sum())))
    bin_, left = _place(coarse, left)
    fine = torch.zeros(1 << _FINE_BITS, dtype=torch.int64)
    for bits in _magnitude_bits(deltas()):
        inside = bits[(bits >> _FINE_BITS) == bin_] & (len(fine) - 1)
        fine += torch.bincount(inside, minlength=len(fine))
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
    """[S], chances linear in the rank of magnitude: density - epsilon for the smallest of a row, + the largest.

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
    if density >= 1:
        return delta
    count = delta.numel()
    top = int(outliers * count)
    bottom = count - int(density * count) - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    order = delta.abs().reshape(-1).argsort()
    kept = torch.zeros(count, dtype=torch.bool)
    kept[order[bottom : count - top]] = True
    return torch.where(kept.reshape(delta.shape), delta, torch.zeros((), dtype=delta.dtype))


def _magnitude_bits(deltas: Iterable[Tensor]) -> Iterable[Tensor]:
    """int32 bits of the magnitudes, in blocks."""
    for delta in deltas:
        for block in torch.split(delta.reshape(-1), _ENTRIES_AT_ONCE):
            yield block.abs().view(torch.int32)


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
