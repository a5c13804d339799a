"""The demo's docstrings: which, in what order, under what names; and the whole demo on real ones."""

import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemb.errors import GembError, UnavailableError
from gemb.jobs import demo
from gemb.jobs.demo import Demo, Docstring, docstrings

LONG = "It says enough to be found by what it means, and not only by its name."


METHOD = f'''def method(self):
    """{LONG}

    More.
    """
'''


def function(name: str) -> str:
    return f'def {name}():\n    """{LONG}"""\n'


def inside(block: str) -> str:
    return textwrap.indent(block, "    ")


def library(tmp_path: Path) -> Path:
    """A small library with everything that matters to the order."""
    files = {
        "b.py": f'"""{LONG}"""\n{function("later")}{function("_hidden")}',
        "a/__init__.py": f'"""{LONG}"""\n',
        "a/deep.py": f'class C:\n    """{LONG}"""\n{inside(METHOD)}',
        "c.py": f"try:\n    import x\nexcept OSError:\n{inside(function('f'))}else:\n{inside(function('f'))}",
        "d.py": 'def short():\n    """Too short."""\n',
        "broken.py": "def (:\n",
        "_e.py": f'"""{LONG}"""\n',
        "surrogate.py": f'"""{LONG} \\ud800"""\n',
        "test/t.py": f'"""{LONG}"""\n',
        "site-packages/s.py": f'"""{LONG}"""\n',
    }
    for name, content in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    return tmp_path / "lib"


def test_the_next_step_names_a_program_that_the_shell_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / ".venv" / "bin" / "gemb"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo._program() == ".venv/bin/gemb"
    monkeypatch.setenv("PATH", str(script.parent))
    assert demo._program() == "gemb"


def test_public_names_come_first_in_a_fixed_order(tmp_path: Path) -> None:
    found = list(docstrings(library(tmp_path)))
    assert [one.name for one in found] == [
        "a", "a.deep.C", "a.deep.C.method", "b", "b.later", "c.f", "c.f#2", "_e", "b._hidden",
    ]  # fmt: skip
    assert found[2] == Docstring("a.deep.C.method", f"{LONG}\n\nMore.")


def test_everything_adds_the_tests_but_never_installed_packages(tmp_path: Path) -> None:
    some, every = (list(docstrings(library(tmp_path), everything=one)) for one in (False, True))
    assert {one.name for one in every} - {one.name for one in some} == {"test.t"}


def test_the_standard_library_fills_the_demo() -> None:
    names = []
    for found in docstrings(Path(sysconfig.get_path("stdlib"))):
        names.append(found.name)
    assert len(names) >= 4000
    assert len(set(names)) == len(names)
    assert {"getpass.getpass", "statistics.median", "queue.PriorityQueue"} & set(names[: demo.DOCUMENTS]) == {
        "statistics.median",
        "queue.PriorityQueue",
    }  # getpass.getpass is getpass.unix_getpass by another name


# --- the demo itself


def top_answers(done: Demo) -> list[str]:
    answers = done.summary.data["answers"]
    assert isinstance(answers, list)
    return [answer["hits"][0]["id"] for answer in answers]


def test_a_second_run_embeds_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gemb: Callable[..., Any]
) -> None:
    monkeypatch.setattr(demo, "DOCUMENTS", 60)
    first = demo.run(tmp_path / "demo").summary
    assert first.title.startswith("60 docstrings of Python ")
    assert " embedded and searched in " in first.title
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("**/segments/*/*")}
    again = gemb("demo", "-o", tmp_path / "demo")
    assert again.code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The answers come first, what was done and what to do now stand at the end, next to the prompt.
    heads = [again.out.index(head) for head in (*demo.QUESTIONS, " were embedded before; searched in ")]
    assert heads == sorted(heads)
    assert again.out.splitlines()[-1].split(maxsplit=2)[:2] == ["now", "you"]


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        demo.run(tmp_path / "demo")
    assert str(caught.value) == (
        f"there are no Python sources in {tmp_path}; run the demo with another Python"
    )


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DOCUMENTS", 1)
    (tmp_path / "file").touch()
    with pytest.raises(GembError, match=rf"^cannot write {tmp_path}/file/demo: a part of the path is a file"):
        demo.run(tmp_path / "file/demo")


@pytest.mark.slow
def test_the_answers_of_the_whole_demo_are_right(tmp_path: Path) -> None:
    password, middle, queue = top_answers(demo.run(tmp_path / "demo"))
    assert password.startswith("getpass")
    assert (middle, queue) == ("statistics.median", "queue.PriorityQueue")
