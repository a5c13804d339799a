import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.store.codes import (
    CODE_LIMIT,
    CodeScale,
    choose_step,
    encode,
    encode_queries,
    residuals,
    sample_rows,
    unit,
)


def unit_rows(count: int, dims: int, seed: int = 1) -> NDArray[np.float32]:
    return unit(np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32))


def test_unit_rows_have_length_one_and_zeros_stay_zeros() -> None:
    rows = np.random.default_rng(1).standard_normal((20, 7)).astype(np.float32)
    rows[4] = 0
    lengths = np.linalg.norm(unit(rows), axis=1)
    assert lengths[4] == 0
    np.testing.assert_allclose(np.delete(lengths, 4), 1, atol=1e-6)


def test_a_row_is_scaled_the_same_alone_and_among_others() -> None:
    rows = np.random.default_rng(1).standard_normal((20, 7)).astype(np.float32)
    assert unit(rows)[3].tobytes() == unit(rows[3:4])[0].tobytes()


def test_codes_are_the_nearest_multiples_of_the_step_within_the_limit() -> None:
    rows = unit_rows(50, 16)
    step = choose_step(rows)
    codes = encode(rows, step)
    wanted = np.clip(np.rint(rows.astype(np.float64) / step), -CODE_LIMIT, CODE_LIMIT)
    assert np.abs(codes - wanted).max() <= 1  # a tie may go either way in float32
    assert (codes == wanted).mean() > 0.999


def test_the_step_loses_no_more_than_the_one_that_clips_nothing() -> None:
    rows = unit_rows(400, 64)
    rows[0] = 0
    rows[0, 0] = 1  # one value far out, which a scale without clipping would spend its range on
    plain = float(np.abs(rows).max()) / CODE_LIMIT

    def lost(step: float) -> float:
        return float(np.square(encode(rows, step) * step - rows).sum())

    assert choose_step(rows) > 0
    assert lost(choose_step(rows)) <= lost(plain) + 1e-9


@pytest.mark.parametrize("rows", [np.zeros((0, 8), np.float32), np.zeros((3, 8), np.float32)])
def test_rows_of_nothing_have_a_step(rows: NDArray[np.float32]) -> None:
    assert choose_step(rows) == 1 / CODE_LIMIT


def test_the_margin_bounds_every_product_of_codes() -> None:
    rows, queries = unit_rows(300, 24), unit_rows(40, 24, seed=2)
    step = choose_step(rows)
    codes = encode(rows, step)
    scale = CodeScale(step, float(residuals(rows, codes, step).max()))
    coded = encode_queries(queries, 24)
    exact = rows.astype(np.float64) @ queries.T.astype(np.float64)
    products = codes.astype(np.int64) @ coded.codes.T.astype(np.int64) * step * coded.steps
    missed = np.abs(exact - products).max(axis=0)
    margin = scale.margin(coded.residuals)
    assert (missed <= margin).all()
    assert (margin < 30 * missed).all()  # a bound that says nothing would look at every row


def test_queries_of_a_prefix_are_brought_to_unit_length_again() -> None:
    queries = unit_rows(6, 32)
    whole = encode_queries(np.ascontiguousarray(queries[:, :8]), 8)
    prefix = encode_queries(queries, 8)
    np.testing.assert_array_equal(whole.codes, prefix.codes)
    assert prefix.codes.shape == (6, 8)
    assert (np.abs(prefix.codes).max(axis=1) == CODE_LIMIT).all()


@pytest.mark.parametrize(("rows", "count"), [(0, 0), (1, 1), (1000, 1000), (10_000_000, 2730)])
def test_the_sample_is_spread_over_all_rows(rows: int, count: int) -> None:
    sample = sample_rows(rows, 384)
    assert len(sample) == count
    if count:
        assert (sample[0], sample[-1]) == (0, rows - 1)
        assert len(np.unique(sample)) == count
