"""The losses that train an embedding model, as pure functions of embeddings.

Every function takes raw embeddings, the rows as the model gives them, and normalises what it compares
itself. float64 and float32 are computed as they are, 16-bit floats in float32. A row of zeros has
similarity 0 to everything and gets no gradient. Losses are in nats where they are logarithms, and mean
values over the rows of the batch; the caller weights and adds them.

Letters: B rows (pairs) of this process, P rows of all processes (P = B on one), N hard negatives,
D width of the embeddings, E width of a teacher's, K Matryoshka sizes.
"""

from gemb.losses.candidates import Direction, Guide, LeftOut, count_left_out
from gemb.losses.in_batch import GECKO, GTE, QWEN3, contrastive, samtone
from gemb.losses.matching import Distance, embedding_matching, score_matching
from gemb.losses.scored import cosent, cosine_error
from gemb.losses.spread import orthogonality, spread_out

__all__ = [
    "GECKO",
    "GTE",
    "QWEN3",
    "Direction",
    "Distance",
    "Guide",
    "LeftOut",
    "contrastive",
    "cosent",
    "cosine_error",
    "count_left_out",
    "embedding_matching",
    "orthogonality",
    "samtone",
    "score_matching",
    "spread_out",
]
