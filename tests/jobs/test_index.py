"""`gemb index`: the same index whatever way it came about, kept like its input; what must be refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.engine import Engine
from gemb.errors import Exit, GembError, Interrupted, LockedError, MismatchError, UnavailableError
from gemb.files import Lock
from gemb.jobs import embed, index_adding
from gemb.jobs import index as job
from gemb.jobs import index_care as care
from gemb.jobs.embed import EmbedRecipe
from gemb.jobs.index import IndexRecipe
from gemb.report import Event, Plan, Report
from gemb.store import Index, Writer
from gemb.store.writer import Compared
from gemb.vectors import calibrate
from tests.fakes import FakeEngine, expected, fake_folder, fake_vector, words

Rows = Sequence[Mapping[str, Any]]

OR_SKIP = "; --on-error skip leaves such rows out"


class Bench:
    """A working folder, models elsewhere, and a job that runs there on a fake engine."""

    def __init__(self, place: Path) -> None:
        self.place = place / "work"
        self.place.mkdir()
        self.models = place / "models"
        self.model = fake_folder(self.models / "usual")
        self.engines: list[FakeEngine] = []
        self.events: list[Event] = []
        self.engine: Callable[[], FakeEngine] = lambda: FakeEngine(workers=2)
        self.path = self.place / "docs.gemb"

    def write(self, rows: Rows, name: str = "docs.jsonl") -> Path:
        path = self.place / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    def open_engine(self, *arguments: object) -> Engine:
        engine = self.engine()
        self.engines.append(engine)
        return engine

    def run(self, *sources: Path | str, overwrite: bool = False, **settings: Any) -> Report:  # noqa: ANN401
        if "vectors" not in settings:
            settings = {"model": str(self.model), **settings}
        recipe = IndexRecipe(
            **{
                "inputs": tuple(map(str, sources)),
                "output": self.path,
                "threads": 1,
                "device": "cpu",
                **settings,
            }
        )
        return job.run(recipe, self.events.append, overwrite=overwrite, open_engine=self.open_engine)

    @property
    def computed(self) -> int:
        """Texts computed by all engines so far."""
        return sum(engine.rows for engine in self.engines)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", 60)  # many windows, from few rows
    monkeypatch.setattr(index_adding, "COMPARED_ROWS", 7)
    bench = Bench(tmp_path)
    monkeypatch.chdir(bench.place)
    return bench


def numbers_of(row: int) -> list[int]:
    """The words of a row: 1 to 9 of them, different for each row."""
    return [row % 400, *range(row % 7, row % 7 + row % 9)]


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": f"d{row}", "text": words(*numbers_of(row)), "year": 2000 + row} for row in range(count)]


def content_of(path: Path) -> dict[str, tuple[str, str, dict[str, Any], Any, list[list[float]]]]:
    """Title, text, metadata, spans and vectors of every document, by id."""
    found = {}
    with Index.open(path) as index:
        for block in index.export():
            starts = np.cumsum([0, *block.counts])
            for place, document in enumerate(block.documents):
                vectors = block.vectors[starts[place] : starts[place + 1]]
                found[document.id] = (
                    document.title,
                    document.text,
                    dict(document.metadata),
                    block.spans[place],
                    vectors.tolist(),
                )
    return found


def counts_of(report: Report) -> tuple[object, ...]:
    return tuple(report.data[name] for name in ("added", "changed", "unchanged", "removed", "rejected"))


# --- what comes out: the same, whatever way it came about -------------------------------------------------


def test_every_document_has_the_vector_of_its_text_and_all_that_was_read(bench: Bench) -> None:
    report = bench.run(bench.write(rows_of(100)), dtype="f32")
    assert (report.exit_code, counts_of(report)) == (Exit.DONE, (100, 0, 0, 0, 0))
    found = content_of(bench.path)
    assert list(found) == [f"d{row}" for row in range(100)]
    for row in range(100):
        title, text, metadata, spans, vectors = found[f"d{row}"]
        assert (title, text, metadata, spans) == ("", words(*numbers_of(row)), {"year": 2000 + row}, None)
        np.testing.assert_allclose(vectors, [expected(*numbers_of(row))], atol=1e-6)


@pytest.mark.parametrize("characters", [1, 10_000_000])
def test_windows_of_any_size_give_the_same_index(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    source = bench.write(rows_of(60))
    bench.run(source)
    usual = content_of(bench.path)
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", characters)
    bench.run(source, output=bench.place / "again.gemb")
    assert content_of(bench.place / "again.gemb") == usual


def test_vectors_of_gemb_embed_give_the_same_index_as_the_texts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bench.write([*rows_of(30), {"id": "e", "text": ""}])
    made = EmbedRecipe(
        inputs=(str(source),), output=bench.place / "docs.npy", model=str(bench.model), on_error="skip"
    )
    embed.run(made, open_engine=bench.open_engine)
    bench.run(source, on_error="skip")
    computed = bench.computed
    for name, path in (("docs.npy", bench.path), ("docs.parquet", bench.path)):
        if name == "docs.parquet":
            embed.run(made.model_copy(update={"output": bench.place / name}), open_engine=bench.open_engine)
            computed = bench.computed
        ready = bench.place / f"{name}.gemb"
        report = bench.run(source, vectors=bench.place / name, output=ready, on_error="skip")
        assert counts_of(report)[:2] == (30, 0)
        assert content_of(ready) == content_of(path)
        assert report.data["fingerprint"] is not None
        assert bench.computed == computed
    with Index.open(bench.place / "docs.npy.gemb") as index, Index.open(bench.path) as other:
        assert {**index.encoder, "passages": "16:0"} == other.encoder


def test_several_runs_over_parts_give_what_one_run_gives(bench: Bench) -> None:
    rows = rows_of(40)
    bench.run(bench.write(rows), output=bench.place / "whole.gemb")
    for start in range(0, 40, 10):
        bench.run(bench.write(rows[start : start + 10], f"part-{start}.jsonl"))
    assert content_of(bench.path) == content_of(bench.place / "whole.gemb")


def test_a_pipe_gives_what_a_file_gives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.write(rows_of(20))
    bench.run(source)
    stdin = io.TextIOWrapper(io.BytesIO(source.read_bytes()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    bench.run("-", output=bench.place / "piped.gemb")
    assert content_of(bench.place / "piped.gemb") == content_of(bench.path)


# --- upsert -----------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_embedded_and_no_model_is_loaded_for_it(bench: Bench) -> None:
    source = bench.write(rows_of(50))
    bench.run(source)
    bench.engines.clear()
    report = bench.run(source)
    assert counts_of(report) == (0, 0, 50, 0, 0)
    assert bench.engines == []
    assert report.title.startswith(f"{bench.path}: 0 added, 50 unchanged, in ")


def test_only_what_changed_is_embedded_again(bench: Bench) -> None:
    rows = rows_of(50)
    bench.run(bench.write(rows))
    before = bench.computed
    rows[7] = {**rows[7], "text": words(300, 301)}
    rows[9] = {**rows[9], "year": 1066}
    rows.append({"id": "new", "text": words(302)})
    report = bench.run(bench.write(rows))
    assert counts_of(report) == (1, 2, 48, 0, 0)
    assert bench.computed - before == 2  # metadata alone cost no vector
    found = content_of(bench.path)
    assert found["d9"][2] == {"year": 1066}
    np.testing.assert_allclose(found["d7"][4], [expected(300, 301)], atol=1e-3)  # f16
    fresh = bench.place / "fresh.gemb"
    bench.run(bench.write(rows), output=fresh)
    assert content_of(bench.path) == content_of(fresh)


def test_the_model_and_all_settings_are_those_of_the_index_that_is_there(bench: Bench) -> None:
    bench.run(bench.write(rows_of(3)), passages="12:4", dtype="int8")
    report = bench.run(bench.write(rows_of(5)), model=None)
    assert counts_of(report) == (2, 0, 3, 0, 0)
    assert (report.data["passages"], report.data["dtype"]) == ("12:4", "int8")
    assert report.data["model"] == str(bench.model.resolve())


def test_prune_removes_what_the_input_no_longer_has(bench: Bench) -> None:
    bench.run(bench.write(rows_of(30)))
    rows = rows_of(30)[10:]
    report = bench.run(bench.write(rows), prune=True)
    assert counts_of(report) == (0, 0, 20, 10, 0)
    assert report.data["pruned"] is True
    assert list(content_of(bench.path)) == [row["id"] for row in rows]


def test_prune_keeps_the_document_of_a_row_that_is_rejected(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    rows: list[dict[str, Any]] = [{"id": "d0", "text": words(0)}, {"id": "d1", "text": None}]
    report = bench.run(bench.write(rows), prune=True, on_error="skip")
    assert (report.exit_code, counts_of(report)[3:]) == (Exit.REJECTED, (3, 1))
    assert list(content_of(bench.path)) == ["d0", "d1"]


def test_nothing_is_pruned_for_a_rejected_row_without_an_id(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    source = bench.write(rows_of(2))
    source.write_text(source.read_text("utf-8") + "{broken\n", "utf-8")
    report = bench.run(source, prune=True, on_error="skip")
    assert report.data["pruned"] is False
    assert report.data["notes"] == [
        "nothing was pruned: 1 rejected row without an id that can be read, "
        "so that their documents would have gone too"
    ]
    assert len(content_of(bench.path)) == 5


def test_nothing_is_pruned_where_a_limit_cut_the_input_and_the_next_run_does_it(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    rows = [{"id": f"n{row}", "text": words(row)} for row in range(4)]
    report = bench.run(bench.write(rows), prune=True, limit_rows=3)
    assert (report.exit_code, counts_of(report)[:4]) == (Exit.MORE, (3, 0, 0, 0))
    report = bench.run(bench.write(rows), prune=True, limit_rows=3)
    assert (report.exit_code, counts_of(report)[:4]) == (Exit.DONE, (1, 0, 3, 5))


def test_an_input_without_rows_prunes_nothing(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    source = bench.write([])
    with pytest.raises(GembError, match=r"docs\.jsonl: no rows$"):
        bench.run(source, prune=True)
    assert len(content_of(bench.path)) == 5


# --- passages ---------------------------------------------------------------------------------------------


def long_text(count: int) -> str:
    return " ".join(words(number) + ("." if number % 5 == 4 else "") for number in range(count))


def test_a_long_document_has_a_row_for_each_passage_with_its_span_and_title(bench: Bench) -> None:
    text = long_text(60)
    rows: Rows = [{"id": "a", "text": words(1)}, {"id": "long", "title": "w7", "text": text}]
    report = bench.run(bench.write(rows), dtype="f32")
    assert (report.data["documents"], report.data["divided"]) == (2, 1)
    found = content_of(bench.path)
    _, stored, _, spans, vectors = found["long"]
    assert stored == text
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(text)
    assert len(spans) == len(vectors) == report.data["rows"] - 1  # type: ignore[operator]
    for (begin, end), vector in zip(spans, vectors, strict=True):
        ids = [1 if word == "." else int(word[1:]) + 4 for word in text[begin:end].replace(".", " .").split()]
        assert len(ids) + 3 <= 16  # the model's maximum, with the title and the special tokens
        np.testing.assert_allclose(vector, fake_vector(np.array([2, 11, *ids, 3], np.int32)), atol=1e-6)


def test_passages_overlap_where_that_is_asked_for(bench: Bench) -> None:
    text = long_text(60)
    bench.run(bench.write([{"id": "long", "text": text}]), passages="12:5")
    _, _, _, spans, _ = content_of(bench.path)["long"]
    for (_, end), (begin, _) in pairwise(spans):
        assert 0 < len(text[begin:end].replace(".", " .").split()) <= 5
        assert text[begin - 1] == " "  # at a word
    assert spans[-1][1] == len(text)


def test_passages_off_cuts_and_counts_it(bench: Bench) -> None:
    report = bench.run(bench.write([{"id": "long", "text": words(*range(40))}]), passages="off", dtype="f32")
    assert (report.data["rows"], report.data["truncated"], report.data["lost_tokens"]) == (1, 1, 26)
    assert dict(report.rows)["cut"] == "1 text lost 26 tokens; see --passages"
    np.testing.assert_allclose(content_of(bench.path)["long"][4], [expected(*range(14))], atol=1e-6)


def test_a_search_gives_each_document_once_with_its_best_passage(bench: Bench) -> None:
    text = " ".join(words(row) for row in range(40))
    bench.run(bench.write([{"id": "long", "text": text}, {"id": "b", "text": words(300)}]))
    with Index.open(bench.path) as index:
        hits = index.search(expected(*range(14)), k=2)[0]
    assert [hit.id for hit in hits] == ["long", "b"]
    assert hits[0].passage == (0, len(words(*range(14))) + 1)


# --- stored vectors ---------------------------------------------------------------------------------------


def test_int8_ranges_come_from_many_rows_though_the_first_window_is_small(bench: Bench) -> None:
    bench.run(bench.write(rows_of(200)), dtype="int8")
    bench.run(bench.write(rows_of(200)), output=bench.place / "exact.gemb", dtype="f32")
    exact = np.concatenate(
        [np.array(one[4], np.float32) for one in content_of(bench.place / "exact.gemb").values()]
    )
    wanted = calibrate(exact)
    with Index.open(bench.path) as index:
        low, high = np.array(index.settings.int8_ranges, np.float32)
    assert (low <= wanted.minimum).all()
    assert (high >= wanted.maximum).all()


def test_the_first_stage_is_the_largest_prefix_the_model_was_trained_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.index_setup.CODE_DIMS", 5)
    bench.model = fake_folder(bench.models / "matryoshka", matryoshka_dims=[8, 4, 2])
    assert bench.run(bench.write(rows_of(9))).data["first_stage_dims"] == 4
    plain = bench.run(
        bench.write(rows_of(9)), model=str(fake_folder(bench.models / "plain")), output=bench.place / "p.gemb"
    )
    assert plain.data["first_stage_dims"] == 8


def test_dims_are_cut_to_a_trained_size_at_unit_length(bench: Bench) -> None:
    bench.model = fake_folder(bench.models / "matryoshka", matryoshka_dims=[8, 4, 2])
    bench.run(bench.write(rows_of(9)), dims=4, dtype="f32")
    for row in range(9):
        vector = expected(*numbers_of(row))[:4]
        wanted = [vector / np.linalg.norm(vector)]
        np.testing.assert_allclose(content_of(bench.path)[f"d{row}"][4], wanted, atol=1e-6)
    with pytest.raises(MismatchError, match="--dims 3 is no size that"):
        bench.run(bench.write(rows_of(9)), dims=3, output=bench.place / "other.gemb")


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        ("all", {"year": 1, "tags": ["a", {"b": None}]}),
        ("none", {}),
        ("tags, other", {"tags": ["a", {"b": None}]}),
    ],
)
def test_keep_chooses_the_metadata(bench: Bench, keep: str, wanted: dict[str, object]) -> None:
    bench.run(bench.write([{"id": "a", "text": "w1", "year": 1, "tags": ["a", {"b": None}]}]), keep=keep)
    assert content_of(bench.path)["a"][2] == wanted


def test_a_name_in_keep_that_no_row_has_is_told(bench: Bench) -> None:
    report = bench.run(bench.write(rows_of(3)), keep="year,yaer")
    assert report.data["notes"] == ["no row has yaer, which --keep names"]


def test_any_string_is_an_id(bench: Bench) -> None:
    ids = ["", " ", "ü\u0000x", "a\nb", "#1", "../x", "🦆", "d" * 5000, "1"]
    rows = [{"id": id_, "text": words(row)} for row, id_ in enumerate(ids)]
    report = bench.run(bench.write(rows), on_error="skip")
    assert report.data["rejected"] == 1  # the empty one
    assert list(content_of(bench.path)) == ids[1:]


def test_metadata_that_json_cannot_hold_are_a_reject(bench: Bench) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": ["a", "b"], "text": ["w1", "w2"], "raw": pa.array([b"\xff", None], pa.binary())})
    pq.write_table(table, bench.place / "docs.parquet")
    with pytest.raises(GembError) as raised:
        bench.run(bench.place / "docs.parquet")
    assert str(raised.value) == (
        f"{bench.place / 'docs.parquet'}:1: field 'raw' holds bytes, which JSON cannot "
        "(type is not json serializable: bytes); leave the field out with --keep; --on-error skip leaves "
        "such rows out"
    )
    report = bench.run(bench.place / "docs.parquet", keep="none")
    assert counts_of(report) == (2, 0, 0, 0, 0)


# --- rejects and limits -----------------------------------------------------------------------------------


def test_a_bad_row_stops_the_job_and_what_was_before_it_is_kept(bench: Bench) -> None:
    rows = [*rows_of(40), {"id": "bad"}]
    with pytest.raises(GembError) as raised:
        bench.run(bench.write(rows))
    place = bench.place / "docs.jsonl"
    assert str(raised.value) == (
        f'{place}:41: no "text"; this line has id; --on-error skip leaves such rows out'
    )
    assert raised.value.exit_code == Exit.USAGE
    kept = len(content_of(bench.path))
    assert 0 < kept <= 40
    report = bench.run(bench.write(rows), on_error="skip")
    assert counts_of(report) == (40 - kept, 0, kept, 0, 1)


def test_a_new_index_that_got_nothing_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(GembError, match=r'docs\.jsonl:1: no "text"'):
        bench.run(bench.write([{"id": "bad"}]))
    assert not bench.path.exists()
    assert bench.engines == []


def test_rejects_are_listed_and_a_run_without_any_removes_the_list(bench: Bench) -> None:
    rows = [{"id": "a", "text": "w1"}, {"id": "b"}, {"id": "a", "text": "w2"}, {"id": "c", "text": " "}]
    report = bench.run(bench.write(rows), on_error="skip")
    assert (report.exit_code, counts_of(report)) == (Exit.REJECTED, (1, 0, 0, 0, 3))
    path = bench.place / "docs.gemb.rejects.jsonl"
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(one["line"], one["id"], one["reason"]) for one in found] == [
        (2, "b", 'no "text"; this line has id'),
        (3, "a", "the id 'a' stands already in the input; ids are unique"),
        (4, "c", "empty text"),
    ]
    assert dict(report.rows)["rejected"] == f"3 rows; see {path}"
    bench.run(bench.write(rows[:1]))
    assert not path.exists()


def test_a_repeated_id_is_found_wherever_its_first_use_is(bench: Bench) -> None:
    bench.run(bench.write([{"id": "old", "text": "w1"}]))
    ids = ["old", "new", *(f"x{row}" for row in range(30)), "new", "old", "x3", "last", "last"]
    rows = [{"id": id_, "text": words(row)} for row, id_ in enumerate(ids)]
    report = bench.run(bench.write(rows), on_error="skip")
    assert counts_of(report) == (32, 1, 0, 0, 4)
    assert content_of(bench.path)["new"][1] == words(1)


def test_max_rejects_and_empty_are_as_in_gemb_embed(bench: Bench) -> None:
    rows = [{"id": "a", "text": "w1"}, {"id": "b", "text": ""}, {"id": "c"}, {"id": "d"}]
    with pytest.raises(
        GembError, match=r"^more than 1 row were rejected, the last at .*:4, and --max-rejects is 1; see "
    ):
        bench.run(bench.write(rows), max_rejects=1, empty="skip")
    report = bench.run(bench.write(rows), max_rejects=2, empty="skip")
    assert (report.data["empty_skipped"], report.data["rejected"]) == (1, 2)
    assert dict(report.rows)["empty"] == "1 row left out"


def test_a_document_whose_vector_fails_is_refused_whole(bench: Bench) -> None:
    def fails(ids: NDArray[np.int32]) -> BaseException | None:
        return RuntimeError("no such luck") if 50 + 4 in ids else None

    bench.engine = lambda: FakeEngine(fails=fails)
    rows: Rows = [
        {"id": "a", "text": words(1)},
        {"id": "long", "text": words(*range(30, 80))},
        {"id": "b", "text": words(2)},
    ]
    report = bench.run(bench.write(rows), on_error="skip")
    assert counts_of(report) == (2, 0, 0, 0, 1)
    assert list(content_of(bench.path)) == ["a", "b"]
    assert "no such luck" in (bench.place / "docs.gemb.rejects.jsonl").read_text("utf-8")


def test_a_text_without_tokens_is_refused_by_the_id_of_its_document(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.models / "bare"
    shutil.copytree(bench.model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer["post_processor"] = None  # without special tokens a text may have none at all
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[ .]"},
        "behavior": "Removed",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    bench.model = folder
    rows = [
        {"id": "a", "text": "w1"},
        {"id": "b", "text": "..."},
        {"id": "c", "text": words(*range(20)) + ". ..."},
    ]
    report = bench.run(bench.write(rows), on_error="skip")
    assert counts_of(report) == (2, 0, 0, 0, 1)
    (line,) = (bench.place / "docs.gemb.rejects.jsonl").read_text("utf-8").splitlines()
    assert (json.loads(line)["id"], json.loads(line)["reason"]) == (
        "b",
        "the tokenizer finds no token in the text",
    )


def test_limit_rows_counts_what_is_added_and_the_next_run_goes_on(bench: Bench) -> None:
    source = bench.write(rows_of(25))
    seen = []
    for _ in range(3):
        report = bench.run(source, limit_rows=10)
        seen.append((report.exit_code, counts_of(report)[:3]))
    assert [code for code, _ in seen] == [Exit.MORE, Exit.MORE, Exit.DONE]
    assert [counts[0] for _, counts in seen] == [10, 10, 5]
    assert seen[2][1] == (5, 0, 20)
    assert bench.computed == 25


def test_max_seconds_does_something_and_stops(bench: Bench) -> None:
    bench.engine = lambda: FakeEngine(seconds_per_token=0.001)
    source = bench.write(rows_of(200))
    report = bench.run(source, max_seconds=0.001)
    added = report.data["added"]
    assert report.exit_code == Exit.MORE
    assert isinstance(added, int)
    assert 0 < added < 200
    assert report.title.endswith("; stopped by a limit, run the same command again to go on")
    bench.engine = FakeEngine
    assert counts_of(bench.run(source))[:3] == (200 - added, 0, added)


@pytest.mark.parametrize("rows", [0, 5])
def test_an_idle_pipe_ends_when_max_seconds_are_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe, os.fdopen(reading, "rb") as stdin:
        pipe.write(bench.write(rows_of(rows)).read_bytes())
        pipe.flush()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, encoding="utf-8"))
        report = bench.run("-", max_seconds=0.5, input_format="jsonl")
        assert (report.exit_code, report.data["added"]) == (Exit.MORE, rows)
        assert report.title.endswith("; stopped by a limit, the rest of the pipe was not read")
        pipe.close()


def test_the_cache_spares_texts_that_were_embedded_before(bench: Bench) -> None:
    source = bench.write(rows_of(30))
    bench.run(source, cache=bench.place / "cache")
    before = bench.computed
    report = bench.run(source, cache=bench.place / "cache", output=bench.place / "again.gemb")
    assert bench.computed == before
    assert report.data["cache_hits"] == 30
    assert content_of(bench.place / "again.gemb") == content_of(bench.path)


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_done_and_the_next_run_goes_on(
    bench: Bench, number: signal.Signals, code: int
) -> None:
    def interrupt(ids: NDArray[np.int32]) -> BaseException | None:
        if 30 + 4 == ids[1]:
            os.kill(os.getpid(), number)
        return None

    bench.engine = lambda: FakeEngine(fails=interrupt)
    source = bench.write(rows_of(80))
    with pytest.raises(Interrupted) as raised:
        bench.run(source)
    assert raised.value.exit_code == code
    kept = content_of(bench.path)
    assert 0 < len(kept) < 80
    assert str(raised.value) == (
        f"interrupted; {len(kept):,} documents added or changed in {bench.path}, "
        "run the same command again to go on"
    )
    bench.engine = FakeEngine
    report = bench.run(source)
    assert counts_of(report) == (80 - len(kept), 0, len(kept), 0, 0)
    assert bench.engines[-1].rows == 80 - len(kept)


def test_after_a_bug_of_the_engine_the_next_run_ends_well(bench: Bench) -> None:
    def bug(ids: NDArray[np.int32]) -> BaseException | None:
        return TypeError("a bug") if ids[1] == 30 + 4 else None

    bench.engine = lambda: FakeEngine(fails=bug)
    source = bench.write(rows_of(80))
    with pytest.raises(TypeError, match="a bug"):
        bench.run(source)
    bench.engine = FakeEngine
    assert bench.run(source).data["documents"] == 80


def test_nothing_is_compared_while_an_error_has_the_index_committed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that reads may be in the middle of many changes of metadata then."""
    bench.run(bench.write(rows_of(40)))
    entered, comparing, overlaps = threading.Event(), threading.Event(), []
    compare, commit = Writer.compare, Writer.commit

    def slow_compare(self: Writer, *arguments: Any) -> Compared:  # noqa: ANN401
        if threading.current_thread() is threading.main_thread():
            return compare(self, *arguments)
        comparing.set()
        entered.set()
        time.sleep(0.3)
        compared = compare(self, *arguments)
        comparing.clear()
        return compared

    def watched_commit(self: Writer) -> None:
        overlaps.append(comparing.is_set())
        commit(self)

    def fail() -> FakeEngine:
        assert entered.wait(10)
        raise GembError("no such engine")

    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", 10_000)
    monkeypatch.setattr(index_adding, "FIRST_WINDOW_SECONDS", 0.05)
    monkeypatch.setattr(Writer, "compare", slow_compare)
    monkeypatch.setattr(Writer, "commit", watched_commit)
    bench.engine = fail
    rows = [{"id": "new", "text": "w1"}, *({**row, "year": 1} for row in rows_of(40))]
    with pytest.raises(GembError, match="no such engine"):
        bench.run(bench.write(rows))
    assert overlaps
    assert not any(overlaps)
    assert care.verify(bench.path).data["sound"] is True


def test_a_signal_while_the_graph_is_built_keeps_all_documents(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Writer.compact, "__kwdefaults__", {**(Writer.compact.__kwdefaults__ or {}), "graph_rows": 20}
    )

    def interrupt(event: Event) -> None:
        if event.stage == "building the graph":
            os.kill(os.getpid(), signal.SIGTERM)

    np.save(bench.place / "v.npy", unit(3000))
    recipe = IndexRecipe(vectors=bench.place / "v.npy", output=bench.path, threads=1)
    monkeypatch.setattr("gemb.store.segments.PASS_ROWS", 500)
    with pytest.raises(Interrupted) as raised:
        job.run(recipe, interrupt)
    assert str(raised.value) == (
        f"interrupted while compacting; all documents are in {bench.path}, "
        f"gemb index compact {bench.path} goes on"
    )
    assert raised.value.exit_code == 143
    assert len(content_of(bench.path)) == 3000
    assert care.compact(bench.path).title == f"{bench.path}: compacted"


# --- replacing --------------------------------------------------------------------------------------------


def test_overwrite_replaces_the_index_when_the_new_one_is_whole(bench: Bench) -> None:
    bench.run(bench.write(rows_of(20)))
    old = content_of(bench.path)
    source = bench.write(rows_of(20)[5:])
    other = str(fake_folder(bench.models / "other", seed=2))
    report = bench.run(source, overwrite=True, model=other, limit_rows=6)
    assert report.exit_code == Exit.MORE
    assert content_of(bench.path) == old
    left = bench.place / "docs.gemb.building"
    assert left.is_dir()
    assert bench.run(bench.write(rows_of(20))).data["notes"] == [
        f"{left} is left of an --overwrite that was stopped: run it again to go on, or remove it"
    ]
    bench.write(rows_of(20)[5:])
    report = bench.run(source, overwrite=True, model=other)
    assert counts_of(report)[:3] == (9, 0, 6)
    assert len(content_of(bench.path)) == 15
    assert sorted(path.name for path in bench.place.iterdir()) == ["docs.gemb", "docs.jsonl"]
    assert bench.run(source, model=None).data["model"] == other


def test_overwrite_begins_anew_where_another_request_was_begun(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    bench.run(bench.write(rows_of(9)), overwrite=True, limit_rows=6)
    report = bench.run(bench.write(rows_of(4)), overwrite=True, dtype="f32")
    assert counts_of(report)[:3] == (4, 0, 0)
    assert report.data["documents"] == 4


def test_overwrite_drops_what_a_stopped_run_put_and_the_input_has_no_more(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    bench.run(bench.write(rows_of(9)), overwrite=True, limit_rows=6)
    bench.run(bench.write(rows_of(9)[4:]), overwrite=True)
    assert list(content_of(bench.path)) == [f"d{row}" for row in range(4, 9)]


# --- ready vectors ----------------------------------------------------------------------------------------


def unit(rows: int, dims: int = 6, seed: int = 3) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, dims)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # type: ignore[no-any-return]


def test_ready_vectors_need_no_model_and_are_compared_by_content(bench: Bench) -> None:
    vectors = unit(20)
    np.save(bench.place / "v.npy", vectors)
    (bench.place / "ids.txt").write_text("".join(f"n{row}\n" for row in range(20)), "utf-8")
    ready: dict[str, Any] = {"vectors": bench.place / "v.npy", "ids": bench.place / "ids.txt", "dtype": "f32"}
    report = bench.run(**ready)
    assert counts_of(report) == (20, 0, 0, 0, 0)
    assert report.data["model"] is None
    np.testing.assert_allclose([one[4][0] for one in content_of(bench.path).values()], vectors, atol=1e-6)
    vectors[3] = unit(1, seed=9)
    np.save(bench.place / "v.npy", vectors)
    assert counts_of(bench.run(**ready)) == (0, 1, 19, 0, 0)
    np.testing.assert_allclose(content_of(bench.path)["n3"][4], [vectors[3]], atol=1e-6)


def test_vectors_without_ids_take_those_of_the_input_by_their_place(bench: Bench) -> None:
    np.save(bench.place / "v.npy", unit(3))
    source = bench.write(rows_of(3))
    bench.run(source, vectors=bench.place / "v.npy", dtype="f32")
    found = content_of(bench.path)
    assert [(id_, one[1]) for id_, one in found.items()] == [(row["id"], row["text"]) for row in rows_of(3)]
    for rows, read in ((2, "2"), (4, "more")):
        with pytest.raises(GembError) as raised:
            bench.run(bench.write(rows_of(rows)), vectors=bench.place / "v.npy")
        assert str(raised.value) == (
            f"{bench.place / 'v.npy'} has 3 vectors without ids, but {source} has {read} rows; "
            "each row needs its vector, or name the ids with --ids"
        )


def test_a_parquet_file_brings_its_vectors_texts_and_metadata(bench: Bench) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = unit(3)
    columns = {
        "id": ["a", "b", "c"],
        "vec": list(map(list, vectors)),
        "year": [1, 2, 3],
        "text": ["x", None, ""],
    }
    pq.write_table(pa.table(columns), bench.place / "docs.parquet")
    with pytest.raises(GembError, match='has no column "embedding"; it has id, vec, year, text'):
        bench.run(vectors=bench.place / "docs.parquet")
    bench.run(bench.place / "docs.parquet", vector_field="vec", dtype="f32", model=None)
    report = bench.run(vectors=bench.place / "docs.parquet", vector_field="vec")
    assert counts_of(report) == (0, 0, 3, 0, 0)
    found = content_of(bench.path)
    assert [(one[1], one[2]) for one in found.values()] == [
        ("x", {"year": 1}),
        ("", {"year": 2}),
        ("", {"year": 3}),
    ]
    np.testing.assert_allclose([one[4][0] for one in found.values()], vectors, atol=1e-6)


def test_vectors_that_are_none_are_refused_by_row(bench: Bench) -> None:
    vectors = unit(5)
    vectors[1, 2], vectors[3] = np.nan, 0
    np.save(bench.place / "v.npy", vectors)
    with pytest.raises(GembError) as raised:
        bench.run(vectors=bench.place / "v.npy")
    assert str(raised.value) == (
        f"{bench.place / 'v.npy'}:2: its vector has NaN or infinity in it; it would ruin every ranking"
        f"{OR_SKIP}"
    )
    report = bench.run(vectors=bench.place / "v.npy", on_error="skip")
    assert counts_of(report) == (3, 0, 0, 0, 2)
    assert list(content_of(bench.path)) == ["0", "2", "4"]


def test_a_refused_row_is_named_by_its_line_in_every_block(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.index_vectors.BLOCK_ROWS", 2)
    vectors = unit(6)
    vectors[4] = 0
    np.save(bench.place / "v.npy", vectors)
    source = bench.write(rows_of(6))
    message = f"{bench.place / 'v.npy'}:5: its vector has zeros only; it would ruin every ranking{OR_SKIP}"
    for ids in (None, bench.place / "v.ids.txt"):
        if ids is not None:
            ids.write_text("".join(f"d{row}\n" for row in range(6)), "utf-8")
        for sources in ([source], []):
            with pytest.raises(GembError) as raised:
                bench.run(*sources, vectors=bench.place / "v.npy", ids=ids)
            assert str(raised.value) == message


def test_ids_and_inputs_that_do_not_belong_to_the_vectors_are_refused(bench: Bench) -> None:
    np.save(bench.place / "v.npy", unit(3))
    ids = bench.place / "ids.txt"
    ids.write_text("d0\nd1\n", "utf-8")
    with pytest.raises(GembError) as raised:
        bench.run(vectors=bench.place / "v.npy", ids=ids)
    assert str(raised.value) == (
        f"{ids} has 2 ids, but {bench.place / 'v.npy'} has 3 rows; give each row its id"
    )
    ids.write_text("d0\nd2\nd1\n", "utf-8")
    source = bench.write(rows_of(5))
    with pytest.raises(GembError) as raised:
        bench.run(source, vectors=bench.place / "v.npy", ids=ids)
    assert str(raised.value) == (
        f"{source} has no 'd1' where {bench.place / 'v.npy'} has it; "
        "the documents must stand in the order of the vectors"
    )


def test_repeated_ids_of_vectors_are_refused_in_and_between_blocks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.index_vectors.BLOCK_ROWS", 2)
    np.save(bench.place / "v.npy", unit(6))
    (bench.place / "v.ids.txt").write_text("a\na\nb\nc\nb\nd\n", "utf-8")
    for dtype in ("f32", "int8"):
        report = bench.run(
            vectors=bench.place / "v.npy", on_error="skip", dtype=dtype, output=bench.place / f"{dtype}.gemb"
        )
        assert counts_of(report) == (4, 0, 0, 0, 2)


# --- what does not fit ------------------------------------------------------------------------------------


def refusal(bench: Bench, kind: type[GembError] = GembError, **settings: Any) -> str:  # noqa: ANN401
    with pytest.raises(kind) as raised:
        bench.run(*settings.pop("sources", [bench.place / "docs.jsonl"]), **settings)
    assert raised.value.exit_code == kind.exit_code
    return str(raised.value).replace(str(bench.place) + "/", "")


def test_what_would_make_other_vectors_is_refused(bench: Bench) -> None:
    bench.run(bench.write(rows_of(3)), passages="off")
    undo = "leave it out to add to the index, or pass --overwrite to make it anew"
    assert refusal(bench, MismatchError, dims=4) == (
        f"docs.gemb was made with dims 8, but this run asks for 4; {undo}"
    )
    assert refusal(bench, MismatchError, dtype="f32") == (
        f"docs.gemb was made with dtype f16, but this run asks for f32; {undo}"
    )
    assert refusal(bench, MismatchError, passages="10:2") == (
        f"docs.gemb was made with passages off, but this run asks for 10:2; {undo}"
    )
    other = fake_folder(bench.models / "other", seed=2)
    message = refusal(bench, MismatchError, model=str(other))
    assert message.startswith(f"docs.gemb holds vectors of {bench.model.resolve()} (")
    assert f"but {other} is " in message


def test_another_prompt_than_the_index_has_is_refused(bench: Bench) -> None:
    bench.model = fake_folder(bench.models / "prompts", prompts={"document": "w1 ", "query": "w2 "})
    bench.run(bench.write(rows_of(3)))
    assert refusal(bench, MismatchError, as_="query").startswith(
        "docs.gemb was made with prompt 'w1 ', but this run asks for 'w2 '"
    )
    with Index.open(bench.path) as index:
        assert index.encoder["query_prompt"] == {"name": "query", "text": "w2 "}


def test_a_model_that_is_gone_is_told_with_both_names(bench: Bench) -> None:
    bench.run(bench.write(rows_of(3)))
    shutil.move(bench.model, bench.models / "moved")
    message = refusal(bench, UnavailableError, model=None)
    assert message.startswith(f"docs.gemb was made by {bench.model} (")
    message = refusal(bench, UnavailableError, model="nowhere")
    assert f"docs.gemb was made by {bench.model} (" in message
    assert "), and nowhere, given with -m, cannot be had: " in message
    assert bench.run(bench.place / "docs.jsonl", model=str(bench.models / "moved")).data["unchanged"] == 3


def test_texts_and_ready_vectors_do_not_mix(bench: Bench) -> None:
    np.save(bench.place / "v.npy", unit(3, dims=8))
    bench.run(vectors=bench.place / "v.npy")
    bench.write(rows_of(3))
    assert refusal(bench, MismatchError) == (
        "docs.gemb holds ready vectors and no model to embed texts with; add ready vectors with "
        "--vectors, or make another index"
    )
    bench.path = bench.place / "texts.gemb"
    bench.run(bench.place / "docs.jsonl")
    message = refusal(bench, MismatchError, vectors=bench.place / "v.npy", sources=[])
    assert message.endswith("and nothing says by what v.npy was made; if by the same, pass it with -m")
    assert bench.run(vectors=bench.place / "v.npy", model=str(bench.model)).data["added"] == 3
    np.save(bench.place / "v.npy", unit(3, dims=9))
    assert refusal(
        bench, MismatchError, vectors=bench.place / "v.npy", model=str(bench.model), sources=[]
    ) == (f"v.npy holds 9-wide vectors, but {bench.model} gives 8 dims")


def test_a_second_writer_is_refused_with_code_6(bench: Bench) -> None:
    bench.run(bench.write(rows_of(3)))
    with Lock(bench.path / "writer.lock", "docs.gemb"):
        assert f"is held by process {os.getpid()}" in refusal(bench, LockedError)
        assert refusal(bench, LockedError, overwrite=True).startswith("docs.gemb is held by process")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": None}, "no output given; pass -o docs.gemb"),
        ({"sources": []}, "no input given; name files, folders or globs, or - for stdin"),
        ({"output": Path("no/docs.gemb")}, "no/docs.gemb: there is no folder no; make it first"),
        ({"output": Path("docs.jsonl")}, "docs.jsonl is a file; an index is a folder, choose another name"),
        ({"ids": Path("ids.txt")}, "--ids belongs to --vectors, which is not given"),
        (
            {"vector_field": "v", "sources": ["a.parquet", "b.parquet"]},
            "--vector-field belongs to --vectors, which is not given",
        ),
        (
            {"vector_field": "v"},
            "--vector-field names a column of a Parquet file, and docs.jsonl is none; leave it out",
        ),
        (
            {"vectors": Path("v.npy"), "passages": "off"},
            "--passages is for texts that are embedded here, not for --vectors; leave it out",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(
    bench: Bench, settings: dict[str, Any], message: str
) -> None:
    bench.write(rows_of(3))
    assert refusal(bench, **settings) == message
    assert not bench.path.exists()


def test_a_folder_of_something_else_is_left_alone(bench: Bench) -> None:
    bench.write(rows_of(3))
    bench.path.mkdir()
    (bench.path / "photo.jpg").write_bytes(b"x")
    for overwrite in (False, True):
        assert refusal(bench, overwrite=overwrite) == (
            "docs.gemb exists and is no index: it has photo.jpg; choose another name"
        )
    assert (bench.path / "photo.jpg").read_bytes() == b"x"


@pytest.mark.parametrize("passages", ["", "x", "0", "12:", "12:7", "-3", "off:2"])
def test_passages_that_are_none_are_refused(passages: str) -> None:
    with pytest.raises(ValueError, match="passages"):
        IndexRecipe(passages=passages)


def test_passages_longer_than_the_model_takes_are_refused(bench: Bench) -> None:
    bench.write(rows_of(3))
    assert refusal(bench, MismatchError, passages="17").startswith(
        "--passages 17 is more than the 16 tokens that "
    )


@pytest.mark.parametrize("harm", ["not a database", "a file is gone", "a file is cut off"])
def test_a_damaged_index_says_what_to_run(bench: Bench, harm: str) -> None:
    source = bench.write(rows_of(30))
    bench.run(source)
    (vectors,) = bench.path.glob("segments/*/vectors.f16")
    if harm == "not a database":
        (bench.path / "index.db").write_bytes(b"x" * 5000)
    elif harm == "a file is gone":
        vectors.unlink()
    else:
        vectors.write_bytes(vectors.read_bytes()[:-1])
    with pytest.raises(GembError) as raised:
        bench.run(source)
    assert raised.value.exit_code == Exit.FAILED
    advice = f"; run gemb index verify {bench.path}, then gemb index rebuild {bench.path}"
    assert str(raised.value).endswith(advice)


def test_a_beginning_that_a_kill_left_is_gone_on_with(bench: Bench) -> None:
    (bench.path / "segments" / "half").mkdir(parents=True)
    with sqlite3.connect(bench.path / "index.db") as database:
        database.execute("PRAGMA journal_mode = WAL")
    database.close()
    assert (bench.path / "index.db").stat().st_size
    assert bench.run(bench.write(rows_of(3))).data["added"] == 3
    assert care.verify(bench.path).data["sound"] is True


def test_an_index_of_a_newer_gemb_is_refused(bench: Bench) -> None:
    bench.run(bench.write(rows_of(3)))
    with sqlite3.connect(bench.path / "index.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    message = "docs.gemb is an index of format 99, this gemb reads up to 1; upgrade gemb"
    assert refusal(bench, MismatchError) == message


# --- plan -------------------------------------------------------------------------------------------------


def test_a_plan_counts_and_writes_nothing(bench: Bench) -> None:
    source = bench.write([*rows_of(20), {"id": "bad"}, {"id": "long", "text": words(*range(40))}])
    recipe = IndexRecipe(
        inputs=(str(source),), output=bench.path, model=str(bench.model), device="cpu", threads=1, onnx=False
    )
    plan = job.plan(recipe, open_engine=bench.open_engine)
    assert re.fullmatch(r"about [0-9.]+ s, at [0-9,]+ tokens/s", dict(plan.rows)["time"])
    assert plan.title == f"would index 21 documents into {bench.path}"
    assert {name: plan.data[name] for name in ("documents", "refused", "rows", "dims", "dtype")} == {
        "documents": 21, "refused": 1, "rows": 23, "dims": 8, "dtype": "f16",
    }  # fmt: skip
    assert plan.data["first_refused"] == f'{source}:21: no "text"; this line has id'
    assert not bench.path.exists()


def plan_of(bench: Bench, source: Path, **settings: Any) -> Plan:  # noqa: ANN401
    return job.plan(
        IndexRecipe(
            inputs=(str(source),),
            output=bench.path,
            model=str(bench.model),
            device="cpu",
            threads=1,
            onnx=False,
            **settings,
        ),
        open_engine=bench.open_engine,
    )


def test_a_plan_of_an_index_that_is_there_tells_what_is_new_changed_and_to_be_removed(bench: Bench) -> None:
    rows = rows_of(20)
    bench.run(bench.write(rows))
    before = bench.path.stat().st_mtime_ns
    rows[1]["text"], rows[2]["year"] = words(*range(40)), 1
    source = bench.write([*rows[:15], {"id": "fresh", "text": words(5)}, {"id": "d15"}])
    plan = plan_of(bench, source, prune=True)
    assert plan.title == f"would index 2 documents of 16 into {bench.path}"
    told = dict(plan.rows)
    assert told["documents"] == "1 new, 2 changed, 13 unchanged, 4 to be removed"
    assert told["refused"].startswith("1 row cannot be read")
    assert [plan.data[name] for name in ("new", "changed", "unchanged", "removed")] == [1, 2, 13, 4]
    assert plan.data["notes"] == []
    assert bench.path.stat().st_mtime_ns == before
    report = bench.run(source, prune=True, on_error="skip")
    done = [report.data[name] for name in ("added", "changed", "unchanged", "removed")]
    assert done == [1, 2, 13, 4]
    source, engines = bench.write(rows[:3]), len(bench.engines)
    told = dict(plan_of(bench, source).rows)
    assert told["documents"] == "0 new, 0 changed, 3 unchanged; 14 not in the input stay, see --prune"
    assert ("tokens" in told, "time" in told, len(bench.engines)) == (False, False, engines)


def test_a_plan_that_would_prune_nothing_says_so(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    source = bench.write(rows_of(2))
    source.write_text(source.read_text("utf-8") + "{broken\n", "utf-8")
    plan = plan_of(bench, source, prune=True)
    assert dict(plan.rows)["note"] == "nothing would be pruned: rows without an id that can be read"
    assert plan.data["removed"] == 0
    assert plan_of(bench, bench.write(rows_of(4)), prune=True).data["removed"] == 1
    plan = plan_of(
        bench, bench.write([{"id": "n1", "text": "w1"}, {"id": "n2", "text": "w1"}]), prune=True, limit_rows=1
    )
    assert plan.data["removed"] == 0


def test_a_plan_counts_passages_as_long_texts_are_really_divided(bench: Bench) -> None:
    # A sentence of 9 words: 14 tokens fit, so that each passage ends with its sentence, not when it is full.
    sentence = f"{words(*range(9))}. "
    source = bench.write([{"id": str(row), "text": sentence * (20 + row)} for row in range(30)])
    planned = plan_of(bench, source).data["rows"]
    assert planned == bench.run(source).data["rows"]


def test_a_plan_bears_a_long_title_without_a_text(bench: Bench) -> None:
    source = bench.write([{"id": "a", "title": words(*range(40)), "text": ""}])
    assert plan_of(bench, source).data["rows"] == 1


def test_progress_counts_records_up_to_all_of_them(bench: Bench) -> None:
    bench.run(bench.write(rows_of(30)))
    last = [event for event in bench.events if event.stage == "indexing"][-1]
    assert last.done == 30
    np.save(bench.place / "v.npy", unit(30))
    bench.run(vectors=bench.place / "v.npy", output=bench.place / "v.gemb")
    assert (bench.events[-1].done, bench.events[-1].total) == (30, 30)


def test_a_large_index_gets_its_graph_at_the_end_unless_told_not_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Writer.compact, "__kwdefaults__", {**(Writer.compact.__kwdefaults__ or {}), "graph_rows": 20}
    )
    report = bench.run(bench.write(rows_of(60)), compact=False)
    assert report.data["compacted"] is False
    report = bench.run(bench.write(rows_of(60)))
    assert report.data["compacted"] is True
    with Index.open(bench.path) as index:
        assert [has_graph for _, _, _, has_graph in index.segments()] == [True]
