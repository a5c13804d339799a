"""Reciprocal rank fusion: one ranking out of several, from the ranks alone."""

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def fuse(
    rankings: Sequence[Sequence[Key]], k: int = 60, weights: Sequence[float] | None = None
) -> list[tuple[Key, float]]:
    """All keys of `rankings` with their fused scores, best first (Cormack et al., SIGIR 2009).

    Each ranking holds its keys best first. A key scores the sum of weight / (k + rank) over the rankings
    that hold it; ranks count from 1. `k` is the paper's constant, >= 0: the larger, the less the first
    ranks stand out. `weights` are one number >= 0 a ranking; 1 each by default.

    Of equal scores the key with the better best rank comes first, then the one met first in the order
    of `rankings`; so the answer depends on nothing but the arguments.

    Raises ValueError for a negative `k`, weights that do not fit, and a key twice in one ranking.
    """
    if k < 0:
        raise ValueError(f"k is {k}, but must be at least 0")
    weights = [1.0] * len(rankings) if weights is None else weights
    if len(weights) != len(rankings):
        raise ValueError(f"{len(weights)} weights for {len(rankings)} rankings")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights are {list(weights)}, but must be finite and at least 0")
    parts: dict[Key, list[float]] = {}
    best: dict[Key, int] = {}
    for number, (ranking, weight) in enumerate(zip(rankings, weights, strict=True), 1):
        if len(set(ranking)) != len(ranking):
            twice = next(key for rank, key in enumerate(ranking) if key in ranking[:rank])
            raise ValueError(f"ranking {number} holds {twice!r} twice")
        for rank, key in enumerate(ranking, 1):
            parts.setdefault(key, []).append(weight / (k + rank))
            best[key] = min(best.get(key, rank), rank)
    # fsum: of three or more parts a plain sum depends on their order, and would break ties by rounding.
    scores = {key: math.fsum(part) for key, part in parts.items()}
    # sorted() is stable, and `scores` stands in the order of the first meeting.
    return sorted(scores.items(), key=lambda scored: (-scored[1], best[scored[0]]))
