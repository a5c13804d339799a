"""The evaluations of `gemb eval` on a model in training: BEIR folders, scored pairs, and the rest.

N texts, D dims, K Matryoshka sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.evaluation import Score, Task, View, evaluate
from gemb.evaluation.reading import Choices, read_task
from gemb.text.prompts import Prompts
from gemb.text.tokenisation import Tokeniser
from gemb.training.gradients import PackedEncoder
from gemb.training.held_out import Measured, encode_all, measure_name


class EvaluatedSets:
    """The data sets of `evaluation.sets`, read once, measured at every size."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        tokeniser: Tokeniser,
        prompts: Prompts,
        leave_out_prompts: bool,
        sizes: Sequence[int],
        seed: int,
    ) -> None:
        """Raises GembError, UnavailableError for data that cannot be read."""
        self._tasks: list[Task] = [read_task(Path(path), Choices(seed=seed)) for path in paths]
        self._tokeniser = tokeniser
        self._prompts = prompts
        self._leave_out_prompts = leave_out_prompts
        self._sizes = sizes

    def measure(self, encoder: PackedEncoder, device: str, tokens_per_chunk: int) -> Measured:
        """The main metric of each task at each size; of those that are means, the value of each item.

        Of the others the whole score is kept besides, for a verdict.
        """
        model = _Model(self, encoder, device, tokens_per_chunk)
        scores: dict[str, NDArray[np.float64]] = {}
        numbers: dict[str, float] = {}
        statistics: dict[str, Score] = {}
        for result in evaluate(model, self._tasks, [View(size) for size in self._sizes]):
            main = f"{result.task.name}/{result.score.metric}"
            name = measure_name(main, result.view.dims, self._sizes[0])
            if result.score.values is not None:
                scores[name] = result.score.values
            else:
                numbers[name] = result.score.value
                statistics[name] = result.score
        return Measured(scores, {}, numbers, statistics)


class _Model:
    """A model in training as gemb.evaluation asks for it."""

    def __init__(
        self, sets: EvaluatedSets, encoder: PackedEncoder, device: str, tokens_per_chunk: int
    ) -> None:
        self._sets = sets
        self._encoder = encoder
        self._device = device
        self._tokens_per_chunk = tokens_per_chunk

    @property
    def dims(self) -> int:
        """D."""
        return self._sets._sizes[0]

    def prompt_of(self, names: Sequence[str]) -> str:
        """As `Prompts.first_of`."""
        return self._sets._prompts.first_of(names)

    def embed(
        self, texts: Sequence[str], *, as_: str | None, titles: Sequence[str | None] | None
    ) -> NDArray[np.float32]:
        """float32[N, D]. Raises GembError for a text without tokens."""
        sets = self._sets
        template = sets._prompts.template(as_)
        rendered = [
            template.render(text, titles[number] if titles is not None else None)
            for number, text in enumerate(texts)
        ]
        skipped = sets._tokeniser.prompt_tokens(template.prefix) if sets._leave_out_prompts else 0
        encoded = sets._tokeniser.encode(rendered, prompt_tokens=skipped)
        if not encoded.lengths.all():
            raise GembError(
                f"the tokenizer finds no token in {rendered[int(np.argmin(encoded.lengths))]!r}; leave it out"
            )
        vectors = encode_all(self._encoder, encoded, self._device, self._tokens_per_chunk)
        found: NDArray[np.float32] = vectors.cpu().numpy()
        return found
