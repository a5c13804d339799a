"""The learning rate over a run, as a share of its largest."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant"]


def schedule(name: ScheduleName, *, warmup: float = 0.0, floor: float = 0.0) -> Callable[[float], float]:
    """The rate's share of its largest, by the share of the run that is done; both 0 to 1.

    It rises from 0 in a line over the first `warmup` of the run, then falls to `floor` along a cosine, in a
    line, or stays (`constant`, which knows no floor).

    Raises ValueError for a warm-up that is no share below 1, or a floor that is none up to 1.
    """
    if not 0 <= warmup < 1 or not 0 <= floor <= 1:
        raise ValueError(f"warmup {warmup} and floor {floor} are shares: 0 <= warmup < 1, 0 <= floor <= 1")

    def rate(done: float) -> float:
        if done < warmup:
            return done / warmup
        left = 1 - min(1.0, (done - warmup) / (1 - warmup))
        match name:
            case "constant":
                return 1.0
            case "linear":
                return floor + (1 - floor) * left
            case "cosine":
                return floor + (1 - floor) * (1 - math.cos(math.pi * left)) / 2

    return rate
