"""The losses as their formulas read: numbers in loops, and autograd over whole matrices, a size at a time."""

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from gemb.losses import Direction, Guide
from gemb.losses.candidates import Masks
from gemb.losses.prefixes import unit


def cosine(first: Tensor, second: Tensor) -> float:
    a, b = first.double(), second.double()
    norm = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / norm if norm else 0.0


def contrastive_row(
    i: int,
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    owner: Tensor | None = None,
    query_hashes: Tensor | None = None,
    positive_hashes: Tensor | None = None,
    negative_hashes: Tensor | None = None,
    guide: Guide | None = None,
    temperature: float = 0.05,
    hardness: float = 5.0,
    hardened: Literal["own", "in_batch", "all"] = "own",
    negatives_of: Literal["own", "all"] = "own",
    also: Collection[Direction] = (),
    literal_mask: bool = False,
) -> float:
    """The loss of row i; `literal_mask` reads 1_TN to the letter and drops the positive."""

    def same(j: int) -> bool:
        return any(
            hashes is not None and int(hashes[i]) == int(hashes[j])
            for hashes in (query_hashes, positive_hashes)
        )

    def too_good(anchor: str, candidate: str, j: int) -> bool:
        if guide is None:
            return False
        of = {"query": guide.queries, "positive": guide.positives, "negative": guide.negatives}
        rows, others = of[anchor], of[candidate]
        if rows is None or others is None:
            return False
        best = cosine(guide.queries[i], guide.positives[i])
        limit = best - guide.margin * (abs(best) if guide.relative else 1)
        return cosine(rows[i], others[j]) > limit

    def is_positive(n: int) -> bool:
        return (
            negative_hashes is not None
            and positive_hashes is not None
            and int(negative_hashes[n]) == int(positive_hashes[i])
        )

    total = 0.0
    for j in range(len(positives)):
        s = cosine(queries[i], positives[j])
        if j == i:
            if not literal_mask:
                total += math.exp(s / temperature)
        elif not same(j) and not too_good("query", "positive", j):
            total += math.exp(s / temperature + (hardness * s if hardened != "own" else 0))
        if j != i and not same(j):
            if "query_to_query" in also and not too_good("query", "query", j):
                total += math.exp(cosine(queries[i], queries[j]) / temperature)
            if "positive_to_positive" in also and not too_good("positive", "positive", j):
                total += math.exp(cosine(positives[i], positives[j]) / temperature)
        if "positive_to_query" in also and (j == i or not (same(j) or too_good("positive", "query", j))):
            total += math.exp(cosine(positives[i], queries[j]) / temperature)
    for n in range(0 if negatives is None or owner is None else len(negatives)):
        if negatives is None or owner is None or is_positive(n):
            continue
        own = int(owner[n]) == i
        s = cosine(queries[i], negatives[n])
        boosted = own if hardened == "own" else not own if hardened == "in_batch" else True
        if (own or negatives_of == "all") and not too_good("query", "negative", n):
            total += math.exp(s / temperature + (hardness * s if boosted else 0))
        crossed = negatives_of == "all" and "positive_to_positive" in also
        if crossed and not own and not too_good("positive", "negative", n):
            total += math.exp(cosine(positives[i], negatives[n]) / temperature)
    return math.log(total) - cosine(queries[i], positives[i]) / temperature


def contrastive(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    owner: Tensor | None = None,
    offset: int = 0,
    all_queries: Tensor | None = None,
    query_hashes: Tensor | None = None,
    positive_hashes: Tensor | None = None,
    negative_hashes: Tensor | None = None,
    guide: Guide | None = None,
    temperature: float = 0.05,
    hardness: float = 5.0,
    hardened: Literal["own", "in_batch", "all"] = "own",
    negatives_of: Literal["own", "all"] = "own",
    also: Collection[Direction] = (),
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """As `gemb.losses.contrastive`, by autograd over whole matrices, a size at a time."""
    sizes = sizes or (queries.shape[1],)
    masks = Masks(
        rows=len(positives),
        device=queries.device,
        offset=offset,
        owner=owner,
        query_hashes=query_hashes,
        positive_hashes=positive_hashes,
        negative_hashes=negative_hashes,
        guide=guide,
    )
    rows = torch.arange(len(queries), device=queries.device)
    losses = []
    for size in sizes:
        units = {
            "query": unit(queries if all_queries is None else all_queries, size),
            "positive": unit(positives, size),
        }
        anchors = {
            "query": unit(queries, size),
            "positive": units["positive"][offset : offset + len(queries)],
        }
        directions: list[Direction] = ["query_to_positive", *also]
        if negatives is not None:
            units["negative"] = unit(negatives, size)
            if negatives_of == "all":
                directions.append("query_to_negative")
                if "positive_to_positive" in also:
                    directions.append("positive_to_negative")
        logits = []
        for direction in directions:
            anchor, candidate = direction.split("_to_")
            scores = anchors[anchor] @ units[candidate].T
            block = scores / temperature
            if direction == "query_to_positive":
                positive = block[rows, rows + offset]
                if hardened != "own":
                    boost = hardness * scores.detach()
                    boost[rows, rows + offset] = 0
                    block = block + boost
            if direction == "query_to_negative" and owner is not None:
                own = owner == (rows + offset)[:, None]
                boosted = {"own": own, "in_batch": ~own, "all": torch.ones_like(own)}[hardened]
                block = block + hardness * scores.detach() * boosted
            mask = masks.left_out(direction, 0, len(queries))
            if mask is not None:
                block = block.masked_fill(mask, -torch.inf)
            logits.append(block)
        if negatives is not None and owner is not None and negatives_of == "own":
            local = owner - offset
            kept = (local >= 0) & (local < len(queries))
            left = masks.own_left_out()
            if left is not None:
                kept &= ~left
            local = local[kept]
            scores = (anchors["query"][local] * units["negative"][kept]).sum(1)
            if hardened != "in_batch":
                scores = scores / temperature + hardness * scores.detach()
            else:
                scores = scores / temperature
            block = scores.new_full((len(queries), len(scores)), -torch.inf)
            block = block.index_put((local, torch.arange(len(scores), device=scores.device)), scores)
            logits.append(block)
        losses.append((torch.logsumexp(torch.cat(logits, dim=1), dim=1) - positive).mean())
    return torch.stack(losses)
