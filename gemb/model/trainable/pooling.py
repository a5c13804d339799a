"""Token states to one vector a text, differentiable, with a prompt of its own length before each text.

Every mode but `max` and attention is a weighted sum over the tokens; the weights are worked out once a
batch. The modes are those of `gemb.model.pooling`, which has the maths of attention pooling, too.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.model.layout import Layout
from gemb.model.trainable.functions import weighted_sums


def pool(
    states: Tensor,
    layout: Layout,
    lengths: NDArray[np.int32],
    skip: NDArray[np.int32],
    modes: Sequence[str],
    *,
    few: int = 1,
) -> Tensor:
    """states[T, D] -> [B, D * len(modes)]; the first skip[B] tokens of each text take no part.

    A text cut away down to its prompt keeps its last token. `few` is K of first-k and last-k.
    """
    skip = np.minimum(skip, lengths - 1)
    parts = []
    for mode in modes:
        if mode == "max":
            parts.append(_largest(states, layout, skip))
        else:
            weights = torch.from_numpy(token_weights(mode, lengths, skip, few)).to(
                states.device, states.dtype
            )
            parts.append(weighted_sums(states, weights, layout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def pool_by_attention(
    states: Tensor,
    layout: Layout,
    lengths: NDArray[np.int32],
    skip: NDArray[np.int32],
    attention: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """states[T, D] -> [B, D]; `attention` takes the texts of one length and which tokens take part."""
    skip = np.minimum(skip, lengths - 1)
    return torch.cat([attention(texts, ~is_prompt) for texts, is_prompt in _texts(states, layout, skip)])


def token_weights(
    mode: str, lengths: NDArray[np.int32], skip: NDArray[np.int32], few: int = 1
) -> NDArray[np.float64]:
    """float64[T], the share of each token in its text's vector.

    Raises ValueError for a mode that is none, or no weighted sum.
    """
    starts = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)  # of each token in its text
    first, size = np.repeat(skip, lengths), np.repeat(lengths, lengths)
    takes_part = place >= first
    match mode:
        case "cls":
            weights = place == first
        case "lasttoken":
            weights = place == size - 1
        case "first-k":
            taken = np.minimum(size - first, few)
            weights = (takes_part & (place < first + taken)) / taken
        case "last-k":
            taken = np.minimum(size - first, few)
            weights = (place >= size - taken) / taken
        case "mean":
            weights = takes_part / (size - first)
        case "mean_sqrt_len_tokens":
            weights = takes_part / np.sqrt(size - first)
        case "weightedmean":
            # Weights count the positions of the text from 1, prompt included.
            long, before = size.astype(np.int64), first.astype(np.int64)
            total = (long * (long + 1) - before * (before + 1)) // 2
            weights = takes_part * (place + 1) / total
        case _:
            raise ValueError(f"{mode!r} is no pooling mode")
    shares: NDArray[np.float64] = weights.astype(np.float64)
    return shares


def _largest(states: Tensor, layout: Layout, skip: NDArray[np.int32]) -> Tensor:
    """The largest value of each channel over the tokens of each text, [B, D]."""
    return torch.cat(
        [
            texts.masked_fill(is_prompt[..., None], -torch.inf).amax(1)
            for texts, is_prompt in _texts(states, layout, skip)
        ]
    )


def _texts(states: Tensor, layout: Layout, skip: NDArray[np.int32]) -> Iterator[tuple[Tensor, Tensor]]:
    """The texts of each length, [N, L, D], and which of their tokens take no part, bool[N, L]."""
    firsts = torch.from_numpy(skip).to(states.device)
    sizes = [group.stop - group.start for group in layout.groups]
    # Split, not sliced: the backward pass of a slice would fill a gradient as large as all states.
    for group, tokens in zip(layout.groups, torch.split(states, sizes), strict=True):
        place = torch.arange(group.length, device=states.device)
        is_prompt = place < firsts[group.row : group.row + group.rows, None]
        yield torch.unflatten(tokens, 0, (group.rows, group.length)), is_prompt
