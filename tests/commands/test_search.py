"""`gemb search` as a person, a pipe and a scheduler meet it."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemb.store import Settings, Writer
from tests.conftest import ROOT, modules_after
from tests.indexes import FILMS, embedded, make_films, make_plain, minilm, needs_minilm

pytestmark = needs_minilm
QUERY = "a captain hunts an animal"
FAST = ("--device", "cpu", "--precision", "fp32", "--threads", "1")

Gemb = Callable[..., Any]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILMS and the long one, made once."""
    return make_films(tmp_path_factory.mktemp("made") / "films.gemb", with_long=True)


# --- what comes out


def test_a_pipe_gets_one_object_a_hit_and_nothing_else(films: Path, gemb: Gemb) -> None:
    done = gemb("search", films, QUERY, "-k", "2", *FAST)
    assert (done.code, done.err) == (0, "")
    first, second = [json.loads(line) for line in done.out.splitlines()]
    assert (first["rank"], first["id"], first["metadata"]) == (1, "whale", {"lang": "en", "year": 1956})
    assert first["score"] > second["score"]
    assert gemb("search", films, "-k", "2", *FAST, stdin=QUERY).out == done.out
    assert gemb("search", films, "-", "-k", "2", *FAST, stdin=QUERY).out == done.out
    whole = json.loads(gemb("search", films, QUERY, "-k", "2", *FAST, "--json").out)
    assert whole["hits"] == [first, second]
    assert whole["exit_code"] == 0


def test_an_index_without_documents_is_told(tmp_path: Path, gemb: Gemb) -> None:
    empty = tmp_path / "empty.gemb"
    Writer.open(empty, Settings(dims=2)).close()
    done = gemb("search", empty, "whale", "--lexical")
    assert (done.code, done.out) == (0, "")
    assert done.err == f"{empty} holds no documents; gemb index DOCUMENTS -o {empty} adds them\n"
    assert gemb("search", empty, "whale", "--lexical", "--quiet").err == ""


def test_every_way_to_write_hits(films: Path, gemb: Gemb) -> None:
    done = gemb("search", films, "whale", "--lexical", "--format", "table")
    query, gap, head, row, *_ = done.out.splitlines()
    assert (query, gap, head.split()) == ("whale", "", ["words", "id", "title", "passage", "lang", "year"])
    assert row.split()[1:4] == ["whale", "Moby", "Dick"]
    run = gemb("search", films, "whale", "--lexical", "--format", "trec")
    query, q0, document, rank, score, tag = run.out.split()
    assert (query, q0, document, rank, tag) == ("1", "Q0", "whale", "1", "gemb")
    assert float(score) > 0


def test_a_file_of_queries_is_told_about_on_stderr(films: Path, tmp_path: Path, gemb: Gemb) -> None:
    queries = tmp_path / "q.txt"
    queries.write_text(f"{QUERY}\nvegetables in space\n", "utf-8")
    done = gemb("search", films, "--queries", queries, "-k", "1", *FAST)
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == ["whale", "mission"]
    assert done.err.startswith("answered 2 queries in ")
    assert gemb("search", films, "--queries", queries, "-k", "1", *FAST, "-q").err == ""
    refused = gemb("search", films, "--queries", queries, "--json")
    assert (refused.code, refused.out) == (2, "")


def test_an_empty_answer_is_code_0_and_8_where_it_was_asked_for(films: Path, gemb: Gemb) -> None:
    done = gemb("search", films, QUERY, "--where", "year > 3000", *FAST)
    assert (done.code, done.out, done.err) == (0, "", "")
    done = gemb("search", films, QUERY, "--where", "year > 3000", "--fail-empty", "-q", *FAST)
    assert (done.code, done.out) == (8, "")
    assert done.err.splitlines()[1:] == ["  hits           0", f"  without a hit  1: {QUERY}"]


def test_recipe_and_options_say_the_same(films: Path, tmp_path: Path, gemb: Gemb) -> None:
    asked = f"kind: search\nindexes: [{films.name}]\nk: 1\nlexical: true\n"
    (tmp_path / "ask.yaml").write_text(asked, "utf-8")
    shutil.copytree(films, tmp_path / films.name)  # paths in a recipe are relative to it
    done = gemb("search", "--recipe", tmp_path / "ask.yaml", "--set", "query=whale")
    assert (done.code, json.loads(done.out)["id"]) == (0, "whale")


# --- cost


def test_a_search_without_the_model_loads_no_torch(films: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", minilm().embed([QUERY], as_="query"))
    for arguments in (["whale", "--lexical"], ["--like", "whale"], ["--vectors", str(tmp_path / "q.npy")]):
        loaded = modules_after(
            "from importlib import import_module\n"
            f"try: import_module('gemb.commands').main({['search', str(films), *arguments]!r})\n"
            "except SystemExit as stop: assert stop.code == 0"
        )
        assert loaded & {"torch", "transformers", "tokenizers", "pyarrow", "rich", "usearch"} == set()


# --- mistakes: message and exit code


@pytest.mark.parametrize(("arguments", "code", "message"), [
    ([], 2, "no index given; gemb search docs.gemb 'what to search for'"),
    (["INDEX", ""], 2, "the query is empty; ask for something"),
    (["INDEX"], 2, "the query is empty; ask for something"),
    (["INDEX", "x", "-k", "0"], 2, "--k: 0 is too small; at least 1"),
    (["INDEX", "x", "--min-score", "2"], 2,
     "--min-score: 2.0 is too large; at most 1"),
    (["INDEX", "x", "--format", "xml"], 2, None),
    (["INDEX", "x", "--where", "yeer > 2000"], 2,
     "--where: no field yeer; did you mean year?\n  yeer > 2000\n  ^"),
    (["INDEX", "x", "--where", "year = 'x'"], 2,
     "--where: year holds numbers, but 'x' is a text; write a number\n  year = 'x'\n         ^"),
    (["INDEX", "x", "--where", "1=1; DROP TABLE documents"], 2,
     "--where: expected a field name\n  1=1; DROP TABLE documents\n  ^"),
    (["INDEX", "x", "--where", "id = '' or 1=1 --"], 2,
     "--where: expected a field name\n  id = '' or 1=1 --\n             ^"),
    (["INDEX", "two", "words"], 2,
     "two is no index; a query of several words stands in quotes: gemb search INDEX 'two words'"),
    (["INDEX", "--like", "nosuch"], 2, "INDEX has no document 'nosuch'"),
    (["INDEX", "x", "--as", "nosuch", *FAST], 5,
     "the model has no prompt 'nosuch'; it has no prompts; use none"),
    (["none.gemb", "x"], 7, None),
    (["INDEX", "none.gemb", "x"], 7, None),
    (["INDEX", "x", "-m", "none/such", "--offline"], 7, None),
])  # fmt: skip
def test_a_mistake_is_one_message(
    films: Path, gemb: Gemb, arguments: list[str], code: int, message: str | None
) -> None:
    done = gemb("search", *(str(films) if argument == "INDEX" else argument for argument in arguments))
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("gemb: ")
    assert "Traceback" not in done.err
    if message is not None:
        assert done.err == f"gemb: {message.replace('INDEX', str(films))}\n"


def test_what_does_not_fit_together_ends_with_5(films: Path, tmp_path: Path, gemb: Gemb) -> None:
    plain = make_plain(tmp_path / "plain.gemb", embedded(["a"]))
    other = make_films(tmp_path / "other.gemb", FILMS[:1], fingerprint="0" * 64, model="other")
    np.save(tmp_path / "narrow.npy", np.ones((1, 7), np.float32))
    for arguments, parts in [
        ([films, plain, "x"], [str(films), str(plain), "search them one by one"]),
        ([films, other, "x"], [str(films), str(other), "(000000000000)"]),
        ([other, "x", "-m", "minilm"], [f"{other} holds vectors of other (000000000000), but minilm is"]),
        ([films, "--vectors", tmp_path / "narrow.npy"], ["384-wide vectors, but the query is 7 wide"]),
    ]:
        done = gemb("search", *arguments)
        assert (done.code, done.out) == (5, "")
        assert all(part in done.err for part in parts), done.err
    # By words, indexes of any models can be searched together.
    assert gemb("search", films, other, "machine", "--lexical").code == 0


def test_a_newer_format_and_another_folder_are_told(films: Path, tmp_path: Path, gemb: Gemb) -> None:
    import sqlite3

    newer = shutil.copytree(films, tmp_path / "newer.gemb")
    with sqlite3.connect(newer / "index.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    done = gemb("search", newer, "x")
    assert (done.code, done.err) == (
        5, f"gemb: {newer} is an index of format 99, this gemb reads up to 1; upgrade gemb\n"
    )  # fmt: skip
    done = gemb("search", tmp_path, "x")
    assert done.code == 2
    assert done.err.startswith(f"gemb: {tmp_path} is no index")


@pytest.mark.parametrize("kind", ["vectors.f32", "rows.u64", "codes.i8"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_never_a_wrong_answer(
    films: Path, tmp_path: Path, gemb: Gemb, kind: str, damage: str
) -> None:
    copy = shutil.copytree(films, tmp_path / "copy.gemb")
    (path,) = copy.glob(f"segments/*/{kind}")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    # The codes are what the first stage reads, the vectors what a score comes from.
    done = gemb("search", copy, "--like", "mission", *(["--exact"] if kind == "vectors.f32" else []))
    assert (done.code, done.out) == (1, "")
    assert f"gemb index verify {copy}" in done.err
    assert "Traceback" not in done.err


# --- around an open index


def test_a_writer_at_work_is_no_obstacle(tmp_path: Path, gemb: Gemb) -> None:
    path = make_films(tmp_path / "films.gemb", FILMS[:2])
    with Writer.open(path) as writer:
        writer.put(FILMS[2:], embedded([film.text for film in FILMS[2:]]))
        before = gemb("search", path, QUERY, *FAST)
        writer.commit()
        after = gemb("search", path, QUERY, *FAST)
    assert (before.code, len(before.out.splitlines())) == (0, 2)
    assert (after.code, len(after.out.splitlines())) == (0, 5)


AS_NOBODY = """
import os, sys
from gemb.commands import load_command, main
load_command("search")
if os.getuid() == 0:  # root may write everywhere
    os.seteuid(65534)
main(sys.argv[1:])
"""
"""Runs gemb as a user who may write nowhere; what root alone may import is imported before."""


def test_a_folder_that_cannot_be_written_is_searched(films: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(films, Path(folder) / "copy.gemb")
        Path(folder).chmod(0o755)
        everything = [copy, *copy.rglob("*")]
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            for arguments in (["whale", "--lexical"], ["--like", "whale"], ["--like", "whale", "--exact"]):
                command = [sys.executable, "-c", AS_NOBODY, "search", str(copy), *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
                expected = subprocess.run(
                    [sys.executable, "-m", "gemb", "search", str(films), *arguments],
                    capture_output=True, text=True, check=True, cwd=ROOT,
                )  # fmt: skip
                assert (done.stdout, done.stderr) == (expected.stdout, "")
        finally:
            for path in everything:
                path.chmod(0o755)


def test_a_cache_that_cannot_be_written_costs_only_time(
    films: Path, tmp_path: Path, gemb: Gemb, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "file" / "cache"))
    done = gemb("search", films, QUERY, "-k", "1", *FAST)
    assert (done.code, done.err, json.loads(done.out)["id"]) == (0, "", "whale")


# --- at a terminal


def at_a_terminal(*arguments: str | Path, lines: list[bytes]) -> tuple[int, str]:
    """Exit code and screen of `gemb` at a terminal, where each line is typed at its prompt."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover  # another process
        os.chdir(ROOT)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "gemb", *(str(one) for one in arguments)])
    seen = b""
    waiting = list(lines)
    shown = 0
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # Linux tells the end of a terminal as an error
                break
            if waiting and seen.count(b"search: ") > shown:
                shown = seen.count(b"search: ")
                os.write(terminal, waiting.pop(0))
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode()


def test_a_terminal_without_a_query_gets_a_prompt(films: Path) -> None:
    code, screen = at_a_terminal("search", films, *FAST, lines=[b"a white whale\n", b":k none\n", b"\x04"])
    assert code == 0
    assert "6 documents; :help explains" in screen
    assert "Moby Dick" in screen
    assert ":k none: not a number of documents" in screen


def test_a_terminal_with_a_query_gets_a_table(films: Path) -> None:
    code, screen = at_a_terminal("search", films, "whale", "--lexical", lines=[])
    assert code == 0
    assert "Moby Dick" in screen
    assert "\x1b[1m" in screen  # bold


def test_a_closed_pipe_ends_it_silently(films: Path, tmp_path: Path) -> None:
    queries = tmp_path / "q.txt"
    queries.write_text("whale\n" * 30_000, "utf-8")
    command = [sys.executable, "-m", "gemb", "search", str(films), "--queries", str(queries), "--lexical"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(), process.stderr.read()) == (141, b"")
    process.stderr.close()
