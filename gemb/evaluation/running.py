"""Texts embedded once, tasks scored in every view.

N texts, D dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError, MismatchError
from gemb.evaluation.tasks import Score, Task, Texts
from gemb.evaluation.views import View, Viewed, ranges_for

_TEXTS_AT_ONCE = 4096


class TextEncoder(Protocol):
    """What evaluation needs of a model; `gemb.Encoder` is one, a model in training another."""

    @property
    def dims(self) -> int:
        """D."""

    def prompt_of(self, names: Sequence[str]) -> str:
        """The name of the prompt for texts: the first of `names` that fits, else the default one, or none."""

    def embed(
        self, texts: Sequence[str], *, as_: str | None, titles: Sequence[str | None] | None
    ) -> NDArray[np.float32]:
        """float32[N, D]."""


@dataclass(frozen=True)
class Result:
    """One task in one view."""

    task: Task
    view: View
    score: Score
    prompts: dict[str, str]
    """Names of the prompts, by role."""


OnTexts = Callable[[Task, int, int], None]
"""Is told how many texts of a task are embedded, and how many it has."""
OnVectors = Callable[[Task, Mapping[str, NDArray[np.float32]]], None]
"""Gets the vectors [N, D] of a task, by role, before they are scored; they are not normalised."""


def evaluate(
    encoder: TextEncoder,
    tasks: Sequence[Task],
    views: Sequence[View] | None = None,
    on_texts: OnTexts = lambda task, done, total: None,
    on_vectors: OnVectors = lambda task, vectors: None,
) -> Iterator[Result]:
    """Every task in every view, task by task; by default whole vectors as they come.

    Raises MismatchError for a view wider than the model, GembError where a text gives no vector.
    """
    views = views or [View(encoder.dims)]
    for view in views:
        if view.dims > encoder.dims:
            raise MismatchError(f"--dims {view.dims} is more than the model's {encoder.dims}")
        if view.dtype == "binary" and view.dims % 8:
            raise GembError(f"binary vectors have a multiple of 8 dims, not {view.dims}")
    for task in tasks:
        prompts = {role: encoder.prompt_of(texts.prompts) for role, texts in task.roles.items()}
        vectors: dict[str, NDArray[np.float32]] = {}
        total, done = sum(len(texts.texts) for texts in task.roles.values()), 0
        for role, texts in task.roles.items():
            own = np.empty((len(texts.texts), encoder.dims), np.float32)
            for start in range(0, len(own), _TEXTS_AT_ONCE):
                stop = min(start + _TEXTS_AT_ONCE, len(own))
                own[start:stop] = _embedded(encoder, texts, start, stop, prompts[role])
                on_texts(task, done + stop, total)
            done += len(own)
            vectors[role] = own
        on_vectors(task, vectors)
        largest = max(vectors.values(), key=len)
        for view in views:
            ranges = ranges_for(largest, view)
            seen = {role: Viewed(own, view, ranges) for role, own in vectors.items()}
            yield Result(task, view, task.score(seen), prompts)


def _embedded(encoder: TextEncoder, texts: Texts, start: int, stop: int, prompt: str) -> NDArray[np.float32]:
    titles = None if texts.titles is None else texts.titles[start:stop]
    return encoder.embed(texts.texts[start:stop], as_=prompt, titles=titles)
