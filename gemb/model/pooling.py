"""Token states of a packed batch to one vector a text.

The modes of sentence-transformers, and those of Gemma Encoder (arXiv 2503.02656) that it has not: the first
or last K tokens, and attention pooling with a query probe or with key and value probes. The paper's text was
not at hand: first-k and last-k take the mean of their tokens, and key-value probes the mean over the tokens.

Modes are concatenated in the order of the folder. Prompt tokens can be left out; `cls` is then the first
token after them. The maths of attention pooling serves training as well, so it is written for texts of one
length, differentiable, with a mask of the tokens that take part.

N texts of one length L, D width, H heads of C = D / H channels, P probes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gemb.model.folder import ModuleSpec, PoolingSettings
from gemb.model.layout import Layout

LINEAR_MODES = frozenset({
    "cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "first-k", "last-k",
})  # fmt: skip
"""Modes through which a linear map of the states can be moved to the vector."""
AttentionPooling = Callable[[Tensor], Tensor]
"""tokens[N, L, D] -> [N, D]."""


def pool(states: Tensor, layout: Layout, modes: Sequence[str], skip: int = 0, *, few: int = 1) -> Tensor:
    """fp32 states[filled, D] -> [B, D * len(modes)]; `skip` leading tokens of each text take no part.

    `few` is K of first-k and last-k; a shorter text gives all that it has.
    A text's vector does not depend on the others: texts of one length are reduced along their tokens only.
    """
    pooled = [
        torch.cat([_pool_mode(tokens, first, mode, few) for mode in modes], dim=-1)
        for tokens, first in _texts(states, layout, skip)
    ]
    return torch.cat(pooled) if pooled else states.new_empty(0, states.shape[1] * len(modes))


def pool_by_attention(states: Tensor, layout: Layout, attention: AttentionPooling, skip: int = 0) -> Tensor:
    """fp32 states[filled, D] -> [B, D] by `attention`; `skip` leading tokens of each text take no part."""
    pooled = []
    for tokens, _ in _texts(states, layout, skip):
        # A row of a product depends on the number of rows on a CPU: one text at a time.
        pooled += [attention(text) for text in torch.split(tokens, 1 if tokens.is_cpu else len(tokens))]
    return torch.cat(pooled) if pooled else states.new_empty(0, states.shape[1])


def _texts(states: Tensor, layout: Layout, skip: int) -> list[tuple[Tensor, int]]:
    """The texts of each length, [N, L, D] without `skip` tokens, and how many tokens that took away."""
    texts = []
    for group in layout.groups:
        tokens = torch.unflatten(states[group.start : group.stop], 0, (group.rows, group.length))
        # A text cut away down to its prompt keeps its last token.
        first = min(skip, group.length - 1)
        texts.append((tokens[:, first:], first))
    return texts


def _pool_mode(tokens: Tensor, first: int, mode: str, few: int) -> Tensor:
    """tokens[N, L, D] -> [N, D]; `first` tokens of each text stand before them."""
    match mode:
        case "first-k":
            return _pool_mode(tokens[:, :few], first, "mean", few)
        case "last-k":
            return _pool_mode(tokens[:, -few:], first, "mean", few)
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


# --- attention pooling --------------------


def attention_pooling(module: ModuleSpec, device: str) -> AttentionPooling | None:
    """The attention pooling of a module, its tensors in fp32 on `device`; None for the other modes."""
    settings = module.settings
    if not isinstance(settings, PoolingSettings) or settings.heads is None:
        return None
    weights = module.weights()
    tensors = {name: weights.tensor(f"{name}.weight").float().to(device) for name in tensor_names(settings)}
    return with_tensors(settings, tensors)


def tensor_names(settings: PoolingSettings) -> list[str]:
    """The layers of attention pooling; each has a weight."""
    return [name.removesuffix(".weight") for name in settings.shapes(settings.width or 0)]


def with_tensors(settings: PoolingSettings, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """Attention pooling with these weights by layer: tokens[N, L, D] and bool takes_part[N, L] -> [N, D]."""
    heads = settings.heads or 1
    if settings.modes[0] == "attention-query":
        scorer = query_scorer(tensors["probe"], tensors["key"], heads)
        return partial(by_query_probe, scorer=scorer, value=tensors["value"])
    return partial(
        by_key_value_probes,
        query=tensors["query"],
        keys=tensors["key_probes"],
        values=tensors["value_probes"],
        heads=heads,
    )


def query_scorer(probe: Tensor, key: Tensor, heads: int) -> Tensor:
    """What states are multiplied with for the scores of a query probe: probe[1, D], key[D, D] -> [H, D].

    The probe is the same for all texts, so that its product with the keys' matrix is made once. Scores are
    divided by the root of C, as Gemma Encoder; EmbeddingGemma's text has D there, which a learnt probe makes
    up for.
    """
    parts = torch.unflatten(probe[0], 0, (heads, -1))  # [H, C]
    matrix = torch.unflatten(key, 0, (heads, -1))  # [H, C, D]
    return (parts[:, None] @ matrix).squeeze(1) / math.sqrt(parts.shape[1])


def by_query_probe(
    tokens: Tensor, takes_part: Tensor | None = None, *, scorer: Tensor, value: Tensor
) -> Tensor:
    """Attention of one learnt query to tokens[N, L, D] -> [N, D], the heads side by side.

    softmax(q (X K)^T / root C) (X V) for each head; `scorer`[H, D] is what `query_scorer` gives, value[D, D]
    the matrix of the values as a linear layer has it. `takes_part`[N, L] is False for tokens left out.
    Values are summed before the product with their matrix: a product a text instead of one a token.
    """
    scores = tokens @ scorer.T  # [N, L, H]
    if takes_part is not None:
        scores = scores.masked_fill(~takes_part[..., None], -torch.inf)
    seen = scores.softmax(1).transpose(1, 2) @ tokens  # [N, H, D]
    matrix = torch.unflatten(value, 0, (len(scorer), -1))  # [H, C, D]
    return torch.einsum("nhd,hcd->nhc", seen, matrix).flatten(1)


def by_key_value_probes(
    tokens: Tensor,
    takes_part: Tensor | None = None,
    *,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
) -> Tensor:
    """The mean over tokens[N, L, D] of their attention to learnt keys[P, D] and values[P, D] -> [N, D].

    softmax((X Q) K^T / root C) V for each head; query[D, D] is a matrix as a linear layer has it.
    `takes_part`[N, L] is False for tokens left out. The mean is taken of the weights, before the values.
    """
    queries = torch.unflatten(F.linear(tokens, query), -1, (heads, -1))  # [N, L, H, C]
    keys, values = (torch.unflatten(part, -1, (heads, -1)) for part in (keys, values))  # [P, H, C]
    scores = torch.einsum("nlhc,phc->nlhp", queries, keys) / math.sqrt(queries.shape[-1])
    weights = scores.softmax(-1)
    if takes_part is None:
        shares = weights.mean(1)  # [N, H, P]
    else:
        part = takes_part.to(weights.dtype)
        shares = torch.einsum("nlhp,nl->nhp", weights, part / part.sum(1, keepdim=True))
    return torch.einsum("nhp,phc->nhc", shares, values).flatten(1)
