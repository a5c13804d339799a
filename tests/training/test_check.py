"""What is shown of the data before any step: repeats, leaks, lengths, what is cut off."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from gemb.report.result import as_json
from gemb.text.prompts import Prompts
from gemb.training.check import DataCheck, Overlap, check, normalised
from gemb.training.columns import Text
from gemb.training.data_recipe import NO_PROMPTS, DataSet, MixtureSettings, RolePrompts
from gemb.training.mixture import Mixture
from tests.conftest import DATA
from tests.training.test_mixture import tokeniser


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names in messages."""
    monkeypatch.chdir(tmp_path)


def data_set(name: str, rows: Sequence[dict[str, Any]], prompts: RolePrompts = NO_PROMPTS) -> DataSet:
    Path(name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return DataSet(path=name, prompts=prompts)


def checked(*data: DataSet, evaluation: Sequence[DataSet] = ()) -> DataCheck:
    prompts = Prompts({"query": "ask ", "document": "title: none | text: "}, None)
    cache = Path("cache")
    with Mixture.open(
        data,
        MixtureSettings(),
        tokeniser=tokeniser(),
        prompts=prompts,
        cache=cache,
        pairs=2,
        seed=0,
        needs_negatives=False,
    ) as mixture:
        return check(mixture, cache=cache, evaluation=evaluation)


def test_repeats_are_counted_by_query_positive_and_pair() -> None:
    rows = [("a", ["p"]), ("a", ["q"]), ("b", ["p"]), ("a", ["p"]), ("c", ["r", "p"])]
    (found,) = checked(data_set("a.jsonl", [{"query": q, "pos": p} for q, p in rows])).sets
    assert (found.rows, found.repeated_queries, found.repeated_positives, found.repeated_pairs) == (
        5,
        2,
        3,
        1,
    )


def test_lengths_are_those_before_cutting_with_prompts_and_special_tokens() -> None:
    rows = [{"query": "x " * n, "pos": ["y"], "neg": ["z"] * (n == 4)} for n in range(1, 9)]
    prompts = RolePrompts(query="query", passage="none")
    (found,) = checked(data_set("a.jsonl", rows, prompts)).sets
    # <s> ask ... </s>: 4 to 11 tokens, of which the model takes 8.
    query = found.lengths["query"]
    assert (query.texts, query.mean, query.median, query.longest, query.truncated) == (8, 7.5, 7, 11, 3)
    assert query.histogram == {4: 1, 8: 4, 16: 3}
    assert found.lengths["positive"].histogram == {4: 8}
    assert found.lengths["negative"].texts == 1


def test_overlap_with_an_evaluation_set_is_found_in_spite_of_case_and_punctuation() -> None:
    train = data_set(
        "a.jsonl",
        [
            {"query": "What is  this?", "pos": ["it is THAT."]},
            {"query": "what is this", "pos": ["something else"]},
            {"query": "unrelated", "pos": ["It, is: that"]},
            {"query": "what", "pos": ["is this"]},
        ],
    )
    evaluation = data_set("held.jsonl", [{"query": "what is this", "pos": ["It is that!"]}])
    (found,) = checked(train, evaluation=[evaluation]).sets
    assert found.overlaps == {"held": Overlap(queries=2, passages=2, pairs=1)}


def test_scored_pairs_overlap_in_either_direction() -> None:
    train = data_set("a.jsonl", [{"sentence1": "b", "sentence2": "a", "score": 1}] * 2)
    evaluation = data_set("held.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 2}])
    (found,) = checked(train, evaluation=[evaluation]).sets
    assert found.overlaps == {"held": Overlap(queries=2, passages=2, pairs=2)}


def test_texts_without_words_are_compared_as_they_are() -> None:
    assert normalised(Text(" ++ ")) == "++"
    assert normalised(Text("Ä b-C", "T")) == "t ä b c"


def test_a_few_examples_are_shown_as_they_are_tokenised_and_long_ones_cut() -> None:
    rows = [{"query": "q" * 300, "pos": [{"text": "p", "title": "T"}], "neg": ["n"]}]
    prompts = RolePrompts(query="query", passage="document")
    (found,) = checked(data_set("a.jsonl", rows * 2, prompts)).sets
    assert found.examples[0] == {
        "query": ["ask " + "q" * 155 + "…"],
        "positive": ["title: T | text: p"],
        "negative": ["title: none | text: n"],
    }


def test_everything_is_in_the_report_for_people_and_programs() -> None:
    rows = [{"query": f"q{n // 2}", "pos": [f"p{n // 2} " + "x " * 9]} for n in range(40)]
    train = data_set("a.jsonl", [*rows, {"query": "same", "pos": ["same"]}, {"query": "", "pos": ["p"]}])
    evaluation = data_set("held.jsonl", [{"query": "Q3", "pos": ["other"]}])
    found = checked(train, evaluation=[evaluation])
    assert found.warnings == [
        "a: 50% of the queries are repeats",
        "a: 50% of the pairs are repeats",
        "a: 100% of the texts as positive are cut to the model's length",
        "a: 2 rows with a query of evaluation set held, 0 of them with its answer; the scores there would be "
        "too good",
        "a: 2 rows rejected, a.jsonl:41: the positive equals the query",
    ]
    report = found.report()
    assert report.title == "checked 40 usable rows of 1 data set, 5 warnings"
    assert ("the positive equals the query", "1 rejected") in report.rows
    assert ('"query" is empty', "1 rejected") in report.rows
    assert [table.title for table in report.tables] == [
        "rows",
        "tokens of a sample",
        "rows also in evaluation sets",
    ]
    assert report.tables[0].rows == [("a", "40", "2", "100.0%", "20", "20", "20")]
    assert report.tables[2].rows == [("a", "held", "2", "0", "0")]
    data = orjson.loads(as_json(report))
    assert data["sets"][0]["overlaps"]["held"]["queries"] == 2
    assert data["sets"][0]["lengths"]["positive"]["truncated"] == 40


def test_clean_data_give_no_warning() -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}"]} for n in range(40)]
    assert checked(data_set("a.jsonl", rows)).warnings == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_the_known_overlaps_of_real_data_are_found() -> None:
    # By the README of the data: 33 anchors equal a test query, no code is shared, STS 12 shares 1,002 pairs.
    java = DataSet(path=str(DATA / "pairs" / "tlcodesum-java-valid.jsonl.gz"), prompts=NO_PROMPTS)
    test = DataSet(path=str(DATA / "retrieval" / "tlcodesum-java"), split="test", prompts=NO_PROMPTS)
    stsb = DataSet(path=str(DATA / "sts/stsb/stsb-en.train.jsonl"), name="sts", prompts=NO_PROMPTS)
    sts12 = DataSet(path=str(DATA / "sts/sts12.jsonl"), prompts=NO_PROMPTS)
    of_java, of_sts = checked(java, stsb, evaluation=[test, sts12]).sets
    assert of_java.overlaps["tlcodesum-java"] == Overlap(queries=33, passages=0, pairs=0)
    assert of_sts.overlaps["sts12"].pairs == pytest.approx(1002, abs=30)
