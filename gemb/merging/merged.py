"""One tensor, or a block of its rows, merged by a method of the catalogue."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gemb.merging.averages import model_stock, soup, task_arithmetic
from gemb.merging.catalogue import METHODS, MethodName, TensorSettings
from gemb.merging.election import elected_mean
from gemb.merging.spheres import karcher, multislerp, slerp
from gemb.merging.thinning import Bounds, drop_at_random, drop_by_rank, keep_within


def merged(
    name: MethodName,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    *,
    generators: Sequence[Generator] = (),
    bounds: Sequence[Bounds] = (),
    zero_sign: float = 1.0,
) -> Tensor:
    """[S], the N `tensors` and their `base` by the method `name`.

    `generators`[N] are used up by what thins at random, in order of blocks; `bounds`[N] say which magnitudes
    stay where a method thins by magnitude.

    Raises ValueError as the functions of the methods do, and for a base that is missing.
    """
    match name:
        case "linear":
            return soup(tensors, settings.weights, normalise=settings.normalise)
        case "slerp":
            return slerp(tensors[0], tensors[1], settings.share)
        case "multislerp":
            return multislerp(tensors, settings.weights, base)
        case "karcher":
            return karcher(tensors, settings.weights, steps=settings.steps, tolerance=settings.tolerance)
    if base is None:
        raise ValueError(f"{name} starts from a base, and there is none")
    if name == "model_stock":
        return model_stock(base, tensors, by_row=settings.by_row)
    method = METHODS[name]
    deltas = thinned(name, [tensor - base for tensor in tensors], settings, generators, bounds)
    if method.elects:
        mean = elected_mean(deltas, settings.weights, normalise=settings.normalise, zero_sign=zero_sign)
        return base + settings.scale * mean
    if settings.normalise:
        return base + settings.scale * soup(deltas, settings.weights)
    return task_arithmetic(base, deltas, settings.weights, scale=settings.scale)


def thinned(
    name: MethodName,
    deltas: Sequence[Tensor],
    settings: TensorSettings,
    generators: Sequence[Generator] = (),
    bounds: Sequence[Bounds] = (),
) -> list[Tensor]:
    """[N] deltas, what the method leaves of them."""
    match METHODS[name].thinning:
        case "largest" | "between":
            return [keep_within(delta, each) for delta, each in zip(deltas, bounds, strict=True)]
        case "random":
            return [
                drop_at_random(delta, density, generator, rescale=settings.rescale)
                for delta, density, generator in zip(deltas, settings.densities, generators, strict=True)
            ]
        case "rank":
            return [
                drop_by_rank(delta, density, epsilon, generator, rescale=settings.rescale)
                for delta, density, epsilon, generator in zip(
                    deltas, settings.densities, settings.epsilons, generators, strict=True
                )
            ]
    return list(deltas)


def seeded(seed: int, name: str, model: int) -> Generator:
    """The random numbers of one tensor of one model: they do not depend on the order of work."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
