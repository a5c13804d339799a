"""The search for a mixture: what is tried, that a kill loses nothing, and that it finds a known optimum."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemb.errors import GembError
from gemb.training.data_recipe import NO_PROMPTS, DataSet
from gemb.training.search import (
    SearchRecipe,
    Trial,
    best_first,
    from_cube,
    given_weights,
    propose,
    search,
    to_cube,
)

BEST = (0.55, 0.05, 0.3, 0.1)
"""The mixture at which `closeness` is largest."""


def data_sets(*weights: float | None) -> list[DataSet]:
    return [
        DataSet(path=f"{'abcd'[place]}.jsonl", prompts=NO_PROMPTS, weight=weight)
        for place, weight in enumerate(weights)
    ]


def closeness(trial: Trial) -> float:
    return -float(np.square(np.subtract(trial.weights, BEST)).sum())


def searched(
    ledger: Path,
    settings: SearchRecipe,
    score_of: Callable[[Trial], float] = closeness,
    weights: Sequence[float] = (1, 1, 1, 1),
) -> list[Trial]:
    return search(settings, data_sets(*weights), ledger, score_of)


def test_the_proposals_find_a_known_optimum_better_than_random_draws(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {"proposed": [], "drawn": []}
    for seed in range(4):
        for name, random in (("proposed", 5), ("drawn", 23)):
            settings = SearchRecipe(trials=24, random=random, seed=seed)
            best = best_first(searched(tmp_path / f"{name}{seed}", settings))[0]
            found[name].append(closeness(best))
    assert np.mean(found["proposed"]) > np.mean(found["drawn"]) / 2  # half the squared distance


def test_a_search_begins_with_the_given_mixture_then_draws_then_proposes(tmp_path: Path) -> None:
    trials = searched(tmp_path / "trials", SearchRecipe(trials=6, random=3), weights=(3, 1, 0, 0))
    assert list(trials[0].weights) == [0.75, 0.25, 0, 0]
    assert [one.origin for one in trials] == ["given", *["dirichlet"] * 3, *["bayesian"] * 2]
    assert [one.folder for one in trials][-1] == "trial-005"
    assert all(sum(one.weights) == pytest.approx(1, abs=1e-5) for one in trials)
    assert len({one.weights for one in trials}) == 6


def test_a_search_that_is_killed_at_any_trial_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    settings = SearchRecipe(trials=5, random=2)
    whole = searched(tmp_path / "whole", settings)
    ran: list[int] = []

    def killed_at(last: int) -> Callable[[Trial], float]:
        def score_of(trial: Trial) -> float:
            if trial.number == last:
                raise KeyboardInterrupt
            ran.append(trial.number)
            return closeness(trial)

        return score_of

    for last in range(5):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "killed", settings, killed_at(last))
    assert searched(tmp_path / "killed", settings, killed_at(9)) == whole
    assert ran == [0, 1, 2, 3, 4]
    lines = (tmp_path / "killed").read_text().splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [
        ["crc32", "origin", "trial", "weights"],
        ["crc32", "score", "seconds", "trial"],
    ] * 5


def test_a_line_that_a_kill_left_half_written_is_done_again(tmp_path: Path) -> None:
    ledger = tmp_path / "trials"
    whole = searched(ledger, SearchRecipe(trials=3, random=2))
    ledger.write_bytes(ledger.read_bytes()[:-9])
    assert searched(ledger, SearchRecipe(trials=3, random=2)) == whole


def test_a_finished_search_runs_nothing_and_more_trials_go_on(tmp_path: Path) -> None:
    searched(tmp_path / "trials", SearchRecipe(trials=2))

    def score_of(trial: Trial) -> float:
        assert trial.number == 2
        return 1.0

    assert len(searched(tmp_path / "trials", SearchRecipe(trials=2), score_of)) == 2
    assert searched(tmp_path / "trials", SearchRecipe(trials=3), score_of)[2].score == 1.0


def test_the_next_trial_follows_from_the_ones_before_alone() -> None:
    settings = SearchRecipe(trials=9, random=1)
    past = [Trial(0, "given", (0.5, 0.5), 0.3), Trial(1, "dirichlet", (0.9, 0.1), 0.1)]
    assert propose(settings, (0.5, 0.5), past) == propose(settings, (0.5, 0.5), past)
    other = SearchRecipe(trials=9, random=1, seed=7)
    assert propose(other, (0.5, 0.5), past) != propose(settings, (0.5, 0.5), past)


def test_a_high_concentration_draws_mixtures_that_are_nearly_even() -> None:
    even = [propose(SearchRecipe(concentration=1000.0), (1, 0), [_scored(0)] * n) for n in range(1, 11)]
    assert max(abs(one.weights[0] - 0.5) for one in even) < 0.1
    few = [propose(SearchRecipe(concentration=0.05), (1, 0), [_scored(0)] * n) for n in range(1, 11)]
    assert np.mean([max(one.weights) for one in few]) > 0.9


def test_the_cube_holds_every_mixture_once() -> None:
    for mixture in ((0.1, 0.2, 0.3, 0.4), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5)):
        assert from_cube(to_cube(mixture)) == pytest.approx(mixture)


def test_even_points_of_the_cube_are_mixtures_drawn_evenly() -> None:
    points = np.random.default_rng(0).random((20_000, 3))
    mixtures = np.array([from_cube(point) for point in points.tolist()])
    # Dirichlet(1) over 4: mean 1/4, variance 3/80, each for all four.
    np.testing.assert_allclose(mixtures.mean(0), [0.25] * 4, atol=0.005)
    np.testing.assert_allclose(mixtures.var(0), [0.0375] * 4, atol=0.001)


def test_the_best_run_comes_first_and_of_equals_the_earlier_one() -> None:
    trials = [Trial(0, "given", (1.0, 0.0), 0.1), *(Trial(n, "dirichlet", (0.0, 1.0), 0.5) for n in (1, 2))]
    assert [one.number for one in best_first([*trials, Trial(3, "bayesian", (0.5, 0.5))])] == [1, 2, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (data_sets(1), "a search mixes data sets, but the recipe has 1; give at least 2"),
        (
            data_sets(1, None),
            "data set b has no weight; a search begins with the weights of the recipe",
        ),
        (
            [DataSet(path=path, prompts=NO_PROMPTS, weight=1) for path in ("a/x.jsonl", "b/x.jsonl")],
            "two data sets are called x; give each its own name",
        ),
    ],
)
def test_a_recipe_without_a_mixture_to_search_is_refused(data: list[DataSet], message: str) -> None:
    with pytest.raises(GembError) as caught:
        given_weights(data)
    assert str(caught.value) == message


def test_a_score_that_is_no_number_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        searched(tmp_path / "trials", SearchRecipe(), lambda trial: float("nan"))
    assert str(caught.value) == "trial-000: its score is nan; look at the evaluation's data"


def test_proposals_without_optuna_are_refused_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(GembError) as caught:
        searched(tmp_path / "trials", SearchRecipe(trials=20, random=10))
    assert str(caught.value) == (
        "optuna is not installed, which proposes mixtures; pip install 'gemb[tune]', "
        "or give no more trials than 1 + random"
    )
    assert len(searched(tmp_path / "trials", SearchRecipe(trials=3, random=2))) == 3


def _scored(number: int) -> Trial:
    return Trial(number, "given", (0.5, 0.5), 0.0)
