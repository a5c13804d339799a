"""Which texts of a batch are negatives of a row, and which are not because they may be right answers.

B rows of this process, P rows of all processes, N hard negatives, C candidates of one kind. Row i of this
process is row `offset + i` of all; everything here counts rows of all processes.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Literal

import torch
from torch import Tensor

from gemb.losses.all_sizes import PANEL_ROWS
from gemb.losses.prefixes import unit

Direction = Literal[
    "query_to_positive",
    "query_to_negative",
    "query_to_query",
    "positive_to_query",
    "positive_to_positive",
    "positive_to_negative",
]
"""Whose similarities with whom: from each row's query or positive to candidates of all rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """A teacher's view of the batch: what it finds about as good as a row's positive is no negative.

    queries[P, E], positives[P, E] and negatives[N, E] are the teacher's raw embeddings of the texts of the
    batch, of all processes where those are gathered. A candidate is left out where its cosine with the row's
    query (or positive, where that is the one compared) is above

        positive - margin               with `relative` False (GISTEmbed, arXiv 2402.16829, has margin 0)
        positive - margin * |positive|  with `relative` True (NV-Retriever, arXiv 2407.15831: "95 percent of
                                        the positive" is margin 0.05)

    where `positive` is the teacher's cosine of the row's query and positive. The absolute value keeps the
    threshold below a negative score too: -0.4 and margin 0.05 give -0.42. A margin below 0 lets candidates
    be better than the positive: -0.1 with the model's own embeddings is the rule of Qwen3-Embedding
    (arXiv 2506.05176).
    """

    queries: Tensor
    positives: Tensor
    negatives: Tensor | None = None
    margin: float = 0.0
    relative: bool = False


class Masks:
    """Which candidates of a batch are left out, some rows at a time, so that no mask of the batch is kept.

    Left out of the denominator of row i:
    - another row's query or positive j where the texts of the queries i and j, or of the positives i and j,
      are equal (1_TN of EmbeddingGemma, arXiv 2509.20354, eq. 3). Read to the letter the paper also drops
      j = i, and with it the positive; Gemini Embedding 2 (2605.27295) prints what is meant.
    - the row itself where its own tower is asked: a text's similarity with itself is 1.
    - a hard negative whose text is that of the row's positive.
    - what the guide finds too good (`Guide`), but never the row's own positive.

    `rows` is P. `owner`[N] is the row each hard negative belongs to. The hashes[P], [P] and [N] are int64,
    equal where texts are equal; None of a kind: no text of it is known to repeat.
    """

    def __init__(
        self,
        *,
        rows: int,
        device: torch.device,
        offset: int,
        owner: Tensor | None,
        query_hashes: Tensor | None,
        positive_hashes: Tensor | None,
        negative_hashes: Tensor | None,
        guide: Guide | None,
    ) -> None:
        self._rows = rows
        self._device = device
        self._offset = offset
        self._owner = owner
        self._repeating = [
            hashes
            for hashes in (query_hashes, positive_hashes)
            # Most batches repeat nothing, and then nothing needs to be compared.
            if hashes is not None and len(torch.unique(hashes)) < len(hashes)
        ]
        self._positive_hashes = positive_hashes
        self._negative_hashes = negative_hashes
        self._guide: dict[str, Tensor] = {}
        if guide is not None:
            with torch.no_grad():
                self._guide = {"query": unit(guide.queries), "positive": unit(guide.positives)}
                if guide.negatives is not None:
                    self._guide["negative"] = unit(guide.negatives)
                positive = (self._guide["query"] * self._guide["positive"]).sum(1)  # [P]
                self._threshold = positive - guide.margin * (positive.abs() if guide.relative else 1)

    def left_out(self, direction: Direction, start: int, stop: int) -> Tensor | None:
        """For local rows start..stop where a candidate is left out, bool[stop - start, C]; None: nowhere."""
        rows = slice(self._offset + start, self._offset + stop)
        anchor, candidate = direction.split("_to_")
        masks = []
        if candidate != "negative":
            masks += [hashes[rows, None] == hashes for hashes in self._repeating]
        elif self._positive_hashes is not None and self._negative_hashes is not None:
            masks.append(self._positive_hashes[rows, None] == self._negative_hashes)
        if candidate == "negative" and anchor == "positive" and self._owner is not None:
            numbers = torch.arange(rows.start, rows.stop, device=self._owner.device)
            masks.append(numbers[:, None] == self._owner)
        if anchor in self._guide and candidate in self._guide:
            scores = self._guide[anchor][rows] @ self._guide[candidate].T
            masks.append(scores > self._threshold[rows, None])
        if anchor == candidate and not masks:
            masks.append(torch.zeros(stop - start, self._rows, dtype=torch.bool, device=self._device))
        if not masks:
            return None
        mask = reduce(or_, masks)
        if candidate != "negative":
            own = torch.arange(stop - start, device=mask.device)
            mask[own, own + rows.start] = anchor == candidate
        return mask

    def own_left_out(self) -> Tensor | None:
        """Where a hard negative is left out for the row it belongs to, bool[N]; None: nowhere."""
        if self._owner is None:
            return None
        masks = []
        if self._positive_hashes is not None and self._negative_hashes is not None:
            masks.append(self._positive_hashes[self._owner] == self._negative_hashes)
        if "negative" in self._guide:
            scores = (self._guide["query"][self._owner] * self._guide["negative"]).sum(1)
            masks.append(scores > self._threshold[self._owner])
        return reduce(or_, masks) if masks else None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """How many (row, candidate) pairs of a batch are no negatives, of those that could be."""

    duplicates: int
    """Left out because texts repeat."""
    false_negatives: int
    """Left out because the guide finds the candidate too good, and not because texts repeat."""
    candidates: int
    """The pairs of a row with another row's positive or with a hard negative of its own."""


def count_left_out(
    queries: int,
    positives: int,
    *,
    offset: int = 0,
    owner: Tensor | None = None,
    query_hashes: Tensor | None = None,
    positive_hashes: Tensor | None = None,
    negative_hashes: Tensor | None = None,
    guide: Guide | None = None,
) -> LeftOut:
    """What `contrastive` leaves out for B queries, P positives and the same other arguments, for a report.

    Counts query to positive and the rows' own hard negatives. It compares the guide's vectors once more.
    """

    def count(guide: Guide | None) -> int:
        masks = Masks(
            rows=positives,
            device=torch.device("cpu"),  # asked for no direction that needs it
            offset=offset,
            owner=owner,
            query_hashes=query_hashes,
            positive_hashes=positive_hashes,
            negative_hashes=negative_hashes,
            guide=guide,
        )
        found = [
            masks.left_out("query_to_positive", start, min(start + PANEL_ROWS, queries))
            for start in range(0, queries, PANEL_ROWS)
        ]
        left_out = masks.own_left_out()
        if left_out is not None:
            found.append(left_out & local)
        return sum(int(mask.sum()) for mask in found if mask is not None)

    local = torch.zeros(0) if owner is None else (owner >= offset) & (owner < offset + queries)
    duplicates = count(None)
    return LeftOut(
        duplicates=duplicates,
        false_negatives=count(guide) - duplicates if guide is not None else 0,
        candidates=queries * (positives - 1) + int(local.sum()),
    )
