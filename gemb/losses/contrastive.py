"""Contrastive losses with in-batch negatives, over all Matryoshka sizes.

B rows (pairs) of this process, P rows of all processes, N hard negatives, D width, K sizes. Row i of this
process is row `offset + i` of all. Symbols of the formulas: s a cosine, t the temperature, a the hardness.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from gemb.losses.candidates import Direction, Guide, Masks
from gemb.losses.prefixes import check_sizes, unit

GECKO: tuple[Direction, ...] = ("query_to_query",)
"""Other rows' queries are negatives too (Gecko, arXiv 2403.20327; SamToNe, 2306.02516, on the query side)."""
QWEN3: tuple[Direction, ...] = ("query_to_query", "positive_to_positive")
"""Queries against queries and positives against positives (Qwen3-Embedding, arXiv 2506.05176)."""
GTE: tuple[Direction, ...] = ("query_to_query", "positive_to_query", "positive_to_positive")
"""All four ways in one softmax (GTE, arXiv 2308.03281). As printed, the row's own pair is in the denominator
twice, once from each side."""


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
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The contrastive loss at each Matryoshka size, [K], the mean over the rows.

    With the defaults equations 2 and 3 of EmbeddingGemma (arXiv 2509.20354): for each row i

        -log  exp(s(q_i, p_i) / t) / ( sum_n w_n exp(s(q_i, n) / t) + sum_j 1_TN(i, j) exp(s(q_i, p_j) / t) )

    over the row's own hard negatives n with weight w_n = exp(a * sg(s(q_i, n))), sg stopping the gradient,
    and over the positives of all rows; 1_TN leaves out the duplicates (`Masks`) and never the row's own
    positive. The paper has at most one hard negative a row; several are added up, and rows may have none.
    Each size compares the prefixes, made unit length, and the terms are to be added (MRL, 2205.13147); their
    weights in the paper are 1.

    queries[B, D] and positives[P, D]: the positive of query i is positives[i + offset]. With several
    processes B rows are this one's, and the other tensors hold the rows of all, gathered with gradients;
    each process takes its own mean, so that the mean over equal processes is the loss of the whole batch.
    negatives[N, D]: `owner`[N] is the row, of all, that each belongs to.
    all_queries[P, D]: the queries of all rows, for directions to queries; None: `queries` are all.
    query_hashes[P], positive_hashes[P], negative_hashes[N]: int64, equal where texts are equal (`Masks`).
    guide: a teacher's view, which leaves out further candidates (`Guide`).
    temperature: t > 0, divides the cosines. Not published; 0.05 is ours.
    hardness: a >= 0, not divided by t. 5 is EmbeddingGemma's; 0 turns it off.
    hardened: which logits of queries get a * sg(s) added. "own": the row's own hard negatives
        (EmbeddingGemma). "in_batch": the candidates of other rows (LLaVE, 2503.04812, with a = 9).
        "all": both.
    negatives_of: "own" has only the row's own hard negatives in its denominator; "all" those of all rows
        (sentence-transformers).
    also: directions besides query to positive whose candidates enter the same denominator: `GECKO`,
        `QWEN3` or `GTE`. "positive_to_positive" brings "positive_to_negative" with `negatives_of` "all".
    weights[K]: what the terms will be multiplied with before they are added (None: all alike). It makes the
        backward pass faster and changes no result.

    Raises ValueError where shapes or values do not fit.
    """
    sizes = check_sizes(sizes, queries.shape[1])
    _check(queries, positives, negatives, owner, offset, all_queries, also, temperature, hardness)
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


def samtone(
    queries: Tensor,
    positives: Tensor,
    *,
    both_sides: bool = True,
    offset: int = 0,
    all_queries: Tensor | None = None,
    query_hashes: Tensor | None = None,
    positive_hashes: Tensor | None = None,
    temperature: float = 0.01,
    sizes: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Same-tower negatives, SamToNe (arXiv 2306.02516), at each Matryoshka size: [K], the mean over the rows.

    For each row -log of exp(s(q_i, p_i) / t) over the sum of exp(s(q_i, p_j) / t) for all j and of
    exp(s(q_i, q_j) / t) for j != i. `both_sides` adds the same with queries and positives exchanged. The
    paper has neither hard negatives nor a mask of duplicates; without hashes there is none here either.
    The temperature 0.01 is that of the group's paper before (Dong et al. 2022), not confirmed for SamToNe.

    Arguments as those of `contrastive`.

    Raises ValueError where shapes or values do not fit.
    """
    everyone = queries if all_queries is None else all_queries
    loss = contrastive(
        queries,
        positives,
        offset=offset,
        all_queries=everyone,
        query_hashes=query_hashes,
        positive_hashes=positive_hashes,
        temperature=temperature,
        also=GECKO,
        sizes=sizes,
        weights=weights,
    )
    if not both_sides:
        return loss
    return loss + contrastive(
        positives[offset : offset + len(queries)],
        everyone,
        offset=offset,
        all_queries=positives,
        query_hashes=positive_hashes,
        positive_hashes=query_hashes,
        temperature=temperature,
        also=GECKO,
        sizes=sizes,
        weights=weights,
    )


def _check(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    owner: Tensor | None,
    offset: int,
    all_queries: Tensor | None,
    also: Collection[Direction],
    temperature: float,
    hardness: float,
) -> None:
    """Raises ValueError for what would give wrong numbers rather than an error further on."""
    everyone = queries if all_queries is None else all_queries
    if not len(queries):
        raise ValueError("there are no queries; the mean over no rows has no value")
    if not 0 <= offset <= len(positives) - len(queries):
        raise ValueError(
            f"{len(queries)} queries from offset {offset} have no positive each among {len(positives)}"
        )
    if any(direction.endswith("_to_query") for direction in also) and len(everyone) != len(positives):
        raise ValueError(
            f"{len(everyone)} queries stand against {len(positives)} positives; all_queries has one for each"
        )
    if negatives is not None and (owner is None or len(owner) != len(negatives)):
        owners = 0 if owner is None else len(owner)
        raise ValueError(f"{len(negatives)} negatives have {owners} owners; each belongs to one row")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, not above 0")
    if not hardness >= 0:
        raise ValueError(f"hardness is {hardness}, not 0 or more")
