"""A run's folder is compared with what is asked for, and the output takes its place at once."""

from pathlib import Path
from typing import Any

import pytest

from gemb.errors import Exit, GembError
from gemb.training.run_folder import RunFolder

REQUEST: dict[str, Any] = {
    "recipe": {"steps": 5, "threads": 1, "checkpoint.every": 3, "checkpoint.result": "last"},
    "model": {"name": "base", "fingerprint": "aaa"},
    "data": {"pairs": "111"},
    "versions": {"torch": "1"},
}


def changed(part: str, **values: object) -> dict[str, Any]:
    """The request with some keys of a part changed; `__` in a name is a dot."""
    own = {name.replace("__", "."): value for name, value in values.items()}
    return {**REQUEST, part: {**REQUEST[part], **own}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "out")
    made.make(overwrite=False)
    made.begin(REQUEST, overwrite=False)
    return made


def test_the_same_request_goes_on(folder: RunFolder) -> None:
    (folder.run / "metrics.jsonl").write_text("{}\n", "utf-8")
    folder.begin(REQUEST, overwrite=False)
    folder.begin(REQUEST, overwrite=True)
    assert (folder.run / "metrics.jsonl").exists()


def test_what_changes_nothing_that_is_learned_may_differ(folder: RunFolder) -> None:
    folder.begin(changed("recipe", threads=8, checkpoint__every=100), overwrite=False)
    folder.begin(changed("versions", torch="2"), overwrite=False)


def test_every_difference_is_told(folder: RunFolder) -> None:
    other = {**changed("recipe", steps=6, checkpoint__result="best"), "data": {"pairs": "222", "more": "3"}}
    with pytest.raises(GembError) as error:
        folder.begin(other, overwrite=False)
    assert str(error.value) == (
        f"{folder.partial} holds another run:\n"
        "  checkpoint.result was last, now best\n"
        "  steps was 5, now 6\n"
        "  data more was not set, now 3\n"
        "  data pairs was 111, now 222\n"
        "give the same recipe to go on, another output, or --overwrite to start anew"
    )
    assert error.value.exit_code == Exit.USAGE


def test_another_model_is_a_mismatch(folder: RunFolder) -> None:
    with pytest.raises(GembError, match="model fingerprint was aaa, now bbb") as error:
        folder.begin(changed("model", fingerprint="bbb"), overwrite=False)
    assert error.value.exit_code == Exit.MISMATCH


def test_overwrite_drops_another_run_and_nothing_of_the_same(folder: RunFolder) -> None:
    (folder.run / "metrics.jsonl").write_text("{}\n", "utf-8")
    folder.begin(changed("recipe", steps=6), overwrite=True)
    assert not (folder.run / "metrics.jsonl").exists()
    folder.begin(changed("recipe", steps=6), overwrite=False)


def save(target: Path) -> None:
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights")


def test_the_output_appears_whole_and_the_rest_goes(folder: RunFolder) -> None:
    folder.checkpoints.mkdir()
    (folder.run / "metrics.jsonl").write_text("{}\n", "utf-8")
    folder.finish(save, {**REQUEST, "steps": 5}, keep_checkpoints=False)
    assert folder.is_finished
    assert not folder.partial.exists()
    assert sorted(path.name for path in folder.output.iterdir()) == ["gemb.json", "model.safetensors", "run"]
    assert [path.name for path in (folder.output / "run").iterdir()] == ["metrics.jsonl"]
    assert folder.finished()["steps"] == 5


def test_an_output_that_is_replaced_stays_until_the_new_one_is_whole(folder: RunFolder) -> None:
    folder.finish(save, {**REQUEST, "steps": 5}, keep_checkpoints=False)
    again = RunFolder(folder.output)
    again.make(overwrite=True)
    again.begin(REQUEST, overwrite=True)

    def failing(target: Path) -> None:
        save(target)
        raise OSError(28, "No space left on device")

    with pytest.raises(GembError, match="no space left"):
        again.finish(failing, REQUEST, keep_checkpoints=False)
    assert again.finished()["steps"] == 5
    again.finish(save, {**REQUEST, "steps": 6}, keep_checkpoints=True)
    assert again.finished()["steps"] == 6


def test_a_request_of_another_version_is_told(folder: RunFolder) -> None:
    (folder.partial / "job.json").write_text('{"version": 0}', "utf-8")
    with pytest.raises(GembError) as error:
        folder.begin(REQUEST, overwrite=False)
    assert str(error.value) == (
        f"{folder.partial} holds another run, written by another version of gemb; "
        "pass --overwrite to start anew"
    )
