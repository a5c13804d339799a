"""Distillation: embeddings towards a teacher's, and in-batch score distributions towards a teacher's.

B rows, C candidates, D width of the student, E width of the teacher, K Matryoshka sizes.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from gemb.losses.prefixes import check_sizes, full_precision, unit

Distance = Literal["l2", "squared", "cosine"]


def embedding_matching(
    student: Tensor,
    teacher: Tensor,
    *,
    distance: Distance = "l2",
    projection: Callable[[Tensor], Tensor] | None = None,
    cut: bool = False,
) -> Tensor:
    """The mean distance of unit student rows to the teacher's unit rows, a scalar (EmbeddingGemma, eq. 5).

    One kind of text at a time: EmbeddingGemma (arXiv 2509.20354) adds those of queries, positives and hard
    negatives with weight 1. It doesn't print the distance; EmbedDistill (arXiv 2301.12005), which it cites,
    has "l2", |a - b|. "squared" is |a - b|^2 and "cosine" is 1 - cos, half of it. Not split over Matryoshka
    sizes. No rows give 0.

    student[B, D], teacher[B, E]: raw embeddings; the teacher gets no gradient.
    projection: a learned map of the unit student rows, [B, D] -> [B, E]; what it gives is compared as it
        is, so the map can also learn the length ("cosine" does not see it).
    cut: where the widths differ, both are cut to the narrower and made unit length again; right for a
        side that was trained with Matryoshka sizes.

    Raises ValueError where the shapes do not fit.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student rows stand against {len(teacher)} of the teacher")
    width = min(student.shape[1], teacher.shape[1]) if cut and projection is None else None
    compared: Tensor = unit(student, width)
    if projection is not None:
        with full_precision(compared):
            compared = projection(compared)
    with torch.no_grad():
        target = unit(teacher, width).to(compared.dtype)
    if compared.shape[1] != target.shape[1]:
        raise ValueError(
            f"the student's rows are {compared.shape[1]} wide but the teacher's {target.shape[1]}; "
            "give a projection, or cut the wider one if it was trained with Matryoshka sizes"
        )
    match distance:
        case "l2":
            # Its gradient is 0, not infinite, where both are equal.
            distances: Tensor = torch.linalg.vector_norm(compared - target, dim=1)
        case "squared":
            distances = (compared - target).square().sum(1)
        case "cosine":
            distances = 1 - (unit(compared) * target).sum(1)
    return distances.sum() / max(1, len(distances))


def score_matching(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    *,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """KL(teacher || student) of the queries' distributions over the candidates, [K], their mean, in nats.

    The distributions are the softmax of the cosines of a query with all candidates of the batch (positives,
    and hard negatives if appended), divided by the temperature; the teacher's temperature is the student's
    unless given. Sizes cut the student alone. Not multiplied by the squared temperature, as Hinton et al.
    (arXiv 1503.02531) do to keep gradients alike over temperatures: weight the term instead.

    queries[B, D], candidates[C, D]; teacher_queries[B, E], teacher_candidates[C, E], no gradient. With
    several processes the candidates are those of all, gathered.

    Raises ValueError where shapes or temperatures do not fit.
    """
    if len(queries) != len(teacher_queries) or len(candidates) != len(teacher_candidates):
        raise ValueError(
            f"the student has {len(queries)} queries and {len(candidates)} candidates, "
            f"the teacher {len(teacher_queries)} and {len(teacher_candidates)}"
        )
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    if not (temperature > 0 and teacher_temperature > 0):
        raise ValueError(f"temperatures are {temperature} and {teacher_temperature}, not above 0")
    losses = []
    with full_precision(queries):
        with torch.no_grad():
            scores = unit(teacher_queries) @ unit(teacher_candidates).T
            target = torch.log_softmax(scores / teacher_temperature, dim=1)  # [B, C]
        for size in check_sizes(sizes, queries.shape[1]):
            logits = unit(queries, size) @ unit(candidates, size).T / temperature
            given = torch.log_softmax(logits, dim=1)
            losses.append(kl_div(given, target.to(given.dtype), reduction="batchmean", log_target=True))
    return torch.stack(losses)
