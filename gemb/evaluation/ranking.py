"""Rankings without a corpus: translations to be found, and candidates to be put in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gemb.evaluation.extras import load
from gemb.evaluation.tasks import Score, Task, mean_of
from gemb.evaluation.views import Viewed
from gemb.vectors.nearest import nearest


@dataclass(frozen=True)
class Bitext(Task):
    """For each sentence its translation among all of them; an equal text is as good."""

    kind: ClassVar[str] = "bitext"

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """Accuracy of the nearest; F1 beside it, weighted as MTEB does, where an equal text is no excuse."""
        metrics = load("sklearn.metrics")
        _, rows = nearest(vectors["firsts"].all(), vectors["seconds"], 1)
        found = rows[:, 0]
        translations = self.roles["seconds"].texts
        hits = np.array(
            [translations[row] == translations[number] for number, row in enumerate(found.tolist())],
            np.float64,
        )
        f1 = metrics.f1_score(np.arange(len(found)), found, average="weighted", zero_division=0.0)
        return mean_of("accuracy", hits, {"f1": float(f1)})


@dataclass(frozen=True)
class Reranking(Task):
    """Candidates of each query in the order of their cosines."""

    kind: ClassVar[str] = "reranking"

    first: Sequence[int]
    """Number of each query's first candidate among all; one more at the end."""
    labels: Sequence[bool]
    """Whether a candidate is right; all candidates in order."""

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """Mean average precision, and mean reciprocal rank (at 10) beside it."""
        queries, labels = vectors["queries"].all(), np.asarray(self.labels, dtype=bool)
        precisions, reciprocals = [], []
        for number, (start, stop) in enumerate(zip(self.first, self.first[1:], strict=False)):
            cosines = vectors["candidates"].block(start, stop) @ queries[number]
            ranks = 1 + np.flatnonzero(labels[start:stop][np.argsort(-cosines, kind="stable")])
            precisions.append(float((np.arange(1, len(ranks) + 1) / ranks).mean()))
            reciprocals.append(1.0 / ranks[0] if ranks[0] <= 10 else 0.0)
        return mean_of("map", np.array(precisions), {"mrr@10": float(np.mean(reciprocals))})
