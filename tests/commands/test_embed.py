from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemb.engine import Engine
from gemb.jobs.embed import split_words
from tests.conftest import Finished
from tests.fakes import FakeEngine, expected, fake_folder

Gemb = Callable[..., Finished]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder, and a working folder with docs.jsonl; the engine is a fake one."""

    def open_engine(setup: object, notice: Callable[[str], None]) -> Engine:
        return FakeEngine()

    monkeypatch.setattr("gemb.jobs.embed.open_torch_engine", open_engine)
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("docs.jsonl").write_text('{"id": "a", "text": "w1 w2"}\n{"id": "b", "text": "w3"}\n')
    return fake_folder(tmp_path / "model")


def test_a_good_run_tells_on_stderr_and_leaves_stdout_to_data(gemb: Gemb, model: Path) -> None:
    done = gemb("embed", "docs.jsonl", "-o", "docs.npy", "-m", model)
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines()[0].startswith("embedded 2 rows to docs.npy in ")
    np.testing.assert_array_equal(np.load("docs.npy"), [expected(1, 2), expected(3)])
    assert Path("docs.ids.txt").read_text() == "a\nb\n"


def test_quiet_says_nothing_at_all(gemb: Gemb, model: Path) -> None:
    done = gemb("embed", "docs.jsonl", "-o", "docs.npy", "-m", model, "-q")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_json_is_one_object_on_stdout(gemb: Gemb, model: Path) -> None:
    done = gemb("embed", "docs.jsonl", "-o", "docs.npy", "-m", model, "--json")
    report = json.loads(done.out)
    assert done.err == ""
    assert report["rows"] == 2
    assert report["exit_code"] == 0
    assert report["files"] == ["docs.ids.txt", "docs.npy"]


def test_rows_have_stdout_to_themselves(gemb: Gemb, model: Path) -> None:
    done = gemb("embed", "-", "-o", "-", "-m", model, "--json", stdin='{"id": "x", "text": "w3"}\n')
    assert json.loads(done.out)["id"] == "x"
    assert json.loads(done.err)["rows"] == 1


def test_a_dry_run_shows_the_plan_and_writes_nothing(gemb: Gemb, model: Path) -> None:
    before = sorted(Path().iterdir())
    done = gemb("embed", "docs.jsonl", "-o", "docs.npy", "-m", model, "--dry-run")
    assert done.code == 0
    assert done.out.splitlines()[0] == "would embed 2 rows to docs.npy"
    assert sorted(Path().iterdir()) == before


def test_a_recipe_file_may_stand_in_place_of_the_inputs(gemb: Gemb, model: Path) -> None:
    Path("mine.yaml").write_text(f"inputs: [docs.jsonl]\noutput: docs.npy\nmodel: {model}\ndtype: f16\n")
    done = gemb("embed", "mine.yaml", "dtype=binary", "--limit-rows", "1")
    assert done.code == 4, done.err
    assert gemb("embed", "mine.yaml", "dtype=binary").code == 0
    assert np.load("docs.npy").shape == (2, 1)


def test_rows_on_stdout_are_not_mixed_with_the_report(gemb: Gemb, model: Path) -> None:
    done = gemb("embed", "docs.jsonl", "-o", "-", "-m", model, "--json")
    assert [sorted(json.loads(line)) for line in done.out.splitlines()] == [["embedding", "id"]] * 2
    assert json.loads(done.err)["rows"] == 2


def test_words_are_told_apart() -> None:
    assert split_words(["a.jsonl", "b=c.jsonl"], None) == (None, [], ["a.jsonl", "b=c.jsonl"])
    assert split_words(["r.yaml", "dims=8"], None) == ("r.yaml", ["dims=8"], [])
    assert split_words(["r.yml", "a.jsonl"], None) == ("r.yml", [], ["a.jsonl"])
    assert split_words(["x.yaml"], "mine") == ("mine", [], ["x.yaml"])


def test_mistakes_in_options_come_all_at_once(gemb: Gemb, model: Path) -> None:
    done = gemb(
        "embed", "docs.jsonl", "-o", "docs.npy", "--dtype", "f8", "--shard", "3/3", "--max-rejects", "x"
    )
    assert done.code == 2
    assert done.err.splitlines() == [
        "gemb: command line: 3 problems",
        "  --dtype: 'f8' is not one of f32, f16, bf16, int8, binary",
        "  --max-rejects: 'x' is neither a number of rows like 100 nor a share like 5%",
        "  --shard: 3/3: the first number goes from 0 to 2, one for each shard",
    ]


def test_a_bad_row_is_one_message_and_exit_code_2(gemb: Gemb, model: Path) -> None:
    Path("bad.jsonl").write_text('{"id": "a", "body_": "w1"}\n')
    done = gemb("embed", "bad.jsonl", "-o", "docs.npy", "-m", model)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        'gemb: bad.jsonl:1: no "text"; this line has id, body_; --on-error skip leaves such rows out\n'
    )


def test_float16_computation_is_refused(gemb: Gemb, model: Path) -> None:
    done = gemb("embed", "docs.jsonl", "-o", "docs.npy", "-m", model, "--precision", "fp16")
    assert done.code == 2
    assert done.err == (
        "gemb: --precision: 'fp16' is refused: float16 gives NaN in Gemma models; use bf16 or fp32\n"
    )
