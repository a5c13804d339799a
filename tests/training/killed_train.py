"""`gemb train` as a process that ends itself somewhere: `killed_train.py PLACE COUNT train r.yaml -o out`.

PLACE: `step` is after a step, `chunk` in the middle of a step, `write` half through the bytes of a file of a
checkpoint, `rename` before a checkpoint gets its name, `place` before the model gets its own. COUNT is which
time. `chunk-term` sends SIGTERM in place of SIGKILL.
"""

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from gemb.model.trainable import TrainableEncoder
from gemb.training import checkpoints, loop, run_folder

torch.set_num_threads(1)
place, left = sys.argv[1], int(sys.argv[2])
number = signal.SIGTERM if place.endswith("-term") else signal.SIGKILL


def before(action: Callable[..., Any], *, half: bool = False) -> Callable[..., Any]:
    """The action, except that the process ends before it when it is called for the COUNT-th time."""

    def ending(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        global left
        left -= 1
        if left == 0:
            if half:
                path, tensors = arguments
                action(path, tensors)
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), number)
        return action(*arguments, **named)

    return ending


def replace(owner: object, name: str, *, half: bool = False) -> None:
    setattr(owner, name, before(getattr(owner, name), half=half))


match place.removesuffix("-term"):
    case "step":
        replace(loop.Training, "_after_step")
    case "chunk":
        replace(TrainableEncoder, "forward")
    case "write":
        replace(checkpoints, "save_tensors", half=True)
    case "rename":
        replace(checkpoints, "write_json")
    case "place":
        replace(run_folder, "write_json")
import_module("gemb.commands").main(sys.argv[3:])
