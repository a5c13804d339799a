"""How well a language model predicts held-out texts: perplexity, and the share of tokens it gets right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.training.held_out import Measured
from gemb.training.pretrain_batches import packed
from gemb.training.pretrain_documents import Documents, Piece
from gemb.training.pretrain_gradients import LanguageModel
from gemb.training.pretrain_rows import MadeRow, RowMaker

_SEED = 0
"""Of the corruption: the same for all runs, whose figures can then be compared."""


class HeldOutTexts:
    """The beginnings of held-out texts, corrupted once and for all."""

    def __init__(self, name: str, documents: Documents, maker: RowMaker, limit: int) -> None:
        """Raises GembError if there is no text."""
        self.pieces: Sequence[Piece] = documents.beginnings(limit)
        if not self.pieces:
            files = ", ".join(file.name for file in documents.files)
            raise GembError(f"evaluation.texts: {files} has no text of 2 tokens or more")
        self._name = name
        self._rows: list[MadeRow] = [maker.of(piece, _SEED, 0) for piece in self.pieces]

    @torch.no_grad()
    def measure(self, model: LanguageModel) -> Measured:
        """Of each text the mean log likelihood of its targets, in nats, and the share of them predicted.

        The numbers are the perplexity over the targets of all texts, and of the rows of each denoiser. The
        model is not in training meanwhile.
        """
        sums = np.zeros((len(self._rows), 3))  # cross entropy, correct, tokens
        for number, one in enumerate(self._rows):
            found = model.loss(packed([one.row]))
            sums[number] = found.cross_entropy, found.correct, found.tokens
        numbers = {f"{self._name}/perplexity": _perplexity(sums)}
        labels = np.array([one.label for one in self._rows])
        for label in sorted(set(labels.tolist()) - {""}):
            numbers[f"{self._name}/perplexity of {label}"] = _perplexity(sums[labels == label])
        scores = {
            f"{self._name}/log likelihood": -sums[:, 0] / sums[:, 2],
            f"{self._name}/accuracy": sums[:, 1] / sums[:, 2],
        }
        return Measured(scores, {}, numbers)


def _perplexity(sums: NDArray[np.float64]) -> float:
    """The exponential of the mean cross entropy; infinity where that is too large for a number."""
    mean = float(sums[:, 0].sum() / sums[:, 2].sum())
    return math.exp(mean) if mean < 700 else math.inf
