import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Finished
from tests.evaluation.test_retrieval import write_beir

Gemb = Callable[..., Finished]


def test_a_pipe_gets_one_json_object(gemb: Gemb, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "sea")
    done = gemb("eval", "minilm", folder, "--dims", "384,64", "--threads", "1", "-q")
    assert (done.code, done.err) == (0, "")
    results = json.loads(done.out)["results"]
    assert (results[0]["dims"], results[0]["value"]) == (384, 1.0)


def test_sizes_and_types_that_are_none_are_told(gemb: Gemb, tmp_path: Path) -> None:
    done = gemb("eval", "minilm", tmp_path, "--dims", "384,big")
    assert done.code == 2
    assert "--dims" in done.err
    assert "'big'" in done.err
    done = gemb("eval", "minilm", tmp_path, "--dtype", "f32,int3")
    assert done.code == 2
    assert "'int3'" in done.err


def test_a_metric_under_its_bound_ends_with_8(gemb: Gemb, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "sea")
    done = gemb("eval", "minilm", folder, "--threads", "1", "--fail-under", "nDCG@10", "1.5", "-q")
    assert done.code == 8
    assert json.loads(done.out)["exit_code"] == 8
