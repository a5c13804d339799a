"""How queries and documents lie in the space of a model: the analyses of SamToNe (arXiv 2306.02516), numbers.

One tower's vectors may form an island of their own; a nearest neighbour is then found across a gap, and
similarities within a tower are no measure for those across. Q queries, N documents, P pairs, D dims;
all vectors are unit rows, all distances Euclidean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.evaluation.extras import load
from gemb.evaluation.ranking import Bitext, Reranking
from gemb.evaluation.retrieval import Retrieval
from gemb.evaluation.tasks import Task
from gemb.evaluation.views import View, Viewed
from gemb.vectors import cut
from gemb.vectors.nearest import nearest

DRAWN_PAIRS = 400
"""Queries and documents in the picture and for the probe; the paper gives no number, its predecessor's is
400 of each."""
LEAST_PAIRS = 10
"""Fewer say nothing, and t-SNE needs some neighbours."""
UNIFORMITY_ROWS = 2000  # 2 M distances
RATIOS = 20_000
BINS = 50
RATIO_RANGE = (-1.0, 3.0)
_FOLDS = 5
_PROBE_ITERATIONS = 1000
_PERPLEXITY = 30.0  # sklearn's default

Rows = NDArray[np.float32]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Space:
    """The space of one model on one data set."""

    name: str
    """The data set."""
    dims: int
    pairs: int
    """P, queries that were drawn, each with a relevant document of its own."""
    probe_accuracy: float
    """Held-out accuracy of a linear probe that tells queries from documents: 0.5 mixed, 1 apart."""
    gap: float
    """See `gap`."""
    alignment: float
    """See `alignment`."""
    query_uniformity: float
    """See `uniformity`."""
    document_uniformity: float
    top1: Numbers
    """[Q], cosine of each query and its nearest document, relevant or not."""
    ratios: Numbers
    """See `self_balancing_ratios`."""
    places: Rows
    """[2P, 2], t-SNE of the drawn queries, then of their documents."""

    def as_json(self) -> dict[str, object]:
        """Plain JSON values: the numbers, and the histograms as counts between edges."""
        return {
            "data": self.name,
            "dims": self.dims,
            "pairs": self.pairs,
            "probe_accuracy": self.probe_accuracy,
            "gap": self.gap,
            "alignment": self.alignment,
            "uniformity": {"queries": self.query_uniformity, "documents": self.document_uniformity},
            "top1_similarity": _described(self.top1, (-1.0, 1.0)),
            "self_balancing_ratio": _described(self.ratios, RATIO_RANGE),
        }


def measure_space(task: Task, vectors: Mapping[str, Rows], view: View, *, seed: int = 42) -> Space:
    """The space of a task with queries and documents; `vectors` by role, as they are embedded.

    Raises GembError for another task, or fewer than 10 queries with different relevant documents.
    """
    query_role, document_role, pairs = pairs_of(task)
    drawn = drawn_pairs(task, seed=seed)
    queries = Viewed(vectors[query_role], view, None).all()
    documents = cut(vectors[document_role], view.dims, normalise=True)
    random = np.random.default_rng(seed)
    own, theirs = queries[drawn[:, 0]], documents[drawn[:, 1]]
    some = random.permutation(len(documents))[:UNIFORMITY_ROWS]
    similarities, _ = nearest(queries, Viewed(vectors[document_role], view, None), 1)
    return Space(
        name=task.name,
        dims=view.dims,
        pairs=len(drawn),
        probe_accuracy=probe_accuracy(own, theirs, seed=seed),
        gap=gap(own, theirs),
        alignment=alignment(queries[pairs[:, 0]], documents[pairs[:, 1]]),
        query_uniformity=uniformity(queries[random.permutation(len(queries))[:UNIFORMITY_ROWS]]),
        document_uniformity=uniformity(documents[some]),
        top1=similarities[:, 0].astype(np.float64),
        ratios=self_balancing_ratios(own, theirs, seed=seed),
        places=_places(np.concatenate([own, theirs]), seed),
    )


def pairs_of(task: Task) -> tuple[str, str, NDArray[np.int64]]:
    """The role of queries, the role of documents, and [P, 2] numbers of queries and relevant documents.

    Raises GembError for a task without the two.
    """
    if isinstance(task, Retrieval):
        row_of = {document: row for row, document in enumerate(task.document_ids)}
        found = [
            (number, row_of[document])
            for number, query in enumerate(task.query_ids)
            for document, grade in task.qrels[query].items()
            if grade > 0 and document in row_of
        ]
        return "queries", "documents", np.array(found, np.int64).reshape(-1, 2)
    if isinstance(task, Reranking):
        queries = np.repeat(np.arange(len(task.first) - 1), np.diff(task.first))
        right = np.flatnonzero(task.labels)
        return "queries", "candidates", np.stack([queries[right], right], axis=1)
    if isinstance(task, Bitext):
        rows = np.arange(len(task.roles["firsts"].texts))
        return "firsts", "seconds", np.stack([rows, rows], axis=1)
    raise GembError(
        f"{task.name} is {task.kind}, which has no queries and documents; --space shows retrieval, reranking "
        "and bitext"
    )


def drawn_pairs(task: Task, *, seed: int = 42) -> NDArray[np.int64]:
    """[P, 2], at most 400 of a task's pairs, in which no query and no document comes twice.

    Raises GembError for a task without queries and documents, and for fewer than 10 pairs.
    """
    _, _, pairs = pairs_of(task)
    drawn = pairs[np.random.default_rng(seed).permutation(len(pairs))]
    for column in (0, 1):
        _, first = np.unique(drawn[:, column], return_index=True)
        drawn = drawn[np.sort(first)]
    if len(drawn) < LEAST_PAIRS:
        raise GembError(
            f"{task.name} has {len(drawn)} queries with different relevant documents; --space needs "
            f"{LEAST_PAIRS} or more"
        )
    return drawn[:DRAWN_PAIRS]


def probe_accuracy(queries: Rows, documents: Rows, *, seed: int = 42) -> float:
    """Accuracy with which a logistic regression tells queries[P, D] from documents[P, D] it has not seen.

    The mean over 5 folds of sklearn's LogisticRegression. Where both towers are the same cloud it is 0.5,
    up to chance (0.035 either way for 400 of each); 1 is two islands that a plane parts. A proxy for the
    picture, ours.
    """
    models, selection = load("sklearn.linear_model"), load("sklearn.model_selection")
    folds = selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    tower = np.repeat([0, 1], [len(queries), len(documents)])
    probe = models.LogisticRegression(max_iter=_PROBE_ITERATIONS)
    found = selection.cross_val_score(probe, np.concatenate([queries, documents]), tower, cv=folds)
    return float(found.mean())


def gap(queries: Rows, documents: Rows) -> float:
    """|mean(q) - mean(p)| of queries[P, D] and documents[P, D]: the distance of the towers, 0 to 2."""
    difference = queries.mean(axis=0, dtype=np.float64) - documents.mean(axis=0, dtype=np.float64)
    return float(np.linalg.norm(difference))


def alignment(queries: Rows, documents: Rows) -> float:
    """E |q - p|^2 over the pairs of queries[P, D] and documents[P, D]: 0 is best, 4 worst.

    Wang & Isola 2020 (arXiv 2005.10242), l_align with alpha = 2.
    """
    return float(np.square(queries - documents, dtype=np.float64).sum(axis=1).mean())


def uniformity(rows: Rows) -> float:
    """Log E exp(-2 |x - y|^2) over different rows[N, D]: 0 is one point, about -4 evenly over the sphere.

    Wang & Isola 2020 (arXiv 2005.10242), l_uniform with t = 2, over all pairs of rows.
    Raises ValueError for fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"uniformity is of two rows or more, not {len(rows)}")
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    distances = squares[:, None] + squares[None, :] - 2 * (rows @ rows.T).astype(np.float64)
    upper = np.triu_indices(len(rows), k=1)
    return float(np.log(np.exp(-2 * np.maximum(distances[upper], 0)).mean()))


def self_balancing_ratios(queries: Rows, documents: Rows, *, seed: int = 42) -> Numbers:
    """s(q_i, q_j) / s(q_i, p_j) for random i and j, i != j; p_j is the document of q_j, s the cosine.

    At most 20,000 of them. About 1: a query is as near to another query as to that one's document
    (SamToNe, arXiv 2306.02516, section 5). Cosines near 0 make ratios of any size: look at the median.
    """
    random = np.random.default_rng(seed)
    count = len(queries)
    first = random.integers(0, count, RATIOS)
    second = (first + random.integers(1, count, RATIOS)) % count
    within = np.einsum("ij,ij->i", queries[first], queries[second], dtype=np.float64)
    across = np.einsum("ij,ij->i", queries[first], documents[second], dtype=np.float64)
    told = across != 0
    ratios: Numbers = within[told] / across[told]
    return ratios


def _places(rows: Rows, seed: int) -> Rows:
    """[N, 2], t-SNE (van der Maaten & Hinton 2008) of rows[N, D]."""
    manifold = load("sklearn.manifold")
    model = manifold.TSNE(
        n_components=2, init="pca", perplexity=min(_PERPLEXITY, (len(rows) - 1) / 3), random_state=seed
    )
    places: Rows = model.fit_transform(rows)
    return places


def _described(values: Numbers, between: tuple[float, float]) -> dict[str, object]:
    """Median, quartiles, and a histogram; values outside of it are counted apart."""
    counts, edges = np.histogram(values, bins=BINS, range=between)
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "count": len(values),
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "outside": int(len(values) - counts.sum()),
        "edges": [round(float(edge), 6) for edge in edges],
        "counts": counts.tolist(),
    }
