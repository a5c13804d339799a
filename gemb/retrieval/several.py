"""Several indexes in one search: one ranking out of the answers of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.store import Hit
from gemb.store import Index as StoredIndex
from gemb.store.conditions import Condition
from gemb.store.field_types import FieldType
from gemb.store.where import parse

Ranking = Literal["vector", "lexical", "hybrid"]
"""What decides the order: cosines, BM25 of the words, or the ranks by both."""


@dataclass(frozen=True, slots=True)
class Found:
    """A hit, and the place of its index among those that were searched, from 0."""

    place: int
    hit: Hit


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a search asks for beside its queries."""

    k: int = 10
    ranking: Ranking = "vector"
    where: Condition | None = None
    exact: bool = False
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise GembError(f"k is {self.k}; ask for at least 1 document")
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise GembError(f"min_score is {self.min_score:g}; a score is a cosine, from -1 to 1")
        if self.min_score is not None and self.ranking == "lexical":
            raise GembError("min_score is a cosine, and a lexical search has none; leave one of them out")
        if self.exact and self.ranking == "lexical":
            raise GembError("a lexical search is always exact, and compares no vectors; leave exact out")


def search_all(
    indexes: Sequence[StoredIndex],
    wanted: Wanted,
    *,
    texts: Sequence[str] | None = None,
    vectors: NDArray[np.floating] | None = None,
) -> list[list[Found]]:
    """The k best documents of all `indexes` for each of Q queries, best first.

    A vector search takes `vectors`[Q, D], a lexical one `texts`, a hybrid one both. Cosines of the same
    encoder can be compared, so a vector search orders by them; BM25 scores and reciprocal ranks depend on
    the collection, so the others take the best of each index, then the second of each, and so on. Of equal
    hits the one of the index named first comes first.
    """
    answers = [
        index.search(
            None if wanted.ranking == "lexical" else vectors,
            words=None if wanted.ranking == "vector" else texts,
            k=wanted.k,
            where=wanted.where,
            exact=wanted.exact,
            min_score=wanted.min_score,
        )
        for index in indexes
    ]
    merge = _by_score if wanted.ranking == "vector" else _by_rank
    return [merge(rankings)[: wanted.k] for rankings in zip(*answers, strict=True)]


def _by_score(rankings: Sequence[Sequence[Hit]]) -> list[Found]:
    found = [Found(place, hit) for place, ranking in enumerate(rankings) for hit in ranking]
    if len(rankings) == 1:
        return found
    return sorted(found, key=lambda one: -(one.hit.score or 0.0))  # stable


def _by_rank(rankings: Sequence[Sequence[Hit]]) -> list[Found]:
    return [
        Found(place, hit)
        for same_rank in zip_longest(*rankings)
        for place, hit in enumerate(same_rank)
        if hit is not None
    ]


def parse_where(text: str, indexes: Sequence[StoredIndex], source: str = "--where") -> Condition:
    """The condition that `text` states about the metadata of any of `indexes`.

    A field of one index alone is simply missing in the documents of the others.

    Raises GembError with the mistake under the expression, as `gemb.store.where.parse` does.
    """
    fields: dict[str, FieldType] = {}
    for index in indexes:
        for name, type_ in index.fields().items():
            fields[name] = type_ if fields.get(name, type_) == type_ else "mixed"
    return parse(text, fields, source=source)
