"""What an export lost: probe texts and evaluation data embedded by it and by its source, side by side.

N probe texts, D dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GateError
from gemb.evaluation import Score, Task, TextEncoder, evaluate
from gemb.jobs.quantize_probes import PROBES
from gemb.report import Event, OnProgress, Table

NEIGHBOURS = 10
"""Of each probe text, among the others; how many of them stay is the overlap."""
_SHOWN = 40


@dataclass(frozen=True)
class Measured:
    """What one model makes of the probe texts and of the evaluation data."""

    vectors: NDArray[np.float32]
    """[N, D], of unit length."""
    scores: Sequence[Score]

    @property
    def mean(self) -> float:
        """The mean of the main metrics; there are some."""
        return float(np.mean([score.value for score in self.scores]))


@dataclass(frozen=True)
class Gate:
    """An export beside its source."""

    tasks: Sequence[Task]
    source: Measured
    export: Measured

    @property
    def cosines(self) -> NDArray[np.float32]:
        """[N], of each probe text's vector to the source's."""
        cosines: NDArray[np.float32] = np.sum(self.source.vectors * self.export.vectors, axis=1)
        return cosines

    @property
    def cosine_min(self) -> float:
        """Of the text that was moved farthest."""
        return float(self.cosines.min())

    @property
    def cosine_median(self) -> float:
        """Of the text in the middle."""
        return float(np.median(self.cosines))

    @property
    def overlap(self) -> float:
        """The share of the nearest other texts of each text that stay nearest."""
        mine, theirs = (_neighbours(one.vectors) for one in (self.source, self.export))
        shared = [len(set(one) & set(other)) for one, other in zip(mine, theirs, strict=True)]
        return float(np.mean(shared)) / int(mine.shape[1])

    @property
    def drop(self) -> float:
        """What is lost: of the mean metric where there are evaluation data, else of the median cosine."""
        return self.source.mean - self.export.mean if self.tasks else 1 - self.cosine_median

    def check(self, label: str, max_drop: float | None) -> None:
        """Raises GateError if a vector is not finite, or more than `max_drop` is lost."""
        finite = np.isfinite(self.export.vectors.sum(axis=1))
        if not finite.all():
            text = PROBES[int(np.argmin(finite))]
            raise GateError(
                f"{label} gives no finite vector for {np.sum(~finite)} of {len(PROBES)} probe texts, such as "
                f"{text[:_SHOWN]!r}; nothing was kept; take another format"
            )
        if max_drop is None or self.drop <= max_drop:
            return
        what = f"{self.drop:.4f} of the mean score" if self.tasks else f"{self.drop:.5f} of the median cosine"
        raise GateError(
            f"{label} loses {what} against its source, and max_drop allows {max_drop:g} (cosine median "
            f"{self.cosine_median:.5f}, minimum {self.cosine_min:.5f}; overlap {self.overlap:.3f}); "
            "nothing was kept; take a wider format, or train the model through this grid"
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for people."""
        worst = PROBES[int(np.argmin(self.cosines))]
        shown = " ".join(worst.split())[:_SHOWN]
        return [
            ("cosine", f"median {self.cosine_median:.6f}, minimum {self.cosine_min:.6f} ({shown!r})"),
            ("overlap", f"{self.overlap:.3f} of the {NEIGHBOURS} nearest of {len(PROBES)} probe texts"),
        ]

    @property
    def tables(self) -> list[Table]:
        """The scores on evaluation data, if there are any."""
        if not self.tasks:
            return []
        columns = ("data", "metric", "source", "export", "difference")
        rows = [
            [
                task.name,
                mine.metric,
                f"{mine.value:.4f}",
                f"{own.value:.4f}",
                f"{own.value - mine.value:+.4f}",
            ]
            for task, mine, own in self._each
        ]
        return [Table(columns, rows, right_aligned=columns[2:])]

    @property
    def _each(self) -> Iterable[tuple[Task, Score, Score]]:
        """Each task with the scores of source and export."""
        return zip(self.tasks, self.source.scores, self.export.scores, strict=True)

    @property
    def data(self) -> Mapping[str, object]:
        """The same for programs."""
        scores = [
            {"data": task.name, "metric": mine.metric, "source": mine.value, "export": own.value}
            for task, mine, own in self._each
        ]
        return {
            "probes": len(PROBES),
            "cosine_min": self.cosine_min,
            "cosine_median": self.cosine_median,
            "overlap": self.overlap,
            "drop": self.drop,
            "scores": scores,
        }


def measure(encoder: TextEncoder, name: str, tasks: Sequence[Task], on_progress: OnProgress) -> Measured:
    """What `encoder`, called `name`, makes of the probe texts and of `tasks`.

    Raises GembError as embedding and evaluation do.
    """
    on_progress(Event(f"embedding probe texts by {name}", 0, len(PROBES)))
    vectors = encoder.embed(PROBES, as_=encoder.prompt_of(("document",)), titles=None)
    on_progress(Event(f"embedding probe texts by {name}", len(PROBES), len(PROBES)))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)

    def tell(task: Task, done: int, total: int) -> None:
        on_progress(Event(f"embedding {task.name} by {name}", done, total))

    scores = [result.score for result in evaluate(encoder, tasks, on_texts=tell)]
    return Measured(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), scores)


def _neighbours(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """[N, min(NEIGHBOURS, N - 1)], the nearest other texts of each text."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(vectors) - 1)]
