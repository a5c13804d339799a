from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine import Engine
from gemb.errors import Exit, GembError, Interrupted
from gemb.files import Journal
from gemb.jobs import mine as job
from gemb.jobs.mine import MineRecipe
from gemb.mining.rules import Choice, choose
from gemb.report import Plan, Report
from gemb.text.batches import Batch
from gemb.training.data_recipe import ColumnNames, DataSet
from gemb.training.examples import open_rows
from tests.conftest import DATA
from tests.fakes import FakeEngine, expected, fake_folder, words

Rows = list[dict[str, Any]]


class CubedEngine(FakeEngine):
    """Another model: the same vectors, each number to its third power."""

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        return super().forward(batch) ** 3


class Bench:
    """A working folder, two models, and a job that runs there on fake engines."""

    def __init__(self, place: Path) -> None:
        self.place = place / "work"
        self.place.mkdir()
        self.model = fake_folder(place / "models" / "usual")
        self.other = fake_folder(place / "models" / "other", seed=2)
        self.engines: list[FakeEngine] = []
        self.spoils: Callable[[NDArray[np.int32]], float | None] | None = None

    def write(self, rows: Rows, name: str = "pairs.jsonl") -> str:
        path = self.place / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    def open_engine(self, setup: Any, notice: Callable[[str], None]) -> Engine:  # noqa: ANN401
        kind = CubedEngine if setup.model_name == str(self.other) else FakeEngine
        self.engines.append(kind(workers=2, spoils=self.spoils))
        return self.engines[-1]

    def run(
        self,
        *pairs: str,
        output: str = "mined.jsonl",
        overwrite: bool = False,
        **settings: Any,  # noqa: ANN401
    ) -> Report:
        recipe = MineRecipe(pairs=pairs, output=self.place / output, **{"model": str(self.model), **settings})
        return job.run(recipe, overwrite=overwrite, open_engine=self.open_engine)

    def plan(self, *pairs: str, overwrite: bool = False, **settings: Any) -> Plan:  # noqa: ANN401
        recipe = MineRecipe(
            pairs=pairs, output=self.place / "mined.jsonl", **{"model": str(self.model), **settings}
        )
        return job.plan(recipe, overwrite=overwrite, open_engine=self.open_engine)

    def mined(self, name: str = "mined.jsonl") -> Rows:
        return [json.loads(line) for line in (self.place / name).read_text().splitlines()]

    @property
    def computed(self) -> int:
        return sum(engine.rows for engine in self.engines)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    bench = Bench(tmp_path)
    monkeypatch.chdir(bench.place)
    return bench


def numbers(row: int) -> tuple[int, int]:
    return row * 7 % 100, 100 + row


def some_pairs(count: int = 30) -> Rows:
    """Every fifth row repeats the query of the one before it with another positive."""
    return [
        {"anchor": words(row - (row % 5 == 4)), "positive": words(*numbers(row)), "id": f"r{row}"}
        for row in range(count)
    ]


def some_documents(count: int = 60) -> Rows:
    return [{"id": f"d{row}", "text": words(200 + row, row * 3 % 50)} for row in range(count)]


def vector(text: str) -> NDArray[np.float64]:
    return expected(*(int(word[1:]) for word in text.split())).astype(np.float64)


def mined_plainly(pairs: Rows, documents: Rows, rules: Mapping[str, Any]) -> list[list[str]]:
    """The negatives of each row by a loop over everything."""
    passages = list(dict.fromkeys([row["text"] for row in documents] + [row["positive"] for row in pairs]))
    found = []
    for row in pairs:
        answers = {other["positive"] for other in pairs if other["anchor"] == row["anchor"]}
        query = vector(row["anchor"])
        allowed = [text for text in passages if text not in answers and text != row["anchor"]]
        ranked = sorted(allowed, key=lambda text: -float(query @ vector(text)))
        ranked = ranked[rules["first_rank"] - 1 : rules["last_rank"]]
        positive = float(query @ vector(row["positive"]))
        ceiling = positive - abs(positive) * rules["relative_margin"]
        found.append([text for text in ranked if float(query @ vector(text)) < ceiling][: rules["negatives"]])
    return found


RULES: dict[str, Any] = {"negatives": 4, "first_rank": 2, "last_rank": 40, "relative_margin": 0.1}


def test_the_negatives_are_those_of_a_loop_over_everything(bench: Bench) -> None:
    pairs, documents = some_pairs(), some_documents()
    report = bench.run(bench.write(pairs), corpus=bench.write(documents, "docs.jsonl"), **RULES)
    mined = bench.mined()
    wanted = mined_plainly(pairs, documents, RULES)
    assert [row["negative"] for row in mined] == wanted
    assert any(0 < len(row) < 4 for row in wanted)  # the margin is felt
    assert any(len(row) == 4 for row in wanted)
    assert [{name: row[name] for name in ("anchor", "positive", "id")} for row in mined] == pairs
    assert report.data["negatives"] == sum(map(len, wanted))
    assert report.data["fewer"] == sum(len(row) < 4 for row in wanted)
    assert sum(report.data["fewer_because"].values()) == report.data["fewer"]  # type: ignore[attr-defined]
    for row in mined:
        query = vector(row["anchor"])
        assert row["pos_scores"] == pytest.approx([query @ vector(row["positive"])], abs=1e-6)
        assert row["neg_scores"] == pytest.approx(
            [query @ vector(text) for text in row["negative"]], abs=1e-6
        )


@pytest.mark.parametrize(("rows", "candidates"), [(1, 1), (7, 50), (7, 1 << 20)])
def test_the_size_of_a_block_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, rows: int, candidates: int
) -> None:
    pairs = bench.write(some_pairs())
    bench.run(pairs, pick="random", output="whole.jsonl")
    monkeypatch.setattr("gemb.jobs.mining.BLOCK_ROWS", rows)
    monkeypatch.setattr("gemb.jobs.mining.CANDIDATES_AT_ONCE", candidates)
    bench.run(pairs, pick="random", output="parts.jsonl")
    assert (bench.place / "whole.jsonl").read_bytes() == (bench.place / "parts.jsonl").read_bytes()


def test_a_graph_finds_the_same_in_a_small_corpus(bench: Bench) -> None:
    pairs = bench.write(some_pairs())
    bench.run(pairs, output="exact.jsonl")
    bench.run(pairs, graph=True, output="graph.jsonl")
    assert bench.mined("graph.jsonl") == bench.mined("exact.jsonl")


def _failing_after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    count = iter(range(calls))

    def call(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("gemb.mining.texts.TextWriter.add_pair", 11),
        ("gemb.mining.texts.TextWriter.finish", 0),
        ("gemb.jobs.embed.run", 1),
        ("gemb.jobs.mining.choose", 0),
        ("gemb.jobs.mining.choose", 17),
        ("gemb.jobs.mining.sync_to_disk", 2),
        ("gemb.files.Journal.append", 9),
        ("gemb.jobs.mine.atomic_write", 0),
        ("gemb.jobs.mine.write_json", 0),
        ("gemb.jobs.mine.keep_record", 0),
    ],
)
def test_a_run_that_is_cut_off_anywhere_goes_on_to_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str, calls: int
) -> None:
    monkeypatch.setattr("gemb.jobs.mining.BLOCK_ROWS", 4)
    pairs = bench.write(some_pairs())
    bench.run(pairs, pick="random", output="whole.jsonl")
    module, _, name = where.rpartition(".")
    holder = _named(module)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, _failing_after(calls, getattr(holder, name)))
        with pytest.raises(KeyboardInterrupt):
            bench.run(pairs, pick="random")
    report = bench.run(pairs, pick="random")
    assert (bench.place / "whole.jsonl").read_bytes() == (bench.place / "mined.jsonl").read_bytes()
    kept = json.loads((bench.place / "whole.jsonl.gemb.json").read_text())["report"]
    same = ("rows", "negatives", "rows_by_negatives", "fewer_because", "too_close")
    assert {name: report.data[name] for name in same} == {name: kept[name] for name in same}
    assert not (bench.place / "mined.jsonl.partial").exists()


def _named(path: str) -> Any:  # noqa: ANN401
    """The module or class with a dotted name."""
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_a_signal_ends_the_run_behind_the_block_in_hand_and_the_next_run_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.mining.BLOCK_ROWS", 10)
    pairs = bench.write(some_pairs())
    bench.run(pairs, output="whole.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr("gemb.jobs.mining.choose", _signalling(patch))
        with pytest.raises(Interrupted) as caught:
            bench.run(pairs)
    work = bench.place / "mined.jsonl.partial"
    assert caught.value.exit_code == Exit.TERMINATED
    assert str(caught.value) == (
        f"interrupted; what is done is kept in {work}, run the same command again to go on"
    )
    assert len((work / "mined.jsonl").read_text().splitlines()) == 10
    bench.run(pairs)
    assert (bench.place / "whole.jsonl").read_bytes() == (bench.place / "mined.jsonl").read_bytes()


def _signalling(patch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    """`choose` that sends SIGTERM to this process the first time."""

    def call(*arguments: Any) -> Choice:  # noqa: ANN401
        patch.setattr("gemb.jobs.mining.choose", choose)
        os.kill(os.getpid(), signal.SIGTERM)
        return choose(*arguments)

    return call


def test_a_run_that_is_cut_off_while_it_tidies_up_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = bench.write(some_pairs())
    with monkeypatch.context() as patch:
        patch.setattr("gemb.jobs.mine.shutil.rmtree", _failing_on_finished(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            bench.run(pairs)
    assert (bench.place / "mined.jsonl.partial.done").exists()
    assert bench.run(pairs).data["already_done"] is True
    done = f"{bench.place / 'mined.jsonl'} is what is asked for: the run finds it done"
    assert bench.plan(pairs).data["notes"] == [done]
    with pytest.raises(
        GembError, match="exists and was made by another request:\n  negatives was 5, now 2\n"
    ):
        bench.plan(pairs, negatives=2)
    assert sorted(path.name for path in bench.place.iterdir()) == [
        "mined.jsonl",
        "mined.jsonl.gemb.json",
        "pairs.jsonl",
    ]


def _failing_on_finished(real: Callable[..., None]) -> Callable[..., None]:
    def call(path: Path, **options: Any) -> None:  # noqa: ANN401
        if path.name == "mined.jsonl.partial.done":
            raise KeyboardInterrupt
        real(path, **options)

    return call


def test_bytes_behind_the_journal_are_cut_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemb.jobs.mining.BLOCK_ROWS", 10)
    pairs = bench.write(some_pairs())
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", _failing_after(5, Journal.append))
        with pytest.raises(KeyboardInterrupt):
            bench.run(pairs)
    mined = bench.place / "mined.jsonl.partial/mined.jsonl"
    before = mined.read_bytes()
    assert before
    mined.write_bytes(before + b'{"half a row')
    bench.run(pairs)
    assert len(bench.mined()) == 30


def test_other_rules_embed_nothing_with_a_cache(bench: Bench) -> None:
    pairs = bench.write(some_pairs())
    bench.run(pairs, cache=bench.place / "cache", output="one.jsonl")
    before = bench.computed
    assert before > 0
    bench.run(pairs, cache=bench.place / "cache", negatives=2, output="two.jsonl")
    assert bench.computed == before


def test_the_output_is_read_by_training(bench: Bench) -> None:
    pairs = bench.write(some_pairs())
    documents = [{**row, "title": "w1 w2"} for row in some_documents()]
    bench.run(pairs, corpus=bench.write(documents, "docs.jsonl"), relative_margin=None)
    data = DataSet(path=str(bench.place / "mined.jsonl"), prompts="none")  # type: ignore[arg-type]
    with open_rows(data, bench.place / "cache") as rows:
        assert (rows.size, rows.prepared.rejected, rows.prepared.with_negatives) == (30, 0, 30)
        negatives = rows.example(0).negatives
        assert len(negatives) == 5
        assert {text.title for row in range(30) for text in rows.example(row).negatives} == {None, "w1 w2"}


def test_own_negatives_stay_in_front_and_are_not_mined_again(bench: Bench) -> None:
    rows: Rows = [
        {"query": words(1), "pos": [words(11), words(12)], "neg": [words(13)]},
        {"query": words(2), "pos": [words(21)], "neg": []},
        {"query": words(3), "pos": [words(31)], "neg": [words(32), words(33)]},
    ]
    bench.run(bench.write(rows), negatives=20, relative_margin=None)
    mined = bench.mined()
    assert all("neg" not in row for row in mined)
    assert mined[0]["negative"][0] == words(13)
    assert sorted(mined[0]["negative"]) == sorted(
        words(number)
        for number in (13, 21, 31, 32, 33)  # all but the positives, each once
    )
    assert len(mined[0]["pos_scores"]) == 2
    assert [len(row["neg_scores"]) for row in mined] == [len(row["negative"]) for row in mined]


def test_columns_that_are_named_are_read_and_the_report_says_how_to_train(bench: Bench) -> None:
    rows = [{"q": words(row), "a": words(row, 50), "other": row} for row in range(5)]
    report = bench.run(bench.write(rows), columns=ColumnNames(query="q", positive="a"), relative_margin=None)
    assert bench.mined()[3]["other"] == 3
    assert len(bench.mined()[3]["negative"]) == 4
    shown = dict(report.rows)["train with"]
    output = bench.place / "mined.jsonl"
    assert shown == f"path: {output}, columns: {{query: q, positive: a, negative: negative}}"


def test_a_beir_folder_is_mined_from_its_corpus(bench: Bench) -> None:
    bench.write(
        [{"_id": f"d{row}", "text": words(row), "title": ""} for row in range(20)], "sea/corpus.jsonl"
    )
    bench.write([{"_id": "q1", "text": words(1, 2)}, {"_id": "q2", "text": words(3)}], "sea/queries.jsonl")
    (bench.place / "sea/qrels").mkdir()
    (bench.place / "sea/qrels/train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t1\nq2\td4\t1\n"
    )
    bench.run(str(bench.place / "sea"), relative_margin=None, negatives=3)
    mined = bench.mined()
    assert [(row["query"], row["positive"]) for row in mined] == [
        (words(1, 2), [words(1), words(2)]),
        (words(3), [words(4)]),
    ]
    assert words(3) not in mined[1]["negative"]  # the text of the query
    assert all(len(row["negative"]) == 3 for row in mined)


def test_a_second_model_has_its_say(bench: Bench) -> None:
    pairs = bench.write(some_pairs())
    bench.run(pairs, output="alone.jsonl", relative_margin=0.1)
    bench.run(pairs, second=str(bench.other), scores="second", output="both.jsonl", relative_margin=0.1)
    both = bench.mined("both.jsonl")
    assert [row["negative"] for row in both] != [row["negative"] for row in bench.mined("alone.jsonl")]

    def other(text: str) -> NDArray[np.float64]:
        cubed = vector(text) ** 3
        return cubed / np.linalg.norm(cubed)

    assert sum(map(len, (row["negative"] for row in both))) > 20
    for row in both:
        query, positive = other(row["anchor"]), other(row["positive"])
        for text, score in zip(row["negative"], row["neg_scores"], strict=True):
            assert score == pytest.approx(query @ other(text), abs=1e-6)
            own = vector(row["anchor"])
            limit = own @ vector(row["positive"])
            assert own @ vector(text) < limit - 0.1 * abs(limit)
            assert score < query @ positive - 0.1 * abs(query @ positive)


def test_texts_without_vector_are_no_negatives_and_rows_that_need_them_say_so(bench: Bench) -> None:
    pairs = some_pairs(10)
    pairs[2]["positive"] = words(399, 1)
    bench.spoils = lambda ids: float("nan") if 399 + 4 in ids else None
    report = bench.run(
        bench.write(pairs), corpus=bench.write([{"text": words(399)}, {"text": words(350)}], "docs.jsonl"),
        relative_margin=None, negatives=3,
    )  # fmt: skip
    mined = bench.mined()
    assert mined[2]["negative"] == []
    assert mined[2]["pos_scores"] == [None]
    assert all(len(row["negative"]) == 3 for number, row in enumerate(mined) if number != 2)
    assert report.data["fewer_because"] == {"the query or a positive has no vector": 1}
    assert not any(words(399) in row["negative"] for row in mined)


def test_rows_of_the_corpus_without_text_are_counted(bench: Bench) -> None:
    corpus = bench.write([{"text": words(350)}, {"text": " "}, {"text": ""}], "docs.jsonl")
    report = bench.run(bench.write(some_pairs(8)), corpus=corpus)
    assert report.data["passages_left_out"] == 2
    assert dict(report.rows)["corpus"] == f"2 rows left out, the first {corpus}:2: empty text"


def test_rows_that_cannot_be_used_are_told_and_kept(bench: Bench) -> None:
    pairs = some_pairs(8)
    pairs[3] = {"anchor": words(1), "positive": words(1), "id": "x"}
    report = bench.run(bench.write(pairs))
    assert report.exit_code == Exit.REJECTED
    assert [row["id"] for row in bench.mined()] == [f"r{row}" for row in range(8) if row != 3]
    rejects = (bench.place / "mined.jsonl.rejects.jsonl").read_text()
    assert json.loads(rejects)["reason"] == "the positive equals the query"


def test_a_finished_output_is_kept_and_another_request_refused(bench: Bench) -> None:
    pairs = bench.write(some_pairs())
    bench.run(pairs)
    before = (bench.place / "mined.jsonl").stat().st_mtime_ns
    assert bench.run(pairs).data["already_done"] is True
    with pytest.raises(GembError) as caught:
        bench.run(pairs, negatives=2)
    output = bench.place / "mined.jsonl"
    assert str(caught.value) == (
        f"{output} exists and was made by another request:\n  negatives was 5, now 2\n"
        "pass --overwrite to replace it, or choose another output"
    )
    with pytest.raises(GembError) as caught:
        bench.run(pairs, model=str(bench.other))
    assert caught.value.exit_code == Exit.MISMATCH
    assert (bench.place / "mined.jsonl").stat().st_mtime_ns == before
    bench.run(pairs, negatives=2, overwrite=True)
    assert all(len(row["negative"]) <= 2 for row in bench.mined())


def test_an_unfinished_job_of_another_request_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = bench.write(some_pairs())
    with monkeypatch.context() as patch:
        patch.setattr("gemb.jobs.mining.choose", _failing_after(0, job.run))
        with pytest.raises(KeyboardInterrupt):
            bench.run(pairs)
    with pytest.raises(GembError, match="was begun by another request:\n  seed was 42, now 7\n"):
        bench.run(pairs, seed=7)
    with pytest.raises(GembError, match="was begun by another request:\n  seed was 42, now 7\n"):
        bench.plan(pairs, seed=7)
    work = bench.place / "mined.jsonl.partial"
    assert bench.plan(pairs).data["notes"] == [
        f"{work} is there from the same request: the run goes on with it"
    ]
    assert bench.plan(pairs, seed=7, overwrite=True).data["notes"] == [f"{work} is replaced"]
    assert bench.run(pairs, seed=7, overwrite=True).data["rows"] == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": ()}, "no pairs given; gemb mine pairs.jsonl -o mined.jsonl"),
        ({"output": None}, "no output given; pass -o mined.jsonl"),
        ({"output": Path("x.npy")}, "x.npy: mined rows are written as .jsonl; choose such a name"),
        ({"pairs": ("pairs.jsonl",), "output": Path("pairs.jsonl")},
         "pairs.jsonl is an input, too; choose another output"),
        ({"output": Path("no/x.jsonl")}, "no/x.jsonl: there is no folder no; make it first"),
    ],
)  # fmt: skip
def test_mistakes_show_before_the_work(bench: Bench, settings: dict[str, Any], message: str) -> None:
    bench.write(some_pairs())
    given = {"pairs": ("pairs.jsonl",), "output": Path("x.jsonl"), "model": str(bench.model), **settings}
    with pytest.raises(GembError) as caught:
        job.run(MineRecipe(**given), open_engine=bench.open_engine)
    assert str(caught.value) == message


def test_labelled_rows_are_refused(bench: Bench) -> None:
    rows = [{"text": words(row), "label": row % 2} for row in range(6)]
    with pytest.raises(GembError) as caught:
        bench.run(bench.write(rows))
    assert str(caught.value) == (
        "pairs: the rows are labelled, not queries with positives; "
        "say which column is which with --set 'columns={query: A, positive: B}', or pass --shape pairs"
    )
    assert [path.name for path in bench.place.iterdir()] == ["pairs.jsonl"]


UNNAMED = (
    '{name}:1: cannot tell the roles of the columns "id", "text"; name them under columns: '
    "query and positive, or first, second and score, or text and label; "
    "on the command line: --set 'columns={{query: A, positive: B}}'"
)


def test_a_request_refused_at_its_first_row_leaves_nothing_by_run_or_plan(bench: Bench) -> None:
    documents = bench.write(some_documents(), "docs.jsonl")
    recipe = MineRecipe(pairs=(documents,), output=bench.place / "mined.jsonl", model=str(bench.model))
    for attempt in (job.run, job.plan):
        with pytest.raises(GembError) as caught:
            attempt(recipe, open_engine=bench.open_engine)
        assert str(caught.value) == UNNAMED.format(name=documents)
        assert [path.name for path in bench.place.iterdir()] == ["docs.jsonl"]
    assert bench.run(bench.write(some_pairs())).data["rows"] == 30


def test_a_request_without_a_usable_row_keeps_its_rejects_and_is_not_in_the_way(bench: Bench) -> None:
    bad = bench.write([{"query": "w1", "positive": "w1"}], "bad.jsonl")
    with pytest.raises(GembError, match=r"no usable row; 1 rejected, .*; all are in ") as caught:
        bench.run(bad)
    assert Path(str(caught.value).rpartition("; all are in ")[2]).is_file()
    with pytest.raises(GembError) as caught:
        job.plan(MineRecipe(pairs=(bad,), output=bench.place / "x.jsonl", model=str(bench.model)))
    assert str(caught.value) == (
        f"bad: no usable row; 1 rejected, the first: {bad}:1: the positive equals the query"
    )
    assert bench.run(bench.write(some_pairs())).data["rows"] == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_rank": 3}, "ranks 1 to 3 hold fewer passages than negatives: 5; raise last_rank"),
        ({"min_score": 0.5, "max_score": 0.1}, "min_score is 0.5, above max_score 0.1"),
        ({"scores": "second"}, "scores: second needs a second model; name it under second"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MineRecipe(**settings)


def test_a_plan_counts_what_the_run_then_embeds_and_writes_nothing(bench: Bench) -> None:
    pairs, documents = bench.write(some_pairs()), bench.write(some_documents(), "docs.jsonl")
    plan = bench.plan(pairs, corpus=documents, second=str(bench.other))
    assert sorted(path.name for path in bench.place.iterdir()) == ["docs.jsonl", "pairs.jsonl"]
    shown = dict(plan.rows)
    assert plan.title == f"would mine hard negatives for 30 rows into {bench.place / 'mined.jsonl'}"
    assert shown["negatives"] == "top 5 of ranks 1 to 100, below positive - 0.05 |positive|"
    assert shown["time"].endswith(" to embed; the search comes on top")
    assert plan.data["rows_complete"] is True
    assert plan.data["notes"] == []
    report = bench.run(pairs, corpus=documents, second=str(bench.other))
    for name in ("rows", "passages", "queries", "rejected", "passages_left_out"):
        assert plan.data[name] == report.data[name]
    embedded: Any = report.data["embedded"]
    assert plan.data["tokens"] == sum(one["tokens"] for one in embedded)
    assert plan.data["bytes_needed"] > (bench.place / "mined.jsonl").stat().st_size  # type: ignore[operator]


def test_a_plan_of_very_many_rows_says_at_least(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PLANNED_ROWS", 10)
    pairs, documents = bench.write(some_pairs()), bench.write(some_documents(), "docs.jsonl")
    plan = bench.plan(pairs)
    assert plan.title.startswith("would mine hard negatives for at least 10 rows into ")
    assert bench.plan(pairs, limit=10).data["rows_complete"] is True
    monkeypatch.setattr(job, "PLANNED_ROWS", 100)
    assert bench.plan(pairs, corpus=documents).data["rows_complete"] is True
    monkeypatch.setattr(job, "COUNT_SECONDS", -1.0)
    cut = bench.plan(pairs, corpus=documents)
    assert cut.data["rows_complete"] is False
    assert dict(cut.rows)["passages"].startswith("at least ")


def test_none_turns_a_margin_off_and_other_words_are_refused() -> None:
    margins: dict[str, Any] = dict.fromkeys(("relative_margin", "absolute_margin"), "none")
    recipe = MineRecipe(**margins)
    assert [getattr(recipe, name) for name in margins] == [None, None]
    with pytest.raises(ValueError, match="valid number"):
        MineRecipe(relative_margin="off")  # type: ignore[arg-type]


@pytest.fixture
def nl2bash() -> str:
    if not DATA.exists():
        pytest.skip("needs ../shared/data")
    return str(DATA / "pairs/nl2bash-train.jsonl.gz")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_pairs_get_negatives_below_their_positive(nl2bash: str, tmp_path: Path) -> None:
    output = tmp_path / "mined.jsonl"
    recipe = MineRecipe(pairs=(nl2bash,), output=output, model="minilm", limit=200, threads=1)
    report = job.run(recipe)
    assert report.data["rows"] == 200
    for line in output.read_text().splitlines():
        row = json.loads(line)
        ceiling = row["pos_scores"][0] - 0.05 * abs(row["pos_scores"][0])
        assert all(score < ceiling + 1e-6 for score in row["neg_scores"])
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
