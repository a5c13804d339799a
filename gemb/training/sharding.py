"""What a run keeps beside weights and gradients, kept once for all ranks: ZeRO stage 1 (arXiv 1910.02054).

Every rank has all weights and, once they are summed, all gradients. The optimizer's states and the averages
of a parameter's rows are kept by one rank alone, which changes these rows and gives them to the others after
each step. The sums are those of one rank that keeps everything, so on a CPU weights and checkpoints are the
same to the bit; only who computes them differs.

Rows are those of a parameter's first axis: V of a token table [V, D].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemb.training.optimizers import LastAverage, MovingAverage, Optimizer
from gemb.training.ranks import Ranks

_STATES = {"adamw": 2, "muon": 1}
"""Numbers that an update keeps for each of a parameter."""
_LARGE = 1 / 16
"""Of a rank's fair share of all states; what is larger is cut, so that it cannot upset the balance."""
_BLOCK_ROWS = 16  # torch's fused AdamW rounds otherwise past the last whole vector, of 16 numbers at most


@dataclass(frozen=True, slots=True)
class Stateful:
    """A parameter as the dealing sees it."""

    rows: int
    numbers: int
    """That its states hold."""
    can_be_cut: bool


def deal(parameters: Sequence[Stateful], count: int) -> list[list[int]]:
    """Who keeps which rows: rank r of `count` has those from bounds[r] up to bounds[r + 1].

    From the largest parameter to the smallest: a large one is cut into `count` parts, equal but for one block
    of rows, any other goes whole to the rank that has least so far. Gives the bounds of each parameter.
    """
    fair = sum(one.numbers for one in parameters) / count
    loads = np.zeros(count)
    bounds: list[list[int]] = [[] for _ in parameters]
    for place in sorted(range(len(parameters)), key=lambda place: -parameters[place].numbers):
        one = parameters[place]
        blocks = np.zeros(count, np.int64)
        least = np.argsort(loads, kind="stable")
        total = -(-one.rows // _BLOCK_ROWS)
        if count > 1 and one.can_be_cut and one.numbers > _LARGE * fair:
            blocks += total // count
            blocks[least[: total % count]] += 1
        else:
            blocks[least[0]] = total
        ends = np.minimum(np.cumsum(blocks) * _BLOCK_ROWS, one.rows)
        bounds[place] = [0, *ends.tolist()]
        loads += np.diff(bounds[place]) * (one.numbers / max(1, one.rows))
    return bounds


class Shards:
    """The rows of the trained `parameters` that this rank keeps, as `pieces`; both by the parameters' names.

    A piece is a parameter of its own in the memory of the whole one; of what other ranks keep it is empty,
    and where this rank keeps all rows it is the parameter itself. A parameter without axes is on every rank.
    `groups` are those of the optimizer: Muon's matrices are never cut.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], groups: Iterable[Mapping[str, Any]], ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self.parameters = dict(named)
        updates = {id(one): str(group["update"]) for group in groups for one in group["params"]}
        dealt = {name: one for name, one in self.parameters.items() if one.ndim > 0}
        stateful = [
            Stateful(len(one), one.numel() * _STATES[updates[id(one)]], updates[id(one)] != "muon")
            for one in dealt.values()
        ]
        self._bounds = dict(zip(dealt, deal(stateful, ranks.count), strict=True))
        self.pieces: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            own = self.own(name, parameter)
            self.pieces[name] = parameter if own is parameter else nn.Parameter(own.detach())

    def own(self, name: str, rows: Tensor) -> Tensor:
        """This rank's part of the `rows` of a parameter or of a state of it; `rows` itself if it is all."""
        if name not in self._bounds or rows.ndim == 0:
            return rows
        start, stop = self._span(name)
        return rows if stop - start == len(rows) else rows[start:stop]

    def kept(self, name: str, rows: Tensor) -> Tensor:
        """The same in memory of its own, so that the `rows` can go."""
        part = self.own(name, rows)
        return part if part is rows else part.clone()

    def refresh(self) -> None:
        """Put the pieces where the parameters are now: layers that lie together in memory move."""
        for name, piece in self._cut():
            piece.data = self.own(name, self.parameters[name].detach())

    @contextmanager
    def with_gradients(self) -> Iterator[None]:
        """The pieces have their part of the gradients within the block."""
        self.refresh()
        for name, piece in self._cut():
            piece.grad = _rows(self.parameters[name].grad, *self._span(name))
        try:
            yield
        finally:
            for _, piece in self._cut():
                piece.grad = None

    def spread(self) -> None:
        """Every rank gets the rows of the others."""
        self._ranks.broadcast([part for name in self._bounds for part in self._parts(name)])

    def spread_step(self) -> None:
        """Every rank gets what a step changed on the others: rows with a gradient."""
        sent: list[tuple[int, Tensor]] = []
        looked_up: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, bounds in self._bounds.items():
            parameter = self.parameters[name]
            if parameter.grad is None or self._ranks.count == 1:
                continue
            if not parameter.grad.is_sparse:
                sent += self._parts(name)
                continue
            table, rows = parameter.detach(), parameter.grad.coalesce().indices()[0]
            ends = torch.searchsorted(rows, torch.tensor(bounds, device=rows.device)).tolist()
            for owner, (start, stop) in enumerate(pairwise(ends)):
                part = table[rows[start:stop]]
                sent.append((owner, part))
                looked_up.append((table, rows[start:stop], part))
        self._ranks.broadcast(sent)
        for table, rows, part in looked_up:
            table.index_copy_(0, rows, part)

    def joined(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all ranks keep, by whatever name, on the first one; nothing elsewhere. All ranks must ask.

        Rows are joined; a number without axes is the same on all ranks that have it.
        """
        parts: dict[str, list[Tensor]] = {}
        for one in self._ranks.collect(own):
            for name, part in one.items():
                parts.setdefault(name, []).append(part)
        whole = {}
        for name in list(parts):
            found = parts.pop(name)  # so that its parts go when they are joined
            whole[name] = found[0] if len(found) == 1 or found[0].ndim == 0 else torch.cat(found)
        return whole

    def _span(self, name: str) -> tuple[int, int]:
        start, stop = self._bounds[name][self._ranks.index : self._ranks.index + 2]
        return start, stop

    def _cut(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The pieces that are not the parameter itself."""
        return ((name, one) for name, one in self.pieces.items() if one is not self.parameters[name])

    def _parts(self, name: str) -> list[tuple[int, Tensor]]:
        """(owner, rows) of a parameter."""
        bounds, whole = self._bounds[name], self.parameters[name].detach()
        return [(owner, whole[start:stop]) for owner, (start, stop) in enumerate(pairwise(bounds))]


class ShardedOptimizer:
    """`whole`, which has made no step yet, with the states of this rank's rows alone.

    Steps, and what `state_dict` gives the first rank, are those of the whole one. All ranks step and ask
    together.
    """

    def __init__(self, whole: Optimizer, shards: Shards) -> None:
        self._optimizer = whole
        self._shards = shards
        names = {id(parameter): name for name, parameter in shards.parameters.items()}
        self._names: list[str] = []  # in the order in which torch numbers the states
        for group in whole.param_groups:
            own = [names[id(parameter)] for parameter in group["params"]]
            group["params"] = [shards.pieces[name] for name in own]
            self._names += own

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, of which the learning rate may be changed."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """Change every parameter that has a gradient."""
        with self._shards.with_gradients():
            self._optimizer.step()
        self._shards.spread_step()

    def state_dict(self) -> dict[str, Any]:
        """That of the whole optimizer on the first rank; without states on the others."""
        own = self._optimizer.state_dict()
        parts = {f"{place} {key}": one for place, state in own["state"].items() for key, one in state.items()}
        states: dict[int, dict[str, Tensor]] = {}
        for path, whole in self._shards.joined(parts).items():
            place, _, key = path.partition(" ")
            states.setdefault(int(place), {})[key] = whole
        return {**own, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of what `state_dict` gave, whatever the number of ranks was."""
        own = {}
        for place, state in state_dict["state"].items():
            name = self._names[place]
            if self._shards.pieces[name].numel():
                own[place] = {key: self._shards.kept(name, one) for key, one in state.items()}
        self._optimizer.load_state_dict({**state_dict, "state": own})


class ShardedAverage:
    """An average of the pieces of `shards`; for the loop and the evaluation it is that of the parameters.

    All ranks call everything together.
    """

    def __init__(self, average: MovingAverage | LastAverage, shards: Shards) -> None:
        self._average = average
        self._shards = shards

    def update(self) -> None:
        """Take in the weights as they are now."""
        self._shards.refresh()
        self._average.update()

    def state_dict(self) -> dict[str, Tensor]:
        """That of the whole average on the first rank; nothing elsewhere."""
        return self._shards.joined(self._average.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what `state_dict` gave, whatever the number of ranks was."""
        name_of = self._average.parameter_of
        self._average.load_state_dict(
            {key: self._shards.kept(name_of(key), one) for key, one in state.items()}
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the averages within the block, and what they were after it."""
        self._shards.refresh()
        with self._average.applied():
            self._shards.spread()
            yield
        self._shards.spread()


def _rows(gradient: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Rows of a gradient; None of none, so that nothing is kept for them."""
    if gradient is None or start == stop:
        return None
    if not gradient.is_sparse:
        return gradient[start:stop]
    gradient = gradient.coalesce()
    indices = gradient.indices()[0]
    first, last = torch.searchsorted(indices, torch.tensor([start, stop], device=indices.device)).tolist()
    return torch.sparse_coo_tensor(
        indices[None, first:last] - start,
        gradient.values()[first:last],
        (stop - start, *gradient.shape[1:]),
        is_coalesced=True,
    )
