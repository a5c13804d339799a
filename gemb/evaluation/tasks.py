"""What every task has in common.

N texts of a role, D dims.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gemb.evaluation.views import Viewed

Statistic = Callable[[NDArray[np.int64]], float]
"""The main metric over some of the items, given by number; one may come several times."""


@dataclass(frozen=True)
class Texts:
    """Texts that are embedded alike."""

    texts: Sequence[str]
    prompts: Sequence[str]
    """Names of prompts, of which the first that the model declares is used; `query` and `document` always
    fit, and where no name fits it is the model's default prompt, or none."""
    titles: Sequence[str | None] | None = None


@dataclass(frozen=True)
class Score:
    """How well some vectors did."""

    metric: str
    """The main one."""
    metrics: Mapping[str, float]
    """All of them, the main one first."""
    items: int
    """How many queries, pairs or texts the main metric is made of, for a paired bootstrap; 0 for none."""
    statistic: Statistic
    """The main metric over a choice of items; a mean is made by `mean_of`."""
    values: NDArray[np.float64] | None = None
    """[items], where the main metric is their mean."""

    @property
    def value(self) -> float:
        """The main metric."""
        return self.metrics[self.metric]


def mean_of(metric: str, values: NDArray[np.float64], others: Mapping[str, float]) -> Score:
    """A score whose main metric is the mean of values[items]."""
    return Score(
        metric,
        {metric: float(values.mean()), **others},
        len(values),
        lambda items: float(values[items].mean()),
        values,
    )


@dataclass(frozen=True)
class Task(ABC):
    """One data set with what is asked of it."""

    kind: ClassVar[str]
    """retrieval, similarity, ..., as `--task` names it."""

    name: str
    """The data set, for people."""
    roles: Mapping[str, Texts]
    """The texts to be embedded, by role."""
    notes: Sequence[str] = field(default=(), kw_only=True)
    """What was left out, and why."""

    @abstractmethod
    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """How well vectors do, one set a role."""
