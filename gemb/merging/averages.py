"""Weighted sums of whole models, and the point between a base and an average that model stock finds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def soup(tensors: Sequence[Tensor], weights: Sequence[float], *, normalise: bool = True) -> Tensor:
    """[S], the weighted mean (model soups, arXiv 2203.05482); the weighted sum without `normalise`.

    Raises ValueError if weights to be normalised sum to 0.
    """
    total = _total(weights) if normalise else 1.0
    return _weighted_sum(tensors, [weight / total for weight in weights])


def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0
) -> Tensor:
    """[S], base + scale * sum of weighted deltas (task arithmetic, arXiv 2212.04089, section 2).

    `scale` is the paper's lambda. Scale 1/N with weights of 1 is the soup of the models.
    """
    return base + scale * _weighted_sum(deltas, weights)


def model_stock(base: Tensor, tensors: Sequence[Tensor], *, by_row: bool = False) -> Tensor:
    """[S], the point nearest to the centre of the models' weights (model stock, arXiv 2403.19522, eq. 7).

    t * mean + (1 - t) * base with t = N cos / (1 + (N - 1) cos); cos is the mean cosine of two deltas, of the
    tensor as a whole, or of each of its rows `by_row`. Where the deltas are at right angles it is the base,
    and where they are opposed it lies beyond the base.

    Raises ValueError for fewer than two tensors, which have no angle.
    """
    count = len(tensors)
    if count < 2:
        raise ValueError(f"model stock needs two models beside its base, not {count}")
    deltas = [_as_rows(tensor - base, by_row=by_row) for tensor in tensors]
    cosines = [cosine_similarity(one, other, dim=-1, eps=1e-12) for one, other in combinations(deltas, 2)]
    cosine = torch.stack(cosines).mean(dim=0)[:, None]  # [rows, 1]
    share = count * cosine / (1 + (count - 1) * cosine)
    mean = torch.stack(deltas).mean(dim=0)
    return base + (share * mean).reshape(base.shape)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not tensors or len(tensors) != len(weights):
        raise ValueError(f"{len(tensors)} tensors, but {len(weights)} weights")
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _total(weights: Sequence[float]) -> float:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise ValueError(f"the weights sum to {total:g}, so they have no mean")
    return total


def _as_rows(tensor: Tensor, *, by_row: bool) -> Tensor:
    return tensor.reshape(len(tensor) if by_row and tensor.ndim > 1 else 1, -1)
