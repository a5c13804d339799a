"""Labelled texts: a probe that learns the labels, and clusters that should find them.

N texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gemb.evaluation.extras import load
from gemb.evaluation.tasks import Score, Task, mean_of
from gemb.evaluation.views import Viewed

_ITERATIONS = 100
_CLUSTER_BATCH = 512


@dataclass(frozen=True)
class Classification(Task):
    """A logistic regression on the vectors of a few texts a label, tried on the rest, as MTEB does.

    The mean of several draws of training texts; sklearn's LogisticRegression, at most 100 iterations.
    """

    kind: ClassVar[str] = "classification"

    train_labels: Sequence[str]
    test_labels: Sequence[str]
    draws: Sequence[Sequence[int]]
    """Which of the training texts each probe learns from, by number."""
    seed: int = 42

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """Accuracy, and macro F1 beside it."""
        models, metrics = load("sklearn.linear_model"), load("sklearn.metrics")
        train, test = vectors["train"].all(), vectors["test"].all()
        labels, gold = np.asarray(self.train_labels), np.asarray(self.test_labels)
        hits = np.zeros(len(gold))
        f1 = []
        for draw in self.draws:
            probe = models.LogisticRegression(max_iter=_ITERATIONS, random_state=self.seed)
            predicted = probe.fit(train[draw], labels[draw]).predict(test)
            hits += predicted == gold
            f1.append(metrics.f1_score(gold, predicted, average="macro"))
        return mean_of("accuracy", hits / len(self.draws), {"f1": float(np.mean(f1))})


def drawn(labels: Sequence[str], samples: int, draws: int, seed: int) -> list[list[int]]:
    """For each draw the numbers of at most `samples` texts of each label, in a random order."""
    random = np.random.default_rng(seed)
    chosen: list[list[int]] = []
    for _ in range(draws):
        taken: Counter[str] = Counter()
        chosen.append([])
        for number in random.permutation(len(labels)).tolist():
            label = labels[number]
            if taken[label] < samples:
                taken[label] += 1
                chosen[-1].append(number)
    return chosen


@dataclass(frozen=True)
class Clustering(Task):
    """Clusters of the vectors, as many as there are labels, against the labels: V-measure, as MTEB does.

    The mean of several starts of sklearn's MiniBatchKMeans.
    """

    kind: ClassVar[str] = "clustering"

    labels: Sequence[str]
    draws: int = 10
    seed: int = 42

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """V-measure."""
        clusters, metrics = load("sklearn.cluster"), load("sklearn.metrics")
        rows, labels = vectors["texts"].all(), np.asarray(self.labels)
        found = [
            clusters.MiniBatchKMeans(
                n_clusters=len(set(self.labels)),
                batch_size=_CLUSTER_BATCH,
                n_init="auto",
                random_state=self.seed + draw,
            ).fit_predict(rows)
            for draw in range(self.draws)
        ]

        def v_measure(items: NDArray[np.int64]) -> float:
            values = [metrics.v_measure_score(labels[items], assigned[items]) for assigned in found]
            return float(np.mean(values))

        everything = np.arange(len(labels))
        return Score("v_measure", {"v_measure": v_measure(everything)}, len(labels), v_measure)
