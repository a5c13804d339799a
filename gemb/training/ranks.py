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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import orjson
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
        parameters = list(parameters)
        gradients = [parameter.grad for parameter in parameters]
        found = [0 if gradient is None else 2 if gradient.is_sparse else 1 for gradient in gradients]
        for parameter, gradient, kind in zip(parameters, gradients, self._most_of_each(found), strict=True):
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
        return here if self.count == 1 else bool(self._most_of_each([int(here)])[0])

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return value if self.count == 1 else -self._most_of_each([-value])[0]

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

    def broadcast(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        """Each part becomes what it is on the rank beside it; every rank must give the same ones in order."""
        if self.count == 1:
            return
        for sent in [dist.broadcast(part, owner, async_op=True) for owner, part in parts if part.numel()]:
            sent.wait()

    def collect(self, own: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What each rank gives, by name, on the CPU of the first one; the others get nothing."""
        if self.count == 1:
            return [dict(own)]
        about = [(name, str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in own.items()]
        listed = torch.from_numpy(np.frombuffer(orjson.dumps(about), np.uint8).copy()).to(self._device)
        lists = self._of_all(listed)
        if not self.is_first:
            for one in own.values():
                if one.numel():
                    dist.send(one.to(self._device).contiguous(), 0)
            return []
        found = [{name: one.cpu() for name, one in own.items()}]
        for index, listed in enumerate(lists[1:], 1):
            parts = {}
            for name, dtype, shape in orjson.loads(listed.cpu().numpy().tobytes()):
                part = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
                if part.numel():
                    dist.recv(part, index)
                parts[name] = part.cpu()
            found.append(parts)
        return found

    def _most_of_each(self, values: Sequence[int]) -> list[int]:
        """The largest of all ranks' values, one by one."""
        shared = torch.tensor(values, dtype=torch.int64, device=self._device)
        if values:
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [int(value) for value in shared.tolist()]

    def _of_all(self, own: Tensor) -> list[Tensor]:
        """own[n, ...] of every rank, whose n may differ."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
        most = max(int(size) for size in sizes)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def _sum_sparse(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """The sum of sparse gradients [V, D], as the rows of all ranks one after the other, coalesced."""
        if gradient is None:
            indices = torch.zeros(0, dtype=torch.int64, device=parameter.device)
            values = parameter.new_zeros(0, *parameter.shape[1:])
        else:
            own = gradient.coalesce()
            indices, values = own.indices()[0], own.values()
        joined, rows = torch.cat(self._of_all(indices)), torch.cat(self._of_all(values))
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
