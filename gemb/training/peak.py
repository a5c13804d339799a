"""How much of what the processor can do a training does: floating-point work a second, against its products.

The work of a token is 6 operations for each number of the matrices (2 forward, 4 backward; PaLM, arXiv
2204.02311, appendix B). Attention scores, norms and the token table are left out, and so is what is computed
twice, so the share says how fast the model learns and not how busy the processor is.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable

import orjson
import torch
from torch import nn

from gemb.device import Device, processor
from gemb.model.hub import cache_folder
from gemb.quantization.roles import role_of

_SIDE = 768
"""Of the product that is timed: a common width of models, and small enough to take milliseconds."""
_SECONDS = 0.25


def work_of_a_token(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Operations that training on one token takes, for the parameters of a model by name."""
    matrices = (
        one.numel() for name, one in parameters if role_of(name, one.shape) not in (None, "embedding")
    )
    return 6 * sum(matrices)


def matrix_peak(device: Device) -> float | None:
    """Operations a second of products of matrices on `device`, in its precision; None off the processor.

    Measured for a quarter of a second, and remembered in the user's cache by processor, threads and torch.
    """
    if device.kind != "cpu":
        return None
    key = [str(processor()), str(device.threads), device.precision, torch.__version__]
    place = cache_folder() / "peaks" / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()}.json"
    try:
        known = orjson.loads(place.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        known = None
    if isinstance(known, float) and known > 0:
        return known
    peak = _measured(device)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(orjson.dumps(peak))
        unfinished.replace(place)
    except OSError:
        return peak  # the next run measures it once more
    return peak


def _measured(device: Device) -> float:
    """The best of all products within the time: what disturbs one makes it slower, never faster."""
    dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(_SIDE, _SIDE, generator=generator).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best
