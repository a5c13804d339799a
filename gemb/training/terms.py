"""The loss of a recipe: its terms at all Matryoshka sizes, added up, and each told apart.

R rows of a batch (B queries, B positives, N hard negatives), D model width, E teacher width, K sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemb.errors import GembError
from gemb.losses import (
    GECKO,
    GTE,
    QWEN3,
    Direction,
    contrastive,
    cosent,
    cosine_error,
    embedding_matching,
    orthogonality,
    samtone,
    score_matching,
    spread_out,
)
from gemb.training.batches import TrainingBatch
from gemb.training.recipe import (
    AnyTerm,
    ContrastiveTerm,
    CosineErrorTerm,
    LossTerm,
    MatchingTerm,
    OrthogonalityTerm,
    SameTowerTerm,
    ScoreMatchingTerm,
    SimilarityTerm,
    SpreadOutTerm,
)

Teacher = Callable[[TrainingBatch], Tensor]
"""The teacher's vectors [R, E] of the rows of a batch."""

_ALSO: Mapping[str, Sequence[Direction]] = {
    "none": (),
    "gecko": GECKO,
    "qwen3": QWEN3,
    "gte": GTE,
}


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch's vectors by role; all have D columns."""

    batch: TrainingBatch
    queries: Tensor
    """[B, D]; of scored pairs the first texts."""
    positives: Tensor
    """[B, D]; of scored pairs the second texts."""
    negatives: Tensor | None
    """[N, D]; None where there are none."""
    owner: Tensor | None
    teacher: Tensor | None
    """[R, E]."""

    @classmethod
    def of(cls, vectors: Tensor, batch: TrainingBatch, teacher: Tensor | None) -> Rows:
        """The parts of vectors[R, D]."""
        pairs = batch.pairs
        has_negatives = len(vectors) > 2 * pairs
        owner = torch.from_numpy(batch.owner).to(vectors.device) if has_negatives else None
        negatives = vectors[2 * pairs :] if has_negatives else None
        return cls(batch, vectors[:pairs], vectors[pairs : 2 * pairs], negatives, owner, teacher)

    def hashes(self) -> dict[str, Tensor]:
        """The hashes of all texts by role, as the losses take them."""
        found = torch.from_numpy(self.batch.hashes).to(self.queries.device)
        pairs = self.batch.pairs
        hashes = {"query_hashes": found[:pairs], "positive_hashes": found[pairs : 2 * pairs]}
        return hashes if self.negatives is None else {**hashes, "negative_hashes": found[2 * pairs :]}

    def taught(self) -> Tensor:
        """The teacher's vectors; without them a recipe with such a term is refused."""
        if self.teacher is None:
            raise ValueError("a term needs a teacher's vectors, and there are none")
        return self.teacher


class Loss:
    """The sum of a recipe's terms at all sizes. Called with a batch's vectors it gives (loss, terms).

    `terms` has the unweighted value of each term at the full width by its name, and `NAME@SIZE` for each
    smaller size. `sizes` begin with the full width.
    """

    def __init__(
        self,
        terms: Sequence[AnyTerm],
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        teacher: Teacher | None = None,
        projection: nn.Module | None = None,
    ) -> None:
        """`projection` maps the student's unit rows [B, D] to the teacher's space [B, E]."""
        self._terms = terms
        self._sizes = tuple(sizes)
        self._weights = tuple(weights)
        self._teacher = teacher
        self._projection = projection

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the loss itself that are trained: of the projection."""
        every = self._projection.parameters() if self._projection is not None else ()
        return [parameter for parameter in every if parameter.requires_grad]

    def check_kind(self, dataset: str, kind: str) -> None:
        """Raises GembError if no term is for batches of a data set of this kind."""
        if not any(kind in term.batches for term in self._terms):
            names = ", ".join(term.name for term in self._terms)
            hint = "similarity" if kind == "scored" else "contrastive"
            raise GembError(
                f"data set {dataset} holds {'scored pairs' if kind == 'scored' else 'pairs'}, but no term of "
                f"losses ({names}) is for them; add - name: {hint}"
            )

    def of(self, batch: TrainingBatch) -> Callable[[Tensor], tuple[Tensor, Mapping[str, float]]]:
        """The loss of one batch, as a function of its vectors [R, D].

        Raises GembError if no term is for this kind of batch.
        """
        self.check_kind(batch.dataset, batch.kind)
        teacher = None
        if self._teacher is not None and any(term.needs_teacher for term in self._terms):
            teacher = self._teacher(batch)
        return lambda vectors: self._computed(Rows.of(vectors, batch, teacher))

    def _computed(self, rows: Rows) -> tuple[Tensor, Mapping[str, float]]:
        total: Tensor | None = None
        told: dict[str, float] = {}
        for term in self._terms:
            if rows.batch.kind not in term.batches:
                continue
            values = self._values(term, rows)  # [K], or [1] for a term that has no sizes
            weights = torch.tensor(self._weights[: len(values)], dtype=values.dtype, device=values.device)
            part = term.weight * (values * weights).sum()
            total = part if total is None else total + part
            for size, value in zip(self._sizes, values.detach().tolist(), strict=False):
                told[term.name if size == self._sizes[0] else f"{term.name}@{size}"] = value
        if total is None:
            raise ValueError(f"no term is for batches of {rows.batch.kind}")
        return total, told

    def _values(self, term: LossTerm, rows: Rows) -> Tensor:
        """The term at each size, [K]; a term without sizes gives [1]."""
        sizes = self._sizes
        match term:
            case ContrastiveTerm():
                hashes = rows.hashes() if term.mask_duplicates else {}
                return contrastive(
                    rows.queries,
                    rows.positives,
                    rows.negatives,
                    owner=rows.owner,
                    query_hashes=hashes.get("query_hashes"),
                    positive_hashes=hashes.get("positive_hashes"),
                    negative_hashes=hashes.get("negative_hashes"),
                    temperature=term.temperature,
                    hardness=term.hardness,
                    hardened=term.hardened,
                    negatives_of=term.negatives_of,
                    also=_ALSO[term.also],
                    sizes=sizes,
                    weights=self._weights,
                )
            case SameTowerTerm():
                hashes = rows.hashes() if term.mask_duplicates else {}
                return samtone(
                    rows.queries,
                    rows.positives,
                    both_sides=term.both_sides,
                    query_hashes=hashes.get("query_hashes"),
                    positive_hashes=hashes.get("positive_hashes"),
                    temperature=term.temperature,
                    sizes=sizes,
                    weights=self._weights,
                )
            case SpreadOutTerm():
                return spread_out(rows.queries, sizes=sizes) + spread_out(rows.positives, sizes=sizes)
            case OrthogonalityTerm():
                return orthogonality(rows.queries, others=rows.positives, sizes=sizes)
            case SimilarityTerm() | CosineErrorTerm():
                if rows.batch.scores is None:
                    raise ValueError(f"a batch of {rows.batch.dataset} is scored but has no scores")
                scores = torch.from_numpy(rows.batch.scores).to(rows.queries)
                if isinstance(term, CosineErrorTerm):
                    return cosine_error(rows.queries, rows.positives, scores, sizes=sizes)
                return cosent(rows.queries, rows.positives, scores, temperature=term.temperature, sizes=sizes)
            case MatchingTerm():
                return self._matching(term, rows)[None]
            case ScoreMatchingTerm():
                taught = rows.taught()
                pairs = rows.batch.pairs
                candidates = (
                    rows.positives if rows.negatives is None else torch.cat([rows.positives, rows.negatives])
                )
                return score_matching(
                    rows.queries,
                    candidates,
                    taught[:pairs],
                    taught[pairs:],
                    temperature=term.temperature,
                    teacher_temperature=term.teacher_temperature,
                    sizes=sizes,
                )
            case _:
                raise ValueError(f"no loss is known for {type(term).__name__}")

    def _matching(self, term: MatchingTerm, rows: Rows) -> Tensor:
        """The sum over queries, positives and hard negatives, a scalar."""
        taught, pairs = rows.taught(), rows.batch.pairs
        parts = [(rows.queries, taught[:pairs]), (rows.positives, taught[pairs : 2 * pairs])]
        if rows.negatives is not None and term.hard_negatives:
            parts.append((rows.negatives, taught[2 * pairs :]))
        values = [
            embedding_matching(
                student,
                teacher,
                distance=term.distance,
                projection=self._projection if term.projection else None,
                cut=not term.projection,
            )
            for student, teacher in parts
        ]
        return torch.stack(values).sum()
