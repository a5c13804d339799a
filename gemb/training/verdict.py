"""Whether a trained model is better than it was before: paired bootstrap over queries or other items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemb.evaluation.comparing import SHARE, SLOW_DRAWS, Comparison, Word
from gemb.evaluation.comparing import compare as bootstrap
from gemb.evaluation.tasks import Score, mean_of

_SEED = 42  # the one that comparing has, so that gemb eval --against says the same


@dataclass(frozen=True, slots=True)
class Resampled:
    """A measure that is no mean of its items, such as a rank correlation, over draws of the items.

    The draws depend on the number of items alone, so those of a model before and after are the same.
    """

    value: float
    """Over all items."""
    draws: NDArray[np.float64]
    """[1000], each over as many items, drawn with replacement."""
    items: int

    @classmethod
    def of(cls, score: Score) -> Resampled:
        """The main metric of a score; a thousand times its work."""
        random = np.random.default_rng(_SEED)
        draws = [
            score.statistic(random.integers(0, score.items, size=score.items)) for _ in range(SLOW_DRAWS)
        ]
        return cls(score.value, np.array(draws), score.items)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measure before and after, and what can be said of the difference."""

    metric: str
    before: float
    after: float
    low: float
    """Lower end of the 95 % interval of the difference of the measure."""
    high: float
    word: Word
    queries: int
    """How many queries, or other items, the measure is made of."""
    unit: str = "queries"
    """What these are."""

    def __str__(self) -> str:
        """`WIN docstrings nDCG@10 0.412 -> 0.581 (+0.152 to +0.185, 500 queries)`."""
        return (
            f"{self.word} {self.metric} {self.before:.3f} -> {self.after:.3f} "
            f"({self.low:+.3f} to {self.high:+.3f}, {self.queries:,} {self.unit})"
        )


def compare(metric: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> Verdict:
    """The verdict on the same queries' scores before and after, higher being better.

    WIN or REGRESSION where the 95 % interval of the mean difference, by a paired bootstrap, leaves out 0.

    Raises ValueError if the queries are not as many.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"{metric} has {before.shape} scores before and {after.shape} after")
    found = bootstrap([mean_of(metric, after, {})], [mean_of(metric, before, {})])
    return Verdict(
        metric, float(before.mean()), float(after.mean()), found.low, found.high, found.verdict, len(before)
    )


def compare_resampled(metric: str, before: Resampled, after: Resampled) -> Verdict:
    """The verdict on a measure over the same draws of the same items before and after, as `compare`.

    Raises ValueError if the items are not as many.
    """
    if before.items != after.items or before.draws.shape != after.draws.shape:
        raise ValueError(f"{metric} has {before.items} items before and {after.items} after")
    low, high = np.quantile(after.draws - before.draws, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    found = Comparison(after.value - before.value, float(low), float(high))
    return Verdict(
        metric, before.value, after.value, found.low, found.high, found.verdict, after.items, "items"
    )
