from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gemb.engine import Engine
from gemb.engine.ahead import ReadAhead
from gemb.errors import Exit, GembError, LockedError, MismatchError, UnavailableError
from gemb.files import Lock
from gemb.jobs import embed as job
from gemb.jobs.embed import EmbedRecipe
from gemb.jobs.writing import Counts, State
from gemb.report import Event, Report, ignore
from gemb.vectors import open_vectors
from tests.fakes import FakeEngine, expected, fake_folder, words

Rows = Sequence[dict[str, Any]]


class Bench:
    """A working folder, a model elsewhere, and a job that runs there on a fake engine."""

    def __init__(self, place: Path) -> None:
        self.place = place / "work"
        self.place.mkdir()
        self.models = place / "models"
        self.model = fake_folder(self.models / "usual")
        self.engines: list[FakeEngine] = []
        self.events: list[Event] = []
        self.engine: Callable[[], FakeEngine] = lambda: FakeEngine(workers=2)

    def write(self, rows: Rows, name: str = "docs.jsonl") -> Path:
        path = self.place / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    def open_engine(self, setup: object, notice: Callable[[str], None]) -> Engine:
        engine = self.engine()
        self.engines.append(engine)
        return engine

    def recipe(self, source: Path | str, output: str = "docs.npy", **settings: Any) -> EmbedRecipe:  # noqa: ANN401
        settings = {"model": str(self.model), **settings}
        place = Path(output) if output == "-" else self.place / output
        return EmbedRecipe(inputs=(str(source),), output=place, **settings)

    def run(
        self,
        source: Path | str,
        output: str = "docs.npy",
        overwrite: bool = False,
        **settings: Any,  # noqa: ANN401
    ) -> Report:
        recipe = self.recipe(source, output, **settings)
        return job.run(recipe, self.events.append, overwrite=overwrite, open_engine=self.open_engine)

    @property
    def computed(self) -> int:
        """Texts computed by all engines so far."""
        return sum(engine.rows for engine in self.engines)

    def clear(self) -> None:
        """Remove everything but docs.jsonl."""
        for path in self.place.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "docs.jsonl":
                path.unlink()

    def files(self) -> dict[str, bytes]:
        """What lies there, but for records with times in them."""
        return {
            path.relative_to(self.place).as_posix(): path.read_bytes()
            for path in sorted(self.place.rglob("*"))
            if path.is_file() and not path.name.endswith("gemb.json")
        }


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", 60)  # many windows, from few rows
    bench = Bench(tmp_path)
    monkeypatch.chdir(bench.place)
    return bench


def numbers_of(row: int) -> list[int]:
    """The words of a row: 1 to 9 of them, different for each row."""
    return [row % 400, *range(row % 7, row % 7 + row % 9)]


def rows_of(count: int) -> Rows:
    return [{"id": f"d{row}", "text": words(*numbers_of(row))} for row in range(count)]


def vectors_of(path: Path) -> NDArray[np.float32]:
    with open_vectors(path) as vectors:
        return np.array(vectors.block(0, vectors.rows))


def ids_of(path: Path) -> list[str]:
    with open_vectors(path) as vectors:
        return vectors.ids()


# --- what comes out --------------------------------------------------------------------------------------


def test_every_row_has_the_vector_of_its_text_in_the_order_of_the_input(bench: Bench) -> None:
    report = bench.run(bench.write(rows_of(300)))
    assert report.exit_code == Exit.DONE
    assert ids_of(bench.place / "docs.npy") == [f"d{row}" for row in range(300)]
    found = vectors_of(bench.place / "docs.npy")
    np.testing.assert_array_equal(found, [expected(*numbers_of(row)) for row in range(300)])
    assert not (bench.place / "docs.npy.partial").exists()
    assert not (bench.place / "docs.npy.lock").exists()
    assert not (bench.place / "docs.npy.rejects.jsonl").exists()


@pytest.mark.parametrize("characters", [1, 10_000_000])
def test_windows_of_any_size_give_the_same_files(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    source = bench.write(rows_of(120))
    bench.run(source)
    usual = bench.files()
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", characters)
    monkeypatch.setattr("gemb.engine.windows.GROWTH", 1.0)
    bench.run(source, overwrite=True)
    assert bench.files() == usual


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_files(bench: Bench, workers: int) -> None:
    source = bench.write(rows_of(120))
    bench.run(source)
    usual = bench.files()
    bench.engine = lambda: FakeEngine(workers=workers, batch_tokens=7)
    bench.run(source, overwrite=True)
    assert bench.files() == usual


@pytest.mark.parametrize(
    ("output", "settings"),
    [
        ("docs.parquet", {}),
        ("docs.jsonl.out.jsonl", {}),
        ("b64.jsonl", {"encoding": "base64"}),
        ("docs.safetensors", {}),
        ("docs.fbin", {}),
        ("folder", {}),
    ],
)
def test_every_format_holds_the_same_rows(bench: Bench, output: str, settings: dict[str, Any]) -> None:
    source = bench.write(rows_of(50))
    report = bench.run(source, output, **settings)
    assert report.exit_code == Exit.DONE
    np.testing.assert_array_equal(
        vectors_of(bench.place / output), [expected(*numbers_of(row)) for row in range(50)]
    )
    assert ids_of(bench.place / output) == [f"d{row}" for row in range(50)]
    again = bench.run(source, output, **settings)
    assert again.title == f"already done: {bench.place / output} holds 50 rows"
    assert bench.run(source, output, overwrite=True, **settings).data["rows"] == 50


def test_stdout_is_json_lines_in_the_order_of_the_input(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    report = bench.run(bench.write(rows_of(40)), "-")
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == [f"d{row}" for row in range(40)]
    np.testing.assert_allclose(
        [line["embedding"] for line in lines], [expected(*numbers_of(row)) for row in range(40)], rtol=1e-6
    )
    assert report.data["rows"] == 40
    assert list(bench.place.glob("*.partial")) == []


def test_stdin_is_read_as_json_lines_or_as_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    for content, ids in (
        (b'{"id": "a", "text": "w1 w2"}\n{"id": "b", "text": "w3"}\n', ["a", "b"]),
        (b"w1 w2\nw3\n", ["1", "2"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        bench.run("-", "-")
        lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
        assert [line["id"] for line in lines] == ids
        np.testing.assert_allclose(lines[0]["embedding"], expected(1, 2), rtol=1e-6)


def test_a_title_and_the_prompt_of_the_model_go_in_front_of_the_text(bench: Bench) -> None:
    bench.model = fake_folder(bench.models / "prompted", prompts={"query": "w7 ", "document": "w8 w9 "})
    source = bench.write([{"id": "a", "title": "w1", "text": "w2"}])
    report = bench.run(source)
    np.testing.assert_array_equal(vectors_of(bench.place / "docs.npy"), [expected(8, 9, 1, 2)])
    assert dict(report.rows)["prompt"] == "document: 'w8 w9 '"
    assert report.data["prompt"] == {"name": "document", "text": "w8 w9 "}
    report = bench.run(source, "q.npy", as_="query")
    np.testing.assert_array_equal(vectors_of(bench.place / "q.npy"), [expected(7, 2)])
    assert dict(report.rows)["prompt"] == "query: 'w7 '; titles are not embedded"
    bench.run(source, "n.npy", as_="none")
    np.testing.assert_array_equal(vectors_of(bench.place / "n.npy"), [expected(1, 2)])


def test_a_text_that_stands_several_times_is_computed_once_in_a_window(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.engine.windows.FIRST_CHARACTERS", 10_000)
    report = bench.run(bench.write([{"id": str(row), "text": words(row % 10)} for row in range(100)]))
    assert bench.computed == 10
    assert report.data["duplicates"] == 90
    assert report.data["computed_texts"] == 10
    np.testing.assert_array_equal(
        vectors_of(bench.place / "docs.npy"), [expected(row % 10) for row in range(100)]
    )


def test_cut_vectors_are_brought_to_unit_length_again(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.run(source, dims=4, force=True)
    found = vectors_of(bench.place / "docs.npy")
    wanted = np.array([expected(*numbers_of(row))[:4] for row in range(20)])
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    bench.run(source, "raw.npy", dims=4, force=True, normalise=False)
    np.testing.assert_array_equal(vectors_of(bench.place / "raw.npy"), wanted)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "binary", "int8"])
def test_stored_types_hold_what_they_can(bench: Bench, dtype: str) -> None:
    report = bench.run(bench.write(rows_of(60)), dtype=dtype)
    found = vectors_of(bench.place / "docs.npy")
    wanted = np.array([expected(*numbers_of(row)) for row in range(60)])
    if dtype == "binary":
        np.testing.assert_array_equal(found > 0, wanted > 0)
    else:
        # int8: 255 steps over a range of at most 2; half a step off
        np.testing.assert_allclose(found, wanted, atol={"f16": 5e-4, "bf16": 4e-3, "int8": 4.1e-3}[dtype])
    assert report.data["dtype"] == dtype


def test_int8_ranges_come_from_the_first_rows_whatever_the_windows_and_interruptions_were(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemb.jobs.calibration.CALIBRATION_ROWS", 40)
    source = bench.write(rows_of(100))
    report = bench.run(source, dtype="int8")
    usual = bench.files()
    ranges = np.load(bench.place / "docs.ranges.npy")
    first = np.array([expected(*numbers_of(row)) for row in range(40)])
    np.testing.assert_array_equal(ranges, [first.min(axis=0), first.max(axis=0)])
    assert float(str(report.data["clipped_share"])) > 0  # rows after the first 40 lie outside
    bench.clear()
    codes = [bench.run(source, dtype="int8", limit_rows=13).exit_code for _ in range(8)]
    assert codes == [Exit.MORE] * 7 + [Exit.DONE]
    assert bench.files() == usual


# --- long, empty and refused rows ------------------------------------------------------------------------


OR_SKIP = "; --on-error skip leaves such rows out"
LONG = words(*range(30))  # the model of these tests takes 16 tokens, 2 of them special


def test_long_texts_are_cut_and_counted(bench: Bench) -> None:
    report = bench.run(bench.write([{"id": "a", "text": "w1"}, {"id": "b", "text": LONG}]))
    np.testing.assert_array_equal(vectors_of(bench.place / "docs.npy"), [expected(1), expected(*range(14))])
    assert report.exit_code == Exit.DONE
    assert (report.data["truncated"], report.data["lost_tokens"]) == (1, 16)
    assert dict(report.rows)["cut"] == ("1 row (50.0%) was longer than 16 tokens and lost 16; see --on-long")


def test_of_a_huge_text_the_lost_tokens_are_an_estimate_and_called_so(bench: Bench) -> None:
    report = bench.run(bench.write([{"id": "a", "text": " ".join([LONG] * 1000)}, {"id": "b", "text": "w1"}]))
    assert (report.data["truncated"], report.data["lost_more"]) == (1, 1)
    assert report.data["lost_tokens"] == pytest.approx(30_000, rel=0.01)
    assert dict(report.rows)["cut"] == (
        "1 row (50.0%) was longer than 16 tokens and lost about "
        f"{report.data['lost_tokens']:,}; see --on-long"
    )


def test_a_limit_of_rows_counts_rows_of_the_input_and_not_passages(bench: Bench) -> None:
    source = bench.write([{"id": "a", "text": LONG}, {"id": "b", "text": "w1"}])
    report = bench.run(source, on_long="chunk", limit_rows=1)
    assert report.title == (
        "stopped by a limit after 3 passages of 1 row; run the same command again to go on"
    )


def test_tokens_that_were_not_computed_are_told_apart(bench: Bench) -> None:
    told = dict(bench.run(bench.write([{"id": id_, "text": "w1 w2"} for id_ in "abc"])).rows)
    assert told["tokens"] == "12, of which 4 were computed"
    assert dict(bench.run(bench.write([{"id": "a", "text": "w1 w2"}]), "one.npy").rows)["tokens"] == "4"


def test_long_texts_become_a_row_a_passage(bench: Bench) -> None:
    report = bench.run(bench.write([{"id": "a", "text": "w1"}, {"id": "b", "text": LONG}]), on_long="chunk")
    assert ids_of(bench.place / "docs.npy") == ["a#0", "b#0", "b#1", "b#2"]
    assert (report.data["records"], report.data["rows"], report.data["chunked"]) == (2, 4, 1)
    assert report.title.startswith(f"embedded 4 passages of 2 rows to {bench.place / 'docs.npy'} in ")
    told = dict(report.rows)
    assert " passages/s, " in told["rate"]
    assert told["chunked"] == "1 long text became several passages"
    assert report.data["truncated"] == 0
    np.testing.assert_array_equal(vectors_of(bench.place / "docs.npy")[1], expected(*range(14)))


def test_long_texts_are_left_out_when_asked(bench: Bench) -> None:
    report = bench.run(bench.write([{"id": "a", "text": LONG}, {"id": "b", "text": "w1"}]), on_long="skip")
    assert ids_of(bench.place / "docs.npy") == ["b"]
    assert report.exit_code == Exit.DONE
    assert dict(report.rows)["too long"] == "1 row left out"


def test_a_long_text_is_an_error_when_asked(bench: Bench) -> None:
    source = bench.write([{"id": "a", "text": "w1"}, {"id": "b", "text": LONG}])
    with pytest.raises(GembError) as caught:
        bench.run(source, on_long="error")
    assert str(caught.value) == (
        f"{source}:2: too long: 32 tokens, and --max-tokens is 16; --on-long skip leaves such rows out"
    )
    assert caught.value.exit_code == Exit.USAGE


def test_empty_texts_are_left_out_when_asked_and_counted(bench: Bench) -> None:
    source = bench.write([{"id": "a", "text": ""}, {"id": "b", "text": " \t"}, {"id": "c", "text": "w1"}])
    report = bench.run(source, empty="skip")
    assert ids_of(bench.place / "docs.npy") == ["c"]
    assert report.exit_code == Exit.DONE
    assert dict(report.rows)["empty"] == "2 rows left out"


def test_refused_rows_go_to_a_file_with_line_and_reason_and_the_exit_code_is_3(bench: Bench) -> None:
    source = bench.place / "docs.jsonl"
    source.write_text('{"id": "a", "text": "w1"}\n{"id": "b"}\n{broken\n{"id": "d", "text": "w2"}\n', "utf-8")
    report = bench.run(source, on_error="skip")
    assert report.exit_code == Exit.REJECTED
    assert ids_of(bench.place / "docs.npy") == ["a", "d"]
    rejects = [json.loads(line) for line in (bench.place / "docs.npy.rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["id"]) for reject in rejects] == [(2, "b"), (3, None)]
    assert rejects[0] == {
        "source": str(source),
        "line": 2,
        "index": 1,
        "id": "b",
        "reason": 'no "text"; this line has id',
    }
    assert rejects[1]["reason"].startswith("broken JSON at column 2: ")
    again = bench.run(source, on_error="skip")
    assert again.exit_code == Exit.REJECTED
    assert again.title.startswith("already done")


def test_a_row_that_the_model_cannot_compute_is_refused_with_its_line(bench: Bench) -> None:
    bench.engine = lambda: FakeEngine(
        fails=lambda ids: RuntimeError("no such token") if 4 + 13 in ids else None,
        spoils=lambda ids: float("nan") if 4 + 14 in ids else None,
    )
    source = bench.write([{"id": str(row), "text": words(row)} for row in range(20)])
    with pytest.raises(GembError) as caught:
        bench.run(source)
    assert str(caught.value) == f"{source}:14: cannot be computed: no such token{OR_SKIP}"
    report = bench.run(source, on_error="skip")
    assert report.data["rejected"] == 2
    assert ids_of(bench.place / "docs.npy") == [str(row) for row in range(20) if row not in (13, 14)]
    rejects = [json.loads(line) for line in (bench.place / "docs.npy.rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects] == [
        "cannot be computed: no such token",
        "its vector is not finite",
    ]


def test_what_a_finished_job_rejected_stays_until_another_output_is_in_its_place(bench: Bench) -> None:
    source = bench.place / "docs.jsonl"
    source.write_text('{"id": "a", "text": "w1"}\n{"id": "b"}\n', "utf-8")
    bench.run(source, on_error="skip")
    rejects = bench.place / "docs.npy.rejects.jsonl"
    kept = rejects.read_bytes()
    source.write_text('{"id": "a", "text": "w1"}\n{"id": "a", "text": "w2"}\n', "utf-8")
    with pytest.raises(GembError, match="stands already"):
        bench.run(source, overwrite=True)
    assert rejects.read_bytes() == kept
    source.write_text('{"id": "a", "text": "w1"}\n', "utf-8")
    bench.run(source, overwrite=True)
    assert not rejects.exists()


def test_a_repeated_id_names_both_places(bench: Bench) -> None:
    rows = [*rows_of(70), {"id": "d3", "text": "w5"}]
    source = bench.write(rows)
    with pytest.raises(GembError) as caught:
        bench.run(source)
    assert str(caught.value) == f"{source}:71: id 'd3' stands already at {source}:4{OR_SKIP}"
    report = bench.run(source, on_error="skip")
    assert (report.data["rows"], report.data["rejected"]) == (70, 1)


def test_a_repeated_id_is_found_across_a_resume(bench: Bench) -> None:
    source = bench.write([*rows_of(50), {"id": "d3", "text": "w5"}])
    assert bench.run(source, limit_rows=40).exit_code == Exit.MORE
    with pytest.raises(GembError, match=rf"^{source}:51: id 'd3' stands already at {source}:4{OR_SKIP}$"):
        bench.run(source)


def test_a_lost_table_of_ids_is_made_again(bench: Bench) -> None:
    source = bench.write([*rows_of(50), {"id": "d3", "text": "w5"}])
    assert bench.run(source, limit_rows=40).exit_code == Exit.MORE
    (bench.place / "docs.npy.partial/seen.sqlite").unlink()
    with pytest.raises(GembError, match=rf"^{source}:51: id 'd3' stands already at {source}:4{OR_SKIP}$"):
        bench.run(source)
    assert any("table of ids is made again" in event.note for event in bench.events)


def test_no_passage_of_a_document_whose_id_stood_before_is_written(bench: Bench) -> None:
    source = bench.write(
        [
            {"id": "a", "text": words(1)},
            {"id": "b", "text": words(2)},
            {"id": "a", "text": words(*range(60))},
        ]
    )
    report = bench.run(source, on_long="chunk", on_error="skip")
    assert ids_of(bench.place / "docs.npy") == ["a#0", "b#0"]
    assert report.data["rejected"] == 1
    (reject,) = (bench.place / "docs.npy.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["reason"] == f"id 'a' stands already at {source}:1"


def test_an_id_that_cannot_stand_on_a_line_is_a_refused_row(bench: Bench) -> None:
    source = bench.write([{"id": "a", "text": "w1"}, {"id": "b\nc", "text": "w2"}, {"id": "d", "text": "w3"}])
    reason = r"id 'b\\nc' holds a line break, but \.ids\.txt has one id a line; write \.jsonl or \.parquet"
    with pytest.raises(GembError, match=rf"^{source}:2: {reason}{OR_SKIP}$"):
        bench.run(source)
    assert bench.run(source, on_error="skip").exit_code == Exit.REJECTED
    assert ids_of(bench.place / "docs.npy") == ["a", "d"]
    assert bench.run(source, "docs.jsonl.jsonl").data["rows"] == 3


@pytest.mark.parametrize(("limit", "passes"), [("4", False), ("5", True), ("9%", False), ("10%", True)])
def test_more_rejects_than_allowed_stop_the_job(bench: Bench, limit: str, passes: bool) -> None:
    rows = [{"id": str(row), "text": "" if row % 10 == 0 else words(row)} for row in range(50)]
    source = bench.write(rows)
    if passes:
        assert bench.run(source, max_rejects=limit).exit_code == Exit.REJECTED
        return
    with pytest.raises(GembError) as caught:
        bench.run(source, max_rejects=limit)
    assert f"and --max-rejects is {limit}; see " in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE
    assert not (bench.place / "docs.npy").exists()


def test_the_row_that_is_one_too_many_is_named_however_much_is_read_at_a_time(bench: Bench) -> None:
    source = bench.write([{"id": str(row), "text": "" if row % 10 == 0 else words(row)} for row in range(99)])
    with pytest.raises(GembError) as caught:
        bench.run(source, max_rejects="3")
    assert str(caught.value) == (
        f"more than 3 rows were rejected, the last at {source}:31, and --max-rejects is 3; "
        f"see {bench.place / 'docs.npy.rejects.jsonl'}, mend them or allow more"
    )


def test_limits_of_rejects_are_read_strictly() -> None:
    with pytest.raises(ValueError, match="neither a number of rows like 100 nor a share like 5%"):
        EmbedRecipe(max_rejects="many")


# --- limits, resuming, what is there already -------------------------------------------------------------


def test_a_job_in_small_steps_gives_the_files_of_one_run(bench: Bench) -> None:
    source = bench.write([*rows_of(90), {"id": "x"}, {"id": "y", "text": "w1"}])
    bench.run(source, on_error="skip")
    usual = bench.files()
    bench.clear()
    codes = []
    while Exit.REJECTED not in codes:
        report = bench.run(source, on_error="skip", limit_rows=17)
        codes.append(report.exit_code)
        assert len(codes) < 10
    assert codes == [Exit.MORE] * 5 + [Exit.REJECTED]
    assert bench.files() == usual
    assert report.data["rows_before"] == 85
    assert dict(report.rows)["resumed"] == "after 85 rows of earlier runs"


def test_a_job_that_is_run_while_an_exception_is_handled_is_whole(bench: Bench) -> None:
    source = bench.write(rows_of(300))
    try:
        bench.run(source, dims=100)
    except MismatchError:
        report = bench.run(source)  # as a caller does that tries again in another way
    assert report.data["rows"] == 300
    assert len(ids_of(bench.place / "docs.npy")) == 300


def test_an_input_that_was_left_before_its_end_does_not_pass_for_a_whole_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ReadAhead.take
    taken = iter(range(2))

    def take(self: ReadAhead[Any], timeout: float = 0.1) -> tuple[Any] | None:
        if next(taken, None) is None:
            raise StopIteration
        return usual(self, timeout)

    monkeypatch.setattr(ReadAhead, "take", take)
    with pytest.raises(RuntimeError, match=r"docs\.jsonl: done up to record \d+, not to the end$"):
        bench.run(bench.write(rows_of(300)))
    assert not (bench.place / "docs.npy").exists()


def test_exactly_as_many_rows_as_the_limit_is_done(bench: Bench) -> None:
    assert bench.run(bench.write(rows_of(20)), limit_rows=20).exit_code == Exit.DONE


def test_a_limit_says_how_to_go_on(bench: Bench) -> None:
    report = bench.run(bench.write(rows_of(20)), limit_rows=5)
    assert report.title == "stopped by a limit after 5 rows; run the same command again to go on"
    assert report.data["more"] is True
    assert not (bench.place / "docs.npy").exists()


def test_a_limit_of_seconds_makes_progress_and_stops(bench: Bench) -> None:
    bench.engine = lambda: FakeEngine(seconds_per_token=0.001)
    source = bench.write(rows_of(400))
    codes = [bench.run(source, max_seconds=0.4).exit_code]
    assert codes == [Exit.MORE]
    while codes[-1] == Exit.MORE:
        codes.append(bench.run(source, max_seconds=0.4).exit_code)
        assert len(codes) < 30
    np.testing.assert_array_equal(
        vectors_of(bench.place / "docs.npy"), [expected(*numbers_of(row)) for row in range(400)]
    )


def test_a_finished_output_is_not_made_again(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.run(source)
    before = bench.files()
    report = bench.run(source)
    assert report.title == f"already done: {bench.place / 'docs.npy'} holds 20 rows"
    assert report.exit_code == Exit.DONE
    assert len(bench.engines) == 1
    assert bench.files() == before


def test_a_touched_but_equal_input_is_the_same_request(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.run(source)
    os.utime(source, (1, 1))
    assert bench.run(source).title.startswith("already done")


def test_an_output_of_another_request_is_refused_with_the_difference(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.run(source)
    with pytest.raises(GembError) as caught:
        bench.run(source, dtype="f16")
    assert str(caught.value) == (
        f"{bench.place / 'docs.npy'} exists and was made by another request:\n"
        "  dtype was f32, now f16\n"
        "pass --overwrite to replace it, or choose another output"
    )
    assert caught.value.exit_code == Exit.USAGE
    bench.run(source, overwrite=True, dtype="f16")
    assert open_vectors(bench.place / "docs.npy").dtype == "f16"


def test_a_job_that_fails_before_its_first_rows_leaves_nothing_behind(bench: Bench) -> None:
    source = bench.write([{"text": ""}])
    with pytest.raises(GembError, match="empty text"):
        bench.run(source)
    assert bench.files() == {"docs.jsonl": source.read_bytes()}


def test_what_was_killed_before_its_first_rows_stands_in_no_ones_way(bench: Bench) -> None:
    source = bench.write(rows_of(40))
    bench.run(source, limit_rows=20)
    (bench.place / "docs.npy.partial" / "journal.jsonl").write_bytes(b"")
    assert bench.run(source, dtype="f16").data["rows"] == 40
    assert open_vectors(bench.place / "docs.npy").dtype == "f16"


def test_another_model_is_a_mismatch(bench: Bench) -> None:
    source = bench.write(rows_of(40))
    bench.run(source, limit_rows=20)
    first = bench.model
    bench.model = fake_folder(bench.models / "other", seed=2)
    with pytest.raises(GembError) as caught:
        bench.run(source)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{bench.place / 'docs.npy.partial'} was begun by another request:"
    assert lines[1].startswith(f"  model was {first} (")
    assert lines[-1] == "run that request again to finish it, or pass --overwrite to start anew"
    assert caught.value.exit_code == Exit.MISMATCH
    assert bench.run(source, overwrite=True).data["rows"] == 40


def in_precision(precision: str) -> Callable[[], FakeEngine]:
    def engine() -> FakeEngine:
        engine = FakeEngine(workers=2)
        engine.precision = precision
        return engine

    return engine


def test_a_machine_that_computes_in_another_precision_does_not_go_on(bench: Bench) -> None:
    source = bench.write(rows_of(60))
    bench.engine = in_precision("bf16")
    assert bench.run(source, limit_rows=20).exit_code == Exit.MORE
    bench.engine = in_precision("fp32")
    work = bench.place / "docs.npy.partial"
    with pytest.raises(MismatchError) as caught:
        bench.run(source)
    assert str(caught.value) == (
        f"{work} holds rows computed in bf16, but here it would be fp32 (fake); "
        f"pass --precision bf16, or remove {work} to start anew"
    )
    assert bench.engines[-1].closed
    bench.engine = in_precision("bf16")
    assert bench.run(source, precision="bf16").data["precision"] == "bf16"


def test_a_finished_output_is_that_of_the_precision_it_was_computed_in(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.engine = in_precision("bf16")
    bench.run(source)
    for precision in ("auto", "bf16"):
        assert bench.run(source, precision=precision).data["already_done"]
    with pytest.raises(GembError, match="  precision was bf16, now fp32") as caught:
        bench.run(source, precision="fp32")
    assert caught.value.exit_code == Exit.MISMATCH


def test_shards_in_different_precisions_are_not_joined(bench: Bench) -> None:
    source = bench.write(rows_of(4096 + 10))
    bench.engine = in_precision("bf16")
    bench.run(source, shard="0/2")
    bench.engine = in_precision("fp32")
    bench.run(source, shard="1/2")
    with pytest.raises(MismatchError) as caught:
        bench.run(source, join=True)
    first, second = (bench.place / f"docs.shard-0000{shard}-of-00002.npy" for shard in (0, 1))
    assert str(caught.value) == (
        f"{second} was computed in fp32, but {first} in bf16; "
        "run --shard 1/2 again with --precision bf16 --overwrite"
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [({"dims": 4, "force": True}, "  dims was 8, now 4"), ({"as_": "query"}, "  prompt was none ('')")],
)
def test_other_dims_or_another_prompt_are_a_mismatch(bench: Bench, change: dict[str, Any], line: str) -> None:
    source = bench.write(rows_of(40))
    bench.run(source, limit_rows=20)
    with pytest.raises(GembError) as caught:
        bench.run(source, **change)
    assert line in str(caught.value)
    assert caught.value.exit_code == Exit.MISMATCH


def test_a_changed_input_is_refused(bench: Bench) -> None:
    source = bench.write(rows_of(40))
    bench.run(source, limit_rows=20)
    bench.write([*rows_of(39), {"id": "new", "text": "w5"}])
    with pytest.raises(GembError) as caught:
        bench.run(source)
    assert f"  {source} had " in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE


@pytest.mark.parametrize("appended", ["", '{"id": "late", "text": "w1"}\n'])
def test_an_input_that_changes_while_it_is_read_gives_no_output(bench: Bench, appended: str) -> None:
    source = bench.write(rows_of(40))

    def append(ids: NDArray[np.int32]) -> None:
        if ids[1] == 4 + 39 and b"late" not in source.read_bytes():  # the last row
            source.write_text(source.read_text() + appended)  # touched only, where that is nothing

    bench.engine = lambda: FakeEngine(fails=append)
    if not appended:
        assert bench.run(source).exit_code == Exit.DONE
        return
    with pytest.raises(GembError, match=rf"^{source} changed while it was read; once it is at rest"):
        bench.run(source)
    assert not (bench.place / "docs.npy").exists()
    bench.engine = FakeEngine
    assert bench.run(source, overwrite=True).exit_code == Exit.DONE


def test_an_output_of_another_program_is_not_replaced(bench: Bench) -> None:
    np.save(bench.place / "docs.npy", np.zeros((2, 2)))
    with pytest.raises(GembError) as caught:
        bench.run(bench.write(rows_of(3)))
    assert str(caught.value) == (
        f"{bench.place / 'docs.npy'} exists; pass --overwrite to replace it, or choose another output"
    )
    assert np.load(bench.place / "docs.npy").shape == (2, 2)


def test_ids_that_stand_in_the_way_are_told_with_the_output_that_needs_them(bench: Bench) -> None:
    source = bench.write(rows_of(3))
    bench.run(source)
    with pytest.raises(GembError) as caught:
        bench.run(source, "docs.fbin")
    assert str(caught.value) == (
        f"{bench.place / 'docs.ids.txt'}, which {bench.place / 'docs.fbin'} would write, exists; "
        "pass --overwrite to replace it, or choose another output"
    )


def test_an_output_never_takes_the_place_of_an_input(bench: Bench) -> None:
    source = bench.write(rows_of(3))
    before = bench.files()
    for output in ("docs.jsonl", f"../{bench.place.name}/docs.jsonl"):
        with pytest.raises(GembError) as caught:
            bench.run(source, output, overwrite=True)
        assert str(caught.value) == f"{bench.place / output} is an input, too; choose another output"
    with pytest.raises(GembError) as caught:
        bench.run(source, ".", overwrite=True)
    assert str(caught.value) == (
        f"the input {source} lies in the output folder {bench.place}; choose another output"
    )
    assert bench.files() == before


def test_an_output_inside_the_input_folder_is_refused(bench: Bench) -> None:
    (bench.place / "notes/deep").mkdir(parents=True)
    (bench.place / "notes/a.md").write_text("w1 w2")
    with pytest.raises(GembError) as caught:
        bench.run("notes", "notes/deep/docs.npy")
    assert str(caught.value) == (
        f"{bench.place / 'notes/deep/docs.npy'} lies in the input folder notes, where its ids would be read "
        "as a text; choose an output outside of it"
    )
    assert bench.run("notes", "notes.npy").exit_code == Exit.DONE


def test_a_damaged_output_is_not_called_done(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.run(source)
    with (bench.place / "docs.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(GembError) as caught:
        bench.run(source)
    assert str(caught.value) == (
        f"{bench.place / 'docs.npy'} is not what was written: docs.npy changed or gone; "
        "pass --overwrite to make it again"
    )


def test_another_run_holds_the_output(bench: Bench) -> None:
    source = bench.write(rows_of(3))
    with Lock(bench.place / "docs.npy.lock", "docs.npy"), pytest.raises(LockedError) as caught:
        bench.run(source)
    assert str(caught.value).startswith(f"{bench.place / 'docs.npy'} is held by process {os.getpid()} since ")
    assert caught.value.exit_code == Exit.LOCKED


def test_a_pipe_is_not_resumed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def stdin() -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(b"w1\nw2\nw3\n"))

    monkeypatch.setattr(sys, "stdin", stdin())
    report = bench.run("-", limit_rows=2)
    assert report.title == "stopped by a limit after 2 rows; the rest of the pipe is not kept"
    assert report.exit_code == Exit.MORE
    np.testing.assert_array_equal(vectors_of(bench.place / "docs.npy"), [expected(1), expected(2)])
    monkeypatch.setattr(sys, "stdin", stdin())
    with pytest.raises(GembError, match=r"docs\.npy exists; pass --overwrite"):
        bench.run("-")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["request"].update(unheard_of=1),
        lambda job: job.pop("request"),
        lambda job: job.update(format=0),
    ],
)
def test_a_job_of_another_version_of_gemb_is_refused_until_it_is_overwritten(
    bench: Bench, spoil: Callable[[dict[str, Any]], object]
) -> None:
    source = bench.write(rows_of(60))
    assert bench.run(source, limit_rows=20).exit_code == Exit.MORE
    path = bench.place / "docs.npy.partial/job.json"
    begun = json.loads(path.read_text())
    spoil(begun)
    path.write_text(json.dumps(begun))
    message = rf"^{path}: written by another version of gemb; pass --overwrite to start anew$"
    with pytest.raises(GembError, match=message):
        bench.run(source)
    report = bench.run(source, overwrite=True)
    assert report.data["rows"] == 60
    assert report.data["rows_before"] == 0


# --- the cache -------------------------------------------------------------------------------------------


def test_the_cache_leaves_only_changed_texts_to_compute(bench: Bench) -> None:
    rows = [{"id": str(row), "text": words(row, row + 1)} for row in range(100)]
    source = bench.write(rows)
    bench.run(source, cache=bench.place / "cache")
    first = vectors_of(bench.place / "docs.npy")
    assert bench.computed == 100
    rows[7] = {"id": "7", "text": "w399"}
    report = bench.run(bench.write(rows), cache=bench.place / "cache", overwrite=True)
    assert bench.computed == 101
    assert dict(report.rows)["cache"] == "99 of 100 texts (99.0%)"
    second = vectors_of(bench.place / "docs.npy")
    np.testing.assert_array_equal(np.delete(second, 7, axis=0), np.delete(first, 7, axis=0))
    np.testing.assert_array_equal(second[7], expected(399))


def test_the_cache_serves_other_dims_and_types_but_no_other_model(bench: Bench) -> None:
    source = bench.write(rows_of(30))
    cache = bench.place / "cache"
    bench.run(source, cache=cache)
    computed = bench.computed
    bench.run(source, "cut.npy", cache=cache, dims=4, force=True, dtype="f16")
    assert bench.computed == computed
    bench.model = fake_folder(bench.models / "other", seed=2)
    bench.run(source, "other.npy", cache=cache)
    assert bench.computed == 2 * computed


def test_a_folder_that_is_no_cache_is_told(bench: Bench) -> None:
    (bench.place / "cache").mkdir()
    (bench.place / "cache/vectors.sqlite").write_text("no database" * 100)
    with pytest.raises(GembError) as caught:
        bench.run(bench.write(rows_of(3)), cache=bench.place / "cache")
    assert str(caught.value) == (
        f"{bench.place / 'cache'} cannot be used as a cache: file is not a database; "
        "pass another --cache, or delete it"
    )


# --- shards ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gemb.engine.windows", "gemb.jobs.writing", "gemb.jobs.running"):
        monkeypatch.setattr(f"{module}.BLOCK_RECORDS", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("output", ["docs.npy", "docs.parquet", "docs.jsonl.out.jsonl", "folder"])
@pytest.mark.parametrize("count", [50, 10])
def test_joined_shards_are_the_file_of_an_undivided_job(bench: Bench, output: str, count: int) -> None:
    source = bench.write([*rows_of(count), {"id": "x"}, {"id": "long", "text": LONG}])
    settings: dict[str, Any] = {"on_error": "skip", "on_long": "chunk"}
    bench.run(source, output, **settings)
    usual = bench.files()
    bench.clear()
    for part in range(3):
        codes: list[Exit] = []
        while not codes or codes[-1] == Exit.MORE:
            codes.append(bench.run(source, output, shard=f"{part}/3", limit_rows=5, **settings).exit_code)
            assert len(codes) < 20
    report = job.run(EmbedRecipe(output=bench.place / output, join=True))
    assert report.exit_code == Exit.REJECTED
    joined = {name: content for name, content in bench.files().items() if ".shard-" not in name}
    assert joined == {name: content for name, content in usual.items() if "rejects" not in name}
    again = job.run(EmbedRecipe(output=bench.place / output, join=True))
    assert again.title.startswith("already done")


@pytest.mark.usefixtures("small_blocks")
def test_a_missing_shard_is_named(bench: Bench) -> None:
    source = bench.write(rows_of(30))
    bench.run(source, shard="0/3")
    bench.run(source, shard="2/3")
    with pytest.raises(GembError, match=r"1 of 3 shards are missing or unfinished: 1; run --shard 1/3$"):
        job.run(EmbedRecipe(output=bench.place / "docs.npy", join=True))


@pytest.mark.usefixtures("small_blocks")
def test_an_id_in_two_shards_is_found_at_the_join(bench: Bench) -> None:
    source = bench.write([*rows_of(10), {"id": "d1", "text": "w9"}])
    bench.run(source, shard="0/2")
    bench.run(source, shard="1/2")
    with pytest.raises(GembError) as caught:
        job.run(EmbedRecipe(output=bench.place / "docs.npy", join=True))
    assert str(caught.value) == (
        "id 'd1' stands in two shards: at row 1 of the joined output and again at row 10; "
        "mend the input and run the shards again"
    )


@pytest.mark.usefixtures("small_blocks")
def test_a_process_of_torchrun_takes_its_shard(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    report = bench.run(bench.write(rows_of(20)))
    assert ids_of(bench.place / "docs.shard-00001-of-00002.npy") == [f"d{row}" for row in range(7, 14)]
    assert ("note", "shard 1/2, from RANK and WORLD_SIZE of torchrun") in report.rows


# --- the plan --------------------------------------------------------------------------------------------


def test_a_plan_counts_measures_and_writes_nothing(bench: Bench) -> None:
    source = bench.write([*rows_of(30), {"id": "x"}])
    before = bench.files()
    plan = job.plan(bench.recipe(source), open_engine=bench.open_engine)
    assert plan.title == f"would embed 30 rows to {bench.place / 'docs.npy'}"
    rows = dict(plan.rows)
    assert rows["rows"] == "30"
    assert rows["refused"] == (
        f'1 row cannot be read; see --on-error\nthe first is {source}:31: no "text"; this line has id'
    )
    assert plan.data["first_refused"] == f'{source}:31: no "text"; this line has id'
    assert rows["prompt"] == "none (no text)"
    assert rows["device"] == "fake"
    assert rows["tokens"].startswith("about ")
    assert rows["disk"].startswith("about 1.4 KiB needed, ")  # 30 rows of 8 float32 and an id
    tokens = sum(len(numbers_of(row)) + 2 for row in range(30))
    assert plan.data["tokens"] == tokens
    assert bench.files() == before
    assert all(engine.closed for engine in bench.engines)


def test_a_plan_names_the_first_and_the_last_of_many_files(bench: Bench) -> None:
    for number in range(5):
        bench.write([{"id": f"d{number}", "text": "w1"}], f"{number}.jsonl")
    plan = job.plan(bench.recipe("*.jsonl"), open_engine=bench.open_engine)
    assert dict(plan.rows)["input"] == "5 files, from 0.jsonl to 4.jsonl"
    (bench.place / "4.jsonl").unlink()
    plan = job.plan(bench.recipe("*.jsonl"), open_engine=bench.open_engine)
    assert dict(plan.rows)["input"] == "0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl"


def test_a_plan_tells_of_an_output_that_is_there(bench: Bench) -> None:
    source = bench.write(rows_of(20))
    bench.run(source)
    plan = job.plan(bench.recipe(source, "docs.npy"), open_engine=bench.open_engine)
    assert plan.data["notes"] == [
        f"{bench.place / 'docs.npy'} exists; if another request made it, the job will need --overwrite"
    ]


def test_a_plan_goes_as_far_as_the_limit(bench: Bench) -> None:
    recipe = bench.recipe(bench.write(rows_of(30)), limit_rows=20)
    assert job.plan(recipe, open_engine=bench.open_engine).data["rows"] == 20


def test_a_join_has_no_plan(bench: Bench) -> None:
    with pytest.raises(
        GembError, match=r"^--join computes nothing that could be planned; leave out --dry-run"
    ):
        job.plan(bench.recipe("docs.jsonl", join=True))


def test_a_plan_of_a_pipe_knows_no_rows(bench: Bench) -> None:
    plan = job.plan(bench.recipe("-", "-"), open_engine=bench.open_engine)
    assert dict(plan.rows)["rows"] == "unknown, the input is a pipe"
    assert plan.outputs == []


# --- progress and report ---------------------------------------------------------------------------------


def test_progress_counts_up_to_the_total(bench: Bench) -> None:
    bench.run(bench.write(rows_of(60)))
    done = [event.done for event in bench.events]
    assert done == sorted(done)
    assert done[-1] == 60
    assert {event.stage for event in bench.events} == {"embedding"}
    assert bench.events[-1].tokens == sum(len(numbers_of(row)) + 2 for row in range(60))


def test_progress_of_a_shard_counts_up_to_its_part(bench: Bench) -> None:
    bench.engine = lambda: FakeEngine(workers=2, seconds_per_token=0.0001)
    bench.run(bench.write(rows_of(2 * 4096)), shard="1/2")
    last = bench.events[-1]
    assert (last.done, last.total) == (4096, 4096)


def test_out_of_memory_is_a_note_and_nothing_is_lost(bench: Bench) -> None:
    bench.engine = lambda: FakeEngine(memory_tokens=20, batch_tokens=64)
    report = bench.run(bench.write(rows_of(60)))
    assert report.data["rows"] == 60
    notes = [event.note for event in bench.events if event.note]
    assert len(notes) == 1
    assert notes[0].startswith("out of memory at ")


def test_the_record_tells_request_report_recipe_and_checksums(bench: Bench) -> None:
    bench.run(bench.write(rows_of(5)))
    record = json.loads((bench.place / "docs.npy.gemb.json").read_text())
    assert record.keys() == {"request", "recipe", "report", "files", "versions"}
    assert record["report"]["rows"] == 5
    assert [entry["file"] for entry in record["files"]] == ["docs.ids.txt", "docs.npy"]
    assert record["recipe"]["kind"] == "embed"
    assert record["versions"].keys() == {"gemb", "torch", "tokenizers", "numpy"}


def test_the_state_has_another_format_when_its_fields_change() -> None:
    names = sorted(field.name for kind in (State, Counts) for field in fields(kind))
    assert (State.FORMAT, " ".join(names)) == (
        2,
        "cache_hits chunked computed_texts computed_tokens counts duplicates empty_skipped long_skipped "
        "lost_more lost_tokens next_record precision records rejected rejects rows seconds seen sink tokens "
        "truncated write_seconds",
    )


def test_what_the_engine_remarks_is_reported(bench: Bench) -> None:
    def open_engine() -> FakeEngine:
        engine = FakeEngine()
        engine.notes = ("runs through transformers",)
        return engine

    bench.engine = open_engine
    assert ("note", "runs through transformers") in bench.run(bench.write(rows_of(3))).rows


def test_one_row_is_enough(bench: Bench) -> None:
    bench.run(bench.write([{"text": "w1"}]))
    assert ids_of(bench.place / "docs.npy") == ["1"]
    np.testing.assert_array_equal(vectors_of(bench.place / "docs.npy"), [expected(1)])


# --- what is refused before anything is computed ---------------------------------------------------------


def refused(bench: Bench, source: Path | str, **settings: Any) -> tuple[str, Exit]:  # noqa: ANN401
    with pytest.raises(GembError) as caught:
        bench.run(source, **settings)
    assert not (bench.place / "docs.npy").exists()
    return str(caught.value), caught.value.exit_code


def test_no_rows(bench: Bench) -> None:
    source = bench.write([])
    assert refused(bench, source) == (f"{source}: no rows", Exit.USAGE)
    assert bench.engines == []


def test_rows_that_are_all_refused(bench: Bench) -> None:
    source = bench.write([{"id": "a"}, {"id": "b", "text": ""}])
    assert refused(bench, source, on_error="skip") == (
        f"{source}: of 2 rows none can be embedded (2 rejected, 0 empty, 0 too long); "
        f"see {bench.place / 'docs.npy.rejects.jsonl'}",
        Exit.USAGE,
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "a"}', 'no "text"; this line has id'),
        (b'{"id": "a", "query": "w1", "passage_": "w2"}', 'no "text"; this line has id, query, passage_'),
        (b'{"id": "a", "text": 5}', '"text" is the number 5, not a string'),
        (b'{"id": "a", "text": null}', '"text" is null, not a string'),
        (b'{"id": "a", "text": ["w1"]}', '"text" is a list, not a string'),
        (b'{"id": "a", "text": ""}', "empty text"),
        (b'{"id": "a", "text": " \\n "}', "empty text"),
        (
            b'{"id": "a", "text": "\\ud800"}',
            "broken JSON at column 22: a lone surrogate (half a character) in a \\u escape",
        ),
        (b'{"id": "a", "text": "\xff"}', "not UTF-8: byte 0xff at byte 21 of the row"),
        (b'{"id": "a", "text": "w1"', "broken JSON at column 25: unexpected end of data"),
        (b'{"id": 1.5, "text": "w1"}', '"id" is the number 1.5, not a string or an integer'),
        (b"7", "the number 7, not an object with a text"),
    ],
)
def test_a_bad_row_is_told_with_file_line_and_reason(bench: Bench, line: bytes, reason: str) -> None:
    source = bench.place / "docs.jsonl"
    source.write_bytes(b'{"id": "first", "text": "w1"}\n' + line + b"\n")
    message, code = refused(bench, source)
    assert message.startswith(f"{source}:2: {reason}; ")
    assert code == Exit.USAGE
    assert bench.engines == []  # told before the model is loaded


@pytest.mark.parametrize(
    ("line", "next_step"),
    [
        (b'{"id": "a"}', OR_SKIP),
        (b'{"id": "a", "text": ""}', "; --empty skip leaves such rows out"),
        (
            b'{"id": "a", "text": "\xff"}',
            f"; iconv -f latin1 -t utf-8 converts a file that is Latin-1{OR_SKIP}",
        ),
    ],
)
def test_a_bad_row_is_told_with_what_to_do_about_it(bench: Bench, line: bytes, next_step: str) -> None:
    source = bench.place / "docs.jsonl"
    source.write_bytes(line + b"\n" + b'{"id": "second", "text": "w1"}\n')
    message, _ = refused(bench, source)
    assert message.endswith(next_step)
    assert bench.run(source, on_error="skip", empty="skip").data["rows"] == 1


def test_a_byte_order_mark_is_no_mistake(bench: Bench) -> None:
    source = bench.place / "docs.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "w1"}\n')
    bench.run(source)
    assert ids_of(bench.place / "docs.npy") == ["a"]


def test_a_text_of_10_megabytes_is_cut_and_counted(bench: Bench) -> None:
    report = bench.run(bench.write([{"id": "a", "text": "w1 " * 3_400_000}, {"id": "b", "text": "w2"}]))
    assert (report.data["rows"], report.data["truncated"]) == (2, 1)


def test_a_missing_file(bench: Bench) -> None:
    assert refused(bench, "absent.jsonl") == ("absent.jsonl: no such file or folder", Exit.USAGE)


def test_an_empty_folder(bench: Bench) -> None:
    (bench.place / "nothing").mkdir()
    assert refused(bench, "nothing") == ("nothing: the folder holds nothing", Exit.USAGE)


def test_no_output(bench: Bench) -> None:
    with pytest.raises(GembError) as caught:
        job.run(EmbedRecipe(inputs=("docs.jsonl",)))
    assert str(caught.value) == "no output given; pass -o docs.npy, or -o - for JSON lines on stdout"


def test_a_folder_that_is_not_there(bench: Bench) -> None:
    source = bench.write(rows_of(1))
    with pytest.raises(GembError) as caught:
        bench.run(source, "nowhere/docs.npy")
    assert str(caught.value) == (
        f"{bench.place / 'nowhere/docs.npy'}: there is no folder {bench.place / 'nowhere'}; make it first"
    )


def test_dims_that_the_model_was_not_trained_for(bench: Bench) -> None:
    source = bench.write(rows_of(1))
    model = bench.model
    assert refused(bench, source, dims=9) == (
        f"--dims 9 is more than the 8 dims that {model} gives",
        Exit.MISMATCH,
    )
    assert refused(bench, source, dims=4) == (
        f"--dims 4: {model} declares no smaller size than its 8 dims, and cutting a model that was not "
        "trained for it costs quality; pass --force to cut anyway",
        Exit.MISMATCH,
    )
    bench.model = fake_folder(bench.models / "matryoshka", matryoshka_dims=[8, 4, 2])
    assert refused(bench, source, dims=5) == (
        f"--dims 5 is no size that {bench.model} was trained for: 8, 4, 2; "
        "pass one of them, or --force to cut anyway",
        Exit.MISMATCH,
    )
    bench.run(source, dims=4)
    assert vectors_of(bench.place / "docs.npy").shape == (1, 4)


def test_more_tokens_than_the_model_declares(bench: Bench) -> None:
    assert refused(bench, bench.write(rows_of(1)), max_tokens=17) == (
        f"--max-tokens 17 is more than the 16 that {bench.model} declares; pass --force to try it anyway",
        Exit.MISMATCH,
    )


def test_an_unknown_prompt(bench: Bench) -> None:
    bench.model = fake_folder(bench.models / "prompted", prompts={"query": "w7 ", "document": "w8 "})
    with pytest.raises(MismatchError, match=r"^the model has no prompt 'queri'; it has query, document"):
        bench.run(bench.write(rows_of(1)), as_="queri")


def test_a_model_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(UnavailableError, match="there is no model folder absent"):
        bench.run(bench.write(rows_of(1)), model="absent")


def test_a_vocabulary_that_does_not_fit_the_weights(bench: Bench) -> None:
    config = json.loads((bench.model / "config.json").read_text())
    (bench.model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    message, code = refused(bench, bench.write(rows_of(1)))
    assert message == (
        "the tokenizer has ids up to 403, but the model's vocab_size is 100; "
        "tokenizer and weights are not of one model"
    )
    assert code == Exit.MISMATCH


def test_a_model_without_weights(bench: Bench) -> None:
    (bench.model / "model.safetensors").unlink()
    assert refused(bench, bench.write(rows_of(1))) == (
        f"{bench.model} has no weights: no model.safetensors and no model.safetensors.index.json; "
        "download the model again",
        Exit.UNAVAILABLE,
    )


def test_weights_that_are_cut_short(bench: Bench) -> None:
    weights = bench.model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    assert refused(bench, bench.write(rows_of(1))) == (
        f"{weights} is damaged: cut short at {len(content) - 4} of {len(content)} bytes; "
        "download or copy it again",
        Exit.UNAVAILABLE,
    )


def test_weights_that_are_not_numbers(bench: Bench) -> None:
    weights = bench.model / "model.safetensors"
    save_file({"weight": np.array([1, np.nan], dtype=np.float32)}, weights)
    assert refused(bench, bench.write(rows_of(1))) == (
        f"{weights} is damaged: 1 of the 2 numbers of weight are NaN or infinite; "
        "download the model again, or train it anew",
        Exit.UNAVAILABLE,
    )


def test_weights_that_are_only_a_pickle(bench: Bench) -> None:
    (bench.model / "model.safetensors").rename(bench.model / "pytorch_model.bin")
    message, code = refused(bench, bench.write(rows_of(1)))
    assert message.startswith(
        f"{bench.model} has its weights only as pickle (pytorch_model.bin), which can run code when loaded"
    )
    assert code == Exit.UNAVAILABLE


def test_a_module_that_is_not_known(bench: Bench) -> None:
    path = bench.model / "modules.json"
    modules = json.loads(path.read_text())
    modules.append({"idx": 3, "path": "3_Other", "type": "sentence_transformers.models.WeightedLayerPooling"})
    path.write_text(json.dumps(modules))
    assert refused(bench, bench.write(rows_of(1))) == (
        f"{path}: gemb does not know the module sentence_transformers.models.WeightedLayerPooling; "
        "it knows Transformer, Pooling, Dense, LayerNorm, Normalize",
        Exit.MISMATCH,
    )


def test_a_name_that_would_have_to_be_downloaded_offline(bench: Bench) -> None:
    message, code = refused(bench, bench.write(rows_of(1)), model="nobody/nothing", offline=True)
    assert message.startswith("nobody/nothing is not in the cache ")
    assert "--offline forbids a download" in message
    assert code == Exit.UNAVAILABLE


def test_int8_cannot_be_sharded_or_streamed(bench: Bench) -> None:
    source = bench.write(rows_of(3))
    message, code = refused(bench, source, dtype="int8", shard="0/2")
    assert message.startswith("--dtype int8 cannot be sharded: every shard would find other ranges;")
    assert code == Exit.USAGE
    with pytest.raises(GembError, match="a stream has no place for the int8 ranges"):
        bench.run(source, "-", dtype="int8")


def test_a_work_folder_of_somebody_else_is_left_alone(bench: Bench) -> None:
    (bench.place / "docs.npy.partial").mkdir()
    (bench.place / "docs.npy.partial/notes.txt").write_text("mine")
    message, _ = refused(bench, bench.write(rows_of(1)))
    assert message == (
        f"{bench.place / 'docs.npy.partial'} is in the way and is not gemb's; "
        "move it, or choose another output"
    )
    assert (bench.place / "docs.npy.partial/notes.txt").read_text() == "mine"


def test_nobody_needs_to_watch(bench: Bench) -> None:
    recipe = bench.recipe(bench.write(rows_of(2)))
    assert job.run(recipe, ignore, open_engine=bench.open_engine).data["rows"] == 2
