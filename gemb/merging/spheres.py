"""Means along the sphere: the tensor of a model, flattened, is taken as a direction and a length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLLINEAR_COSINE = 0.9995
"""From here on an arc is as good as a line, and sin(angle) too small to divide by."""
TOLERANCE = 1e-5
"""Radians; a step of the Karcher mean that is shorter ends it."""


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """[S], the point at `share` of the arc from `first` (0) to `second` (1) (Shoemake 1985).

    The angle is that of the flattened tensors; their lengths are kept as they are, so that length goes from
    one to the other, too. Nearly collinear tensors are joined by a line.
    """
    lengths = torch.linalg.vector_norm(first), torch.linalg.vector_norm(second)
    product = float(lengths[0] * lengths[1])
    cosine = float((first * second).sum()) / product if product else 1.0
    if abs(cosine) > COLLINEAR_COSINE:
        return (1 - share) * first + share * second
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    sine = torch.sin(angle)
    return first * float(torch.sin((1 - share) * angle) / sine) + second * float(
        torch.sin(share * angle) / sine
    )


def karcher(
    tensors: Sequence[Tensor], weights: Sequence[float], *, steps: int = 10, tolerance: float = TOLERANCE
) -> Tensor:
    """[S], the Karcher mean of the directions at the weighted mean of the lengths (Karcher 1977).

    The mean on the unit sphere is the point from which the weighted arcs to all directions add up to nothing:
    u <- exp_u(sum of weight * log_u(direction)), from the normalised mean on, until a step is shorter than
    `tolerance` or `steps` are done. Of two it is their mean length times slerp at one half. A tensor of
    length 0 has no direction and takes part in the length only.

    Raises ValueError if the weights sum to 0.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    lengths = [float(torch.linalg.vector_norm(one)) for one in flat]
    total = sum(weights)
    if abs(total) < 1e-8:
        raise ValueError(f"the weights sum to {total:g}, so they have no mean")
    there = [index for index, length in enumerate(lengths) if length > tolerance]
    if not there:
        return torch.zeros_like(tensors[0])
    units = [flat[index] / lengths[index] for index in there]
    shares = [weights[index] / sum(weights[index] for index in there) for index in there]
    mean = _combined(units, shares)
    length = float(torch.linalg.vector_norm(mean))
    mean = mean / length if length > tolerance else units[0].clone()
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for unit, share in zip(units, shares, strict=True):
            cosine = float(torch.dot(mean, unit).clamp(-1, 1))
            angle = float(torch.arccos(torch.tensor(cosine, dtype=torch.float64)))
            if angle >= tolerance:
                # A direction right opposite has no arc of its own; any one is as short.
                sine = max(float(torch.sin(torch.tensor(angle, dtype=torch.float64))), 1e-12)
                step += share * (angle / sine) * (unit - cosine * mean)
        if not _moved(mean, step, tolerance):
            break
    radius = sum(weight * length for weight, length in zip(weights, lengths, strict=True)) / total
    return (mean * radius).reshape(tensors[0].shape)


def multislerp(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """[S], the weighted mean of the directions at that of the lengths: near to Karcher's mean, and cheaper.

    With `base` it is that of the deltas. No paper; it is mergekit's method of this name, which also takes a
    step on the tangent plane at that mean. The step is 0: what the directions have across their own mean
    cancels out.

    Raises ValueError if the weights sum to 0.
    """
    total = sum(weights)
    if abs(total) < 1e-8:
        raise ValueError(f"the weights sum to {total:g}, so they have no mean")
    shares = [weight / total for weight in weights]
    flat = [(tensor if base is None else tensor - base).reshape(-1) for tensor in tensors]
    lengths = [float(torch.linalg.vector_norm(one)) for one in flat]
    units = [one / (length + 1e-8) for one, length in zip(flat, lengths, strict=True)]
    result = _combined(units, shares)
    radius = float(torch.linalg.vector_norm(result))
    if radius < 1e-8:  # the directions cancel each other out, so the sphere has no mean
        result = _combined(flat, shares)
    else:
        result *= sum(share * length for share, length in zip(shares, lengths, strict=True)) / radius
    result = result.reshape(tensors[0].shape)
    return result if base is None else base + result


def _combined(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = tensors[0] * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total.add_(tensor, alpha=share)
    return total


def _moved(mean: Tensor, step: Tensor, tolerance: float) -> bool:
    """Moves `mean` along the sphere by the tangent `step`; False if that is shorter than the tolerance."""
    angle = torch.linalg.vector_norm(step)
    if float(angle) < tolerance:
        return False
    mean.mul_(torch.cos(angle)).add_(step * (torch.sin(angle) / angle))
    mean.div_(torch.linalg.vector_norm(mean))  # rounding leaves the sphere slowly
    return True
