"""safetensors files written tensor by tensor."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemb.errors import MachineError
from gemb.model.tensor_file import NewTensor, save_tensors, write_tensors
from gemb.model.weights import read_header


def test_safetensors_loads_what_was_written_in_blocks(tmp_path: Path) -> None:
    codes, matrix = torch.arange(15, dtype=torch.uint8).view(3, 5), torch.randn(7, 4)
    half = torch.randn(3).bfloat16()
    heard: list[str] = []
    write_tensors(
        tmp_path / "m.safetensors",
        [
            NewTensor("codes", "U8", (3, 5), lambda: [codes]),
            NewTensor("matrix", "F32", (7, 4), lambda: torch.split(matrix, 3)),
            NewTensor("half", "BF16", (3,), lambda: [half]),
            NewTensor("scale", "F32", (), lambda: [torch.tensor(0.5)]),
        ],
        heard.append,
    )
    loaded = load_file(tmp_path / "m.safetensors")
    for name, tensor in (("codes", codes), ("matrix", matrix), ("half", half), ("scale", torch.tensor(0.5))):
        assert torch.equal(loaded[name], tensor)
    assert heard == ["matrix", "scale", "half", "codes"]  # wide ones first, so that each is aligned
    for spec in read_header(tmp_path / "m.safetensors").values():
        assert spec.start % {"F32": 4, "BF16": 2, "U8": 1}[spec.dtype] == 0


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path: Path) -> None:
    short = NewTensor("short", "F32", (4,), lambda: [torch.ones(3)])
    with pytest.raises(ValueError, match=r"^short was announced as \(4,\), but has 12 bytes$"):
        write_tensors(tmp_path / "m.safetensors", [short], lambda name: None)
    assert not list(tmp_path.iterdir())


def test_tensors_of_any_dtype_and_layout_are_saved_as_they_are(tmp_path: Path) -> None:
    grown = torch.randn(3, 4, requires_grad=True)
    tensors = {
        "turned": grown.T,
        "half": torch.randn(5).bfloat16(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "state": torch.randint(0, 255, (9,), dtype=torch.uint8),
        "exact": torch.randn(2, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "m.safetensors"
    save_tensors(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())
    first = path.read_bytes()
    save_tensors(path, dict(reversed(tensors.items())))
    assert path.read_bytes() == first


def test_a_file_of_tensors_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "m.safetensors", {"one": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_one_message_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemb.files.sync_to_disk", full)
    path = tmp_path / "m.safetensors"
    with pytest.raises(MachineError, match=f"cannot write {path}: no space left "):
        save_tensors(path, {"one": torch.ones(1)})
    assert not list(tmp_path.iterdir())
