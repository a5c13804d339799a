"""docs/eval.md: every example runs, in order."""

import doctest
import json
import re
from collections.abc import Callable
from pathlib import Path
from shlex import split

import numpy as np
import pytest

from gemb.evaluation.reading import KINDS
from gemb.evaluation.space import Space
from tests.conftest import ROOT, Finished
from tests.indexes import needs_minilm

pytestmark = needs_minilm
PAGE = (ROOT / "docs/eval.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gemb: Callable[..., Finished]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = 0
    for kind, name, content in BLOCKS:
        if kind == "jsonl":
            Path(name).write_text(content, "utf-8")
        elif kind == "python":
            test = doctest.DocTestParser().get_doctest(content, {}, "eval.md", None, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        for line in content.splitlines() if kind == "sh" else ():
            done = gemb(*split(line)[1:], "--threads", "1")
            assert done.code == 0, f"{line}\n{done.err}"
            assert json.loads(done.out)["results"], line
            commands += 1
    assert commands == 5
    assert Path("sizes.png").exists()


def test_the_page_names_every_task_and_every_number_of_a_space() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)) >= set(KINDS)
    numbers = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    space = Space("s", 1, 1, 0, 0, 0, 0, 0, np.ones(3), np.ones(3), np.ones((2, 2), np.float32))
    assert numbers >= set(space.as_json()) - {"data", "dims", "pairs"}
