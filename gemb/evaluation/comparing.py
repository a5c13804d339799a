"""Whether one model is better than another on the same items: the paired bootstrap (Efron 1979; Koehn 2004).

Items are drawn with replacement, the same for both models; the difference of the metrics over many draws
tells how far it can be chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemb.evaluation.tasks import Score

DRAWS = 10_000
SLOW_DRAWS = 1_000
"""Where the metric is no mean and has to be computed anew for each draw."""
SHARE = 0.95
_BLOCK_DRAWS = 500

Word = Literal["WIN", "TIE", "REGRESSION"]


@dataclass(frozen=True)
class Comparison:
    """The difference of two scores, and between which bounds 95 of 100 draws lie."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Word:
        """WIN if even the low bound is above 0, REGRESSION if the high one is below, else TIE."""
        if self.low > 0:
            return "WIN"
        return "REGRESSION" if self.high < 0 else "TIE"


def compare(mine: Sequence[Score], other: Sequence[Score], *, seed: int = 42) -> Comparison:
    """The mean difference of the main metrics over some tasks, mine - other; the items of each are drawn.

    Raises ValueError where two scores are not of the same items.
    """
    random = np.random.default_rng(seed)
    quick = all(score.values is not None for score in (*mine, *other))
    draws = DRAWS if quick else SLOW_DRAWS
    differences = np.zeros(draws)
    for own, its in zip(mine, other, strict=True):
        if own.items != its.items or own.metric != its.metric:
            raise ValueError(f"{own.metric} of {own.items} items against {its.metric} of {its.items}")
        differences += _differences(own, its, draws, random) / len(mine)
    low, high = np.quantile(differences, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    point = float(np.mean([own.value - its.value for own, its in zip(mine, other, strict=True)]))
    return Comparison(point, float(low), float(high))


def _differences(own: Score, its: Score, draws: int, random: np.random.Generator) -> NDArray[np.float64]:
    """[draws] differences of the main metrics."""
    if own.values is not None and its.values is not None:
        each = own.values - its.values
        parts = [
            each[random.integers(0, len(each), size=(min(_BLOCK_DRAWS, draws - start), len(each)))].mean(
                axis=1
            )
            for start in range(0, draws, _BLOCK_DRAWS)
        ]
        return np.concatenate(parts)
    found = np.empty(draws)
    for draw in range(draws):
        items = random.integers(0, own.items, size=own.items)
        found[draw] = own.statistic(items) - its.statistic(items)
    return found
