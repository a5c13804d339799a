"""Matryoshka prefixes (MRL, arXiv 2205.13147): the first k coordinates of each row, made unit length.

B rows, D width, K sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_sizes(sizes: Sequence[int] | None, width: int) -> tuple[int, ...]:
    """The Matryoshka sizes as given, or the full `width` alone for None.

    Raises ValueError where there is none, one comes twice, or one is not in 1..width.
    """
    if sizes is None:
        return (width,)
    if not sizes:
        raise ValueError(f"no Matryoshka size is given; None means the full width, {width}")
    for size in sizes:
        if not 1 <= size <= width:
            raise ValueError(f"Matryoshka size {size} is not in 1..{width}, the width of the embeddings")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"Matryoshka sizes {tuple(sizes)} name one size twice")
    return tuple(sizes)


def unit(rows: Tensor, size: int | None = None) -> Tensor:
    """The first `size` coordinates (None: all) of rows[B, D], each row divided by its norm: [B, size].

    16-bit rows become float32. A row of zeros stays zeros and gets no gradient.
    """
    prefix = promoted(rows)[:, :size]
    norms: Tensor = torch.linalg.vector_norm(prefix, dim=1, keepdim=True)  # [B, 1]
    return prefix / norms.where(norms > 0, torch.inf)


def cosines(first: Tensor, second: Tensor, sizes: Sequence[int]) -> Tensor:
    """The cosine of row i of first[B, D] with row i of second[B, D] at every size: [K, B]."""
    return torch.stack([(unit(first, size) * unit(second, size)).sum(1) for size in sizes])


def full_precision(rows: Tensor) -> torch.autocast:
    """The context in which autocast leaves products of rows on this device as they are.

    A product in bfloat16 has errors of 0.004, which a temperature of 0.05 makes 0.08 of a logit.
    """
    return torch.autocast(rows.device.type, enabled=False)


def promoted(rows: Tensor) -> Tensor:
    """Rows in float32, or in float64 where they are: squares of 16-bit floats lose too much."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
