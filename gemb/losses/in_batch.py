"""Contrastive losses with in-batch negatives, over all Matryoshka sizes.

B rows (pairs) of this process, P rows of all processes, N hard negatives, D width, K sizes. Row i of this
process is row `offset + i` of all. Symbols of the formulas: s a cosine, t the temperature, a the hardness.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemb.losses.all_sizes import (
    Context,
    Rows,
    add_gradient,
    add_pair_gradient,
    common_factor,
    dot_products,
    pair_cosines,
    panel_memory,
    panels,
    to_cosines,
    to_slopes,
)
from gemb.losses.candidates import Direction, Guide, Masks
from gemb.losses.prefixes import check_sizes, full_precision, promoted

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
    weights = [1.0] * len(sizes) if weights is None else weights
    if len(weights) != len(sizes):
        raise ValueError(f"{len(weights)} weights stand against {len(sizes)} Matryoshka sizes")
    if negatives is not None and not len(negatives):
        negatives = None
    directions: list[Direction] = ["query_to_positive", *also]
    if negatives is not None and negatives_of == "all":
        directions.append("query_to_negative")
        if "positive_to_positive" in also:
            directions.append("positive_to_negative")
    ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
    form = _Form(
        sizes=tuple(sizes[k] for k in ascending),
        weights=tuple(weights[k] for k in ascending),
        directions=tuple(directions),
        own_negatives=negatives is not None and negatives_of == "own",
        offset=offset,
        owner=owner,
        masks=Masks(
            rows=len(positives),
            device=queries.device,
            offset=offset,
            owner=owner,
            query_hashes=query_hashes,
            positive_hashes=positive_hashes,
            negative_hashes=negative_hashes,
            guide=guide,
        ),
        temperature=temperature,
        hardness=hardness,
        hardened=hardened,
    )
    embeddings = (
        None if rows is None else promoted(rows) for rows in (queries, all_queries, positives, negatives)
    )
    with full_precision(queries):
        terms: Tensor = _Contrastive.apply(form, *embeddings)  # type: ignore[no-untyped-call]
    return terms[[ascending.index(k) for k in range(len(sizes))]]


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
        all_queries=all_queries,
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
        all_queries=None if len(positives) == len(queries) else positives,
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


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """Everything about a loss but its embeddings."""

    sizes: tuple[int, ...]
    """Ascending."""
    weights: tuple[float, ...]
    directions: tuple[Direction, ...]
    own_negatives: bool
    """Each row has its own hard negatives beside the directions' candidates."""
    offset: int
    owner: Tensor | None
    masks: Masks
    temperature: float
    hardness: float
    hardened: Literal["own", "in_batch", "all"]

    @property
    def harder(self) -> float:
        """What the hardness weight multiplies a logit with: (s / t + a * s) / (s / t)."""
        return 1 + self.hardness * self.temperature

    def made_harder(self, direction: Direction, start: int, stop: int, like: Tensor) -> Tensor | None:
        """Which candidates of local rows start..stop get the hardness weight, as like[..., C]; None: none."""
        rows = torch.arange(self.offset + start, self.offset + stop, device=like.device)[:, None]
        if direction == "query_to_positive" and self.hardened != "own":
            return rows != torch.arange(like.shape[-1], device=like.device)
        if direction == "query_to_negative" and self.owner is not None:
            own = rows == self.owner
            return {"own": own, "in_batch": ~own, "all": torch.ones_like(own)}[self.hardened]
        return None


SAFE_EXPONENT = 60.0
"""Up to here exponentials are summed as they are: exp(60) times a million candidates fits float32, exp(-60)
is not subnormal. Beyond, each row's largest logit is taken off first, which costs two more passes."""


class _Contrastive(torch.autograd.Function):
    """The terms[K], and on the way the gradient of their sum with the form's weights.

    A block of logits lives only while it is in the cache: value and gradient are taken from it at once, and
    nothing that grows with the square of the batch is kept for the backward pass, which finds the gradient
    ready. Only where the terms were weighted otherwise is all computed again.
    """

    @staticmethod
    def forward(
        ctx: Context,
        form: _Form,
        queries: Tensor,
        all_queries: Tensor | None,
        positives: Tensor,
        negatives: Tensor | None,
    ) -> Tensor:
        weights = queries.new_tensor(form.weights) if any(ctx.needs_input_grad) else None
        terms, gradients = _evaluate(form, queries, all_queries, positives, negatives, weights)
        ctx.arguments = form
        ctx.save_for_backward(queries, all_queries, positives, negatives, *gradients)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
        queries, all_queries, positives, negatives, *gradients = ctx.saved_tensors
        factor = common_factor(upstream, ctx.arguments.weights)
        if factor is not None:
            return None, *(None if gradient is None else gradient * factor for gradient in gradients)
        with full_precision(queries):
            again = _evaluate(ctx.arguments, queries, all_queries, positives, negatives, upstream)
        return None, *again[1]


def _evaluate(
    form: _Form,
    queries: Tensor,
    all_queries: Tensor | None,
    positives: Tensor,
    negatives: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The terms[K] and, for weights[K] of them, the gradients of their sum for the embeddings."""

    def prefixes(rows: Tensor) -> Rows:
        return Rows(rows, form.sizes, with_gradient=weights is not None)

    count = len(queries)
    anchors = {"query": prefixes(queries), "positive": prefixes(positives)}
    candidates = dict(anchors)
    if all_queries is not None:
        candidates["query"] = prefixes(all_queries)
    if negatives is not None:
        candidates["negative"] = prefixes(negatives)
    own = None
    if form.own_negatives and form.owner is not None:
        own = _OwnNegatives(form, form.owner, anchors["query"], candidates["negative"])
    slope = None if weights is None else weights[:, None] / count  # [K, 1], of each row's loss
    losses, totals = (queries.new_empty(len(form.sizes), count) for _ in range(2))
    ways = []
    for direction in form.directions:
        anchor, candidate = direction.split("_to_")
        first = 0 if anchor == "query" else form.offset
        ways.append(_Panel(form, direction, anchors[anchor], first, candidates[candidate]))
    columns = len(form.sizes) * sum(len(panel.candidates.rows) for panel in ways)
    for start, stop, tiles in panels(count, columns, queries.device):
        for panel in ways:
            panel.multiply(start, stop)
        for low, high in tiles:
            rows = slice(start + low, start + high)
            blocks = [_Block(panel, low, high) for panel in ways]
            rest = [block.log_sums for block in blocks]
            if own is not None:
                rest.append(own.log_sums[:, rows])
            # The denominator is the positive and the rest, so the loss of a row is log(1 + rest / positive),
            # exactly 0 where there is no rest.
            positive = blocks[0].positive
            odds = (rest[0] if len(rest) == 1 else torch.logsumexp(torch.stack(rest), dim=0)) - positive
            losses[:, rows] = torch.logaddexp(odds, torch.zeros_like(odds))
            totals[:, rows] = positive + losses[:, rows]
            if slope is not None:
                for block in blocks:
                    block.take_slopes(slope, totals[:, rows], -slope * torch.sigmoid(odds))
        if slope is not None:
            for panel in ways:
                add_gradient(panel.products, panel.anchors, panel.span, panel.candidates)
    if slope is not None and own is not None:
        own.add_gradient(slope, totals)
    everyone = None if all_queries is None else candidates["query"].finish()
    apart = None if negatives is None else candidates["negative"].finish()
    gradients = anchors["query"].finish(), everyone, anchors["positive"].finish(), apart
    return losses.mean(1), gradients


class _Panel:
    """Dot products[K, R, C] of some rows in one direction, which tile by tile become logits and slopes.

    Row 0 of the batch is anchor number `first`.
    """

    def __init__(
        self, form: _Form, direction: Direction, anchors: Rows, first: int, candidates: Rows
    ) -> None:
        self.form = form
        self.direction = direction
        self.anchors = anchors
        self.candidates = candidates
        self._first = first
        self._memory = panel_memory(anchors, candidates)

    def multiply(self, start: int, stop: int) -> None:
        """Go on to the rows start..stop of the batch."""
        self.start = start
        self.span = slice(self._first + start, self._first + stop)
        self.products = dot_products(self.anchors, self.span, self.candidates, self._memory)


class _Block:
    """A tile of a panel: logits[K, R, C] of some rows, the row's own positive kept apart from the others."""

    def __init__(self, panel: _Panel, low: int, high: int) -> None:
        form, direction = panel.form, panel.direction
        span = slice(panel.span.start + low, panel.span.start + high)
        start, stop = panel.start + low, panel.start + high
        self._sides = panel.anchors, span, panel.candidates, 1 / form.temperature
        self._logits = to_cosines(panel.products[:, low:high], *self._sides)
        shown = self._logits
        harder = form.made_harder(direction, start, stop, shown) if form.hardness else None
        if harder is not None:
            shown = torch.where(harder, shown * form.harder, shown)
        left_out = form.masks.left_out(direction, start, stop)
        if left_out is not None:
            shown = shown.masked_fill(left_out, -torch.inf)
        if form.harder / form.temperature <= SAFE_EXPONENT:
            self._shifts = None
            self._exponentials = torch.exp(shown)
        else:
            shifts = shown.amax(2)
            self._shifts = shifts.where(shifts != -torch.inf, 0)  # where a row's candidates are all left out
            self._exponentials = torch.sub(shown, self._shifts[:, :, None]).exp_()
        self._matches = None
        if direction == "query_to_positive":
            numbers = torch.arange(stop - start, device=shown.device)
            self._matches = numbers + (start + form.offset)
            self.positive = self._logits[:, numbers, self._matches]
            """The logits[K, R] of the rows' own positives."""
            self._exponentials[:, numbers, self._matches] = 0
        self.log_sums = self._exponentials.sum(2).log_()
        """The log[K, R] of the sum of the exponentials of a row's candidates, its positive not among them."""
        if self._shifts is not None:
            self.log_sums += self._shifts

    def take_slopes(self, slope: Tensor, totals: Tensor, positive_slopes: Tensor) -> None:
        """Put slopes in the place of the logits.

        slope[K, 1] is that of each row's loss, totals[K, R] the logs of the denominators and
        positive_slopes[K, R] those of the logits of the positives.
        """
        row_slopes = slope * torch.exp(-totals if self._shifts is None else self._shifts - totals)
        matches = None if self._matches is None else (self._matches, positive_slopes)
        to_slopes(self._logits, self._exponentials, row_slopes, matches, *self._sides)


class _OwnNegatives:
    """The hard negatives that are in the denominator of their own row only: M pairs."""

    def __init__(self, form: _Form, owner: Tensor, queries: Rows, negatives: Rows) -> None:
        local = owner - form.offset
        kept = (local >= 0) & (local < len(queries.rows))
        left_out = form.masks.own_left_out()
        if left_out is not None:
            kept &= ~left_out
        columns = kept.nonzero().flatten()
        self._rows = local[columns]
        self._sides = queries, self._rows, negatives, columns, 1 / form.temperature
        self._logits = pair_cosines(*self._sides)  # [K, M]
        self._shown = self._logits if form.hardened == "in_batch" else self._logits * form.harder
        shifts = torch.full_like(queries.inverse, -torch.inf)  # [K, B]
        shifts.scatter_reduce_(1, self._rows.expand_as(self._shown), self._shown, "amax")
        shifts = shifts.where(shifts != -torch.inf, 0)
        exponentials = torch.exp(self._shown - shifts[:, self._rows])
        sums = torch.zeros_like(shifts).index_add_(1, self._rows, exponentials)
        self.log_sums = shifts + sums.log()
        """The log[K, B] of the sum of the exponentials of each row's hard negatives."""

    def add_gradient(self, slope: Tensor, totals: Tensor) -> None:
        """For the slope[K, 1] of each row's loss and the logs[K, B] of the denominators."""
        slopes = slope * torch.exp(self._shown - totals[:, self._rows])
        add_pair_gradient(*self._sides, self._logits, slopes)
