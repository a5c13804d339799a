"""docs/search.md: every example runs, in order."""

import doctest
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.indexes import needs_minilm

pytestmark = needs_minilm
PAGE = (ROOT / "docs/search.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gemb: Callable[..., Any]) -> None:
    monkeypatch.chdir(tmp_path)
    commands = 0
    for kind, name, content in BLOCKS:
        if kind == "jsonl":
            Path(name).write_text(content, "utf-8")
        elif kind == "python":
            test = doctest.DocTestParser().get_doctest(content, {}, "search.md", None, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        for line in content.splitlines() if kind == "sh" else ():
            if "|" in line:
                continue  # the next test
            done = gemb(*split(line)[1:])
            assert done.code == 0, f"{line}\n{done.err}"
            assert done.out or " index " in line or " embed " in line, line
            commands += 1
    assert commands >= 17


@pytest.mark.slow
def test_the_pipelines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gemb: Callable[..., Any]) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    monkeypatch.chdir(tmp_path)
    for _, name, content in BLOCKS:
        if name:
            Path(name).write_text(content, "utf-8")
    assert gemb("index", "docs.jsonl", "-o", "docs.gemb").code == 0
    alias = f'gemb() {{ PYTHONPATH={ROOT} {sys.executable} -m gemb "$@"; }}\nset -o pipefail\n'
    lines = [
        line for kind, _, content in BLOCKS if kind == "sh" for line in content.splitlines() if "|" in line
    ]
    for line in lines:
        done = subprocess.run(["bash", "-c", alias + line], capture_output=True, text=True, check=True)
        assert done.stdout, line
    assert len(lines) == 4
