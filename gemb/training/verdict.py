"""Whether a trained model is better than the one it began as: paired bootstrap over queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemb.evaluation.comparing import Word
from gemb.evaluation.comparing import compare as bootstrap
from gemb.evaluation.tasks import mean_of


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measure before and after, and what can be said of the difference."""

    metric: str
    before: float
    after: float
    low: float
    """Lower end of the 95 % interval of the difference of the means."""
    high: float
    word: Word
    queries: int

    def __str__(self) -> str:
        """`WIN docstrings nDCG@10 0.412 -> 0.581 (+0.152 to +0.185, 500 queries)`."""
        return (
            f"{self.word} {self.metric} {self.before:.3f} -> {self.after:.3f} "
            f"({self.low:+.3f} to {self.high:+.3f}, {self.queries:,} queries)"
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
