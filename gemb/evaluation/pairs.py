"""Pairs of texts: similarity against scores of people, and yes-or-no classification by a threshold.

P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gemb.evaluation.extras import load
from gemb.evaluation.tasks import Score, Task
from gemb.evaluation.views import Viewed

_BLOCK_PAIRS = 16_384


@dataclass(frozen=True)
class Similarity(Task):
    """Cosines against the scores of people: Spearman's rank correlation, as STS does."""

    kind: ClassVar[str] = "similarity"

    scores: Sequence[float]

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """Spearman, and Pearson beside it."""
        statistics = load("scipy.stats")
        cosines = pair_cosines(vectors["firsts"], vectors["seconds"])
        gold = np.asarray(self.scores, dtype=np.float64)

        def spearman(items: NDArray[np.int64]) -> float:
            if not np.ptp(cosines[items]) or not np.ptp(gold[items]):
                return 0.0  # a draw of one item over and over has no order
            return float(statistics.spearmanr(cosines[items], gold[items]).statistic)

        everything = np.arange(len(gold))
        pearson = statistics.pearsonr(cosines, gold).statistic if np.ptp(cosines) else 0.0
        metrics = {"spearman": spearman(everything), "pearson": float(pearson)}
        return Score("spearman", metrics, len(gold), spearman)


@dataclass(frozen=True)
class PairClassification(Task):
    """Which pairs belong together, told by their cosine: average precision, as MTEB does."""

    kind: ClassVar[str] = "pair-classification"

    positive: Sequence[bool]

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """Average precision; F1 and accuracy at the best thresholds beside it."""
        metrics = load("sklearn.metrics")
        cosines = pair_cosines(vectors["firsts"], vectors["seconds"])
        gold = np.asarray(self.positive, dtype=bool)

        def average_precision(items: NDArray[np.int64]) -> float:
            if not gold[items].any():
                return 0.0
            return float(metrics.average_precision_score(gold[items], cosines[items]))

        everything = np.arange(len(gold))
        found = {"ap": average_precision(everything), **_at_best_thresholds(cosines, gold)}
        return Score("ap", found, len(gold), average_precision)


def pair_cosines(firsts: Viewed, seconds: Viewed) -> NDArray[np.float64]:
    """[P] dot products of the unit rows of two sets of P."""
    parts = [
        np.einsum("ij,ij->i", firsts.block(start, stop), seconds.block(start, stop), dtype=np.float64)
        for start in range(0, firsts.rows, _BLOCK_PAIRS)
        for stop in (min(start + _BLOCK_PAIRS, firsts.rows),)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _at_best_thresholds(cosines: NDArray[np.float64], gold: NDArray[np.bool_]) -> dict[str, float]:
    """F1 and accuracy, each with its best threshold; equal cosines stand or fall together."""
    order = np.argsort(-cosines, kind="stable")
    hits = np.cumsum(gold[order])  # true positives if the first n are called positive
    taken = np.arange(1, len(gold) + 1)
    is_border = np.append(cosines[order][1:] != cosines[order][:-1], True)
    f1 = 2 * hits / (taken + gold.sum())
    right = hits + ((~gold).sum() - (taken - hits))
    nothing_taken = (~gold).sum()
    return {
        "f1": float(f1[is_border].max()),
        "accuracy": float(max(right[is_border].max(), nothing_taken) / len(gold)),
    }
