"""The memory that training data take does not grow with their number."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import itertools, resource, sys
from pathlib import Path
from gemb.text.prompts import Prompts
from gemb.training.data_recipe import NO_PROMPTS, DataSet, MixtureSettings
from gemb.training.mixture import Mixture
from tests.training.test_mixture import tokeniser

path = Path(sys.argv[1])
data = [DataSet(path=str(path), prompts=NO_PROMPTS)]
options = {"tokeniser": tokeniser(), "prompts": Prompts({}, None), "cache": path.parent / "cache"}
with Mixture.open(data, MixtureSettings(), **options, pairs=64, seed=0) as mixture:
    for batch in itertools.islice(mixture, 200):
        assert batch.pairs == 64
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        '{{"anchor": "q{0} some words", "positive": "p{0} more words"}}',
        '{{"text": "t{0} words", "label": {1}}}',
    ],
    ids=["pairs", "labelled"],
)
def test_a_million_rows_take_the_memory_of_ten_thousand(row: str, tmp_path: Path) -> None:
    peaks = []
    for count in (10_000, 1_000_000):
        path = tmp_path / str(count) / "rows.jsonl"
        path.parent.mkdir()
        with path.open("w") as file:
            file.writelines(row.format(number, number % 50) + "\n" for number in range(count))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        peaks.append(int(done.stdout))
    # Two runs of the same job differ by less than 1 %.
    assert peaks[1] <= peaks[0] * 1.03
