"""Losses for pairs of texts with a similarity score, at each Matryoshka size.

B pairs, D width, K sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemb.losses.prefixes import check_sizes, cosines


def cosent(
    first: Tensor,
    second: Tensor,
    scores: Tensor,
    *,
    temperature: float = 0.05,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The CoSENT loss of scored pairs at each size, [K], in nats: pairs are to be ranked as their scores.

    log(1 + sum over all i, j with score_i > score_j of exp((cos_j - cos_i) / t)); a sum over pairs of pairs,
    not a mean (Jianlin Su, CoSENT, kexue.fm/archives/8847; sentence-transformers' CoSENTLoss with scale 1/t).
    Only the order of the scores counts; equal scores are not compared.

    first[B, D], second[B, D], scores[B].

    Raises ValueError where the shapes do not fit.
    """
    sizes = _check(first, second, scores, sizes)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, not above 0")
    ascending, order = scores.sort()
    logits = cosines(first, second, sizes)[:, order] / temperature  # [K, B]
    # The sum of exp(-logit) over the pairs from each on in ascending order; after the last there is none.
    onwards = torch.logcumsumexp(-logits.flip(1), dim=1).flip(1)
    onwards = torch.cat([onwards, onwards.new_full((len(sizes), 1), -torch.inf)], dim=1)
    higher = torch.searchsorted(ascending, ascending, right=True)  # [B] where the higher scores begin
    inversions = logits + onwards[:, higher]  # [K, B]
    return torch.logsumexp(torch.cat([inversions.new_zeros(len(sizes), 1), inversions], dim=1), dim=1)


def cosine_error(
    first: Tensor, second: Tensor, scores: Tensor, *, sizes: Sequence[int] | None = None
) -> Tensor:
    """The mean squared difference of the cosines of the pairs and their scores at each size, [K].

    Scores are meant on the scale of a cosine, -1..1 (sentence-transformers' CosineSimilarityLoss).
    first[B, D], second[B, D], scores[B]. Raises ValueError where the shapes do not fit.
    """
    sizes = _check(first, second, scores, sizes)
    return (cosines(first, second, sizes) - scores).square().mean(1)


def _check(first: Tensor, second: Tensor, scores: Tensor, sizes: Sequence[int] | None) -> tuple[int, ...]:
    if not len(first) == len(second) == len(scores):
        raise ValueError(f"{len(first)} and {len(second)} texts have {len(scores)} scores; each pair has one")
    if not len(first):
        raise ValueError("there are no pairs; the mean over no rows has no value")
    return check_sizes(sizes, first.shape[1])
