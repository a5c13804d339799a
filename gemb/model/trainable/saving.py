"""A trained model as a folder: the files of its source, the weights anew.

Only what a model needs is taken along: the files at the top and those of the module folders. Weights in other
formats (pickles, ONNX, GGUF) and records of the making would be those of the source, so they stay behind.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from torch import Tensor

from gemb.errors import GembError
from gemb.files import atomic_write, fsync_folder, os_errors_explained, read_json, write_json
from gemb.model.folder import ModelFolder
from gemb.model.tensor_file import save_tensors
from gemb.model.weights import Weights

SavedDtype = Literal["float32", "source"]

_WEIGHT_ENDINGS = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".ot", ".gguf",
})  # fmt: skip
_INDEX = "model.safetensors.index.json"
_LEFT_BEHIND = frozenset({_INDEX, "adapt_report.json", "gemb.json"})


def save_folder(
    source: ModelFolder, values: Mapping[Path, Mapping[str, Tensor]], target: Path, dtype: SavedDtype
) -> None:
    """Write `target`, the folder of `source` with the tensors `values` by module folder and name.

    A tensor of the source that is not among them is copied. The weights are spread over files as in the
    source. Raises GembError if `target` exists or cannot be written; then nothing is left there.
    """
    with appearing(target) as place:
        for folder in {source.path, source.tokenizer_folder, *(module.folder for module in source.modules)}:
            copy_files(folder, place / folder.relative_to(source.path))
        for folder, tensors in values.items():
            _write_weights(Weights.read(folder), tensors, place / folder.relative_to(source.path), dtype)
        if dtype == "float32":
            _declare_fp32(place / source.transformer.folder.relative_to(source.path) / "config.json")


def save_backbone(source: Path, values: Mapping[str, Tensor], target: Path, dtype: SavedDtype) -> None:
    """`save_folder` of a folder of transformers, which has no modules: `values` are its tensors by name."""
    with appearing(target) as place:
        copy_files(source, place)
        _write_weights(Weights.read(source), values, place, dtype)
        if dtype == "float32":
            _declare_fp32(place / "config.json")


@contextmanager
def appearing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends well, and goes away otherwise.

    `overwrite` lets it take the place of a model that is there, which stays until then. What a writer of the
    same target left when it was killed is removed.

    Raises GembError if `target` exists and is not to be overwritten, or is no model.
    """
    check_absent(target, overwrite=overwrite)
    with unfinished(target) as place:
        replaced = place.with_suffix(".old")
        try:
            yield place
            if overwrite and target.exists():
                os.rename(target, replaced)  # a folder that holds something cannot be replaced at once
            os.replace(place, target)
        except BaseException:
            if replaced.exists() and not target.exists():
                os.rename(replaced, target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    fsync_folder(target.parent)


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to prepare it in, which goes away with the block unless it was moved.

    What a writer of the same target left when it was killed is removed.
    """
    place = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with os_errors_explained(target):
        _remove_remains(target)
        place.mkdir(parents=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a drive without locks; then only what is left there stays
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield place
        finally:
            os.close(descriptor)
            shutil.rmtree(place, ignore_errors=True)


def _remove_remains(target: Path) -> None:
    """Remove the folders of writers of `target` that were killed; that of a live one is locked and stays."""
    for place in target.parent.glob(f".{escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):  # it is held, or appeared meanwhile
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(descriptor)


def check_absent(target: Path, *, overwrite: bool = False, hint: str = "move it away") -> None:
    """Raises GembError if something is at `target` that a model may not take the place of; `hint` ends it."""
    if not target.is_symlink() and not target.exists():
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if not overwrite:
        raise GembError(f"{target} exists; choose another path for the model, or {hint}")
    if target.is_symlink() or not any((target / name).is_file() for name in ("modules.json", "config.json")):
        raise GembError(f"{target} is no model, so it is not overwritten; choose another path for the model")


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of one folder, but no weights, no record of how they were made, and nothing below it."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        if file.is_file() and file.suffix not in _WEIGHT_ENDINGS and file.name not in _LEFT_BEHIND:
            with atomic_write(target / file.name) as copy, file.open("rb") as original:
                shutil.copyfileobj(original, copy)


def _write_weights(weights: Weights, values: Mapping[str, Tensor], target: Path, dtype: SavedDtype) -> None:
    size_bytes = 0
    for file in weights.files:
        tensors = {}
        for name in weights:
            if weights.spec(name).file != file:
                continue
            original = weights.tensor(name)
            tensor = values.get(name, original)
            if original.is_floating_point():
                tensor = tensor.to("cpu", torch.float32 if dtype == "float32" else original.dtype)
            tensors[name] = tensor
            size_bytes += tensor.numel() * tensor.element_size()
        save_tensors(target / file.name, tensors)
    if len(weights.files) > 1:
        _write_index(weights, target / _INDEX, size_bytes)


def _write_index(weights: Weights, path: Path, size_bytes: int) -> None:
    index = orjson.loads((weights.folder / _INDEX).read_bytes())
    metadata = {**index.get("metadata", {}), "total_size": size_bytes}
    write_json(path, {"metadata": metadata, "weight_map": index["weight_map"]})


def _declare_fp32(path: Path) -> None:
    """Let config.json say what dtype the weights have now; transformers loads them so."""
    config = read_json(path)
    if _declare_fp32_in(config):
        write_json(path, config)


def _declare_fp32_in(config: dict[str, Any]) -> bool:
    """The same at every depth: an encoder-decoder has a part for each tower; says whether it changed."""
    changed = False
    for key, value in config.items():
        if isinstance(value, dict):
            changed |= _declare_fp32_in(value)
        elif key in ("dtype", "torch_dtype") and value not in (None, "float32"):
            config[key] = "float32"
            changed = True
    return changed
