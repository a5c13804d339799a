"""The demo: the docstrings of the Python standard library, embedded, indexed and searched.

Real texts that are on every machine with Python, in a fixed order, read from the sources and never run.
"""

import ast
import inspect
import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeAlias

import orjson

from gemb.errors import GembError, UnavailableError
from gemb.files import atomic_write, os_errors_explained
from gemb.jobs import index
from gemb.jobs.hits import Answer, write_table
from gemb.jobs.index import IndexRecipe
from gemb.jobs.search import Queries, Search, SearchRecipe
from gemb.report import Event, OnProgress, Report, ignore

DOCUMENTS = 5000
"""How many docstrings the demo reads; `everything` lifts the limit."""

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

QUESTIONS = (
    "hide what I type when asking for a password",
    "the middle value of a list of numbers",
    "take jobs from a queue in order of importance",
)
"""Asked in other words than those of the answers: getpass, statistics.median, queue.PriorityQueue."""

SHORTEST = 40
"""Characters; a shorter docstring says too little to be found by."""

# Tests and a whole development environment: not what people look for, and not on every machine.
_TESTS = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "idle_test"})
_NEVER = frozenset({"site-packages", "dist-packages", "__pycache__", "__phello__"})


@dataclass(frozen=True)
class Docstring:
    """One docstring; `name` is dotted (`json.decoder.JSONDecoder`) and unique."""

    name: str
    text: str


@dataclass(frozen=True)
class Demo:
    """What the demo has to say: an answer a question, and then what was done."""

    answers: list[Answer]
    summary: Report

    def write_answers(self, output: TextIO) -> None:
        """The answers for people, one table a question."""
        for answer in self.answers:
            write_table(answer, output)


def run(
    folder: Path = Path("demo"),
    on_progress: OnProgress = ignore,
    *,
    everything: bool = False,
    model: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> Demo:
    """Write, index and search the docstrings in `folder`; a second run finds the work done and only searches.

    Raises GembError as gemb.jobs.index does, and if this Python has no sources.
    """
    started = time.monotonic()
    name = "stdlib-all" if everything else "stdlib"
    documents, target = folder / f"{name}.jsonl", folder / f"{name}.gemb"
    count = _write(documents, everything, on_progress)
    # --prune: another version of Python has other docstrings.
    recipe = IndexRecipe(inputs=(str(documents),), output=target, model=model, offline=offline, prune=True)
    indexed = index.run(recipe, on_progress, overwrite=overwrite)
    indexed_at = time.monotonic()
    answers, each = _ask(SearchRecipe(indexes=(target,), model=model, offline=offline, k=3), on_progress)
    seconds = time.monotonic() - started
    rows = [
        *indexed.rows,
        ("search", f"{1000 * each:.1f} ms a question, embedded and searched for"),
        ("texts", str(documents)),
        ("index", str(target)),
        ("now you", f"{_program()} search {target} 'your own question'"),
    ]
    data = {
        **indexed.data,
        "documents": count,
        "index_seconds": round(indexed_at - started, 3),
        "seconds": round(seconds, 3),
        "answers": [{"query": answer.query, "hits": answer.hits()} for answer in answers],
    }
    done = "embedded and searched" if _has_changed(indexed) else "were embedded before; searched"
    summary = Report(
        title=f"{count:,} docstrings of Python {sys.version.split()[0]} {done} in {seconds:.0f} s",
        rows=rows,
        data=data,
        outputs=[documents, target],
        exit_code=indexed.exit_code,
    )
    return Demo(answers, summary)


def _program() -> str:
    """How a shell finds this gemb: by name, or after `make demo`, which puts it on no PATH, by its place."""
    script = Path(sys.executable).with_name("gemb")
    if shutil.which("gemb") is not None or not script.exists():
        return "gemb"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def _ask(recipe: SearchRecipe, on_progress: OnProgress) -> tuple[list[Answer], float]:
    """The answers to QUESTIONS, and the seconds that each took once the model was loaded."""
    with Search(recipe, on_progress) as search:
        search.load()
        started = time.monotonic()
        answers = [answer for question in QUESTIONS for answer in search.answer(Queries([question]))]
        return answers, (time.monotonic() - started) / len(QUESTIONS)


def _has_changed(indexed: Report) -> bool:
    """Whether this run embedded anything."""
    return bool(indexed.data.get("added") or indexed.data.get("changed"))


def docstrings(library: Path, *, everything: bool = False) -> Iterator[Docstring]:
    """The docstrings of modules, classes and functions below `library`, in a fixed order.

    Public names come first, by path and then by place in the file; then private ones; with `everything`
    also tests and idlelib. Names that occur twice get #2, #3 and so on.
    """
    seen: dict[str, int] = {}
    private: list[Docstring] = []
    for path in _sources(library, everything=everything):
        for found in _docstrings_of(path, library):
            seen[found.name] = seen.get(found.name, 0) + 1
            if seen[found.name] > 1:
                found = Docstring(f"{found.name}#{seen[found.name]}", found.text)
            if _is_public(found.name):
                yield found
            else:
                private.append(found)
    yield from private


def _write(target: Path, everything: bool, on_progress: OnProgress) -> int:
    """Write the documents and give their number; a file that would stay the same is left alone."""
    library = Path(sysconfig.get_path("stdlib"))
    lines: list[bytes] = []
    for found in docstrings(library, everything=everything):
        entry = {"id": found.name, "title": found.name, "text": found.text}
        lines.append(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        if len(lines) % 100 == 0:
            on_progress(Event("reading", len(lines), None if everything else DOCUMENTS, "docstrings"))
        if len(lines) == DOCUMENTS and not everything:
            break
    if not lines:
        raise UnavailableError(f"there are no Python sources in {library}; run the demo with another Python")
    content = b"".join(lines)
    if target.is_file() and target.read_bytes() == content:
        return len(lines)
    if target.exists() and not target.is_file():
        raise GembError(f"{target} is in the way; it is not a file")
    with os_errors_explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(content)
    return len(lines)


def _sources(library: Path, *, everything: bool) -> list[Path]:
    """The source files in a fixed order; tests stand last."""
    found = []
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        tests = bool(_TESTS.intersection(parts))
        if _NEVER.isdisjoint(parts) and (everything or not tests):
            found.append((tests, parts, path))
    return [path for _, _, path in sorted(found)]


def _docstrings_of(path: Path, library: Path) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes, which are not ours to mend
            module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # the standard library ships files that are broken on purpose, as input of its tests
    parts = list(path.relative_to(library).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    yield from _docstrings_in(module, ".".join(parts))


def _docstrings_in(node: ast.Module | Definition, name: str) -> Iterator[Docstring]:
    raw = ast.get_docstring(node, clean=False)
    text = inspect.cleandoc(raw).strip() if raw else ""
    # A lone surrogate cannot be written as UTF-8; the standard library has some in its tests.
    if len(text) >= SHORTEST and _encodes(text):
        yield Docstring(name, text)
    for child in _definitions(node):
        yield from _docstrings_in(child, f"{name}.{child.name}")


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """The classes and functions directly in `node`, those under `if` and `try` included, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(child)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_public(name: str) -> bool:
    """Whether no part of a dotted name is private; `__init__` and the like are public."""
    return not any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
