"""Every kind of export onto a disk that is really full, at different places of the work."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemb.engine.onnx_engine import write_cached_graph
from gemb.errors import MachineError
from gemb.jobs import quantize as job
from gemb.jobs.quantize import QuantizeRecipe
from gemb.model.folder import read_folder
from tests.gguf_models import gguf_folder

PAGE_BYTES = 4096
LARGE_BYTES = 64 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A folder, and the function that puts an empty disk of so many bytes there."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def unmount() -> None:
        # Models that were measured may still be mapped; the old disk goes when they do.
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)

    def mount(size_bytes: int) -> None:
        unmount()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")

    yield folder, mount
    unmount()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return gguf_folder(tmp_path / "source", "bert")


def used_bytes(folder: Path) -> int:
    """Of all files, in whole pages as the disk counts them."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("out", {"format": "int4"}),
        ("out", {"format": "mixed"}),
        ("out", {"format": "f32"}),
        ("out", {"onnx": "int8"}),
        ("out.gguf", {"gguf": "q8_0"}),
    ],
)
def test_a_full_disk_is_one_message_and_leaves_nothing(
    name: str,
    settings: dict[str, Any],
    source: Path,
    disk: tuple[Path, Callable[[int], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, mount = disk
    # Else what is free is asked for beforehand; here something else fills the disk meanwhile.
    monkeypatch.setattr(job, "check_writable", lambda *_: None)
    recipe = QuantizeRecipe(model=str(source), output=folder / name, threads=1, device="cpu", **settings)
    weights = job.plan(recipe).data["bytes"]
    assert isinstance(weights, int)
    mount(LARGE_BYTES)
    job.run(recipe)
    whole = used_bytes(folder)
    copied = used_bytes(source) - (source / "model.safetensors").stat().st_size
    # Among the copied files, among the weights, and at the record or the card, which come last.
    for size_bytes in (PAGE_BYTES, copied // 2, copied + weights // 2, whole - 2 * PAGE_BYTES):
        mount(size_bytes)
        with pytest.raises(MachineError, match=r"^cannot write .*: no space left \(.* free\); free some"):
            job.run(recipe)
        assert not list(folder.iterdir())


def test_a_full_disk_under_the_cache_of_graphs_leaves_none(
    source: Path, disk: tuple[Path, Callable[[int], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mount = disk
    monkeypatch.setenv("GEMB_CACHE", str(folder))
    model = read_folder(source)
    mount((source / "model.safetensors").stat().st_size // 2)
    with pytest.raises(MachineError, match=r"^cannot write .*: no space left"):
        write_cached_graph(model)
    assert not list((folder / "onnx").iterdir())
    mount(LARGE_BYTES)
    assert write_cached_graph(model).exists()
