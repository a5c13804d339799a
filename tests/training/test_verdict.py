"""A verdict says whether a difference can be chance."""

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.evaluation.comparing import compare as compare_scores
from gemb.evaluation.tasks import Score
from gemb.training.verdict import Resampled, compare, compare_resampled


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


# --- measures that are no means


def correlation(cosines: NDArray[np.float64], gold: NDArray[np.float64]) -> Score:
    def over(items: NDArray[np.int64]) -> float:
        return float(np.corrcoef(cosines[items], gold[items])[0, 1])

    return Score("pearson", {"pearson": over(np.arange(len(gold)))}, len(gold), over)


def models(noise: float) -> tuple[Score, Score]:
    """The scores of a good model, and of one that is noisier by so much."""
    random = np.random.default_rng(2)
    gold = random.uniform(0, 5, 80)
    good = gold + random.normal(0, 0.3, 80)
    return correlation(good, gold), correlation(good + random.normal(0, noise, 80), gold)


@pytest.mark.parametrize("noise", [5.0, 0.05])
def test_a_measure_that_is_no_mean_gets_the_verdict_of_gemb_eval(noise: float) -> None:
    good, worse = models(noise)
    found = compare_resampled("sts/pearson", Resampled.of(good), Resampled.of(worse))
    theirs = compare_scores([worse], [good])
    assert (found.low, found.high, found.word) == (theirs.low, theirs.high, theirs.verdict)
    assert (found.before, found.after) == (good.value, worse.value)
    assert found.word == ("REGRESSION" if noise == 5.0 else "TIE")
    assert str(found).endswith(", 80 items)")
    assert compare_resampled("sts/pearson", Resampled.of(worse), Resampled.of(good)).low == -found.high


def test_other_items_are_refused() -> None:
    good, _ = models(1.0)
    fewer = Resampled(0.5, np.zeros(1000), 79)
    with pytest.raises(ValueError, match="x has 80 items before and 79 after"):
        compare_resampled("x", Resampled.of(good), fewer)
