"""safetensors files written tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemb.model.tensor_file import NewTensor, write_tensors
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
