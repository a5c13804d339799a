"""The language model head and its loss, a few tokens at a time: no [T, V] matrix is ever whole.

The gradients of the states and of the table are found together with the loss, while the scores of a chunk
are at hand, so that nothing of them is kept for the backward pass (as Liger Kernel, arXiv 2410.10989, and Cut
Cross-Entropy, arXiv 2411.09009, do).

N places with a target, D width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 1 << 24
"""Scores of a chunk, 64 MiB in fp32."""
CHUNK_TOKENS = (64, 1024)
"""The fewest and the most tokens of a chunk; below, products are slow."""
PIECE_NUMBERS = 1 << 18
"""Scores of a piece, 1 MiB in fp32: several passes over them stay in the cache."""
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """What a teacher thinks of the same targets: its states and its head, from which scores are made.

    The loss is `share` tau^2 KL(teacher || student) + (1 - share) cross entropy, both distributions at the
    `temperature` tau > 0 in the first term (Hinton et al., arXiv 1503.02531, section 2).
    """

    states: Tensor
    """[N, D'], the teacher's final states, one for each target of the batch in its order."""
    table: Tensor
    """[V, D'], its head; of the student's vocabulary."""
    softcap: float | None = None
    """Of its scores."""
    temperature: float = 1.0
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """Sums over the N targets."""

    total: Tensor
    """Scalar with a graph: cross entropy in nats, or what `TeacherStates` says."""
    cross_entropy: Tensor
    """Scalar without a graph."""
    correct: Tensor
    """int64 scalar, the targets with the highest score."""


def head_loss(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    teacher: TeacherStates | None = None,
) -> HeadLoss:
    """The loss of states[N, D] through the head table[V, D] against int64 targets[N].

    `softcap` c squeezes a score s to c tanh(s / c) (Gemma 2, arXiv 2408.00118, section 2). Products run in
    `dtype`; None is that of the states. The graph can be walked once.

    Raises ValueError if the teacher has other targets or another vocabulary.
    """
    if teacher is not None and (len(teacher.states) != len(states) or len(teacher.table) != len(table)):
        raise ValueError(
            f"the teacher has {len(teacher.states)} states and {len(teacher.table)} tokens, "
            f"but the student has {len(states)} and {len(table)}"
        )
    keeps = torch.is_grad_enabled()
    total, cross_entropy, correct = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        states, table, targets, softcap, dtype or states.dtype, teacher, keeps
    )
    return HeadLoss(total, cross_entropy, correct)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # torch's context
        states: Tensor,
        table: Tensor,
        targets: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        teacher: TeacherStates | None,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_states, needs_table = (keeps and needs for needs in ctx.needs_input_grad[:2])
        grad_states = torch.empty_like(states) if needs_states else None
        grad_table = torch.zeros_like(table) if needs_table else None
        weight = table.to(dtype)
        sums = torch.zeros(2, dtype=torch.float64, device=states.device)
        correct = torch.zeros((), dtype=torch.int64, device=states.device)
        step = min(len(states), _chunk_tokens(len(table)))
        room = states.new_empty(step, len(table), dtype=dtype)  # one for all chunks: new pages cost a pass
        for rows in _slices(len(states), step):
            entered = states[rows].to(dtype)
            scores = torch.mm(entered, weight.T, out=room[: len(entered)])  # becomes its own gradient
            theirs = None if teacher is None else _teacher_scores(teacher, rows)
            for piece in _slices(len(scores), max(1, PIECE_NUMBERS // len(table))):
                mix = None if theirs is None or teacher is None else (theirs[piece], teacher)
                found, right = _piece_(scores[piece], targets[rows][piece], softcap, mix)
                sums += found
                correct += right
            if grad_states is not None:
                grad_states[rows] = scores @ weight
            if grad_table is not None and grad_table.dtype == dtype:
                grad_table.addmm_(scores.T, entered)
            elif grad_table is not None:
                grad_table += scores.T @ entered
        ctx.gradients = (grad_states, grad_table)
        total, cross_entropy = (one.to(torch.promote_types(states.dtype, torch.float32)) for one in sums)
        ctx.mark_non_differentiable(cross_entropy, correct)
        return total, cross_entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the graph of this loss was walked before; compute the loss again")
        scaled = (None if one is None else one.mul_(grad) for one in gradients)
        return *scaled, None, None, None, None, None


def _chunk_tokens(vocabulary: int) -> int:
    fewest, most = CHUNK_TOKENS
    return min(max(CHUNK_NUMBERS // vocabulary, fewest), most)


def _slices(count: int, step: int) -> Iterator[slice]:
    for first in range(0, count, max(1, step)):
        yield slice(first, min(first + step, count))


def _teacher_scores(teacher: TeacherStates, rows: slice) -> Tensor:
    """The teacher's scores[rows, V] over its temperature."""
    scores = (teacher.states[rows] @ teacher.table.T).to(
        torch.promote_types(teacher.table.dtype, torch.float32)
    )
    if teacher.softcap is not None:
        scores.div_(teacher.softcap).tanh_().mul_(teacher.softcap)
    return scores.div_(teacher.temperature)


def _piece_(
    scores: Tensor, targets: Tensor, softcap: float | None, mix: tuple[Tensor, TeacherStates] | None
) -> tuple[Tensor, Tensor]:
    """(the sums of loss and cross entropy, correct targets) of scores[n, V], which become their gradient.

    `mix` holds the teacher's scores over its temperature.
    """
    wide = scores if scores.dtype in _WIDE else scores.float()
    squeezed = None
    if softcap is not None:
        squeezed = wide.div_(softcap).tanh_()
        wide = squeezed * softcap
    highest = wide.amax(-1, keepdim=True)
    of_target = wide.gather(1, targets[:, None])
    correct = (of_target >= highest).sum()
    if mix is None:
        share, total = 0.0, torch.zeros((), dtype=torch.float64, device=scores.device)
        distilled = None
    else:
        theirs, teacher = mix
        share, temperature = teacher.share, teacher.temperature
        own_log, their_log = (wide / temperature).log_softmax(-1), theirs.log_softmax(-1)
        their_share = their_log.exp()
        total = (their_share * (their_log - own_log)).sum(dtype=torch.float64) * (share * temperature**2)
        distilled = own_log.exp_().sub_(their_share).mul_(share * temperature)
    grad = torch.sub(wide, highest).exp_()
    sizes = grad.sum(-1, keepdim=True)
    cross_entropy = (sizes.log() + highest - of_target).sum(dtype=torch.float64)
    grad.div_(sizes)
    grad.scatter_add_(1, targets[:, None], torch.full_like(of_target, -1.0))
    if distilled is not None:
        grad = distilled.add_(grad, alpha=1 - share)
    if squeezed is not None:
        grad.mul_(squeezed.square_().neg_().add_(1))
    scores.copy_(grad)
    return torch.stack((total + (1 - share) * cross_entropy, cross_entropy)), correct
