"""Token-budget batches: texts sorted by token count, packed without padding.

B rows of a batch, T its packed tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemb.text.tokenisation import Encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids of some texts, one after the other; longest first, so that equal lengths are neighbours."""

    ids: NDArray[np.int32]
    """[T]"""
    lengths: NDArray[np.int32]
    """[B], descending, each >= 1; their sum is T."""
    rows: NDArray[np.int64]
    """[B], the position of each text in what was encoded."""
    prompt_tokens: int
    """How many leading tokens of every row are left out of pooling (`include_prompt: false`); usually 0."""


def token_batches(encoded: Encoded, budget_tokens: int) -> list[Batch]:
    """All rows of `encoded` in batches of at most `budget_tokens` tokens, longest texts first.

    Rows are sorted by token count, equal ones in input order, and filled greedily; a text longer than
    the budget is a batch of its own. The first batch is the one that needs the most memory for attention.

    Raises ValueError if the budget is not positive or a row has no tokens (nothing could be pooled).
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens is {budget_tokens}, but must be at least 1")
    lengths = encoded.lengths
    if len(lengths) == 0:
        return []
    if lengths.min() < 1:
        raise ValueError(f"row {int(lengths.argmin())} has no tokens; reject it before batching")

    rows = np.argsort(-lengths, kind="stable")  # [N]
    sorted_lengths = lengths[rows]
    ends = np.cumsum(sorted_lengths, dtype=np.int64)  # where each row ends in the sorted ids
    starts = ends - sorted_lengths
    first_tokens = np.cumsum(lengths, dtype=np.int64) - lengths  # where each row starts in encoded.ids
    # One gather for all rows: token t of the sorted ids comes from the row's own start.
    source = np.arange(ends[-1]) + np.repeat(first_tokens[rows] - starts, sorted_lengths)
    ids = encoded.ids[source]

    batches: list[Batch] = []
    first = 0
    while first < len(rows):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + budget_tokens, side="right")))
        batches.append(
            Batch(
                ids[starts[first] : ends[last - 1]],
                sorted_lengths[first:last],
                rows[first:last],
                encoded.prompt_tokens,
            )
        )
        first = last
    return batches
