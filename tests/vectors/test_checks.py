import numpy as np
import pytest

from gemb.vectors import bad_rows, cut
from tests.vectors.conftest import Rows


def test_cutting_a_batch_equals_cutting_each_row_alone_to_the_bit(unit_rows: Rows) -> None:
    for rows, dims, kept in ((33, 768, 256), (7, 384, 384), (5, 65, 17)):
        vectors = unit_rows(rows, dims)
        alone = np.concatenate([cut(row[None], kept, normalise=True) for row in vectors])
        assert np.array_equal(cut(vectors, kept, normalise=True), alone)
        assert np.array_equal(cut(vectors[::-1], kept, normalise=True), alone[::-1])


def test_cut_rows_are_unit_and_point_where_the_prefix_pointed(unit_rows: Rows) -> None:
    vectors = unit_rows(20, 768) * 3
    exact = vectors[:, :128].astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    kept = cut(vectors, 128, normalise=True)
    assert kept.dtype == np.float32
    assert kept.flags.c_contiguous
    # half a unit in the last place for the norm and for the division, of values below 1
    np.testing.assert_allclose(kept, exact, atol=1.2e-7, rtol=0)


def test_cutting_without_normalising_keeps_the_numbers(unit_rows: Rows) -> None:
    vectors = unit_rows(4, 64)
    assert np.array_equal(cut(vectors, 16, normalise=False), vectors[:, :16])


def test_cutting_does_not_touch_what_it_is_given(unit_rows: Rows) -> None:
    vectors = unit_rows(4, 64) * 2
    before = vectors.copy()
    cut(vectors, 64, normalise=True)
    assert np.array_equal(vectors, before)


def test_normalising_works_where_squares_leave_float32() -> None:
    vectors = np.array([[3e-30, 4e-30], [3e30, 4e30], [3e-20, 4e-20], [3, 4]], np.float32)
    np.testing.assert_allclose(cut(vectors, 2, normalise=True), [[0.6, 0.8]] * 4, atol=1e-7)


def test_rows_that_cannot_be_normalised_stay_to_be_found() -> None:
    vectors = np.array([[0, 0, 1], [np.nan, 1, 1], [np.inf, 1, 1], [1, 1, 1]], np.float32)
    assert bad_rows(cut(vectors, 2, normalise=True)).tolist() == [0, 1, 2]


def test_bad_rows_are_those_with_nan_infinity_or_only_zeros() -> None:
    vectors = np.ones((7, 3), np.float32)
    vectors[1, 2] = np.nan
    vectors[2, 0] = np.inf
    vectors[3, 1] = -np.inf
    vectors[4] = 0
    vectors[5] = [0, -1e-45, 0]  # the smallest number there is, but a direction
    assert bad_rows(vectors).tolist() == [1, 2, 3, 4]


def test_no_rows_are_not_bad() -> None:
    assert bad_rows(np.empty((0, 3), np.float32)).tolist() == []
    assert cut(np.empty((0, 3), np.float32), 2, normalise=True).shape == (0, 2)


@pytest.mark.parametrize("dims", [0, 4])
def test_dims_beyond_the_vectors_are_refused(dims: int) -> None:
    with pytest.raises(ValueError, match=f"dims is {dims} but the vectors are 3 wide"):
        cut(np.ones((1, 3), np.float32), dims, normalise=True)
