"""Torch's random numbers as a value: kept, put back, and stored in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """The state of the CPU's generator, and of the device's where that has its own."""

    cpu: Tensor
    accelerator: Tensor | None
    device: str

    @classmethod
    def of(cls, device: str) -> Self:
        """The state now."""
        kind = torch.device(device).type
        own = None if kind == "cpu" else torch.get_device_module(kind).get_rng_state()
        return cls(torch.get_rng_state(), own, device)

    def restore(self) -> None:
        """The next random numbers are again those that followed when this state was taken."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(torch.device(self.device).type).set_rng_state(self.accelerator)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; `from_tensors` reads it back."""
        own = {} if self.accelerator is None else {"accelerator": self.accelerator}
        return {"cpu": self.cpu, **own}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: str) -> Self:
        """The state that `tensors` gave."""
        return cls(tensors["cpu"], tensors.get("accelerator"), device)


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """A block whose random numbers follow from `seed`; the caller's own go on after it as before it."""
    before = RandomState.of(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        before.restore()
