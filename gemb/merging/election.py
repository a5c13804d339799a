"""The sign that most of the deltas' mass has at each entry, and the mean of those that agree (TIES)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sign_balance(deltas: Sequence[Tensor], weights: Sequence[float]) -> int:
    """How many more entries of the weighted sum are above 0 than below; parts of a model add up."""
    return int(_weighted_sum(deltas, weights).sign().sum(dtype=torch.float64))


def elected_mean(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalise: bool = True,
    zero_sign: float = 1.0,
) -> Tensor:
    """[S], steps 2 and 3 of TIES (arXiv 2306.01708, algorithm 1): elect a sign, then the disjoint mean.

    The sign of an entry is that of the sum of its weighted deltas; of these only those with this sign are
    taken, zeros never. Their sum is divided by the sum of their weights, unless not to `normalise`; with
    weights of 1 that is the mean of the paper, which has no weights. An entry that nobody has is 0.
    `zero_sign` is the sign of an entry whose deltas cancel out: 1 or -1. The authors take that of the model's
    `sign_balance`, mergekit 1.
    """
    signs = _weighted_sum(deltas, weights).sign()
    signs[signs == 0] = zero_sign
    result, divisor = torch.zeros_like(signs), torch.zeros_like(signs)
    for delta, weight in zip(deltas, weights, strict=True):
        weighted = delta * weight
        agrees = weighted.sign() == signs
        result += torch.where(agrees, weighted, 0.0)
        if normalise:
            divisor += torch.where(agrees, weight, 0.0)
    if normalise:
        divisor[divisor == 0] = 1.0
        result /= divisor
    return result


def _weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total
