"""`gemb index` on the command line: its verbs, and the one that need not be said."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemb.store import Writer
from tests.conftest import Finished

Gemb = Callable[..., Finished]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three vectors and their ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "v.npy", np.eye(3, 4, dtype=np.float32))
    (tmp_path / "v.ids.txt").write_text("a\nb\nc\n", "utf-8")
    return tmp_path


@pytest.fixture
def made(place: Path, gemb: Gemb) -> Path:
    """An index of them."""
    assert gemb("index", "--vectors", "v.npy", "-o", "docs.gemb", "-q") == Finished(0, "", "")
    return place / "docs.gemb"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--vectors", "v.npy", "-o", "x.gemb"),
        ("add", "--vectors", "v.npy", "-o", "x.gemb"),
        ("-o", "x.gemb", "add", "--vectors", "v.npy"),
        ("-o", "x.gemb", "docs.jsonl", "--vectors", "v.npy"),
        ("docs.jsonl", "--vectors=v.npy", "-o", "x.gemb"),
        ("--vectors", "v.npy", "docs.jsonl", "-q", "-o", "x.gemb"),
        ("-qo", "x.gemb", "docs.jsonl", "--vectors", "v.npy"),
        ("--", "docs.jsonl"),
    ],
)
def test_add_need_not_be_said_wherever_the_options_stand(
    place: Path, gemb: Gemb, arguments: tuple[str, ...]
) -> None:
    (place / "docs.jsonl").write_text("".join(f'{{"id": "{id_}", "text": "x"}}\n' for id_ in "abc"), "utf-8")
    if arguments[0] == "--":
        arguments = ("--vectors", "v.npy", "-o", "x.gemb", *arguments)
    done = gemb("index", *arguments)
    assert (done.code, done.out) == (0, "")
    assert json.loads(gemb("info", "x.gemb", "--json").out)["documents"] == 3


@pytest.mark.parametrize("arguments", [("verify", "docs.gemb", "--json"), ("--json", "verify", "docs.gemb")])
def test_a_verb_is_found_before_and_behind_the_options(
    made: Path, gemb: Gemb, arguments: tuple[str, ...]
) -> None:
    done = gemb("index", *arguments)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["sound"] is True


@pytest.mark.parametrize("first", [("./verify", "-o", "x.gemb"), ("-o", "x.gemb", "./verify")])
def test_a_file_that_is_called_like_a_verb_is_written_with_a_dot(
    place: Path, gemb: Gemb, first: tuple[str, ...]
) -> None:
    (place / "verify").write_text("one\ntwo\nthree\n", "utf-8")
    arguments = (*first, "--vectors", "v.npy", "--input-format", "text", "--ids", "v.ids.txt")
    done = gemb("index", *arguments)
    # The ids of a text are its lines, those of --ids are others: what is read is the file.
    assert done.err == (
        "gemb: ./verify has no 'a' where v.npy has it; the documents must stand in the order of the vectors\n"
    )
    done = gemb("index", "verify", "-o", "x.gemb")
    assert (done.code, done.err) == (
        2,
        "gemb: index verify: no such option: -o; see gemb index verify --help\n",
    )


def test_a_verb_as_the_value_of_an_option_is_a_value(place: Path, gemb: Gemb) -> None:
    assert gemb("index", "-o", "verify", "--vectors", "v.npy").code == 0
    assert (place / "verify" / "index.db").is_file()


def test_the_help_of_the_group_shows_the_options_of_add_and_the_verbs(gemb: Gemb) -> None:
    for arguments in (("--help",), ("-h",)):
        done = gemb("index", *arguments)
        assert done.code == 0
        assert done.out.startswith("Usage: gemb index [VERB] [OPTIONS] [INPUT...]\n")
        for word in ("--passages", "--prune", "\nCommands:\n", "\n  verify ", "\n  export "):
            assert word in done.out
    assert gemb("index", "add", "--help").out.startswith("Usage: gemb index add ")
    assert gemb("index", "--help", "verify").out.startswith("Usage: gemb index verify ")


def test_nothing_at_all_is_a_mistake(gemb: Gemb) -> None:
    assert gemb("index") == Finished(2, "", "gemb: no output given; pass -o docs.gemb\n")


def test_a_report_goes_to_stderr_and_json_to_stdout(place: Path, gemb: Gemb) -> None:
    done = gemb("index", "--vectors", "v.npy", "-o", "docs.gemb")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("docs.gemb: 3 added, 0 unchanged, in ")
    done = gemb("index", "--vectors", "v.npy", "-o", "docs.gemb", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert (found["unchanged"], found["exit_code"], found["outputs"]) == (3, 0, ["docs.gemb"])


def test_a_recipe_says_what_to_index(place: Path, gemb: Gemb) -> None:
    (place / "mine.yaml").write_text("kind: index\nvectors: v.npy\noutput: docs.gemb\nprune: true\n", "utf-8")
    assert gemb("index", "mine.yaml", "dtype=f32", "-q") == Finished(0, "", "")
    assert json.loads(gemb("info", "docs.gemb", "--json").out)["dtype"] == "f32"
    done = gemb("embed", "mine.yaml")
    assert done.code == 2
    assert "this is a recipe for gemb index, not for gemb embed" in done.err


def test_a_dry_run_writes_nothing_and_is_the_product(place: Path, gemb: Gemb) -> None:
    done = gemb("index", "--vectors", "v.npy", "-o", "docs.gemb", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("would index 3 documents into docs.gemb\n")
    assert not (place / "docs.gemb").exists()


def test_verify_of_a_damaged_index_is_code_1_with_the_remedy(made: Path, gemb: Gemb) -> None:
    (file,) = made.glob("segments/*/vectors.f16")
    file.write_bytes(b"\0" * file.stat().st_size)
    done = gemb("index", "verify", "docs.gemb", "-q")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("docs.gemb: damaged, 1 fault; run gemb index rebuild docs.gemb\n")


def test_delete_and_export_go_through(made: Path, gemb: Gemb) -> None:
    done = gemb("index", "delete", "docs.gemb", "--where", "id in ('a', 'b')", "--dry-run")
    assert (done.code, done.out, done.err) == (0, "docs.gemb: would delete 2 documents of 3\n", "")
    assert gemb("index", "delete", "docs.gemb", "a", "--quiet") == Finished(0, "", "")
    done = gemb("index", "export", "docs.gemb", "-o", "out.jsonl", "--where", "id = 'b'")
    assert done.code == 0
    assert json.loads((made.parent / "out.jsonl").read_text("utf-8"))["id"] == "b"
    done = gemb("index", "delete", "docs.gemb", "--where", "id ==")
    assert done.code == 2
    assert done.err.startswith("gemb: --where: ")
    assert gemb("index", "compact", "docs.gemb", "-q").code == 0
    assert gemb("index", "upgrade", "docs.gemb", "-q").code == 0
    assert gemb("index", "rebuild", "docs.gemb", "-q").code == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify", "none.gemb"), 7),
        (("delete", "docs.gemb"), 2),
        (("export", "docs.gemb", "-o", "x.csv"), 2),
        (("--vectors", "none.npy", "-o", "docs.gemb"), 2),
        (("--vectors", "v.npy", "-o", "docs.gemb", "--dims", "3"), 5),
        (("--vectors", "v.npy", "-o", "docs.gemb", "--passages", "12:9"), 2),
        (("no.jsonl", "-o", "docs.gemb"), 2),
    ],
)
def test_a_mistake_is_one_message_with_its_code(
    made: Path, gemb: Gemb, arguments: tuple[str, ...], code: int
) -> None:
    done = gemb("index", *arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("gemb: ")
    assert "Traceback" not in done.err


# --- bad input: message and exit code


def refused(gemb: Gemb, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one message of `gemb index` with these arguments."""
    done = gemb("index", *arguments)
    assert done.out == ""
    assert done.err.startswith("gemb: ")
    assert "Traceback" not in done.err
    return done.code, done.err.removeprefix("gemb: ").removesuffix("\n")


VERBS = [
    ("verify",),
    ("compact",),
    ("rebuild",),
    ("upgrade",),
    ("delete", "a"),
    ("export", "-o", "x.npy"),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_nothing_and_something_else_is_no_index_to_any_verb(
    place: Path, gemb: Gemb, verb: tuple[str, ...]
) -> None:
    name, *rest = verb
    assert refused(gemb, name, "none.gemb", *rest) == (
        7,
        "there is no index none.gemb; make one with gemb index INPUT -o none.gemb",
    )
    (place / "photos").mkdir()
    assert refused(gemb, name, "photos", *rest) == (
        2,
        "photos is no index: it has no index.db; make one with gemb index INPUT -o NAME.gemb",
    )


@pytest.mark.parametrize("verb", [*VERBS, ("add", "--vectors", "v.npy", "-o")], ids=" ".join)
def test_a_newer_format_is_refused_by_every_verb(made: Path, gemb: Gemb, verb: tuple[str, ...]) -> None:
    with sqlite3.connect(made / "index.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    name, *rest = verb
    arguments = [name, *rest, "docs.gemb"] if name == "add" else [name, "docs.gemb", *rest]
    assert refused(gemb, *arguments) == (
        5,
        "docs.gemb is an index of format 99, this gemb reads up to 1; upgrade gemb",
    )


@pytest.mark.parametrize(
    ("value", "what"),
    [(np.nan, "NaN or infinity in it"), (np.inf, "NaN or infinity in it"), (0.0, "zeros only")],
)
def test_a_vector_that_is_none_is_named_by_file_and_row(
    place: Path, gemb: Gemb, value: float, what: str
) -> None:
    vectors = np.eye(3, 4, dtype=np.float32)
    vectors[1] = value
    np.save(place / "v.npy", vectors)
    assert refused(gemb, "--vectors", "v.npy", "-o", "docs.gemb") == (
        2,
        f"v.npy:2: its vector has {what}; it would ruin every ranking; --on-error skip leaves such rows out",
    )


def test_a_repeated_id_is_named_by_file_and_row(place: Path, gemb: Gemb) -> None:
    (place / "v.ids.txt").write_text("a\nb\na\n", "utf-8")
    assert refused(gemb, "--vectors", "v.npy", "-o", "docs.gemb") == (
        2,
        "v.npy:3: the id 'a' stands already in the input; ids are unique; "
        "--on-error skip leaves such rows out",
    )


def test_vectors_of_another_width_are_refused_with_both(made: Path, gemb: Gemb) -> None:
    for width, advice in ((3, "make another index for them"), (5, "pass --dims 4 to cut them")):
        np.save(made.parent / "w.npy", np.eye(3, width, dtype=np.float32))
        assert refused(gemb, "--vectors", "w.npy", "-o", "docs.gemb") == (
            5,
            f"docs.gemb holds 4-wide vectors, but those of w.npy are {width} wide; {advice}",
        )


def test_a_second_writer_is_told_who_is_the_first(made: Path, gemb: Gemb) -> None:
    with Writer.open(made):
        for arguments in (["--vectors", "v.npy", "-o", "docs.gemb"], ["delete", "docs.gemb", "a"]):
            code, message = refused(gemb, *arguments)
            assert code == 6
            assert message.startswith(f"docs.gemb is held by process {os.getpid()} since ")
            assert message.endswith("; wait for it, or pass --wait-lock SECONDS")


def test_an_empty_index_is_sound_and_has_nothing_to_export(made: Path, gemb: Gemb) -> None:
    assert gemb("index", "delete", "docs.gemb", "a", "b", "c", "-q") == Finished(0, "", "")
    for verb in ("verify", "compact", "rebuild"):
        assert gemb("index", verb, "docs.gemb", "-q") == Finished(0, "", "")
    assert refused(gemb, "export", "docs.gemb", "-o", "x.npy") == (
        2,
        "docs.gemb: there is no document to export",
    )
    assert not (made.parent / "x.npy").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("yeer = 1", "no field yeer; the fields are id, title\n  yeer = 1\n  ^"),
        ("1=1; DROP TABLE documents", "expected a field name\n  1=1; DROP TABLE documents\n  ^"),
        (
            "id = 3",
            "id holds texts, but 3 is a number; write '3' to compare it as a text\n  id = 3\n       ^",
        ),
    ],
)
def test_a_filter_that_is_none_deletes_and_exports_nothing(
    made: Path, gemb: Gemb, where: str, message: str
) -> None:
    for arguments in (["delete", "docs.gemb"], ["export", "docs.gemb", "-o", "x.npy"]):
        assert refused(gemb, *arguments, "--where", where) == (2, f"--where: {message}")
    assert json.loads(gemb("index", "verify", "docs.gemb", "--json").out)["documents"] == 3


@pytest.fixture
def graph(made: Path) -> Path:
    """The index with a graph."""
    with Writer.open(made) as writer:
        writer.compact(graph_rows=1)
    return made


@pytest.mark.parametrize("harm", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", ["rows.u64", "vectors.f16", "graph.usearch", "index.db"])
def test_each_damaged_file_is_told_with_what_to_run_and_code_1(
    graph: Path, gemb: Gemb, name: str, harm: str
) -> None:
    (path,) = graph.rglob(name)
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    done = gemb("index", "verify", "docs.gemb")
    if (name, harm) == ("index.db", "missing"):
        assert done.code == 2
        assert done.err.startswith("gemb: docs.gemb is no index: it has no index.db")
        assert gemb("search", "docs.gemb", "--like", "a") == done
        return
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("docs.gemb: damaged, ")
    assert "run gemb index rebuild docs.gemb\n" in done.err
    assert f"docs.gemb/{path.relative_to(graph)}: " in done.err
    assert "Traceback" not in done.err
    for arguments in (["search", "docs.gemb", "--like", "a"], ["index", "compact", "docs.gemb"]):
        done = gemb(*arguments)
        if arguments[0] == "index" and harm == "flipped" and name != "index.db":
            continue  # nothing is to be compacted, so nothing is read
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(f"gemb: docs.gemb/{path.relative_to(graph)} is ")
        assert done.err.endswith("; run gemb index verify docs.gemb, then gemb index rebuild docs.gemb\n")
