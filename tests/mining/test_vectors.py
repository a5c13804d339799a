from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.mining.graph import GraphSearch
from gemb.mining.vectors import NumberedVectors, exact_search, scores_of


def unit_rows(count: int, dims: int, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, dims))
    unit: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def write(folder: Path, rows: NDArray[np.float32], ids: list[int] | None = None) -> Path:
    np.save(folder / "rows.npy", rows)
    if ids is not None:
        (folder / "rows.ids.txt").write_text("".join(f"{number}\n" for number in ids))
    return folder / "rows.npy"


def test_rows_stand_by_number_where_all_are_there(tmp_path: Path) -> None:
    rows = unit_rows(6, 4)
    vectors = NumberedVectors(write(tmp_path, rows, list(range(6))), 6)
    np.testing.assert_array_equal(vectors.take(np.array([5, 0])), rows[[5, 0]])
    np.testing.assert_array_equal(vectors.block(1, 3), rows[1:3])


def test_a_text_without_vector_is_nan_and_is_never_found(tmp_path: Path) -> None:
    rows = unit_rows(3, 4)
    vectors = NumberedVectors(write(tmp_path, rows, [1, 4, 5]), 7)
    found = vectors.take(np.array([0, 1, 3, 5, 6]))
    assert np.isnan(found).any(axis=1).tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(found[[1, 3]], rows[[0, 2]])
    scores, numbers = exact_search(vectors)(rows, 9)
    assert sorted(numbers[0].tolist()) == [1, 4, 5]
    assert numbers[:, 0].tolist() == [1, 4, 5]
    np.testing.assert_allclose(scores[:, 0], 1, rtol=1e-6)


def test_ids_out_of_order_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, unit_rows(2, 4), [4, 1])
    with pytest.raises(GembError) as caught:
        NumberedVectors(path, 7)
    assert str(caught.value) == f"{path}: its ids are not the numbers of the texts; remove it to start anew"


def test_scores_do_not_depend_on_what_else_is_scored() -> None:
    rows = unit_rows(300, 48)
    whole = scores_of(rows[0], rows)
    np.testing.assert_array_equal(whole[17:23], scores_of(rows[0], rows[17:23]))
    np.testing.assert_allclose(whole, rows.astype(np.float64) @ rows[0], atol=1e-6)  # float32 sums


def test_the_graph_finds_nearly_what_exact_search_finds_with_exact_scores(tmp_path: Path) -> None:
    rows, queries = unit_rows(2000, 16), unit_rows(50, 16, seed=1)
    passages = NumberedVectors(write(tmp_path, rows, list(range(0, 4000, 2))), 4000)
    heard: list[int] = []
    graph = GraphSearch(passages, tmp_path / "graph", lambda done, total: heard.append(done))
    scores, numbers = graph.candidates(queries, 20)
    _, exact_numbers = exact_search(passages)(queries, 20)
    shared = [len(set(a) & set(b)) for a, b in zip(numbers.tolist(), exact_numbers.tolist(), strict=True)]
    assert sum(shared) >= 0.98 * 20 * 50
    np.testing.assert_allclose(scores, np.sum(queries[:, None] * rows[numbers // 2], axis=2), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert heard == [2000]
    again = GraphSearch(passages, tmp_path / "graph", lambda done, total: heard.append(done))
    np.testing.assert_array_equal(again.candidates(queries, 20)[1], numbers)
    assert heard == [2000]  # it was not built again


def test_a_graph_of_few_passages_says_where_it_found_none(tmp_path: Path) -> None:
    passages = NumberedVectors(write(tmp_path, unit_rows(3, 4)), 3)
    graph = GraphSearch(passages, tmp_path / "graph", lambda done, total: None)
    scores, numbers = graph.candidates(unit_rows(2, 4, seed=5), 5)
    assert (numbers[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
