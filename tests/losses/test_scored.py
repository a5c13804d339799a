"""Losses for pairs with a similarity score."""

import math
import re

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, CosineSimilarityLoss
from torch import Tensor, nn

from gemb.losses import cosent, cosine_error
from tests.losses import plain


def pairs(rows: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Two texts and a score, scores repeating."""
    generator = torch.Generator().manual_seed(rows)
    first, second = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second, torch.randint(0, 4, (rows,), generator=generator).double() / 3


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_cosent_is_its_formula_at_every_size(rows: int) -> None:
    first, second, scores = pairs(rows)
    expected = []
    for size in (2, 6):
        cosines = [plain.cosine(a[:size], b[:size]) for a, b in zip(first, second, strict=True)]
        total = sum(
            math.exp((cosines[j] - cosines[i]) / 0.1)
            for i in range(rows)
            for j in range(rows)
            if scores[i] > scores[j]
        )
        expected.append(math.log1p(total))
    found = cosent(first, second, scores, temperature=0.1, sizes=(2, 6))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_cosent_is_that_of_sentence_transformers_in_value_and_gradient() -> None:
    first, second, scores = pairs(12)
    leaves = [first.requires_grad_(), second.requires_grad_()]
    loss = CoSENTLoss(nn.Identity(), scale=20.0)  # type: ignore[arg-type]
    wanted = loss.compute_loss_from_embeddings(leaves, scores)
    found = cosent(first, second, scores, temperature=0.05)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for given, want in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(given, want, rtol=0, atol=1e-12)


def test_the_gradients_are_the_derivatives() -> None:
    first, second, scores = pairs(5)
    leaves = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: cosent(a, b, scores, temperature=0.3, sizes=(6, 3)), leaves)
    assert torch.autograd.gradcheck(lambda a, b: cosine_error(a, b, scores, sizes=(6, 3)), leaves)


def test_only_the_order_of_scores_counts_for_cosent() -> None:
    first, second, scores = pairs(9)
    moved = cosent(first, second, scores.exp() * 100)
    torch.testing.assert_close(moved, cosent(first, second, scores))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        cosent(first[order], second[order], scores[order]), cosent(first, second, scores)
    )


def test_equal_scores_have_no_cosent_loss_and_no_gradient() -> None:
    first, second, _ = pairs(4)
    first.requires_grad_()
    loss = cosent(first, second, torch.ones(4))
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), first)[0].abs().max() == 0


def test_cosent_neither_overflows_nor_vanishes_at_a_low_temperature() -> None:
    first = torch.eye(2)[[0, 0]].requires_grad_()
    loss = cosent(first, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0]), temperature=0.001)
    assert loss.item() == pytest.approx(2000)
    assert torch.autograd.grad(loss.sum(), first)[0].isfinite().all()


def test_the_cosine_error_is_its_formula_and_that_of_sentence_transformers() -> None:
    first, second, scores = pairs(8)
    cosines = [plain.cosine(a, b) for a, b in zip(first, second, strict=True)]
    expected = sum((c - float(s)) ** 2 for c, s in zip(cosines, scores, strict=True)) / 8
    found = cosine_error(first, second, scores)[0]
    assert found.item() == pytest.approx(expected, rel=1e-12)
    loss = CosineSimilarityLoss(nn.Identity())  # type: ignore[arg-type]
    theirs = loss.compute_loss_from_embeddings([first.float(), second.float()], scores)
    torch.testing.assert_close(found.float(), theirs)


def test_what_does_not_fit_is_refused() -> None:
    first, second, scores = pairs(4)
    with pytest.raises(ValueError, match=re.escape("4 and 4 texts have 3 scores; each pair has one")):
        cosent(first, second, scores[:3])
    with pytest.raises(ValueError, match=r"^there are no pairs; the mean over no rows has no value$"):
        cosine_error(first[:0], second[:0], scores[:0])
    with pytest.raises(ValueError, match=r"^temperature is 0\.0, not above 0$"):
        cosent(first, second, scores, temperature=0.0)
