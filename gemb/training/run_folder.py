"""Where a run keeps its state, and how the finished model takes its place.

    OUTPUT.partial/           while the run goes on
      job.json                what was asked for: recipe, model, data, versions
      memory.json             how batches are cut to fit the memory, found before the first step
      run/metrics.jsonl       a line for every step and evaluation
      run/report.html         the same as pictures, written anew with every checkpoint
      run/baseline.json       the scores before the first step
      run/checkpoints/        see gemb.training.checkpoints
      base/, data/            what was made on the spot: a first model, unpacked rows
    OUTPUT/                   when it is done: a model folder with its card, gemb.json and run/

OUTPUT appears at once, by one rename. A rerun reads job.json and goes on, or is refused with the differences.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemb.errors import GembError, MismatchError
from gemb.files import fsync_folder, os_errors_explained, read_json, write_json
from gemb.training.recipe import NOT_COMPARED

_VERSION = 1


class RunFolder:
    """The folders and files of one run, for an output."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.lock_file = output.with_name(output.name + ".lock")
        self.run = self.partial / "run"
        self.checkpoints = self.run / "checkpoints"
        self.metrics = self.run / "metrics.jsonl"
        self.report = self.run / "report.html"
        self.memory = self.partial / "memory.json"
        self.baseline = self.run / "baseline.json"
        self.tensorboard = self.run / "tensorboard"
        self.base = self.partial / "base"
        self.data = self.partial / "data"

    @property
    def is_finished(self) -> bool:
        """Whether the output is there, made by a run."""
        return (self.output / "gemb.json").is_file()

    @property
    def is_begun(self) -> bool:
        """Whether an unfinished run is there."""
        return (self.partial / "job.json").is_file()

    def make(self, *, overwrite: bool) -> None:
        """Make the folder of the run; `overwrite` allows an output that exists.

        Raises GembError if the output exists and is not to be overwritten.
        """
        if self.output.exists() and not overwrite and not self.is_finished:
            raise GembError(
                f"{self.output} exists and is no finished run; choose another output, or pass --overwrite"
            )
        with os_errors_explained(self.partial):
            self.run.mkdir(parents=True, exist_ok=True)

    def begin(self, request: Mapping[str, Any], *, overwrite: bool) -> None:
        """Note what is asked for, or compare it with what an earlier run of this folder was asked for.

        Another run is dropped with `overwrite`, and a GembError with the differences without (exit code 5 if
        they are only of the model).
        """
        file = self.partial / "job.json"
        if file.is_file():
            try:
                self.refuse_differences(read_json(file), request, f"{self.partial} holds another run")
            except GembError:
                if not overwrite:
                    raise
                with os_errors_explained(self.run):
                    file.unlink()
                    self.memory.unlink(missing_ok=True)
                    shutil.rmtree(self.run)
                    self.run.mkdir()
            else:
                return
        write_json(file, {"version": _VERSION, **request})

    def forget_another(self, recipe: Mapping[str, Any]) -> None:
        """Remove the first model that an unfinished run of another recipe made on the spot."""
        file = self.partial / "job.json"
        was = read_json(file).get("recipe", {}) if file.is_file() else recipe
        if any(not _is_free(key) and was.get(key) != recipe.get(key) for key in was.keys() | recipe.keys()):
            with os_errors_explained(self.base):
                shutil.rmtree(self.base, ignore_errors=True)

    def finished(self) -> dict[str, Any]:
        """What gemb.json of the output holds."""
        return read_json(self.output / "gemb.json")

    @staticmethod
    def refuse_differences(was: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
        """Raises GembError if two requests differ in what is learned."""
        if was.get("version") != _VERSION:
            raise GembError(f"{what}, written by another version of gemb; pass --overwrite to start anew")
        lines: list[str] = []
        parts: set[str] = set()
        for part in ("model", "recipe", "data"):
            old, new = dict(was.get(part, {})), dict(now.get(part, {}))
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key) and not (part == "recipe" and _is_free(key)):
                    name = key if part == "recipe" else f"{part} {key}"
                    lines.append(f"  {name} was {_shown(old.get(key))}, now {_shown(new.get(key))}")
                    parts.add(part)
        if lines:
            error = GembError(
                "\n".join([
                    f"{what}:",
                    *lines,
                    "give the same recipe to go on, another output, or --overwrite to start anew",
                ])
            )  # fmt: skip
            if parts == {"model"}:
                error.exit_code = MismatchError.exit_code
            raise error

    def finish(
        self, save: Callable[[Path], None], record: Mapping[str, Any], *, keep_checkpoints: bool
    ) -> None:
        """Put the output in place: the model that `save` writes, gemb.json of `record`, and the run's files.

        Killed at any moment, the output is the old one or the new one, and a rerun does this once more.
        """
        model = self.partial / "model"
        with os_errors_explained(self.output):
            shutil.rmtree(model, ignore_errors=True)
            save(model)
            ignored = None if keep_checkpoints else shutil.ignore_patterns("checkpoints")
            shutil.copytree(self.run, model / "run", ignore=ignored)
            write_json(model / "gemb.json", {"version": _VERSION, **record})
            fsync_folder(model)
            if self.output.exists():
                old = self.partial / "old"
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.output, old)
            os.rename(model, self.output)
            fsync_folder(self.output.parent)
            shutil.rmtree(self.partial, ignore_errors=True)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in NOT_COMPARED)


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)
