"""A verdict says whether a difference can be chance."""

import numpy as np
import pytest

from gemb.training.verdict import compare


def test_a_clear_gain_is_a_win_and_a_clear_loss_a_regression() -> None:
    random = np.random.default_rng(0)
    before = random.uniform(0, 1, 200)
    better = before + 0.1 + random.normal(0, 0.2, 200)
    assert compare("x/nDCG@10", before, better).word == "WIN"
    assert compare("x/nDCG@10", better, before).word == "REGRESSION"


def test_no_difference_and_noise_are_ties() -> None:
    random = np.random.default_rng(0)
    before = random.uniform(0, 1, 200)
    assert compare("x", before, before).word == "TIE"
    assert compare("x", before, before + random.normal(0, 0.3, 200)).word == "TIE"


def test_the_interval_is_that_of_the_mean_difference() -> None:
    random = np.random.default_rng(1)
    difference = random.normal(0.05, 0.2, 400)
    found = compare("x", np.zeros(400), difference)
    error = 1.96 * difference.std() / np.sqrt(400)
    assert found.low == pytest.approx(difference.mean() - error, abs=0.004)
    assert found.high == pytest.approx(difference.mean() + error, abs=0.004)
    assert found.after == pytest.approx(difference.mean())
    assert (found.before, found.queries) == (0.0, 400)


def test_a_verdict_is_one_line() -> None:
    line = str(compare("docs/nDCG@10", np.zeros(5), np.ones(5)))
    assert line == "WIN docs/nDCG@10 0.000 -> 1.000 (+1.000 to +1.000, 5 queries)"


def test_other_queries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has \(3,\) scores before and \(4,\) after"):
        compare("x", np.zeros(3), np.zeros(4))
