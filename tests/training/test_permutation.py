"""The keyed permutation: every number once, different by key, without structure."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from gemb.training.permutation import Permutation, key_of, random64, scattered32


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 65_537])
def test_every_number_comes_once(size: int) -> None:
    assert sorted(Permutation(size, 7).at(np.arange(size)).tolist()) == list(range(size))


def test_a_place_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = Permutation(1000, 7).at(np.arange(1000))
    assert Permutation(1000, 7).at(np.array([999, 3, 500])).tolist() == whole[[999, 3, 500]].tolist()


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Golden: a change here changes every run that is resumed.
    assert Permutation(10, 7).at(np.arange(10)).tolist() == [6, 2, 3, 9, 1, 0, 7, 5, 4, 8]
    assert random64(1, 2, 3) == 0x77BA1AE68D5AFBB4
    assert key_of("draws", 0, "pairs") == 0x18E579200434447B


def test_every_order_of_four_comes_about_equally_often() -> None:
    orders = Counter(tuple(Permutation(4, key).at(np.arange(4)).tolist()) for key in range(4800))
    counts = np.array(list(orders.values()))
    assert len(counts) == 24
    # 23 degrees of freedom: 49.7 is exceeded by chance once in a thousand; the keys are fixed.
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def test_neighbours_do_not_stay_together() -> None:
    order = Permutation(100_000, 3).at(np.arange(100_000))
    steps = np.abs(np.diff(order))
    # Two random places are a third of the size apart on average.
    assert steps.mean() == pytest.approx(100_000 / 3, rel=0.01)
    assert np.corrcoef(order[:-1], order[1:])[0, 1] == pytest.approx(0, abs=0.01)


def test_marks_are_all_different_and_spread() -> None:
    marks = [scattered32(number, 5) for number in range(100_000)]
    assert len(set(marks)) == 100_000
    # Bits that differ between neighbours: 16 of 32 on average for unrelated numbers.
    assert np.mean([(one ^ next_).bit_count() for one, next_ in pairwise(marks)]) == pytest.approx(
        16, abs=0.5
    )
