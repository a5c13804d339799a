import numpy as np
import pytest

from gemb.evaluation.views import View, Viewed
from gemb.vectors import nearest as module
from gemb.vectors.nearest import nearest


@pytest.mark.parametrize("block", [7, 64, 100_000])
def test_the_nearest_are_those_of_a_whole_sort_whatever_the_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(1)
    queries = random.standard_normal((9, 8)).astype(np.float32)
    rows = Viewed(random.standard_normal((200, 8)).astype(np.float32), View(8), None)
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    monkeypatch.setattr(module, "BLOCK_QUERIES", 4)
    scores, found = nearest(queries, rows, 11)
    whole = queries @ rows.all().T
    expected = np.argsort(-whole, axis=1)[:, :11]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(whole, expected, 1), rtol=1e-6)


def test_equal_scores_stand_in_the_order_of_the_rows() -> None:
    rows = Viewed(np.ones((6, 4), np.float32), View(4), None)
    assert nearest(np.ones((1, 4), np.float32), rows, 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_k_is_cut_to_the_rows_and_nothing_is_asked_of_nothing() -> None:
    rows = Viewed(np.ones((2, 4), np.float32), View(4), None)
    assert nearest(np.ones((1, 4), np.float32), rows, 10)[1].shape == (1, 2)
    assert nearest(np.ones((0, 4), np.float32), rows, 10)[1].shape[0] == 0
