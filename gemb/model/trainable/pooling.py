"""Token states to one vector a text, differentiable, with a prompt of its own length before each text.

Every mode but `max` is a weighted sum over the tokens; the weights are worked out once a batch.
The modes are those of `gemb.model.pooling`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.model.layout import Layout
from gemb.model.trainable.functions import weighted_sums


def pool(
    states: Tensor, layout: Layout, lengths: NDArray[np.int32], skip: NDArray[np.int32], modes: Sequence[str]
) -> Tensor:
    """states[T, D] -> [B, D * len(modes)]; the first skip[B] tokens of each text take no part.

    A text cut away down to its prompt keeps its last token.
    """
    skip = np.minimum(skip, lengths - 1)
    parts = []
    for mode in modes:
        if mode == "max":
            parts.append(_largest(states, layout, skip))
        else:
            weights = torch.from_numpy(token_weights(mode, lengths, skip)).to(states.device, states.dtype)
            parts.append(weighted_sums(states, weights, layout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def token_weights(mode: str, lengths: NDArray[np.int32], skip: NDArray[np.int32]) -> NDArray[np.float64]:
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
    firsts = torch.from_numpy(skip).to(states.device)
    parts = []
    sizes = [group.stop - group.start for group in layout.groups]
    # Split, not sliced: the backward pass of a slice would fill a gradient as large as all states.
    for group, tokens in zip(layout.groups, torch.split(states, sizes), strict=True):
        texts = torch.unflatten(tokens, 0, (group.rows, group.length))
        place = torch.arange(group.length, device=states.device)
        is_prompt = place < firsts[group.row : group.row + group.rows, None]
        parts.append(texts.masked_fill(is_prompt[..., None], -torch.inf).amax(1))
    return torch.cat(parts)
