"""The sign that most of the deltas' mass has at each entry, and the mean of those that agree (TIES)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

ZeroSign: TypeAlias = Literal["total", "plus"]
"""The sign of an entry whose deltas sum to 0: that of most other entries (the authors' code), or plus."""


def elected_mean(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalise: bool = True,
    zero_sign: ZeroSign = "total",
) -> Tensor:
    """[S], steps 2 and 3 of TIES (arXiv 2306.01708, algorithm 1): elect a sign, then the disjoint mean.

    The sign of an entry is that of the sum of its weighted deltas; of these only those with this sign are
    taken, zeros never. Their sum is divided by the sum of their weights, unless not to `normalise`; with
    weights of 1 that is the mean of the paper, which has no weights. An entry that nobody has is 0.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    signs = total.sign()
    if bool((signs == 0).any()):
        signs[signs == 0] = 1.0 if zero_sign == "plus" or float(signs.sum()) >= 0 else -1.0
    result, divisor = torch.zeros_like(total), torch.zeros_like(total)
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
