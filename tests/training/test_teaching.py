"""A teacher's side of a run: the map to its space, and the share of its quality."""

import numpy as np
import pytest
import torch

from gemb.training.recipe import LossTerm, MatchingTerm, ScoreMatchingTerm
from gemb.training.teaching import Teaching, new_projection, share_of, width_notes


@pytest.mark.parametrize("teacher_width", [8, 12])
def test_a_new_map_keeps_lengths_and_angles_where_it_is_not_narrower(teacher_width: int) -> None:
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mapped = new_projection(8, teacher_width, seed=1)(rows)
    torch.testing.assert_close(mapped @ mapped.T, rows @ rows.T)


def test_a_new_map_follows_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    one, two, other = (new_projection(8, 12, seed=seed).weight for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_cut_that_the_teacher_does_not_declare_is_told() -> None:
    teacher = Teaching(
        "big", "1f3a", 96, lambda batch: np.zeros((0, 96), np.float32), lambda: None, sizes=(48,)
    )
    cut, mapped = MatchingTerm(name="matching"), MatchingTerm(name="matching", projection=True)
    assert width_notes(teacher, 64, [cut]) == [
        "the teacher's 96 dims are cut to the student's 64, a size that big does not declare; "
        "projection: true of matching learns a map instead"
    ]
    scores = ScoreMatchingTerm(name="score_matching")
    silent: list[tuple[int, LossTerm]] = [(48, cut), (96, cut), (128, cut), (64, mapped), (64, scores)]
    for width, term in silent:
        assert width_notes(teacher, width, [term]) == []


def test_the_share_is_of_the_means_of_what_both_have_at_full_width() -> None:
    student = {"a/nDCG@10": 0.3, "a/nDCG@10/64": 0.1, "b/spearman": 0.5, "c/nDCG@10": 0.9}
    teacher = {"a/nDCG@10": 0.6, "b/spearman": 0.9}
    assert share_of(student, teacher) == pytest.approx(0.8 / 1.5)
    assert share_of(student, {}) is None
