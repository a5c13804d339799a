import json
from pathlib import Path
from typing import Any

import pytest

from gemb.errors import Exit, GembError
from gemb.evaluation.labels import Classification
from gemb.evaluation.pairs import PairClassification, Similarity
from gemb.evaluation.ranking import Reranking
from gemb.evaluation.reading import Choices, read_task

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


SCORED: Rows = [
    {"sentence1": "a cat", "sentence2": "the cat", "score": 5},
    {"sentence1": "a dog", "sentence2": "a fish", "score": "0.5"},
    {"sentence1": "", "sentence2": "x", "score": 1},
]
LABELLED: Rows = [{"text": f"t{number}", "label": "ab"[number % 2]} for number in range(8)]


def test_pairs_with_scores_are_similarity_and_an_empty_text_is_left_out(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "stsb.test.jsonl", SCORED), Choices())
    assert isinstance(task, Similarity)
    assert (task.name, list(task.scores)) == ("stsb", [5.0, 0.5])
    assert task.roles["firsts"].texts == ["a cat", "a dog"]
    assert task.notes == ["1 pair with an empty text left out"]


def test_a_csv_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\na cat,the cat,5\na dog,a fish,1\n")
    assert isinstance(read_task(path, Choices()), Similarity)


def test_pairs_with_labels_are_classified_and_the_yes_is_found(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("entailment", "neutral")]
    task = read_task(write(tmp_path / "nli.jsonl", rows), Choices())
    assert isinstance(task, PairClassification)
    assert task.positive == [True, False]
    task = read_task(tmp_path / "nli.jsonl", Choices(positive="neutral"))
    assert isinstance(task, PairClassification)
    assert task.positive == [False, True]


def test_labelled_texts_are_a_probe_that_embeds_only_what_it_learns_from(tmp_path: Path) -> None:
    write(tmp_path / "intents/train.jsonl", [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(100)])
    write(tmp_path / "intents/test.jsonl", LABELLED)
    task = read_task(tmp_path / "intents", Choices(samples=2, draws=3))
    assert isinstance(task, Classification)
    assert len(task.roles["train"].texts) <= 12
    assert [task.train_labels[number] for number in task.draws[0]].count("a") == 2
    for number, text in enumerate(task.roles["train"].texts):
        assert task.train_labels[number] == "ab"[int(text[1:]) % 2]
    assert task.test_labels == [row["label"] for row in LABELLED]


def test_without_a_training_file_every_second_text_of_a_label_is_tested(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "cr.jsonl", LABELLED), Choices())
    assert isinstance(task, Classification)
    assert list(task.roles["test"].texts) == ["t2", "t3", "t6", "t7"]
    assert task.notes == ["no file to learn from: every second text of a label is for the test"]


def test_labelled_texts_can_be_clustered_instead(tmp_path: Path) -> None:
    assert read_task(write(tmp_path / "cr.jsonl", LABELLED), Choices("clustering")).kind == "clustering"


def test_two_columns_are_translations(tmp_path: Path) -> None:
    (tmp_path / "deu-eng.tsv").write_text("Hallo\thello\nKatze\tcat\n")
    task = read_task(tmp_path / "deu-eng.tsv", Choices())
    assert (task.kind, task.roles["seconds"].texts) == ("bitext", ["hello", "cat"])


def test_candidates_are_reranked_and_one_sided_queries_left_out(tmp_path: Path) -> None:
    rows = [
        {"query": "q1", "docs": ["a", "b"], "labels": [1, 0]},
        {"query": "q2", "docs": ["c"], "labels": [0]},
        {"query": "q3", "docs": ["d", "e", "f"], "labels": [0, 0, 1]},
    ]
    task = read_task(write(tmp_path / "trecqa.dev.jsonl", rows), Choices())
    assert isinstance(task, Reranking)
    assert (task.first, task.labels) == ([0, 2, 5], [True, False, False, False, True])
    assert task.notes == ["1 query left out: all candidates are right, or none"]
    rows = [{"query": "q", "positive": ["a"], "negative": ["b", "c"]}]
    task = read_task(write(tmp_path / "mteb.jsonl", rows), Choices())
    assert isinstance(task, Reranking)
    assert task.labels == [True, False, False]


@pytest.mark.parametrize(
    ("rows", "choices", "message"),
    [
        (
            [{"sentence1": "a", "sentence2": "b", "score": "high"}],
            Choices(),
            ":1: \"score\" is 'high', not a number",
        ),
        (
            [{"sentence1": "a", "sentence2": "b", "score": "nan"}],
            Choices(),
            ":1: \"score\" is 'nan', not a number",
        ),
        ([{"sentence1": "a", "sentence2": "b"}], Choices("similarity"), ':1: "score" is None, not a number'),
        (
            [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1, 2)],
            Choices(),
            ": the labels are 0, 1, 2; name the one that says yes with --positive",
        ),
        (
            [{"query": "q", "docs": ["a", "b"], "labels": ["1", "0"]}],
            Choices(),
            ":1: the label '1' is no number",
        ),
        ([{"sentence1": 3, "sentence2": "b", "score": 1}], Choices(), ':1: "sentence1" is 3, not a string'),
        (SCORED[:1], Choices(), ": every score is 5.0; a correlation needs different ones"),
        (
            [{"sentence1": "a", "sentence2": "b", "label": label} for label in "xy"],
            Choices(),
            ": the labels are x, y; name the one that says yes with --positive",
        ),
        (LABELLED[:1], Choices(), ": 1 different labels; a task needs two"),
        (
            [*LABELLED, {"text": "x", "label": None}],
            Choices(),
            ':9: "label" is None, not a string or an integer',
        ),
        ([*LABELLED, {"label": "a"}], Choices(), ':9: no "text"; this line has label'),
        (
            [{"query": "q", "docs": ["a"], "labels": []}],
            Choices(),
            ':1: "docs" and "labels" must be lists of one length',
        ),
        ([{"query": "q", "docs": ["a", ""], "labels": [1, 0]}], Choices(), ":1: the candidate '' is no text"),
        (
            [{"query": "q", "docs": ["a"], "labels": [1]}],
            Choices(),
            ": no query has both right and wrong candidates",
        ),
        (
            LABELLED,
            Choices("retrieval"),
            " is no BEIR folder: it needs corpus.jsonl, queries.jsonl and qrels/test.tsv",
        ),
    ],
)
def test_rows_that_do_not_fit_are_told(tmp_path: Path, rows: Rows, choices: Choices, message: str) -> None:
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(GembError) as caught:
        read_task(path, choices)
    assert str(caught.value) == f"{path}{message}"


def test_unknown_shapes_list_what_is_known(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"foo": "a", "bar": 1}])
    with pytest.raises(
        GembError, match=r"data.jsonl:1: no task has the fields bar, foo; evaluation knows BEIR"
    ):
        read_task(path, Choices())


def test_missing_data_and_splits_are_told(tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        read_task(tmp_path / "nothing", Choices())
    assert caught.value.exit_code == Exit.USAGE  # as for every input; 7 is for models
    assert str(caught.value) == f"there is no {tmp_path / 'nothing'} to evaluate on; check the path"
    write(tmp_path / "intents/train.jsonl", LABELLED)
    with pytest.raises(GembError) as mistake:
        read_task(tmp_path / "intents", Choices())
    assert str(mistake.value) == f"{tmp_path / 'intents'} has no test file; it has train"
