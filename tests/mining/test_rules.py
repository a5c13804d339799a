import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.mining.rules import Pick, Rules, Shortage, choose

SCORES = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], np.float32)


def places(
    rules: Rules, positive: float = 2.0, scores: NDArray[np.float32] = SCORES, row: int = 0
) -> list[int]:
    return choose(rules, row, scores, positive).places


def test_without_rules_the_closest_are_taken() -> None:
    assert places(Rules(3)) == [0, 1, 2]


def test_the_relative_margin_is_a_share_of_the_positive() -> None:
    # below 0.8 - 0.25 * 0.8 = 0.6; 0.6 itself is float32 and a little above it
    assert places(Rules(2, relative_margin=0.25), positive=0.8) == [4, 5]


def test_the_relative_margin_lies_below_a_negative_positive() -> None:
    scores = np.array([-0.1, -0.19, -0.21, -0.23, -0.3], np.float32)
    # below -0.2 - 0.1 * 0.2 = -0.22, and not below 0.9 * -0.2 = -0.18
    assert places(Rules(4, relative_margin=0.1), positive=-0.2, scores=scores) == [3, 4]
    assert places(Rules(4, relative_margin=0.5), positive=-0.2, scores=scores) == [4]
    assert places(Rules(4, relative_margin=0.6), positive=-0.2, scores=scores) == []


def test_the_absolute_margin_is_a_distance() -> None:
    assert places(Rules(6, absolute_margin=0.25), positive=0.8) == [4, 5]
    assert places(Rules(6, absolute_margin=0.25), positive=-0.2, scores=SCORES - 1) == [4, 5]


def test_of_two_margins_both_hold() -> None:
    assert places(Rules(6, absolute_margin=0.1, relative_margin=0.5), positive=0.95) == [5]


def test_a_margin_of_nothing_still_keeps_what_equals_the_positive_out() -> None:
    assert places(Rules(6, relative_margin=0.0), positive=float(SCORES[1])) == [2, 3, 4, 5]


def test_score_limits_are_part_of_what_they_allow() -> None:
    rules = Rules(6, min_score=float(SCORES[4]), max_score=float(SCORES[1]))
    assert places(rules) == [1, 2, 3, 4]


def test_ranks_count_from_one() -> None:
    assert places(Rules(2, first_rank=2, last_rank=4)) == [1, 2]
    assert places(Rules(5, first_rank=2, last_rank=4)) == [1, 2, 3]


@pytest.mark.parametrize(("pick", "expected"), [("top", [0, 1]), ("last", [4, 5])])
def test_the_ends_are_picked(pick: Pick, expected: list[int]) -> None:
    assert places(Rules(2, pick=pick)) == expected


def test_a_sample_depends_on_seed_and_row_alone() -> None:
    rules = Rules(3, pick="random", seed=7)
    first = [places(rules, row=row) for row in range(50)]
    assert first == [places(rules, row=row) for row in range(50)]
    assert first != [places(Rules(3, pick="random", seed=8), row=row) for row in range(50)]
    assert all(found == sorted(set(found)) and len(found) == 3 for found in first)
    counts = np.bincount(np.concatenate(first), minlength=6)
    assert counts.min() > 10  # of 25 expected: every candidate has its chance


def test_two_scorers_are_fused_by_their_ranks() -> None:
    """Ranks (1, 3) of one candidate come before (2, 2) of another: 1/61 + 1/63 > 2/62 (method 11.13)."""
    first = np.array([0.9, 0.8, 0.7], np.float32)
    second = np.array([0.1, 0.2, 0.3], np.float32)  # ranks 3, 2, 1
    choice = choose(Rules(3), 0, first, 2.0, second, 2.0)
    assert choice.places == [0, 2, 1]  # (1, 3) and (3, 1) tie, and stand before (2, 2)
    choice = choose(Rules(1, pick="last"), 0, first, 2.0, second, 2.0)
    assert choice.places == [1]


def test_fusion_ignores_what_keeps_the_order_of_scores() -> None:
    random = np.random.default_rng(3)
    first = np.sort(random.uniform(size=20).astype(np.float32))[::-1].copy()
    second = random.uniform(size=20).astype(np.float32)
    plain = choose(Rules(20), 0, first, 2.0, second, 2.0)
    assert plain.places == choose(Rules(20), 0, first**3, 2.0, 5 * second - 9, 2.0).places


def test_a_candidate_keeps_the_margins_by_both_scorers() -> None:
    second = np.array([0.9, 0.1, 0.1, 0.1, np.nan, 0.1], np.float32)
    choice = choose(Rules(6, relative_margin=0.1), 0, SCORES, 0.8, second, 0.8)
    # 0 and 1 are too close for the first; 4 has no vector of the second
    assert choice.places == [2, 3, 5]
    assert choice.too_close == 3
    assert choice.shortage is Shortage.MARGIN
    strict = choose(Rules(6, relative_margin=0.1), 0, SCORES, 2.0, np.full(6, 0.9, np.float32), 0.8)
    assert (strict.places, strict.shortage) == ([], Shortage.SECOND)


@pytest.mark.parametrize(
    ("rules", "positive", "reason"),
    [
        (Rules(6), 2.0, None),
        (Rules(7), 2.0, Shortage.FEW),
        (Rules(3, first_rank=5), 2.0, Shortage.FEW),
        (Rules(2, relative_margin=0.1), 0.1, Shortage.MARGIN),
        (Rules(2, max_score=0.1), 2.0, Shortage.LIMITS),
    ],
)
def test_a_shortage_has_a_reason(rules: Rules, positive: float, reason: Shortage | None) -> None:
    assert choose(rules, 0, SCORES, positive).shortage is reason


def test_no_candidate_at_all_is_a_shortage() -> None:
    choice = choose(Rules(2), 0, SCORES[:0], 1.0, SCORES[:0], 1.0)
    assert (choice.places, choice.shortage, choice.too_close) == ([], Shortage.FEW, 0)
