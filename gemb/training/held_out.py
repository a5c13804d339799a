"""Retrieval among held-out pairs: how well a model finds the positive of each query among those of all.

Q queries, C candidates (the distinct positives), D model width, R rows (texts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.errors import GembError
from gemb.evaluation.tasks import Score
from gemb.losses.prefixes import unit
from gemb.text.prompts import Prompts, Template
from gemb.text.tokenisation import Encoded, Tokeniser
from gemb.training.data_recipe import DataSet
from gemb.training.examples import open_rows
from gemb.training.gradients import PackedEncoder, chunks
from gemb.training.mixture import templates
from gemb.training.verdict import Resampled

RANKS = 10
"""nDCG looks at so many of the best candidates."""
_BLOCK = 256  # queries whose similarities are held at once
BINS = 50
"""Of the histograms, over cosines from -1 to 1."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one evaluation found."""

    scores: Mapping[str, NDArray[np.float64]]
    """By measure (`docstrings/nDCG@10`), the value of each query, always in the same order."""
    histograms: Mapping[str, NDArray[np.int64]]
    """By name (`docstrings/positive`), how many cosines fall into each of 50 bins from -1 to 1."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Measures that are no means over queries, such as a rank correlation."""
    statistics: Mapping[str, Score] = field(default_factory=dict)
    """Those of `numbers` that can be had over some of the items alone, and how, until `resampled`."""
    resamples: Mapping[str, Resampled] = field(default_factory=dict)
    """The same, over the draws that a verdict needs; empty before `resampled`."""

    def resampled(self) -> Measured:
        """This with its `resamples`. Slow, so it is for the first and the last measurement of a run alone."""
        found = {name: Resampled.of(score) for name, score in self.statistics.items()}
        return replace(self, statistics={}, resamples={**self.resamples, **found})

    def means(self) -> dict[str, float]:
        """The mean of each measure."""
        return {**{name: float(values.mean()) for name, values in self.scores.items()}, **self.numbers}

    def main(self) -> float:
        """The mean of all measures at full width, by which checkpoints are compared."""
        means = [value for name, value in self.means().items() if is_full_size(name)]
        return sum(means) / len(means)


class Evaluation(Protocol):
    """Anything that measures a model: before the first step, now and then, and at the end."""

    def measure(self, encoder: PackedEncoder, device: str, tokens_per_chunk: int) -> Measured:
        """The scores of the model as it is. The model is not in training meanwhile."""
        ...


class HeldOutPairs:
    """The evaluation on one held-out data set, tokenised once."""

    def __init__(
        self,
        name: str,
        queries: Encoded,
        candidates: Encoded,
        relevant: Sequence[set[int]],
        sizes: Sequence[int],
    ) -> None:
        self.name = name
        self.queries = queries
        self.candidates = candidates
        self._relevant = relevant
        self._sizes = sizes

    @classmethod
    def open(
        cls,
        data: DataSet,
        *,
        tokeniser: Tokeniser,
        prompts: Prompts,
        cache: Path,
        limit: int,
        sizes: Sequence[int],
    ) -> HeldOutPairs:
        """The first `limit` pairs of a data set; equal queries become one with several right answers.

        Raises GembError if the data set holds no pairs.
        """
        query_template, passage_template = templates(data, prompts)
        queries: dict[str, set[int]] = {}
        candidates: dict[str, int] = {}
        with open_rows(data, cache) as rows:
            if rows.shape != "pairs":
                raise GembError(
                    f"evaluation.pairs: {rows.name} holds {rows.shape} rows; give pairs of query and positive"
                )
            for number in range(min(limit, rows.size)):
                example = rows.example(number)
                query = query_template.render(example.query.text, example.query.title)
                for positive in example.positives:
                    rendered = passage_template.render(positive.text, positive.title)
                    place = candidates.setdefault(rendered, len(candidates))
                    queries.setdefault(query, set()).add(place)
            name = rows.name
        return cls(
            name,
            _encoded(tokeniser, list(queries), query_template),
            _encoded(tokeniser, list(candidates), passage_template),
            list(queries.values()),
            sizes,
        )

    def measure(self, encoder: PackedEncoder, device: str, tokens_per_chunk: int) -> Measured:
        """nDCG@10 of each query at each size, and the cosines of right and of best wrong candidates."""
        queries = encode_all(encoder, self.queries, device, tokens_per_chunk)
        candidates = encode_all(encoder, self.candidates, device, tokens_per_chunk)
        scores: dict[str, NDArray[np.float64]] = {}
        histograms: dict[str, NDArray[np.int64]] = {}
        for size in self._sizes:
            gains, right, wrong = self._ranked(unit(queries, size), unit(candidates, size))
            scores[measure_name(f"{self.name}/nDCG@{RANKS}", size, self._sizes[0])] = gains
            if size == self._sizes[0]:
                for name, cosines in (("positive", right), ("best other", wrong)):
                    counts, _ = np.histogram(np.clip(cosines, -1, 1), bins=BINS, range=(-1, 1))
                    histograms[f"{self.name}/{name}"] = counts.astype(np.int64)
        return Measured(scores, histograms)

    def _ranked(
        self, queries: Tensor, candidates: Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(nDCG@10, highest cosine of a right candidate, of a wrong one) of each query, each [Q]."""
        gains = np.zeros(len(queries))
        right, wrong = np.zeros(len(queries)), np.full(len(queries), -1.0)
        discounts = 1 / np.log2(np.arange(2, RANKS + 2))
        for start in range(0, len(queries), _BLOCK):
            cosines = (queries[start : start + _BLOCK] @ candidates.T).cpu().numpy()
            for offset, row in enumerate(cosines):
                number = start + offset
                places = np.fromiter(self._relevant[number], np.int64)
                right[number] = row[places].max()
                # A wrong candidate with the same cosine stands before the right one: no model wins by a tie.
                others = np.sort(np.delete(row, places))
                ranks = len(others) - np.searchsorted(others, np.sort(row[places])[::-1], side="left")
                ranks = ranks + np.arange(len(places))  # from 0
                found = discounts[ranks[ranks < RANKS]].sum()
                gains[number] = found / discounts[: min(RANKS, len(places))].sum()
                if len(others):
                    wrong[number] = others[-1]
        return gains, right, wrong


def measure_name(name: str, size: int, full: int) -> str:
    """`docstrings/nDCG@10`, or `docstrings/nDCG@10/64` at a smaller size."""
    return name if size == full else f"{name}/{size}"


def is_full_size(name: str) -> bool:
    """Whether a measure is one at full width."""
    return not name.rpartition("/")[2].isdecimal()


class Evaluations:
    """Several evaluations as one."""

    def __init__(self, parts: Sequence[Evaluation]) -> None:
        self._parts = parts

    def measure(self, encoder: PackedEncoder, device: str, tokens_per_chunk: int) -> Measured:
        """All that the parts measure."""
        found = [part.measure(encoder, device, tokens_per_chunk) for part in self._parts]
        return Measured(
            {name: values for one in found for name, values in one.scores.items()},
            {name: values for one in found for name, values in one.histograms.items()},
            {name: value for one in found for name, value in one.numbers.items()},
            {name: score for one in found for name, score in one.statistics.items()},
        )


@torch.no_grad()
def encode_all(encoder: PackedEncoder, texts: Encoded, device: str, tokens_per_chunk: int) -> Tensor:
    """[R, D] of all the texts, in their order, fp32, without a graph."""
    vectors: Tensor | None = None
    for rows in chunks(texts.lengths, tokens_per_chunk):
        chosen = texts.take(rows)
        ids = torch.from_numpy(chosen.ids.astype(np.int64)).to(device)
        part = encoder(ids, chosen.lengths, np.full(len(rows), texts.prompt_tokens, np.int32)).float()
        if vectors is None:
            vectors = part.new_empty(len(texts.lengths), part.shape[1])
        vectors[torch.from_numpy(rows).to(device)] = part
    if vectors is None:
        raise ValueError("there are no texts to encode")
    return vectors


def _encoded(tokeniser: Tokeniser, texts: Sequence[str], template: Template) -> Encoded:
    return tokeniser.encode(texts, prompt_tokens=tokeniser.prompt_tokens(template.prefix))
