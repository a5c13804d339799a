"""Distillation of embeddings and of in-batch score distributions."""

import math
import re

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, EmbedDistillLoss
from torch import Tensor, nn

from gemb.losses import (
    Distance,
    contrastive,
    embedding_matching,
    orthogonality,
    score_matching,
    spread_out,
)
from tests.losses import plain
from tests.losses.goldens import NEGATIVES, POSITIVES, QUERIES, SIX_DIGITS

DISTANCES: tuple[Distance, ...] = ("l2", "squared", "cosine")


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_distance_is_its_formula() -> None:
    student, teacher = normal(7, 5, 1), normal(7, 5, 2)
    cosines = [plain.cosine(a, b) for a, b in zip(student, teacher, strict=True)]
    expected = {
        "l2": sum(math.sqrt(2 - 2 * c) for c in cosines) / 7,
        "squared": sum(2 - 2 * c for c in cosines) / 7,
        "cosine": sum(1 - c for c in cosines) / 7,
    }
    for distance in DISTANCES:
        found = embedding_matching(student, teacher, distance=distance)
        assert found.item() == pytest.approx(expected[distance], rel=1e-12)


@pytest.mark.parametrize(("distance", "metric"), [("l2", "l2"), ("cosine", "cosine")])
def test_the_distances_are_those_of_sentence_transformers(distance: Distance, metric: str) -> None:
    student, teacher = normal(7, 5, 1).requires_grad_(), nn.functional.normalize(normal(7, 5, 2))
    loss = EmbedDistillLoss(nn.Identity(), distance_metric=metric)  # type: ignore[arg-type]
    wanted = loss.compute_loss_from_embeddings([nn.functional.normalize(student)], [teacher])
    found = embedding_matching(student, teacher, distance=distance)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    given, want = (torch.autograd.grad(value, student)[0] for value in (found, wanted))
    torch.testing.assert_close(given, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_is_the_derivative_and_the_teacher_gets_none(distance: Distance) -> None:
    student, teacher = normal(4, 5, 1).requires_grad_(), normal(4, 7, 2).requires_grad_()
    projection = nn.Linear(5, 7, dtype=torch.float64)
    loss = embedding_matching(student, teacher, distance=distance, projection=projection)
    leaves = [student, projection.weight, teacher]
    given = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert [gradient is None for gradient in given] == [False, False, True]
    assert torch.autograd.gradcheck(
        lambda x: embedding_matching(x, teacher.detach(), distance=distance, cut=True), (student,)
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_an_equal_student_has_no_loss_and_a_finite_gradient(distance: Distance) -> None:
    student = normal(4, 5).requires_grad_()
    loss = embedding_matching(student, 2 * student.detach(), distance=distance)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-15


def test_a_cut_compares_the_common_prefix_made_unit_length() -> None:
    narrow, wide = normal(6, 4, 1), normal(6, 9, 2)
    expected = embedding_matching(narrow, wide[:, :4])
    torch.testing.assert_close(embedding_matching(narrow, wide, cut=True), expected)
    torch.testing.assert_close(embedding_matching(wide, narrow, cut=True), expected)


def test_turning_the_student_changes_the_matching_but_not_the_contrast_nor_the_spread() -> None:
    turn = torch.linalg.qr(normal(4, 4, 3)).Q
    queries, positives = QUERIES @ turn, POSITIVES @ turn
    teacher = normal(3, 4, 4)
    torch.testing.assert_close(contrastive(queries, positives), contrastive(QUERIES, POSITIVES))
    torch.testing.assert_close(spread_out(queries), spread_out(QUERIES))
    assert abs(float(embedding_matching(queries, teacher) - embedding_matching(QUERIES, teacher))) > 0.01


def test_no_rows_give_zero() -> None:
    assert embedding_matching(torch.empty(0, 4), torch.empty(0, 4)).item() == 0


def test_the_golden_values() -> None:
    basis = torch.eye(4, dtype=torch.float64)
    teachers = (basis[[0, 1, 2]], basis[[1, 2, 0]], basis[[3, 0, 1]])
    kinds = list(zip((QUERIES, POSITIVES, NEGATIVES), teachers, strict=True))
    parts = {
        distance: [
            embedding_matching(student, teacher, distance=distance).item() for student, teacher in kinds
        ]
        for distance in DISTANCES
    }
    assert parts["l2"] == pytest.approx([0.989545, 0.924219, 1.337286], abs=SIX_DIGITS)
    assert sum(parts["l2"]) == pytest.approx(3.251050, abs=SIX_DIGITS)
    assert sum(parts["squared"]) == pytest.approx(3.763249, abs=SIX_DIGITS)
    assert sum(parts["cosine"]) == pytest.approx(1.881624, abs=SIX_DIGITS)


def test_score_matching_is_the_divergence_in_loops() -> None:
    queries, candidates, teacher_queries, teacher_candidates = (
        normal(rows, width, seed) for seed, (rows, width) in enumerate([(4, 6), (9, 6), (4, 3), (9, 3)])
    )

    def distribution(a: Tensor, b: Tensor, temperature: float) -> list[float]:
        weights = [math.exp(plain.cosine(a, row) / temperature) for row in b]
        return [weight / sum(weights) for weight in weights]

    expected = []
    for size in (6, 2):
        total = 0.0
        for query, teacher_query in zip(queries, teacher_queries, strict=True):
            p = distribution(teacher_query, teacher_candidates, 0.2)
            q = distribution(query[:size], candidates[:, :size], 0.1)
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected.append(total / 4)
    found = score_matching(
        queries,
        candidates,
        teacher_queries,
        teacher_candidates,
        temperature=0.1,
        teacher_temperature=0.2,
        sizes=(6, 2),
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_score_matching_is_that_of_sentence_transformers_on_in_batch_columns() -> None:
    queries, candidates = normal(4, 6, 1).requires_grad_(), normal(5, 6, 2).requires_grad_()
    teacher_queries, teacher_candidates = normal(4, 6, 3), normal(5, 6, 4)
    unit = nn.functional.normalize
    scores = unit(teacher_queries) @ unit(teacher_candidates).T

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(a, b)

    loss = DistillKLDivLoss(nn.Identity(), similarity_fct=cosine, temperature=0.5)  # type: ignore[arg-type]
    columns = [queries, *(row.expand(4, -1) for row in candidates)]
    wanted = loss.compute_loss_from_embeddings(columns, scores) / 0.5**2
    found = score_matching(queries, candidates, teacher_queries, teacher_candidates, temperature=0.5)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for given, want in zip(
        torch.autograd.grad(found, [queries, candidates]),
        torch.autograd.grad(wanted, [queries, candidates]),
        strict=True,
    ):
        torch.testing.assert_close(given, want, rtol=0, atol=1e-12)


def test_score_matching_is_zero_for_the_teacher_itself() -> None:
    queries, candidates = normal(4, 6, 1), normal(5, 6, 2)
    turn = torch.linalg.qr(normal(6, 6, 3)).Q
    found = score_matching(queries @ turn, 2 * candidates @ turn, queries, candidates)
    torch.testing.assert_close(found, torch.zeros(1).double(), rtol=0, atol=1e-14)


def test_autocast_changes_nothing() -> None:
    rows = [
        normal(n, width, seed).float() for seed, (n, width) in enumerate([(4, 6), (5, 6), (4, 3), (5, 3)])
    ]
    projection = nn.Linear(6, 3)

    def losses() -> list[Tensor]:
        many = rows[0].repeat(50, 1)
        return [
            score_matching(*rows, sizes=(6, 2)),
            embedding_matching(rows[0], rows[2], projection=projection),
            spread_out(rows[0]),
            spread_out(many, sizes=(2, 3)),
            orthogonality(rows[0], others=rows[1]),
        ]

    expected = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given, wanted in zip(losses(), expected, strict=True):
            assert torch.equal(given, wanted)


def test_what_does_not_fit_is_refused() -> None:
    def refusal(message: str) -> str:
        return f"^{re.escape(message)}$"

    wide = "the student's rows are 4 wide but the teacher's 9; give a projection, or cut the wider one if it "
    with pytest.raises(ValueError, match=refusal(wide + "was trained with Matryoshka sizes")):
        embedding_matching(normal(3, 4), normal(3, 9))
    with pytest.raises(ValueError, match=refusal("3 student rows stand against 2 of the teacher")):
        embedding_matching(normal(3, 4), normal(2, 4))
    rows = "the student has 3 queries and 5 candidates, the teacher 3 and 4"
    with pytest.raises(ValueError, match=refusal(rows)):
        score_matching(normal(3, 4), normal(5, 4), normal(3, 4), normal(4, 4))
    with pytest.raises(ValueError, match=refusal("temperatures are 0.05 and 0.0, not above 0")):
        score_matching(normal(3, 4), normal(5, 4), normal(3, 4), normal(5, 4), teacher_temperature=0.0)
