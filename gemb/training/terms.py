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
    Guide,
    contrastive,
    cosent,
    cosine_error,
    count_left_out,
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
from gemb.training.teacher_recipe import FalseNegatives

Teacher = Callable[[TrainingBatch], Tensor]
"""A teacher's vectors [R, E] of the rows of a batch."""

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
    finder: Tensor | None
    """[R, E'], by which false negatives are found; None where those are the model's own."""

    @classmethod
    def of(cls, vectors: Tensor, batch: TrainingBatch, teacher: Tensor | None, finder: Tensor | None) -> Rows:
        """The parts of vectors[R, D]."""
        pairs = batch.pairs
        has_negatives = len(vectors) > 2 * pairs
        owner = torch.from_numpy(batch.owner).to(vectors.device) if has_negatives else None
        negatives = vectors[2 * pairs :] if has_negatives else None
        return cls(batch, vectors[:pairs], vectors[pairs : 2 * pairs], negatives, owner, teacher, finder)

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

    def guide(self, settings: FalseNegatives | None) -> Guide | None:
        """The view of whoever finds false negatives; None where nobody does."""
        if settings is None:
            return None
        margins = settings.margin, settings.relative_margin is not None
        if settings.own:
            apart = None if self.negatives is None else self.negatives.detach()
            return Guide(self.queries.detach(), self.positives.detach(), apart, *margins)
        if self.finder is None:
            raise ValueError("false negatives are to be found by a teacher's vectors, and there are none")
        pairs = self.batch.pairs
        apart = None if self.negatives is None else self.finder[2 * pairs :]
        return Guide(self.finder[:pairs], self.finder[pairs : 2 * pairs], apart, *margins)


def finder_of(term: LossTerm) -> FalseNegatives | None:
    """Who finds false negatives for a term."""
    return term.false_negatives if isinstance(term, ContrastiveTerm) else None


def _left_out(term: ContrastiveTerm, rows: Rows) -> dict[str, int]:
    """How many candidates are no negatives, and of how many, for the report."""
    hashes = rows.hashes() if term.mask_duplicates else {}
    guide = rows.guide(term.false_negatives)
    found = count_left_out(
        len(rows.queries),
        len(rows.positives),
        owner=rows.owner,
        query_hashes=hashes.get("query_hashes"),
        positive_hashes=hashes.get("positive_hashes"),
        negative_hashes=hashes.get("negative_hashes"),
        guide=guide,
    )
    told = {"candidates": found.candidates, "masked_duplicates": found.duplicates}
    return told if guide is None else {**told, "false_negatives": found.false_negatives}


class BatchLoss:
    """The loss of one batch: called with its vectors [R, D] it gives (loss, terms), see `Loss`."""

    def __init__(
        self,
        compute: Callable[[Rows], tuple[Tensor, dict[str, float], dict[str, int]]],
        batch: TrainingBatch,
        teacher: Tensor | None,
        finder: Tensor | None,
    ) -> None:
        self._compute = compute
        self._batch = batch
        self._teacher = teacher
        self._finder = finder
        self.counts: Mapping[str, int] = {}
        """Of the last call: candidates of the contrastive loss, and how many were left out."""

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """The loss and its terms."""
        rows = Rows.of(vectors, self._batch, self._teacher, self._finder)
        loss, terms, self.counts = self._compute(rows)
        return loss, terms


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
        finder: Teacher | None = None,
        projection: nn.Module | None = None,
    ) -> None:
        """`finder` gives the vectors by which false negatives are found, unless those are the model's own.

        `projection` maps the student's unit rows [B, D] to the teacher's space [B, E].
        """
        self._terms = terms
        self._sizes = tuple(sizes)
        self._weights = tuple(weights)
        self._teacher = teacher
        self._finder = finder
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

    def of(self, batch: TrainingBatch) -> BatchLoss:
        """The loss of one batch, as a function of its vectors [R, D].

        Raises GembError if no term is for this kind of batch.
        """
        self.check_kind(batch.dataset, batch.kind)
        here = [term for term in self._terms if batch.kind in term.batches]
        teacher = finder = None
        if self._teacher is not None and any(term.needs_teacher for term in here):
            teacher = self._teacher(batch)
        if self._finder is not None and any(finder_of(term) is not None for term in here):
            finder = teacher if self._finder is self._teacher and teacher is not None else self._finder(batch)
        return BatchLoss(self._computed, batch, teacher, finder)

    def _computed(self, rows: Rows) -> tuple[Tensor, dict[str, float], dict[str, int]]:
        total: Tensor | None = None
        told: dict[str, float] = {}
        counts: dict[str, int] = {}
        for term in self._terms:
            if rows.batch.kind not in term.batches:
                continue
            values = self._values(term, rows)  # [K], or [1] for a term that has no sizes
            weights = torch.tensor(self._weights[: len(values)], dtype=values.dtype, device=values.device)
            part = term.weight * (values * weights).sum()
            total = part if total is None else total + part
            for size, value in zip(self._sizes, values.detach().tolist(), strict=False):
                told[term.name if size == self._sizes[0] else f"{term.name}@{size}"] = value
            if isinstance(term, ContrastiveTerm):
                counts = _left_out(term, rows)
        if total is None:
            raise ValueError(f"no term is for batches of {rows.batch.kind}")
        return total, told, counts

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
                    guide=rows.guide(term.false_negatives),
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
