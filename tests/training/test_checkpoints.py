"""Checkpoints are whole or absent, and give back what was put in to the bit."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemb.errors import Exit, GembError, MachineError
from gemb.training.checkpoints import Checkpoints, flatten_state, restore_state


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"table": torch.full((4, 3), value), "norm": torch.arange(3.0)}


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> None:
    checkpoints.save(step, {"weights": weights(step)}, {"tokens": step * 10}, best)


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    tensors = {"weights": weights(0.1), "optimizer": {"0.exp_avg": torch.randn(5)}}
    checkpoints.save(7, tensors, {"position": {"row": 3}})
    assert checkpoints.steps() == [7]
    assert checkpoints.state(7)["position"] == {"row": 3}
    for name, expected in tensors.items():
        found = checkpoints.tensors(7, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_newest_and_the_best_checkpoint_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        save(checkpoints, step, best=10)
    assert checkpoints.steps() == [10, 30, 40]
    save(checkpoints, 50, best=50)
    assert checkpoints.steps() == [40, 50]


def test_a_draft_of_a_killed_run_is_no_checkpoint_and_is_written_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    draft = tmp_path / ".step-00000005.partial"
    draft.mkdir()
    (draft / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == []
    save(checkpoints, 5)
    assert checkpoints.steps() == [5]
    assert not draft.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_found(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    path = checkpoints.path(5) / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "flip" else bytes(content[:-4]))
    with pytest.raises(GembError) as error:
        checkpoints.tensors(5, "weights")
    assert str(error.value) == (
        f"{path}: not as it was written; remove {path.parent}, "
        "and the run goes on from the checkpoint before it"
    )


def test_nan_in_a_checkpoint_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "isfinite", torch.ones_like)  # as a version without the check would write it
        checkpoints.save(5, {"weights": {"norm": torch.tensor([1.0, float("nan")])}}, {})
    with pytest.raises(GembError, match=r"norm holds NaN or infinity; remove .*step-00000005, and"):
        checkpoints.tensors(5, "weights")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    with pytest.raises(MachineError) as error:
        checkpoints.save(6, {"weights": {"norm": torch.tensor([1.0, float("inf")])}}, {})
    assert str(error.value) == (
        "the weight norm is not finite at step 6, so no checkpoint was written; "
        "start again from the last one with a smaller learning_rate"
    )
    assert checkpoints.steps() == [5]


@pytest.mark.faults
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    big = {"weights": {"table": torch.zeros(300_000)}}
    with pytest.raises(MachineError) as error:
        with_file_limit(500_000, lambda: checkpoints.save(6, big, {}))
    assert error.value.exit_code == Exit.FAILED
    assert "cannot write" in str(error.value)
    assert "run the same command again" in str(error.value)
    assert checkpoints.steps() == [5]
    assert list(tmp_path.iterdir()) == [checkpoints.path(5)]
    assert torch.equal(checkpoints.tensors(5, "weights")["table"], torch.full((4, 3), 5.0))


def with_file_limit(size: int, action: Callable[[], object]) -> None:
    """Run `action` while no file may grow past `size` bytes."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_state_of_an_optimizer_is_restored_to_the_bit() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors, layout = flatten_state(optimizer.state_dict())
    import orjson

    again = restore_state(tensors, orjson.loads(orjson.dumps(layout)))
    assert again["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(again["state"][index][key], value)
