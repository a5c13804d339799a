"""The space of a model: formulas by hand and in float64, and clouds whose answer is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from gemb.errors import GembError
from gemb.evaluation.pairs import Similarity
from gemb.evaluation.plots import draw_spaces
from gemb.evaluation.ranking import Bitext, Reranking
from gemb.evaluation.retrieval import Retrieval
from gemb.evaluation.space import (
    alignment,
    drawn_pairs,
    gap,
    measure_space,
    pairs_of,
    probe_accuracy,
    self_balancing_ratios,
    uniformity,
)
from gemb.evaluation.tasks import Texts
from gemb.evaluation.views import View

DIMS = 16
RANDOM = np.random.default_rng(11)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def cloud(count: int, shift: float = 0.0) -> NDArray[np.float32]:
    """Random unit rows, moved along the first axis before."""
    return unit(RANDOM.standard_normal((count, DIMS)) + shift * np.eye(1, DIMS))


def bitext(count: int) -> Bitext:
    texts = Texts([str(number) for number in range(count)], ())
    return Bitext("pairs", {"firsts": texts, "seconds": texts})


def test_alignment_is_the_mean_squared_distance_of_the_pairs() -> None:
    queries, documents = cloud(50), cloud(50)
    cosines = (queries.astype(np.float64) * documents).sum(axis=1)
    assert alignment(queries, documents) == pytest.approx(np.mean(2 - 2 * cosines), rel=1e-6)
    assert alignment(queries, queries) == 0
    assert alignment(queries, -queries) == pytest.approx(4)


def test_uniformity_is_the_log_of_the_mean_gaussian_potential_over_all_pairs() -> None:
    rows = cloud(60)
    expected = np.log(np.exp(-2 * pdist(rows.astype(np.float64)) ** 2).mean())
    assert uniformity(rows) == pytest.approx(expected, abs=1e-6)
    assert uniformity(np.repeat(rows[:1], 5, axis=0)) == pytest.approx(0, abs=1e-6)
    corners = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    assert uniformity(corners) == pytest.approx(-8)  # one pair at distance 2
    with pytest.raises(ValueError, match="uniformity is of two rows or more, not 1"):
        uniformity(rows[:1])


def test_the_gap_is_the_distance_of_the_means() -> None:
    queries, documents = np.eye(2, 4, dtype=np.float32), np.eye(2, 4, k=2, dtype=np.float32)
    assert gap(queries, documents) == pytest.approx(1)  # (1/2, 1/2, -1/2, -1/2)
    assert gap(queries, queries[::-1]) == 0


def test_a_probe_tells_islands_apart_and_one_cloud_not() -> None:
    assert probe_accuracy(cloud(200, 3), cloud(200, -3)) > 0.99
    # Of 400 guesses half are right, give or take three times 0.025.
    assert abs(probe_accuracy(cloud(200), cloud(200)) - 0.5) < 0.075


def test_the_ratio_is_that_of_similarities_within_and_across_the_towers() -> None:
    queries = unit(np.abs(RANDOM.standard_normal((30, DIMS))))
    np.testing.assert_allclose(self_balancing_ratios(queries, queries), 1, rtol=1e-5)
    two = unit(np.array([[1.0, 0.2, 0.0], [0.5, 1.0, 0.0]]))
    documents = unit(np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    expected = {two[0] @ two[1] / (two[0] @ documents[1]), two[1] @ two[0] / (two[1] @ documents[0])}
    found = self_balancing_ratios(two, documents)
    assert len(found) == 20_000
    assert sorted({round(float(value), 5) for value in found}) == pytest.approx(sorted(expected), abs=1e-4)


def test_a_cosine_of_zero_gives_no_ratio() -> None:
    assert len(self_balancing_ratios(np.eye(2, 8, dtype=np.float32), np.eye(2, 8, 2, dtype=np.float32))) == 0


def test_islands_and_one_cloud_are_told_apart_by_every_number() -> None:
    mixed_queries = cloud(120)
    mixed = {"firsts": mixed_queries, "seconds": unit(mixed_queries + 0.2 * cloud(120).astype(np.float64))}
    islands = {"firsts": cloud(120, 6), "seconds": cloud(120, -6)}
    near, apart = (measure_space(bitext(120), each, View(DIMS)) for each in (mixed, islands))
    assert near.probe_accuracy < 0.65 < 0.99 < apart.probe_accuracy
    assert near.gap < 0.2 < 1.5 < apart.gap
    assert near.alignment < 0.1 < 3 < apart.alignment
    assert np.median(near.top1) > 0.9 > 0 > np.median(apart.top1)
    assert near.query_uniformity < apart.query_uniformity  # an island is less uniform
    assert np.median(apart.ratios) < 0
    assert near.places.shape == (240, 2)


def test_numbers_do_not_depend_on_the_length_of_vectors_and_follow_the_view() -> None:
    queries, documents = cloud(40), cloud(40)
    task = bitext(40)
    one = measure_space(task, {"firsts": queries, "seconds": documents}, View(8))
    other = measure_space(task, {"firsts": 3 * queries, "seconds": 0.5 * documents}, View(8))
    cut = measure_space(task, {"firsts": queries[:, :8], "seconds": documents[:, :8]}, View(8))
    for space in (other, cut):
        assert space.gap == pytest.approx(one.gap, abs=1e-6)
        assert space.alignment == pytest.approx(one.alignment, abs=1e-6)
        assert space.query_uniformity == pytest.approx(one.query_uniformity, abs=1e-5)
        np.testing.assert_allclose(space.top1, one.top1, atol=1e-6)


def test_pairs_are_queries_with_their_relevant_documents() -> None:
    retrieval = Retrieval(
        "r", {}, ["q1", "q2"], ["a", "b"], {"q1": {"b": 2, "a": 0}, "q2": {"a": 1, "gone": 1}}
    )
    assert pairs_of(retrieval)[2].tolist() == [[0, 1], [1, 0]]
    reranking = Reranking("r", {}, [0, 2, 5], [False, True, True, False, True])
    role, other, pairs = pairs_of(reranking)
    assert (role, other) == ("queries", "candidates")
    assert pairs.tolist() == [[0, 1], [1, 2], [1, 4]]
    assert pairs_of(bitext(2))[2].tolist() == [[0, 0], [1, 1]]


def test_no_query_and_no_document_is_drawn_twice() -> None:
    queries, documents = cloud(30), cloud(12)
    names = [str(number) for number in range(30)]
    task = Retrieval("r", {}, names, names[:12], {name: {str(int(name) % 12): 1} for name in names})
    drawn = drawn_pairs(task)
    assert sorted(drawn[:, 1].tolist()) == list(range(12))
    assert len(set(drawn[:, 0].tolist())) == 12
    assert (drawn[:, 0] % 12 == drawn[:, 1]).all()
    assert measure_space(task, {"queries": queries, "documents": documents}, View(DIMS)).pairs == 12


def test_at_most_400_pairs_are_drawn() -> None:
    assert len(drawn_pairs(bitext(500))) == 400


def test_numbers_are_plain_json_and_counts_add_up() -> None:
    space = measure_space(bitext(30), {"firsts": cloud(30), "seconds": cloud(30)}, View(DIMS))
    found = json.loads(json.dumps(space.as_json()))
    assert sum(found["top1_similarity"]["counts"]) == 30
    ratio = found["self_balancing_ratio"]
    assert sum(ratio["counts"]) + ratio["outside"] == ratio["count"]
    assert math.isclose(ratio["median"], float(np.median(space.ratios)))


def test_a_space_is_drawn_with_a_row_for_each_model(tmp_path: Path) -> None:
    path = tmp_path / "space.png"
    space = measure_space(bitext(20), {"firsts": cloud(20), "seconds": cloud(20)}, View(DIMS))
    draw_spaces([("one", space), ("other", space)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tasks_without_two_towers_and_too_few_pairs_are_refused() -> None:
    with pytest.raises(GembError) as caught:
        pairs_of(Similarity("sts", {}, []))
    assert str(caught.value) == (
        "sts is similarity, which has no queries and documents; --space shows retrieval, reranking and bitext"
    )
    with pytest.raises(GembError) as caught:
        drawn_pairs(bitext(9))
    assert str(caught.value) == (
        "pairs has 9 queries with different relevant documents; --space needs 10 or more"
    )
