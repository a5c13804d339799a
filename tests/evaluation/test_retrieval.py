import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from gemb.errors import GembError
from gemb.evaluation import View, evaluate
from gemb.evaluation.retrieval import Retrieval, is_beir, read_beir
from gemb.evaluation.views import Viewed
from tests.conftest import ROOT
from tests.evaluation.conftest import WordEncoder

SCIFACT = ROOT.parent / "shared/data/retrieval/scifact"


def write_beir(
    folder: Path,
    qrels: str = "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t1\nq2\tc\t1\n",
    documents: str | None = None,
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [
        {"_id": "a", "title": "Ships", "text": "sail on the sea"},
        {"_id": "b", "title": "", "text": "the sea is deep"},
        {"_id": "c", "title": "", "text": "bread is baked"},
        {"_id": "d", "title": "", "text": ""},
    ]
    (folder / "corpus.jsonl").write_text(documents or "".join(json.dumps(row) + "\n" for row in rows))
    queries = [
        {"_id": "q1", "text": "ships on the sea"},
        {"_id": "q2", "text": "baked bread"},
        {"_id": "q3", "text": "x"},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels/test.tsv").write_text(qrels)
    return folder


def test_a_beir_folder_is_read_with_titles_and_only_the_judged_queries(
    tmp_path: Path, encoder: WordEncoder
) -> None:
    task = read_beir(write_beir(tmp_path / "sea"))
    assert is_beir(tmp_path / "sea")
    assert (task.name, task.kind, list(task.query_ids)) == ("sea", "retrieval", ["q1", "q2"])
    assert task.notes == ["1 document without text cannot be found"]
    (result,) = evaluate(encoder, [task])
    assert result.score.metrics["nDCG@10"] == 1.0
    assert result.score.metrics["RR@10"] == 1.0
    assert result.prompts == {"queries": "query", "documents": "document"}
    assert encoder.seen[1] == (
        "document",
        ["sail on the sea", "the sea is deep", "bread is baked"],
        ["Ships", "", ""],
    )


def test_a_gzipped_folder_is_the_same(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "sea")
    plain = read_beir(folder)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = folder / name
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = read_beir(folder)
    assert (packed.qrels, packed.roles) == (plain.qrels, plain.roles)


def made_task(
    documents: int, queries: int, random: np.random.Generator
) -> tuple[Retrieval, np.ndarray, np.ndarray]:
    rows = random.standard_normal((documents, 16)).astype(np.float32)
    asked = random.standard_normal((queries, 16)).astype(np.float32)
    qrels = {
        f"q{query}": {
            f"d{row}": int(random.integers(1, 4)) for row in random.choice(documents, 12, replace=False)
        }
        for query in range(queries)
    }
    ids = [f"d{row}" for row in range(documents)]
    return Retrieval("made", {}, list(qrels), ids, qrels), asked, rows


def test_metrics_are_those_of_sklearn_and_of_the_formulas() -> None:
    task, asked, rows = made_task(300, 20, np.random.default_rng(3))
    view = View(16)
    seen = {"queries": Viewed(asked, view, None), "documents": Viewed(rows, view, None)}
    score = task.score(seen)
    cosines = seen["queries"].all() @ seen["documents"].all().T
    ndcg, recall10, recall100, reciprocal, precision = [], [], [], [], []
    for number, query in enumerate(task.query_ids):
        gold = np.array([task.qrels[query].get(id_, 0) for id_ in task.document_ids])
        ndcg.append(ndcg_score(gold[None], cosines[number][None], k=10))
        order = np.argsort(-cosines[number])
        hits = gold[order] > 0
        recall10.append(hits[:10].sum() / hits.sum())
        recall100.append(hits[:100].sum() / hits.sum())
        first = np.flatnonzero(hits[:10])
        reciprocal.append(1 / (first[0] + 1) if first.size else 0.0)
        at = np.flatnonzero(hits[:100])
        precision.append(sum((place + 1) / (rank + 1) for place, rank in enumerate(at)) / hits.sum())
    expected = {
        "nDCG@10": ndcg,
        "R@10": recall10,
        "R@100": recall100,
        "RR@10": reciprocal,
        "AP@100": precision,
    }
    assert list(score.metrics) == list(expected)
    for name, values in expected.items():
        assert score.metrics[name] == pytest.approx(np.mean(values), abs=1e-6), name
    assert score.items == 20
    assert score.statistic(np.array([0, 0, 1])) == pytest.approx((2 * ndcg[0] + ndcg[1]) / 3, abs=1e-6)


def test_documents_with_equal_vectors_are_ranked_in_the_order_of_the_corpus() -> None:
    rows = np.ones((5, 8), np.float32)
    task = Retrieval("ties", {}, ["q"], ["z", "y", "x", "w", "v"], {"q": {"y": 1}})
    view = View(8)
    score = task.score({"queries": Viewed(rows[:1], view, None), "documents": Viewed(rows, view, None)})
    assert score.metrics["RR@10"] == 0.5
    assert score.value == pytest.approx(1 / math.log2(3))


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1\ta\t1\nq9\ta\t1\n", "{0}/qrels/test.tsv:2: no such query 'q9' in {0}/queries.jsonl"),
        (
            "q1\ta\t1\nq1\tzz\t1\n",
            "{0}/qrels/test.tsv:2: no such document 'zz' in {0}/corpus.jsonl; "
            "the judgements belong to another corpus",
        ),
        ("q1 a 1\n", "{0}/qrels/test.tsv:1: 1 columns, but query-id, corpus-id and score are 3, with tabs"),
        ("q1\ta\t1\nq1\tb\tgood\n", "{0}/qrels/test.tsv:2: the score 'good' is no number"),
        (
            "q1\ta\t0\n",
            "{0}/qrels/test.tsv has no judgement above 0; without a relevant document nothing can be scored",
        ),
    ],
)
def test_wrong_judgements_are_told_with_their_line(tmp_path: Path, qrels: str, message: str) -> None:
    folder = write_beir(tmp_path / "sea", qrels)
    with pytest.raises(GembError) as caught:
        read_beir(folder)
    assert str(caught.value) == message.format(folder)


def test_trec_judgements_with_four_columns_are_read(tmp_path: Path) -> None:
    assert read_beir(write_beir(tmp_path / "sea", "q1\t0\ta\t1\n")).qrels == {"q1": {"a": 1}}


def test_grades_may_be_decimals_and_the_first_line_is_no_header_then(tmp_path: Path) -> None:
    assert read_beir(write_beir(tmp_path / "sea", "q1\ta\t2.0\nq2\tc\t1.0\n")).qrels == {
        "q1": {"a": 2},
        "q2": {"c": 1},
    }


def test_an_id_that_comes_twice_is_told(tmp_path: Path) -> None:
    rows = [{"_id": "a", "text": "x"}, {"_id": "b", "text": "y"}, {"_id": "a", "text": "z"}]
    folder = write_beir(tmp_path / "sea", documents="".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(GembError) as caught:
        read_beir(folder)
    assert str(caught.value) == f"{folder}/corpus.jsonl:3: the id 'a' comes a second time; ids are unique"


def test_a_missing_split_and_a_broken_row_are_told(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "sea", documents='{"_id": "a", "text": "x"}\n{broken\n')
    with pytest.raises(GembError, match=r"corpus.jsonl:2: broken JSON at column 2"):
        read_beir(folder)
    with pytest.raises(GembError) as caught:
        read_beir(folder, split="dev")
    assert str(caught.value) == f"{folder}/qrels has no dev.tsv; it has test"


@pytest.mark.skipif(not SCIFACT.exists(), reason="needs ../shared/data")
def test_scifact_is_read_whole() -> None:
    task = read_beir(SCIFACT)
    assert (len(task.query_ids), len(task.document_ids)) == (300, 5183)
    assert sum(len(grades) for grades in task.qrels.values()) == 339
