"""Token states of a packed batch to one vector a text (sentence-transformers' pooling modes).

Modes are concatenated in the order of the folder. Prompt tokens can be left out; `cls` is then the first
token after them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gemb.model.layout import Layout

LINEAR_MODES = frozenset({"cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"})
"""Modes through which a linear map of the states can be moved to the vector."""


def pool(states: Tensor, layout: Layout, modes: Sequence[str], skip: int = 0) -> Tensor:
    """fp32 states[filled, D] -> [B, D * len(modes)]; `skip` leading tokens of each text take no part.

    A text's vector does not depend on the others: texts of one length are reduced along their tokens only.
    """
    pooled = []
    for group in layout.groups:
        tokens = torch.unflatten(states[group.start : group.stop], 0, (group.rows, group.length))
        # A text cut away down to its prompt keeps its last token.
        first = min(skip, group.length - 1)
        pooled.append(torch.cat([_pool_mode(tokens[:, first:], first, mode) for mode in modes], dim=-1))
    return torch.cat(pooled) if pooled else states.new_empty(0, states.shape[1] * len(modes))


def _pool_mode(tokens: Tensor, first: int, mode: str) -> Tensor:
    """tokens[N, L, D] -> [N, D]; `first` tokens of each text stand before them."""
    match mode:
        case "cls":
            return tokens[:, 0]
        case "lasttoken":
            return tokens[:, -1]
        case "max":
            return tokens.amax(1)
        case "mean":
            return tokens.sum(1) / tokens.shape[1]
        case "mean_sqrt_len_tokens":
            return tokens.sum(1) / math.sqrt(tokens.shape[1])
        case "weightedmean":
            # Weights count the positions of the text from 1, prompt included.
            last = first + tokens.shape[1]
            weights = torch.arange(first + 1, last + 1, device=tokens.device, dtype=tokens.dtype)
            return (tokens * weights[:, None]).sum(1) / weights.sum()
    raise ValueError(f"{mode!r} is no pooling mode")
