"""Plans and reports: what goes to stdout, what to stderr, and how it looks where."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gemb.errors import Exit
from gemb.report import Plan, Report, Table, show
from gemb.report.result import as_json, write

REPORT = Report(
    title="embedded 2 texts into docs.npy in 0.1 s",
    rows=[("device", "cpu; 2 threads"), ("left out", "1 text\nsee docs.npy.rejects.jsonl")],
    data={"rows": 2, "mean": np.float32(0.5), "paths": [Path("a")]},
    outputs=[Path("docs.npy")],
    tables=[Table(("score", "text"), [("0.91", "one"), ("12.00", "two words")], "hits", ("score",))],
)

PLAIN = """\
embedded 2 texts into docs.npy in 0.1 s
  device    cpu; 2 threads
  left out  1 text
            see docs.npy.rejects.jsonl

hits
score  text
 0.91  one
12.00  two words
"""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_report_goes_to_stderr_so_that_stdout_stays_data(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT)
    assert capsys.readouterr() == ("", PLAIN)


def test_a_report_that_is_the_product_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT, product=True, quiet=True)
    assert capsys.readouterr() == (PLAIN, "")


def test_json_is_one_line_on_stdout_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT, json=True)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "rows": 2,
        "mean": 0.5,
        "paths": ["a"],
        "outputs": ["docs.npy"],
        "exit_code": 0,
    }


def test_json_leaves_stdout_alone_when_rows_go_there(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT, json=True, stdout_taken=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["rows"] == 2


def test_quiet_is_silent_on_success_only(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT, quiet=True)
    assert capsys.readouterr() == ("", "")
    show(Report(title="3 rows were rejected", exit_code=Exit.REJECTED), quiet=True)
    assert capsys.readouterr() == ("", "3 rows were rejected\n")


def test_the_data_of_a_job_wins_over_what_is_filled_in() -> None:
    report = Report(title="t", data={"outputs": ["x"]}, outputs=[Path("y")], exit_code=Exit.MORE)
    assert json.loads(as_json(report)) == {"outputs": ["x"], "exit_code": 4}


def test_numbers_that_json_lacks_become_null() -> None:
    assert json.loads(as_json(Report(title="t", data={"a": float("nan")})))["a"] is None


def test_a_plan_is_shown_like_a_report_and_is_a_success() -> None:
    stream = io.StringIO()
    write(Plan(title="would embed 2 texts", rows=[("rows", "2")]), stream)
    assert stream.getvalue() == "would embed 2 texts\n  rows  2\n"
    assert Plan(title="t").exit_code == Exit.DONE


def test_a_table_of_many_columns_becomes_records_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    columns = ("data", "metric", "dims", "bytes", "value", "difference", "verdict")
    table = Table(columns, [("scifact", "nDCG@10", "384", "1536", "0.6451", "+0.0021", "REGRESSION")])
    shown = {}
    for width in ("60", "100"):
        monkeypatch.setenv("COLUMNS", width)
        stream = Terminal()
        write(Report(title="evaluated", tables=[table]), stream)
        shown[width] = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    lines = [line.rstrip() for line in shown["60"].splitlines()]
    assert "  data        scifact" in lines
    assert "  verdict     REGRESSION" in lines
    assert any(line.split() == ["data", *columns[1:]] for line in shown["100"].splitlines())


def test_an_empty_table_shows_its_head() -> None:
    stream = io.StringIO()
    write(Report(title="t", tables=[Table(("a", "bb"), [])]), stream)
    assert stream.getvalue() == "t\n\na  bb\n"


def test_a_terminal_gets_the_same_words_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    write(REPORT, stream)
    assert "\x1b[1m" in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    write(REPORT, stream)
    shown = stream.getvalue()
    assert "\x1b[3" not in shown  # no colour, and no italics
    for word in PLAIN.split():
        assert word in shown


def test_dotted_names_are_folded_at_their_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    name = "model.encoder.layers.*.self_attn.q_proj.weight"
    stream = Terminal()
    rows = [(name, "64 x 64", f"decoder.{name}"), ("norm", "1.5", "")]
    write(Report(title="t", tables=[Table(("tensor", "shape", "from"), rows)]), stream)
    lines = re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= 60
    words = " ".join(lines).split()
    for part in name.split("."):
        assert any(f".{part}" in f".{word}" for word in words)  # whole, on one line
    assert "1.5" in words


def test_text_with_brackets_is_not_taken_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    write(Report(title="[red]t[/red]", rows=[("[b]", "[/b]")], tables=[Table(("c",), [("[i]x",)])]), stream)
    for text in ("[red]t[/red]", "[b]", "[/b]", "[i]x"):
        assert text in stream.getvalue()
