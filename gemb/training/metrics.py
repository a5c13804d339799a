"""metrics.jsonl: what every step and every evaluation measured, one JSON object a line.

A resumed run cuts the file where its checkpoint was written, so that no step stands in it twice.

    {"step": 12, "dataset": "docstrings", "loss": 2.31, "loss/contrastive": 2.31, "learning_rate": 2e-05, ...}
    {"step": 500, "eval/docstrings/nDCG@10": 0.61}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from gemb.errors import GembError
from gemb.files import os_errors_explained, sync_to_disk, write_fully


class Metrics:
    """The open file; `position` is its size in bytes, every line before it is on the disk after `sync`."""

    def __init__(
        self, path: Path, position: int = 0, also: Callable[[Mapping[str, object]], None] | None = None
    ) -> None:
        """`also` is given every line as well, for TensorBoard."""
        self.path = path
        self._also = also
        with os_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._descriptor, min(position, os.fstat(self._descriptor).st_size))
        self.position = min(position, os.fstat(self._descriptor).st_size)

    def write(self, values: Mapping[str, object]) -> None:
        """Add one line; a number that is not finite becomes null."""
        line = orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)
        with os_errors_explained(self.path):
            write_fully(self._descriptor, memoryview(line), self.position)
        self.position += len(line)
        if self._also is not None:
            self._also(values)

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        with os_errors_explained(self.path):
            sync_to_disk(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


@contextmanager
def tensorboard(folder: Path, step: int) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """What writes the lines it is given to `folder` for TensorBoard, after `step` steps of the run.

    Later steps of a run that was killed are hidden. Raises GembError if the package is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise GembError(
            "tensorboard is asked for, but the package is not installed: pip install 'gemb[train]'; "
            "run/metrics.jsonl and run/report.html need none"
        ) from error
    # Events of this step and later ones are of a run that did not get to save them.
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if name not in ("step", "tokens") and isinstance(value, int | float):
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, in order; a last line that was cut off is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield orjson.loads(line)
