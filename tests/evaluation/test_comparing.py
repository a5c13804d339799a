import numpy as np
import pytest

from gemb.evaluation import compare
from gemb.evaluation.tasks import Score, mean_of


def scores_of(values: np.ndarray) -> Score:
    return mean_of("accuracy", values, {})


def test_a_model_ties_with_itself() -> None:
    values = np.random.default_rng(1).random(50)
    found = compare([scores_of(values)], [scores_of(values)])
    assert (found.difference, found.low, found.high, found.verdict) == (0, 0, 0, "TIE")


def test_a_small_steady_gain_wins_and_the_other_way_round_it_is_a_regression() -> None:
    values = np.random.default_rng(1).random(50)
    better = values + 0.01
    assert compare([scores_of(better)], [scores_of(values)]).verdict == "WIN"
    assert compare([scores_of(values)], [scores_of(better)]).verdict == "REGRESSION"


def test_the_bounds_are_those_of_the_normal_distribution_for_many_items() -> None:
    random = np.random.default_rng(2)
    each = random.standard_normal(400)
    found = compare([scores_of(each)], [scores_of(np.zeros(400))])
    error = each.std() / 20
    assert found.low == pytest.approx(each.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(each.mean() + 1.96 * error, abs=0.15 * error)


def test_a_metric_that_is_no_mean_is_computed_anew_for_each_draw() -> None:
    values = np.random.default_rng(3).random(40)
    median = Score(
        "median", {"median": float(np.median(values))}, 40, lambda items: float(np.median(values[items]))
    )
    lower = Score("median", {"median": 0.0}, 40, lambda items: 0.0)
    found = compare([median], [lower])
    assert found.verdict == "WIN"
    assert found.low < found.difference < found.high


def test_the_mean_over_data_sets_weighs_them_alike() -> None:
    small, large = np.full(10, 0.5), np.full(1000, 0.1)
    found = compare(
        [scores_of(small), scores_of(large)], [scores_of(np.zeros(10)), scores_of(np.zeros(1000))]
    )
    assert found.difference == pytest.approx(0.3)


def test_scores_of_other_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="accuracy of 3 items against accuracy of 4"):
        compare([scores_of(np.zeros(3))], [scores_of(np.zeros(4))])


def test_the_seed_decides_the_draws() -> None:
    values = [scores_of(np.random.default_rng(4).standard_normal(30))], [scores_of(np.zeros(30))]
    assert compare(*values, seed=1) == compare(*values, seed=1)
    assert compare(*values, seed=1) != compare(*values, seed=2)
