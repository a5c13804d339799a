"""Similarity, pairs, probes, clusters, translations, candidates: against sklearn and by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from gemb.evaluation.labels import Classification, Clustering, drawn
from gemb.evaluation.pairs import PairClassification, Similarity, pair_cosines
from gemb.evaluation.ranking import Bitext, Reranking
from gemb.evaluation.tasks import Texts
from gemb.evaluation.views import View, Viewed

RANDOM = np.random.default_rng(7)


def viewed(rows: np.ndarray) -> Viewed:
    return Viewed(rows.astype(np.float32), View(rows.shape[1]), None)


def made_pairs(count: int) -> dict[str, Viewed]:
    firsts = RANDOM.standard_normal((count, 8))
    near = RANDOM.random((count, 1))
    return {
        "firsts": viewed(firsts),
        "seconds": viewed(firsts * near + RANDOM.standard_normal((count, 8)) * (1 - near)),
    }


def test_similarity_is_spearman_of_the_cosines_and_pearson_beside_it() -> None:
    pairs = made_pairs(200)
    gold = RANDOM.integers(0, 6, 200).astype(float)
    score = Similarity("s", {}, gold.tolist()).score(pairs)
    cosines = (pairs["firsts"].all() * pairs["seconds"].all()).sum(axis=1)
    assert score.metric == "spearman"
    assert score.value == pytest.approx(stats.spearmanr(cosines, gold).statistic, abs=1e-9)
    assert score.metrics["pearson"] == pytest.approx(stats.pearsonr(cosines, gold).statistic, abs=1e-6)
    some = np.arange(0, 200, 2)
    assert score.statistic(some) == pytest.approx(
        stats.spearmanr(cosines[some], gold[some]).statistic, abs=1e-9
    )


def test_pairs_are_classified_at_the_best_thresholds() -> None:
    pairs = made_pairs(120)
    cosines = pair_cosines(pairs["firsts"], pairs["seconds"])
    gold = cosines + 0.3 * RANDOM.standard_normal(120) > 0.4
    score = PairClassification("p", {}, gold.tolist()).score(pairs)
    assert score.value == pytest.approx(average_precision_score(gold, cosines))
    thresholds = [*cosines, np.inf]
    assert score.metrics["f1"] == pytest.approx(max(f1_score(gold, cosines >= at) for at in thresholds))
    assert score.metrics["accuracy"] == pytest.approx(
        max(((cosines >= at) == gold).mean() for at in thresholds)
    )


def test_equal_cosines_are_classified_alike() -> None:
    same = viewed(np.ones((4, 8)))
    score = PairClassification("p", {}, [True, False, False, False]).score({"firsts": same, "seconds": same})
    assert score.metrics["accuracy"] == 0.75  # nothing is positive
    assert score.metrics["f1"] == pytest.approx(0.4)  # everything is


def test_a_probe_learns_from_each_draw_and_the_mean_counts() -> None:
    labels = [str(number % 3) for number in range(60)]
    centres = RANDOM.standard_normal((3, 8))
    rows = np.stack([centres[int(label)] for label in labels]) + RANDOM.standard_normal((60, 8))
    draws = drawn(labels[:40], 4, 5, seed=1)
    task = Classification("c", {}, labels[:40], labels[40:], draws)
    vectors = {"train": viewed(rows[:40]), "test": viewed(rows[40:])}
    score = task.score(vectors)
    train, test = vectors["train"].all(), vectors["test"].all()
    accuracies = [
        LogisticRegression(max_iter=100, random_state=42)
        .fit(train[draw], np.array(labels[:40])[draw])
        .score(test, np.array(labels[40:]))
        for draw in draws
    ]
    assert score.value == pytest.approx(np.mean(accuracies))
    assert score.items == 20


def test_draws_hold_so_many_texts_of_each_label_and_follow_the_seed() -> None:
    labels = ["a"] * 30 + ["b"] * 30 + ["c"] * 2
    draws = drawn(labels, 8, 10, seed=5)
    for draw in draws:
        assert [sum(labels[number] == label for number in draw) for label in "abc"] == [8, 8, 2]
        assert len(set(draw)) == 18
    assert len({tuple(sorted(draw)) for draw in draws}) > 1
    assert drawn(labels, 8, 10, seed=5) == draws
    assert drawn(labels, 8, 10, seed=6) != draws


def test_clusters_find_labels_that_lie_apart_and_none_in_noise() -> None:
    labels = [str(number % 4) for number in range(200)]
    centres = 8 * np.eye(4, 16)
    apart = np.stack([centres[int(label)] for label in labels]) + RANDOM.standard_normal((200, 16)) / 4
    assert Clustering("c", {}, labels).score({"texts": viewed(apart)}).value == pytest.approx(1.0)
    noise = RANDOM.standard_normal((200, 16))
    assert Clustering("c", {}, labels).score({"texts": viewed(noise)}).value < 0.2


def test_translations_are_found_and_an_equal_text_is_as_good() -> None:
    rows = np.eye(4, 8)
    texts = {"firsts": Texts(["a", "b", "c", "d"], ()), "seconds": Texts(["x", "y", "y", "z"], ())}
    swapped = rows[[0, 2, 1, 3]]
    score = Bitext("b", texts).score({"firsts": viewed(rows), "seconds": viewed(swapped)})
    assert score.value == 1.0
    assert score.metrics["f1"] == 0.5


def test_candidates_are_ranked_query_by_query() -> None:
    queries = np.eye(2, 8)
    candidates = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.2, 0.9], [0.9, 0.3]])
    candidates = np.hstack([candidates, np.zeros((5, 6))])
    task = Reranking("r", {}, [0, 3, 5], [False, True, True, False, True])
    score = task.score({"queries": viewed(queries), "candidates": viewed(candidates)})
    assert score.value == pytest.approx(np.mean([(1 / 2 + 2 / 3) / 2, 1 / 2]))
    assert score.metrics["mrr@10"] == pytest.approx(1 / 2)
