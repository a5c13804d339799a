"""The loss of a recipe is the weighted sum of the losses of gemb.losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gemb.losses import (
    GECKO,
    Guide,
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
    MatchingTerm,
    OrthogonalityTerm,
    SameTowerTerm,
    ScoreMatchingTerm,
    SimilarityTerm,
    SpreadOutTerm,
)
from gemb.training.teacher_recipe import FalseNegatives
from gemb.training.terms import Loss
from tests.training.fakes import hashes_of, tiny_batch

SIZES, WEIGHTS = (8, 4), (1.0, 0.5)
BATCH = tiny_batch(5, 3)
SCORED = replace(tiny_batch(5), kind="scored", scores=np.linspace(0, 1, 5, dtype=np.float32))
VECTORS = torch.randn(13, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TEACHER = torch.randn(13, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Q, P, N = VECTORS[:5], VECTORS[5:10], VECTORS[10:]
OWNER = torch.from_numpy(BATCH.owner)


def value(*terms: AnyTerm, batch: TrainingBatch = BATCH, vectors: Tensor = VECTORS) -> float:
    loss = Loss(terms, SIZES, WEIGHTS, teacher=lambda batch: TEACHER[: len(batch.lengths)])
    return float(loss.of(batch)(vectors)[0])


def weighted(values: Tensor) -> float:
    return float(values @ torch.tensor(WEIGHTS, dtype=values.dtype))


def test_terms_are_the_losses_at_all_sizes() -> None:
    assert value(ContrastiveTerm(name="contrastive")) == pytest.approx(
        weighted(contrastive(Q, P, N, owner=OWNER, sizes=SIZES))
    )
    assert value(
        ContrastiveTerm(name="contrastive", also="gecko", negatives_of="all", temperature=0.2)
    ) == pytest.approx(
        weighted(
            contrastive(
                Q,
                P,
                N,
                owner=OWNER,
                sizes=SIZES,
                also=GECKO,
                negatives_of="all",
                temperature=0.2,
            )
        )
    )
    assert value(SameTowerTerm(name="same_tower", temperature=0.1)) == pytest.approx(
        weighted(samtone(Q, P, temperature=0.1, sizes=SIZES))
    )
    assert value(SpreadOutTerm(name="spread_out")) == pytest.approx(
        weighted(spread_out(Q, sizes=SIZES) + spread_out(P, sizes=SIZES))
    )
    assert value(OrthogonalityTerm(name="orthogonality")) == pytest.approx(
        weighted(orthogonality(Q, others=P, sizes=SIZES))
    )


def test_terms_of_scored_pairs_are_the_losses_at_all_sizes() -> None:
    scores = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert value(SimilarityTerm(name="similarity"), batch=SCORED, vectors=VECTORS[:10]) == pytest.approx(
        weighted(cosent(Q, P, scores, sizes=SIZES))
    )
    assert value(CosineErrorTerm(name="cosine_error"), batch=SCORED, vectors=VECTORS[:10]) == pytest.approx(
        weighted(cosine_error(Q, P, scores, sizes=SIZES))
    )


def test_matching_adds_queries_positives_and_hard_negatives_and_has_no_sizes() -> None:
    parts = [embedding_matching(VECTORS[rows], TEACHER[rows], cut=True) for rows in (slice(5), slice(5, 10))]
    own = embedding_matching(N, TEACHER[10:], cut=True)
    assert value(MatchingTerm(name="matching")) == pytest.approx(float(sum(parts) + own))
    assert value(MatchingTerm(name="matching", hard_negatives=False)) == pytest.approx(float(sum(parts)))


def test_a_map_is_used_by_the_terms_that_ask_for_it_and_cut_vectors_by_the_others() -> None:
    projection = torch.nn.Linear(8, 6, bias=False).double()
    for wanted in (True, False):
        term = MatchingTerm(name="matching", projection=wanted)
        loss = Loss((term,), SIZES, WEIGHTS, teacher=lambda batch: TEACHER, projection=projection)
        expected = sum(
            embedding_matching(mine, theirs, projection=projection if wanted else None, cut=not wanted)
            for mine, theirs in ((Q, TEACHER[:5]), (P, TEACHER[5:10]), (N, TEACHER[10:]))
        )
        torch.testing.assert_close(loss.of(BATCH)(VECTORS)[0], torch.as_tensor(expected))
        assert loss.parameters == [projection.weight]
    projection.requires_grad_(False)
    assert loss.parameters == []


def test_score_matching_has_the_hard_negatives_among_its_candidates() -> None:
    expected = score_matching(Q, VECTORS[5:], TEACHER[:5], TEACHER[5:], sizes=SIZES)
    assert value(ScoreMatchingTerm(name="score_matching")) == pytest.approx(weighted(expected))


def test_a_sum_has_the_weight_of_each_term() -> None:
    first, second = ContrastiveTerm(name="contrastive"), SpreadOutTerm(name="spread_out", weight=0.3)
    expected = value(first) + 0.3 * value(SpreadOutTerm(name="spread_out"))
    assert value(first, second) == pytest.approx(expected)


def test_terms_for_other_batches_are_left_out() -> None:
    both = (ContrastiveTerm(name="contrastive"), SimilarityTerm(name="similarity"))
    assert value(*both) == value(both[0])
    assert value(*both, batch=SCORED, vectors=VECTORS[:10]) == value(
        both[1], batch=SCORED, vectors=VECTORS[:10]
    )


def test_equal_texts_are_no_negatives_unless_wished() -> None:
    texts = ["a", "b", "a", "d", "e", *"pqrst", *"xyz"]
    batch = replace(BATCH, hashes=hashes_of(texts))
    masked = value(ContrastiveTerm(name="contrastive"), batch=batch)
    assert masked < value(ContrastiveTerm(name="contrastive"))
    assert value(ContrastiveTerm(name="contrastive", mask_duplicates=False), batch=batch) == value(
        ContrastiveTerm(name="contrastive")
    )


@pytest.mark.parametrize(("absolute", "relative"), [(None, None), (-0.3, None), (None, 0.4)])
@pytest.mark.parametrize("own", [False, True])
def test_false_negatives_are_found_by_the_guide_of_the_losses(
    absolute: float | None, relative: float | None, own: bool
) -> None:
    finder = FalseNegatives(own=own, absolute_margin=absolute, relative_margin=relative)
    term = ContrastiveTerm(name="contrastive", false_negatives=finder)
    loss = Loss((term,), SIZES, WEIGHTS, finder=lambda batch: TEACHER).of(BATCH)
    value, _ = loss(VECTORS)
    rows = VECTORS if own else TEACHER
    margin = absolute or relative or 0.0
    guide = Guide(rows[:5], rows[5:10], rows[10:], margin, relative=relative is not None)
    expected = weighted(contrastive(Q, P, N, owner=OWNER, sizes=SIZES, guide=guide))
    assert float(value) == pytest.approx(expected)
    assert float(value) < weighted(contrastive(Q, P, N, owner=OWNER, sizes=SIZES))
    # Counted by hand: the others' positives and the own hard negatives that are too good.
    unit = torch.nn.functional.normalize(rows, dim=1)
    positive = (unit[:5] * unit[5:10]).sum(1)
    limit = positive - margin * (positive.abs() if relative is not None else 1)
    others = (unit[:5] @ unit[5:10].T > limit[:, None]) & ~torch.eye(5, dtype=torch.bool)
    apart = (unit[:5][OWNER] * unit[10:]).sum(1) > limit[OWNER]
    found = int(others.sum() + apart.sum())
    assert loss.counts == {"candidates": 23, "masked_duplicates": 0, "false_negatives": found}
    assert found > 0


def test_own_false_negatives_send_no_gradient_back() -> None:
    # The rule only chooses candidates: with all of them left out there is nothing to learn.
    term = ContrastiveTerm(name="contrastive", false_negatives=FalseNegatives(own=True, absolute_margin=2.0))
    vectors = VECTORS.clone().requires_grad_()
    loss = Loss((term,), SIZES, WEIGHTS).of(BATCH)
    (gradient,) = torch.autograd.grad(loss(vectors)[0], vectors)
    assert not gradient.any()
    assert loss.counts["false_negatives"] == loss.counts["candidates"] == 23


def test_masked_duplicates_are_counted() -> None:
    batch = replace(BATCH, hashes=hashes_of(["a", "b", "a", "d", "e", *"pqrst", *"xyz"]))
    loss = Loss((ContrastiveTerm(name="contrastive"),), SIZES, WEIGHTS).of(batch)
    loss(VECTORS)
    assert loss.counts == {"candidates": 23, "masked_duplicates": 2}
    unmasked = Loss((ContrastiveTerm(name="contrastive", mask_duplicates=False),), SIZES, WEIGHTS).of(batch)
    unmasked(VECTORS)
    assert unmasked.counts == {"candidates": 23, "masked_duplicates": 0}


def test_the_gradient_of_an_all_duplicate_batch_is_finite() -> None:
    batch = replace(tiny_batch(4), hashes=hashes_of(["same"] * 4 + ["other"] * 4))
    vectors = VECTORS[:8].clone().requires_grad_()
    loss, _ = Loss((ContrastiveTerm(name="contrastive"),), SIZES, WEIGHTS).of(batch)(vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert not gradient.abs().max() > 1e-12


def test_a_teacher_that_is_missing_is_an_error_of_the_program() -> None:
    loss = Loss((MatchingTerm(name="matching"),), SIZES, WEIGHTS)
    with pytest.raises(ValueError, match="a term needs a teacher's vectors, and there are none"):
        loss.of(BATCH)(VECTORS)
