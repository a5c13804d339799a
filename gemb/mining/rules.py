"""Which of the passages near a query are hard negatives.

Margins follow NV-Retriever (arXiv 2407.15831: "TopK-MarginPos" and "TopK-PercPos"), the fusion of two scorers
follows Gecko (arXiv 2403.20327). n negatives a row, C candidates, best first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemb.store.fusion import fuse

Pick = Literal["top", "random", "last"]


class Shortage(StrEnum):
    """Why a row has fewer negatives than asked."""

    NO_VECTOR = "the query or a positive has no vector"
    FEW = "too few passages in the range of ranks"
    MARGIN = "too close to the positive"
    SECOND = "too close to the positive for the second model"
    LIMITS = "outside the score limits"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a hard negative is."""

    count: int
    """n, at most so many a row."""
    first_rank: int = 1
    """Ranks count from 1, in the passages near the query without those that must not be mined."""
    last_rank: int = 100
    absolute_margin: float | None = None
    """A negative scores below positive - margin."""
    relative_margin: float | None = None
    """A negative scores below positive - |positive| * margin."""
    min_score: float | None = None
    max_score: float | None = None
    pick: Pick = "top"
    """Of those that fit the closest, a sample by seed, or the least close."""
    seed: int = 42

    def ceiling(self, positive: float) -> float:
        """What every negative must score below, beside a positive with this score; infinity for no rule.

        |positive| makes the relative rule right below zero: 0.95 * positive would lie above a negative one.
        """
        limits = [np.inf]
        if self.absolute_margin is not None:
            limits.append(positive - self.absolute_margin)
        if self.relative_margin is not None:
            limits.append(positive - abs(positive) * self.relative_margin)
        return min(limits)


@dataclass(frozen=True, slots=True)
class Choice:
    """The negatives of a row."""

    places: list[int]
    """At most n of the C candidates, in order of their rank."""
    shortage: Shortage | None
    """Why there are fewer than n: the rule that took most of the candidates in the range of ranks."""
    too_close: int
    """Candidates in the range of ranks that a margin took, by either scorer."""


def choose(
    rules: Rules,
    row: int,
    scores: NDArray[np.float32],
    positive: float,
    second_scores: NDArray[np.float32] | None = None,
    second_positive: float = 0.0,
) -> Choice:
    """The negatives of row number `row` among C candidates that may all be mined.

    scores[C] descend; second_scores[C] are those of another model. `positive` and `second_positive` are the
    scores of the least similar positive of the row. With a second model every negative keeps the margins by
    both, and the candidates in the range of ranks are ordered by the sum of 1 / (60 + rank) over both models
    (reciprocal rank fusion). The choice depends on the arguments alone, and a sample on seed and row.
    """
    window = slice(rules.first_rank - 1, rules.last_rank)
    own = scores[window].astype(np.float64)
    first = rules.first_rank - 1
    close = own >= rules.ceiling(positive)
    close_for_second = np.zeros(len(own), dtype=bool)
    order = list(range(len(own)))
    if second_scores is not None:
        other = second_scores[window].astype(np.float64)
        close_for_second = (other >= rules.ceiling(second_positive)) & ~close
        # A candidate without a vector of the second model (NaN) is not judged by it: it is left out.
        close_for_second |= np.isnan(other) & ~close
        by_second = np.argsort(-other, kind="stable").tolist()
        order = [place for place, _ in fuse([order, by_second])]
    outside = np.zeros(len(own), dtype=bool)
    if rules.min_score is not None:
        outside |= own < rules.min_score
    if rules.max_score is not None:
        outside |= own > rules.max_score
    outside &= ~(close | close_for_second)
    fit = [place for place in order if not (close[place] or close_for_second[place] or outside[place])]
    chosen = _picked(rules, row, fit)
    shortage = None
    if len(chosen) < rules.count:
        taken = {
            Shortage.MARGIN: int(close.sum()),
            Shortage.SECOND: int(close_for_second.sum()),
            Shortage.LIMITS: int(outside.sum()),
        }
        worst = max(taken, key=lambda reason: taken[reason])
        shortage = worst if len(own) >= rules.count and taken[worst] else Shortage.FEW
    too_close = int(close.sum() + close_for_second.sum())
    return Choice([first + place for place in chosen], shortage, too_close)


def _picked(rules: Rules, row: int, fit: list[int]) -> list[int]:
    """At most n of the places that fit, best first."""
    if len(fit) <= rules.count or rules.pick == "top":
        return fit[: rules.count]
    if rules.pick == "last":
        return fit[-rules.count :]
    drawn = np.random.default_rng((rules.seed, row)).choice(len(fit), rules.count, replace=False)
    return [fit[number] for number in sorted(drawn.tolist())]
