"""The processes that train one model together, as torchrun starts them; alone, one rank of one.

Every rank reads the same batches and encodes its share of the rows. The vectors of all ranks are gathered
without a graph, so that each rank computes the whole loss and with it the gradient of every vector; each
sends those of its own rows back through its encoder, and the parameters' gradients are summed. That is
method (b) of GradCache across devices (arXiv 2101.06983) for any loss: nothing is approximated, and no
factor of the number of ranks is left over.

R rows of the batch, D model width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from gemb.errors import GembError


class Ranks:
    """This process among `count` equal ones; `index` 0 writes the files. Works without torch.distributed."""

    def __init__(self, index: int = 0, count: int = 1, device: str = "cpu") -> None:
        self.index = index
        self.count = count
        self._device = device  # where what is sent has to be

    @property
    def is_first(self) -> bool:
        """Whether this process writes and talks."""
        return self.index == 0

    def rows(self, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """The rows that this rank encodes, ascending; every rank gets about as many tokens.

        The rows are dealt out from the longest to the shortest, back and forth.
        """
        if self.count == 1:
            return np.arange(len(lengths), dtype=np.int64)
        order = np.argsort(-lengths.astype(np.int64), kind="stable")
        place = np.arange(len(order)) % (2 * self.count)
        turn = np.minimum(place, 2 * self.count - 1 - place)
        return np.sort(order[turn == self.index])

    def gather(self, own: Tensor, lengths: NDArray[np.int32]) -> Tensor:
        """[R, D] of all ranks from the `own` rows of each, in the order of the batch; without a graph."""
        if self.count == 1:
            return own.detach()
        shares = [Ranks(index, self.count).rows(lengths) for index in range(self.count)]
        most = max(len(share) for share in shares)
        padded = own.new_zeros(most, own.shape[1])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        whole = own.new_empty(len(lengths), own.shape[1])
        for share, part in zip(shares, parts, strict=True):
            whole[torch.from_numpy(share).to(own.device)] = part[: len(share)]
        return whole

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the ranks; where one rank has none, it counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            gradient = parameter.grad
            kind = self._most(0 if gradient is None else 2 if gradient.is_sparse else 1)
            if kind == 0:
                continue
            if kind == 2:
                parameter.grad = self._sum_sparse(parameter, gradient)
                continue
            if gradient is None:
                gradient = parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(gradient)

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank; every rank must ask."""
        return here if self.count == 1 else bool(self._most(int(here)))

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return value if self.count == 1 else -self._most(-value)

    def first(self, value: float) -> float:
        """The value of the first rank, on all of them."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.broadcast(shared, 0)
        return float(shared)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of the values of all ranks, one by one; every rank must give as many."""
        if self.count == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(shared)
        return [float(value) for value in shared]

    def wait(self) -> None:
        """Returns when every rank is here."""
        if self.count > 1:
            dist.barrier()

    def _most(self, value: int) -> int:
        flag = torch.tensor(value, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def _sum_sparse(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """The sum of sparse gradients [V, D], as the rows of all ranks one after the other, coalesced."""
        if gradient is None:
            indices = torch.zeros(0, dtype=torch.int64, device=parameter.device)
            values = parameter.new_zeros(0, *parameter.shape[1:])
        else:
            own = gradient.coalesce()
            indices, values = own.indices()[0], own.values()
        counts = [torch.zeros(1, dtype=torch.int64, device=indices.device) for _ in range(self.count)]
        dist.all_gather(counts, torch.tensor([len(indices)], device=indices.device))
        most = max(int(count) for count in counts)
        all_indices = [indices.new_zeros(most) for _ in counts]
        all_values = [values.new_zeros(most, *values.shape[1:]) for _ in counts]
        dist.all_gather(all_indices, _padded(indices, most))
        dist.all_gather(all_values, _padded(values, most))
        sizes = [int(count) for count in counts]
        joined = torch.cat([part[:size] for part, size in zip(all_indices, sizes, strict=True)])
        rows = torch.cat([part[:size] for part, size in zip(all_values, sizes, strict=True)])
        return torch.sparse_coo_tensor(joined[None], rows, tuple(parameter.shape)).coalesce()


@contextmanager
def ranks_of_environment(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun announces in RANK and WORLD_SIZE; one alone where it does not.

    Joins the process group for the block: gloo on a CPU, nccl on GPUs, of which `device` is this rank's.
    Raises GembError if the variables are no numbers.
    """
    index, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise GembError(f"RANK={index} and WORLD_SIZE={count} are no rank and number of ranks; use torchrun")
    if int(count) == 1:
        yield Ranks()
        return
    on_gpu = device.startswith("cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device(device) if on_gpu else None)
    try:
        yield Ranks(int(index), int(count), device if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


def _padded(part: Tensor, rows: int) -> Tensor:
    whole = part.new_zeros(rows, *part.shape[1:])
    whole[: len(part)] = part
    return whole
