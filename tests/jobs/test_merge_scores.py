"""The searches for weights, on scores made up."""

import pytest

from gemb.jobs.merge_scores import Trial, chosen, greedy, mixtures


def best(score: dict[tuple[float, ...], float]) -> list[Trial]:
    return list(greedy([0.5, 0.7, 0.6], score.__getitem__, budget=20))


def test_a_greedy_soup_adds_models_from_the_best_on_while_it_does_not_get_worse() -> None:
    trials = best({(0, 1, 1): 0.7, (1, 1, 1): 0.69})
    assert [list(trial.weights) for trial in trials] == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 1, 1],
        [1, 1, 1],
    ]
    assert list(chosen(trials).weights) == [0, 1, 1]  # as good as the best model, and of more models


def test_a_greedy_soup_drops_what_harms_and_goes_on() -> None:
    trials = best({(0, 1, 1): 0.65, (1, 1, 0): 0.8})
    assert list(trials[-1].weights) == [1, 1, 0]
    assert list(chosen(trials).weights) == [1, 1, 0]


def test_the_budget_bounds_the_soups_that_are_tried() -> None:
    assert len(list(greedy([0.5, 0.7, 0.6], lambda weights: 1.0, budget=1))) == 4


def peak(weights: tuple[float, ...]) -> float:
    return -sum((weight - wanted) ** 2 for weight, wanted in zip(weights, (0.2, 0.2, 2.6), strict=True))


@pytest.mark.parametrize("budget", [1, 2, 9, 40])
def test_mixtures_keep_the_sum_and_the_budget_and_begin_with_the_recipe(budget: int) -> None:
    trials = list(mixtures((1, 1, 1), peak, budget, seed=3))
    assert trials[0] == Trial((1, 1, 1), peak((1, 1, 1)), "recipe")
    assert len(trials) <= budget
    assert all(sum(trial.weights) == pytest.approx(3) for trial in trials)
    assert len({trial.weights for trial in trials}) == len(trials)
    assert trials == list(mixtures((1, 1, 1), peak, budget, seed=3))


def test_refining_comes_closer_than_the_best_one_drawn() -> None:
    trials = list(mixtures((1, 1, 1), peak, 40, seed=3))
    drawn = max(trial.score for trial in trials if trial.origin != "refined")
    assert chosen(trials).origin == "refined"
    assert chosen(trials).score > drawn
