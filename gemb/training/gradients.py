"""The gradient of one batch, exactly, within the memory that there is.

A loss looks at the vectors of a whole batch at once. Where the graphs of all chunks fit the memory budget
they are kept, and every text is encoded once; where they do not, this is GradCache (arXiv 2101.06983):
encode without graphs, take the gradient of the loss at the vectors, encode chunk by chunk again with the
same random numbers, and send each chunk's gradient back. Both give the same gradients.

R rows (texts), T packed tokens, D model width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemb.device import is_out_of_memory
from gemb.errors import MachineError
from gemb.training.batches import TrainingBatch
from gemb.training.random_numbers import RandomState
from gemb.training.ranks import Ranks


class PackedEncoder(Protocol):
    """What the loop asks of a model: packed tokens in, one vector a row out, in the order of the rows."""

    def __call__(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """[R, D] of ids[T], lengths[R] and prompt_tokens[R]."""
        ...


LossFunction = Callable[[Tensor], tuple[Tensor, Mapping[str, float]]]
"""(loss, its terms by name) of the vectors [R, D] of a batch."""


class BatchLoss(Protocol):
    """The loss of one batch."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What was counted when it was called last, by name."""
        ...

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """A `LossFunction`."""
        ...


class LossOfVectors(Protocol):
    """A loss that looks at the vectors of a whole batch."""

    def of(self, batch: TrainingBatch) -> BatchLoss:
        """The loss of this batch."""
        ...

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Those of the loss itself."""
        ...


class Stopped(Exception):  # no error: the step was left because someone asked for it
    """The step was left in the middle; nothing of it counts."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a batch is cut, found before the first step and kept in the checkpoints: sums depend on it."""

    tokens_per_chunk: int
    """Tokens encoded at once; a longer text is a chunk of its own."""
    tokens_with_graph: int
    """Most tokens of a batch whose graphs are all kept; a batch with more is encoded twice."""

    def halved(self) -> MemoryPlan:
        """The plan after memory ran out: half the chunk, and no more kept than one of them."""
        chunk = self.tokens_per_chunk // 2
        return replace(self, tokens_per_chunk=chunk, tokens_with_graph=min(self.tokens_with_graph, chunk))


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a step found out; the gradients themselves are at the parameters."""

    loss: float
    terms: Mapping[str, float]
    encoded_twice: bool
    measures: Mapping[str, object] = field(default_factory=dict)
    """What metrics.jsonl says of the step besides."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What is added up over the run, by name."""


def chunks(lengths: NDArray[np.int32], tokens_per_chunk: int) -> list[NDArray[np.int64]]:
    """The rows in chunks of at most so many tokens, longest rows first; a longer text stands alone."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    found: list[NDArray[np.int64]] = []
    start = tokens = 0
    for place, row in enumerate(order):
        if place > start and tokens + int(lengths[row]) > tokens_per_chunk:
            found.append(order[start:place])
            start, tokens = place, 0
        tokens += int(lengths[row])
    if start < len(order):
        found.append(order[start:])
    return found


def batch_gradients(
    encoder: PackedEncoder,
    parameters: Sequence[Tensor],
    batch: TrainingBatch,
    loss_of: LossFunction,
    plan: MemoryPlan,
    *,
    loss_parameters: Sequence[nn.Parameter] = (),
    device: str = "cpu",
    ranks: Ranks | None = None,
    stop: threading.Event | None = None,
) -> Gradients:
    """Add the gradient of the batch's loss to the `grad` of each parameter, summed over all ranks.

    `loss_parameters` are those of the loss itself, such as a map to a teacher's space. Every rank computes
    the whole loss, so that theirs are not summed.

    The random numbers that were drawn, as for dropout, are those of one pass over the chunks.

    Raises Stopped between two chunks once `stop` is set on any rank, MemoryError where a chunk does not fit
    the memory of any rank; the gradients then hold parts, and must be cleared.
    """
    ranks = ranks or Ranks()
    rows = ranks.rows(batch.lengths)
    texts = _Texts(batch, device)
    cut = [rows[chosen] for chosen in chunks(batch.lengths[rows], plan.tokens_per_chunk)]
    twice = int(batch.lengths[rows].sum()) > plan.tokens_with_graph
    kept: list[Tensor] = []
    states: list[RandomState] = []
    with together(ranks):
        for chunk in cut:
            if stop is not None and stop.is_set():
                raise Stopped
            states.append(RandomState.of(device))
            with torch.set_grad_enabled(not twice):
                kept.append(encoder(*texts.of(chunk)))
    vectors = _in_order(kept, cut, rows)
    leaf = ranks.gather(vectors, batch.lengths).requires_grad_()
    loss, terms = loss_of(leaf)
    gradient = torch.zeros_like(leaf)
    of_the_loss: Sequence[Tensor] = ()
    if loss.requires_grad:  # a loss of nothing, as of one pair without negatives, has no gradient
        gradient, *of_the_loss = torch.autograd.grad(
            loss, [leaf, *loss_parameters], allow_unused=True, materialize_grads=True
        )
    after = RandomState.of(device)
    with together(ranks):
        for number, chunk in enumerate(cut):
            if stop is not None and stop.is_set():
                raise Stopped
            part = kept[number]
            if twice:
                states[number].restore()
                part = encoder(*texts.of(chunk))
            if part.requires_grad:
                own = gradient[torch.from_numpy(chunk).to(leaf.device)]
                torch.autograd.backward(part, own.to(part.dtype))
            kept[number] = part.detach()  # its graph is done with
    after.restore()
    ours = {id(parameter) for parameter in loss_parameters}
    ranks.sum_gradients([parameter for parameter in parameters if id(parameter) not in ours])
    for parameter, value in zip(loss_parameters, of_the_loss, strict=False):
        parameter.grad = value if parameter.grad is None else parameter.grad + value
    return Gradients(float(loss.detach()), terms, twice)


@dataclass(frozen=True, slots=True)
class EmbeddingGradients:
    """Gradients of a loss of vectors, for the loop: `batch_gradients` with the parts that stay the same."""

    encoder: PackedEncoder
    parameters: Sequence[nn.Parameter]
    loss: LossOfVectors
    device: str = "cpu"
    ranks: Ranks = field(default_factory=Ranks)
    standing_in: Callable[[], AbstractContextManager[Sequence[Tensor]]] = lambda: nullcontext(())
    """What the encoder computes with in place of parameters for one batch, at which their gradients are left
    until the block ends."""

    def __call__(self, batch: TrainingBatch, step: int) -> Callable[[MemoryPlan, threading.Event], Gradients]:
        """The computation of a batch; every step does the same."""
        del step
        loss_of = self.loss.of(batch)

        def compute(plan: MemoryPlan, stop: threading.Event) -> Gradients:
            with self.standing_in() as stand_ins:
                found = batch_gradients(
                    self.encoder,
                    [*self.parameters, *stand_ins],
                    batch,
                    loss_of,
                    plan,
                    loss_parameters=self.loss.parameters,
                    device=self.device,
                    ranks=self.ranks,
                    stop=stop,
                )
            return replace(found, counts=loss_of.counts)

        return compute


def graph_bytes(
    encoder: PackedEncoder,
    parameters: Sequence[Tensor],
    lengths: NDArray[np.int32],
    token: int = 0,
    device: str = "cpu",
) -> int:
    """Bytes that autograd keeps for the backward pass of texts of these lengths, parameters left out.

    Counted, not measured, so that it is the same on every machine; the texts repeat one `token`.
    """
    ids = torch.full((int(lengths.sum()),), token, dtype=torch.int64, device=device)
    return saved_bytes(lambda: encoder(ids, lengths, np.zeros_like(lengths)), parameters, device)


def saved_bytes(forward: Callable[[], object], parameters: Sequence[Tensor], device: str = "cpu") -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, parameters left out."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = RandomState.of(device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        graph = forward()
    state.restore()
    total = sum(sizes.values())
    del graph
    return total


def plan_memory(
    bytes_per_token: float,
    budget_bytes: int,
    longest_tokens: int,
    wanted_chunk: int | None,
    usual_chunk: int,
) -> MemoryPlan:
    """The plan that keeps all graphs within `budget_bytes`, with chunks of `wanted_chunk` or what fits.

    Raises MachineError if not even one text of `longest_tokens` fits.
    """
    fitting = int(budget_bytes / max(bytes_per_token, 1e-9))
    if fitting < longest_tokens:
        raise MachineError(
            f"one text of {longest_tokens:,} tokens needs about "
            f"{longest_tokens * bytes_per_token / 2**30:.1f} GiB, but the memory budget is "
            f"{budget_bytes / 2**30:.1f} GiB; lower data max_tokens, or raise batch.memory_gib"
        )
    chunk = wanted_chunk if wanted_chunk is not None else max(longest_tokens, min(usual_chunk, fitting))
    return MemoryPlan(chunk, max(fitting, chunk))


class _Texts:
    """The token ids of a batch by row, on the device."""

    def __init__(self, batch: TrainingBatch, device: str) -> None:
        self._batch = batch
        self._starts = np.concatenate(([0], np.cumsum(batch.lengths, dtype=np.int64)))
        self._device = device

    def of(self, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int32], NDArray[np.int32]]:
        """(ids [T], lengths [R], prompt_tokens [R]) of some rows."""
        parts = [self._batch.ids[self._starts[row] : self._starts[row + 1]] for row in rows]
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self._device)
        return ids, self._batch.lengths[rows], self._batch.prompt_tokens[rows]


def _in_order(parts: Sequence[Tensor], cut: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> Tensor:
    """[rows, D] in ascending order of the rows, without a graph."""
    if not parts:
        raise MachineError("a rank has no text of the batch to encode; use more pairs, or fewer ranks")
    joined = torch.cat([part.detach() for part in parts])
    place = np.searchsorted(rows, np.concatenate(cut))
    whole = torch.empty_like(joined)
    whole[torch.from_numpy(place).to(joined.device)] = joined
    return whole


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """A phase in which no rank waits for another; at its end all go on, stop or give up together."""
    stopped = full = False
    try:
        yield
    except Stopped:
        stopped = True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        full = True
    if ranks.any(stopped):
        raise Stopped
    if ranks.any(full):
        raise MemoryError("a chunk does not fit the memory")
