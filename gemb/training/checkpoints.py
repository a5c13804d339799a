"""Checkpoints: folders that appear whole or not at all, and give back a run to the bit.

    checkpoints/step-00000120/
      weights.safetensors     the model's parameters, fp32
      optimizer.safetensors   the optimizer's tensors
      state.json              all else: step, place in the data, random numbers, and the files' checksums

A checkpoint is written under a name that begins with a dot and renamed when it is on the disk, so a process
that is killed at any moment leaves the one before it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gemb.errors import GembError, MachineError
from gemb.files import (
    file_digest,
    fsync_folder,
    os_errors_explained,
    read_json,
    write_json,
)
from gemb.model.tensor_file import save_tensors

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one run, in `folder`; at most `keep` of the newest stay, and the best one."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: int | None = None,
    ) -> Path:
        """Write the checkpoint of `step` unless it is there; remove those neither new nor of the `best` step.

        `tensors` are the files by name (`weights`), each with its tensors by name; `state` is what JSON
        holds.

        Raises MachineError where the disk is full or a weight is not finite; the checkpoints before stay.
        """
        for name, tensor in tensors.get("weights", {}).items():
            if not bool(torch.isfinite(tensor).all()):
                raise MachineError(
                    f"the weight {name} is not finite at step {step:,}, so no checkpoint was written; "
                    "start again from the last one with a smaller learning_rate"
                )
        target = self.path(step)
        if target.is_dir():  # the same step of the same run is the same to the bit
            return target
        draft = self.folder / f".{target.name}.partial"
        with os_errors_explained(target):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        try:
            files = {f"{name}.safetensors": parts for name, parts in tensors.items()}
            for name, parts in files.items():
                save_tensors(draft / name, parts)
            digests = {name: file_digest(draft / name, "blake2b") for name in files}
            write_json(draft / STATE, {**state, "step": step, "files": digests})
            with os_errors_explained(target):
                fsync_folder(draft)
                os.rename(draft, target)
                fsync_folder(self.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self._remove_old(step, best)
        return target

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self.folder / f"step-{step:08d}"

    def state(self, step: int) -> dict[str, Any]:
        """What state.json of a step holds. Raises GembError if it is damaged."""
        return read_json(self.path(step) / STATE)

    def tensors(self, step: int, name: str) -> dict[str, Tensor]:
        """The tensors of one file of a step, checked.

        Raises GembError if the file is not as it was written, or a weight is not finite.
        """
        path = self.path(step) / f"{name}.safetensors"
        expected = self.state(step).get("files", {}).get(path.name)
        if not path.is_file() or file_digest(path, "blake2b") != expected:
            raise GembError(
                f"{path}: not as it was written; remove {path.parent}, and the run goes on from the "
                "checkpoint before it"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise GembError(f"{path}: {str(error).lower()}") from error
        if name == "weights":
            for key, tensor in tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise GembError(
                        f"{path}: {key} holds NaN or infinity; remove {path.parent}, and the run goes on "
                        "from the checkpoint before it"
                    )
        return tensors

    def _remove_old(self, newest: int, best: int | None) -> None:
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)


def flatten_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """A state dict as (tensors by dotted path, the rest as JSON values); `restore_state` joins them again."""
    tensors: dict[str, Tensor] = {}

    def split(value: Any, path: str) -> Any:  # noqa: ANN401  # whatever an optimizer keeps
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"items": [[key, split(item, f"{path}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            listed = [split(item, f"{path}.{index}".lstrip(".")) for index, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": listed}
        return {"value": value}

    return tensors, split(state, "")


def restore_state(tensors: Mapping[str, Tensor], layout: Any) -> Any:  # noqa: ANN401
    """What `flatten_state` took apart, on the CPU."""
    kind, value = next(iter(layout.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {key: restore_state(tensors, item) for key, item in value}
    if kind in ("list", "tuple"):
        listed = [restore_state(tensors, item) for item in value]
        return listed if kind == "list" else tuple(listed)
    return value
