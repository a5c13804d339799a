import itertools
import math
import random
from collections.abc import Hashable

import pytest

from gemb.store.fusion import fuse


def plainly(rankings: list[list[str]], k: int, weights: list[float]) -> dict[str, float]:
    """The formula, key by key."""
    return {
        key: math.fsum(
            weight / (k + ranking.index(key) + 1)
            for ranking, weight in zip(rankings, weights, strict=True)
            if key in ranking
        )
        for key in set(itertools.chain.from_iterable(rankings))
    }


def random_rankings(seed: int) -> list[list[str]]:
    source = random.Random(seed)
    return [source.sample("abcdefghij", source.randint(0, 10)) for _ in range(source.randint(1, 5))]


@pytest.mark.parametrize("seed", range(20))
def test_fuse_equals_the_formula(seed: int) -> None:
    rankings = random_rankings(seed)
    weights = [random.Random(seed).uniform(0, 3) for _ in rankings]
    fused = fuse(rankings, 7, weights)
    assert dict(fused) == plainly(rankings, 7, weights)
    assert [score for _, score in fused] == sorted((score for _, score in fused), reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_rankings_does_not_change_a_score(seed: int) -> None:
    rankings = random_rankings(seed)
    assert dict(fuse(rankings)) == dict(fuse(rankings[::-1]))


def test_a_common_factor_of_the_weights_does_not_change_the_order() -> None:
    rankings = ["abcd", "dbac", "cdab"]
    once, twice = fuse(rankings, weights=[1, 2, 3]), fuse(rankings, weights=[2, 4, 6])
    assert [key for key, _ in once] == [key for key, _ in twice]


def test_one_ranking_stays_as_it_is() -> None:
    assert [key for key, _ in fuse(["xyz"])] == ["x", "y", "z"]


@pytest.mark.parametrize("rankings", [[], [[]], [[], []]])
def test_nothing_fuses_to_nothing(rankings: list[list[str]]) -> None:
    assert fuse(rankings) == []


def test_keys_need_not_be_comparable() -> None:
    rankings: list[list[Hashable]] = [[("passage", 1), 7], [7, None]]
    assert [key for key, _ in fuse(rankings)] == [7, ("passage", 1), None]


def test_ranks_1_and_3_beat_ranks_2_and_2() -> None:
    scores = dict(fuse([["a", "b", "x"], ["y", "b", "a"]]))
    assert scores["a"] == pytest.approx(0.0322665, abs=5e-8)
    assert scores["b"] == pytest.approx(0.0322581, abs=5e-8)
    assert next(iter(scores)) == "a"


def test_a_weight_of_0_leaves_the_keys_at_the_end() -> None:
    assert fuse([["a"], ["b", "a"]], 1, [2, 0]) == [("a", 1.0), ("b", 0.0)]


def test_equal_scores_go_by_the_best_rank_then_by_the_first_ranking() -> None:
    # weight 2 at rank 3 is weight 1 at rank 1 where k is 1: 2/4 = 1/2
    assert fuse([["p", "q", "late"], ["early"]], 1, [2, 1])[2:] == [("early", 0.5), ("late", 0.5)]
    assert [key for key, _ in fuse([["b"], ["a"]])] == ["b", "a"]
    assert [key for key, _ in fuse([["a"], ["b"]])] == ["a", "b"]


def test_rounding_breaks_no_tie() -> None:
    ranks = [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert len({score for _, score in fuse(ranks)}) == 1


@pytest.mark.parametrize(
    ("k", "weights", "message"),
    [
        (-1, None, "k is -1, but must be at least 0"),
        (60, [1.0], "1 weights for 2 rankings"),
        (60, [1.0, -1.0], r"weights are \[1.0, -1.0\], but must be finite and at least 0"),
        (60, [1.0, math.inf], r"weights are \[1.0, inf\], but must be finite and at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(k: int, weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        fuse([["a"], ["b"]], k, weights)


def test_a_key_twice_in_one_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ranking 2 holds 'b' twice$"):
        fuse([["a"], ["b", "c", "b"]])
