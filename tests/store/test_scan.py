import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.store.scan import LEFT_OUT, BestRows, PackedQueries, _places, block_spans

RANDOM = np.random.default_rng(3)


def codes(count: int, dims: int, seed: int) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-127, 128, (count, dims)).astype(np.int8)


def plainly(products: NDArray[np.int32], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Every row sorted by falling product, then by row."""
    order = np.lexsort((np.arange(len(products))[:, None] + 0 * products, -products.astype(np.int64)), axis=0)
    rows = order[:count].T
    return rows.tolist(), np.take_along_axis(products, order[:count], 0).T.tolist()


@pytest.mark.parametrize("dims", [1, 7, 64, 384, 1000])
@pytest.mark.parametrize("queries", [1, 3, 70])
def test_products_equal_integer_arithmetic(dims: int, queries: int) -> None:
    rows, asked = codes(257, dims, 1), codes(queries, dims, 2)
    wanted = rows.astype(np.int64) @ asked.T.astype(np.int64)
    np.testing.assert_array_equal(PackedQueries(asked).dots(rows), wanted)


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 500_000])
@pytest.mark.parametrize("queries", [1, 64, 5000])
def test_blocks_cover_every_row_once(rows: int, queries: int) -> None:
    spans = list(block_spans(rows, queries))
    assert [start for start, _ in spans] == [0, *[stop for _, stop in spans[:-1]]][: len(spans)]
    assert (spans[-1][1] if spans else 0) == rows


@pytest.mark.parametrize("queries", [1, 2, 9])
@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize("block", [1, 37, 700])
@pytest.mark.parametrize("values", [3, 1_000_000])  # few values: mostly ties
def test_the_best_rows_equal_a_full_sort(queries: int, count: int, block: int, values: int) -> None:
    products = RANDOM.integers(-values, values, (700, queries)).astype(np.int32)
    best = BestRows(queries, count)
    for start in range(0, len(products), block):
        best.offer(start, products[start : start + block])
    rows, found = best.rows()
    wanted_rows, wanted = plainly(products, count)
    assert rows.tolist() == wanted_rows
    assert found.tolist() == wanted


@pytest.mark.parametrize("queries", [1, 4])
def test_products_that_only_rise_are_kept(queries: int) -> None:
    products = np.repeat(np.arange(5000, dtype=np.int32)[:, None], queries, axis=1)
    best = BestRows(queries, 3)
    for start in range(0, 5000, 500):
        best.offer(start, products[start : start + 500])
    assert best.rows()[0].tolist() == [[4999, 4998, 4997]] * queries


@pytest.mark.parametrize("queries", [1, 3])
def test_rows_left_out_are_never_found(queries: int) -> None:
    products = np.full((50, queries), LEFT_OUT, dtype=np.int32)
    products[[7, 30]] = -5
    best = BestRows(queries, 4)
    best.offer(0, products)
    rows, found = best.rows()
    assert rows.tolist() == [[7, 30, -1, -1]] * queries
    assert found.tolist() == [[-5, -5, LEFT_OUT, LEFT_OUT]] * queries


def test_nothing_offered_finds_nothing() -> None:
    assert BestRows(2, 3).rows()[0].tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("shape", [(0, 8), (3, 8), (5, 7), (16, 1), (64, 33)])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_places_are_those_of_a_plain_search(shape: tuple[int, int], share: float) -> None:
    passed = np.random.default_rng(9).random(shape) < share
    for found, wanted in zip(_places(passed), np.nonzero(passed), strict=True):
        np.testing.assert_array_equal(found, wanted)
