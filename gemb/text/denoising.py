"""Token rows for pretraining: corrupted in the ways of UL2, split, shifted or masked, as pure functions.

What is random follows from the generator that the caller makes for a row, and from nothing else. Padding and
packing are left to the model. L tokens of a row without special tokens, S of what the encoder reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemb.errors import MismatchError

NO_TARGET = -100
"""The target of a state from which nothing is predicted."""

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens of a model."""

    before: tuple[int, ...]
    """What its tokenizer puts before a text, such as `<bos>`."""
    after: tuple[int, ...]
    """What its tokenizer puts behind a text."""
    start: int
    """What the decoder of an encoder-decoder reads before its first token."""
    end: int
    """What ends a text that is generated."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as a language model learns from it."""

    ids: Ids
    """What the decoder, or the only tower, reads."""
    targets: Ids
    """As long as `ids`: the token to predict from the state at this place, or NO_TARGET."""
    source: Ids
    """[S], what the encoder reads; empty where there is none."""


@dataclass(frozen=True, slots=True)
class Denoiser:
    """How a row is corrupted for an encoder-decoder (UL2, arXiv 2205.05131, section 3.1.2)."""

    rate: float
    """Share of the tokens that the decoder has to restore, above 0 and below 1."""
    mean_span: float | None
    """Tokens of a span in the mean; None is one span at the end, as in prefix language modelling."""
    weight: float = 1.0
    """How often it is drawn, against the weights of the others."""
    mode: int | None = None
    """A token before the text that names the denoiser to the encoder; None is no such token."""


def noise_mask(length: int, denoiser: Denoiser, generator: np.random.Generator) -> NDArray[np.bool_]:
    """[L], True for the tokens that are taken out, `round(L * rate)` of them but at least 1 and not all.

    The procedure of T5 (arXiv 1910.10683, section 3.1.4, as in its code): as many spans as the mean span
    asks for, their lengths a random partition of the tokens taken out, and those between them one of the
    rest; the first token stays and the last one goes. No two spans touch.

    Raises ValueError for less than 2 tokens.
    """
    if length < 2:
        raise ValueError(f"{length} token cannot be corrupted; a row has 2 or more")
    noise, spans = _sizes(length, denoiser)
    mask = np.zeros(length, np.bool_)
    lengths = np.empty(2 * spans, np.int64)
    lengths[0::2] = _partition(length - noise, spans, generator)
    lengths[1::2] = _partition(noise, spans, generator)
    edges = np.cumsum(lengths)
    for start, end in zip(edges[0::2], edges[1::2], strict=True):
        mask[start:end] = True
    return mask


def most_spans(length: int, denoiser: Denoiser) -> int:
    """The most spans that a row of 2 to `length` tokens can have; as many sentinels are needed."""
    # Over all lengths: rounding can give a shorter row one span more.
    return max(_sizes(one, denoiser)[1] for one in range(2, length + 1))


def take_out(row: Ids, mask: NDArray[np.bool_], sentinels: Ids) -> tuple[Ids, Ids]:
    """(source, target) of row[L]: each span of the mask becomes a sentinel, and the spans follow theirs.

    `a b c d e` with `b` and `d e` taken out gives `a <0> c <1>` and `<0> b <1> d e`.

    Raises MismatchError if there are fewer sentinels than spans.
    """
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    spans = int(starts.sum())
    if spans > len(sentinels):
        raise MismatchError(
            f"{spans:,} spans are taken out of {len(row):,} tokens, but there are {len(sentinels):,} "
            "sentinel tokens; lower max_tokens, or give a larger mean_span"
        )
    marked = row.copy()
    marked[starts] = sentinels[:spans]
    # Where a span starts among all the tokens that are taken out.
    places = np.flatnonzero(starts[mask])
    return marked[~mask | starts], np.insert(row[mask], places, sentinels[:spans])


def denoising_row(
    body: Ids, denoiser: Denoiser, sentinels: Ids, frame: Frame, generator: np.random.Generator
) -> Row:
    """body[L] for an encoder-decoder: the encoder reads what is left, the decoder restores the rest.

    Raises as `noise_mask` and `take_out` do.
    """
    source, target = take_out(body, noise_mask(len(body), denoiser, generator), sentinels)
    mode = () if denoiser.mode is None else (denoiser.mode,)
    return _encoder_decoder_row((*frame.before, *mode), source, target, frame, ends=True)


def prefix_row(body: Ids, frame: Frame, *, ends: bool) -> Row:
    """body[L] for an encoder-decoder: the encoder reads the first half, the decoder goes on (T5Gemma).

    The halves are equal, or the second is one token longer. `ends` says that the text ends with the row;
    then the end is predicted, too.

    Raises ValueError for less than 2 tokens.
    """
    if len(body) < 2:
        raise ValueError(f"{len(body)} token has no two halves; a row has 2 or more")
    half = len(body) // 2
    return _encoder_decoder_row(frame.before, body[:half], body[half:], frame, ends=ends)


def prefix_teacher_row(body: Ids, frame: Frame, *, ends: bool) -> Row:
    """What a decoder reads to teach `prefix_row` of the same text: all of it, with the same targets."""
    row = causal_row(body, frame, ends=ends)
    row.targets[: len(frame.before) + len(body) // 2 - 1] = NO_TARGET
    return row


def causal_row(body: Ids, frame: Frame, *, ends: bool) -> Row:
    """body[L] for a decoder: every token is predicted from those before it."""
    whole = _joined(frame.before, body, (frame.end,) if ends else ())
    return Row(whole[:-1], whole[1:].copy(), _NO_IDS)


def masked_row(body: Ids, rate: float, mask_token: int, frame: Frame, generator: np.random.Generator) -> Row:
    """body[L] for masked next-token prediction (LLM2Vec, arXiv 2404.05961, section 2.2).

    `round(L * rate)` tokens, at least 1, become the mask token, and each is predicted from the state before
    it, as a decoder does. Where the tokenizer puts nothing before a text its first token has no such state
    and stays.

    Raises ValueError if no token can be masked.
    """
    first = 0 if frame.before else 1
    places = len(body) - first
    if places < 1:
        raise ValueError(f"of {len(body)} tokens none can be masked")
    count = min(max(round(len(body) * rate), 1), places)
    chosen = np.sort(np.argsort(generator.random(places))[:count]) + first
    masked = body.copy()
    masked[chosen] = mask_token
    ids = _joined(frame.before, masked, frame.after)
    targets = np.full(len(ids), NO_TARGET, np.int32)
    targets[len(frame.before) + chosen - 1] = body[chosen]
    return Row(ids, targets, _NO_IDS)


def drawn(denoisers: Sequence[Denoiser], generator: np.random.Generator) -> Denoiser:
    """One of them, by their weights."""
    edges = np.cumsum([one.weight for one in denoisers])
    return denoisers[int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))]


_NO_IDS: Ids = np.zeros(0, np.int32)


def _encoder_decoder_row(
    before: tuple[int, ...], source: Ids, target: Ids, frame: Frame, *, ends: bool
) -> Row:
    whole = _joined((frame.start,), target, (frame.end,) if ends else ())
    return Row(whole[:-1], whole[1:], _joined(before, source, frame.after))


def _joined(before: tuple[int, ...], ids: Ids, after: tuple[int, ...]) -> Ids:
    return np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])


def _sizes(length: int, denoiser: Denoiser) -> tuple[int, int]:
    """(tokens taken out, spans) of a row."""
    noise = min(max(round(length * denoiser.rate), 1), length - 1)
    spans = 1 if denoiser.mean_span is None else max(1, round(noise / denoiser.mean_span))
    return noise, min(spans, noise, length - noise)


def _partition(total: int, parts: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[parts], positive numbers whose sum is `total`; all such lists are equally likely."""
    cuts = np.sort(np.argsort(generator.random(total - 1))[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
