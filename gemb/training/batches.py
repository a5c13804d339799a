"""What the training loop gets: batches of token ids, each from one data set.

B examples, R texts (rows), T packed tokens, N hard negatives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["pairs", "scored"]
"""`pairs` are contrastive examples, with or without hard negatives; `scored` are two texts and a number."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """All examples that see each other as in-batch negatives, tokenised; the loop may cut it into chunks.

    The R texts stand in this order: B queries, B positives, N negatives, so R = 2 B + N; of scored pairs
    the B first texts, then the B second ones, and N is 0.
    """

    dataset: str
    """The name of the data set that every row is from."""
    kind: Kind
    ids: NDArray[np.int32]
    """[T], the token ids of the texts one after the other, prompts and special tokens included."""
    lengths: NDArray[np.int32]
    """[R], tokens of each text; their sum is T."""
    prompt_tokens: NDArray[np.int32]
    """[R], leading tokens that are left out of the pooling; 0 where the model pools its prompts too."""
    pairs: int
    """B."""
    owner: NDArray[np.int64]
    """[N], the example that each negative belongs to, ascending."""
    hashes: NDArray[np.int64]
    """[R], of the texts without prompt and title: equal texts have equal hashes, on every machine."""
    scores: NDArray[np.float32] | None
    """[B], of scored pairs, as in the file; else None."""
    texts: Sequence[str] | None
    """[R], the texts without prompt, titles joined before them, where the mixture was asked for them."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    @property
    def measures(self) -> Mapping[str, object]:
        """What metrics.jsonl says of the batch."""
        return {"negatives_per_query": self.pairs - 1, "hard_negatives": len(self.owner)}
