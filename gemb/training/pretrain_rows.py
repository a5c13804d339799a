"""What a language model learns from a row of text: the objective of a recipe, bound to a model's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemb.errors import MismatchError
from gemb.text.denoising import (
    Denoiser,
    Frame,
    Ids,
    Row,
    causal_row,
    denoising_row,
    drawn,
    masked_row,
    most_spans,
    prefix_row,
    prefix_teacher_row,
)
from gemb.text.tokenisation import Tokeniser
from gemb.training.permutation import key_of
from gemb.training.pretrain_documents import LEAST_TOKENS, Piece
from gemb.training.pretrain_recipe import (
    AnyDenoiser,
    CausalObjective,
    MaskedObjective,
    PretrainRecipe,
    SpansDenoiser,
    Ul2Objective,
)

_MASK_TOKENS = ("<mask>", "[MASK]", "_")
FOR_ENCODER_DECODERS = frozenset({"ul2", "prefix_lm"})


@dataclass(frozen=True, slots=True)
class MadeRow:
    """A row, ready to be learned."""

    row: Row
    teacher: Row | None
    """What a teacher reads, with the same targets in the same order; None where it cannot."""
    label: str
    """Which denoiser made it, such as `spans 3 0.15`; empty where there is but one way."""


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Makes the rows of an objective; `row_tokens` is how much text one may hold."""

    row_tokens: int
    _make: Callable[[Ids, bool, np.random.Generator], MadeRow]

    def of(self, piece: Piece, seed: int, epoch: int) -> MadeRow:
        """The row of a piece; what is random follows from seed, epoch and the piece's place in the files."""
        generator = np.random.default_rng(key_of("row", seed, epoch, piece.text, piece.number))
        return self._make(piece.ids, piece.ends, generator)


def row_maker(
    recipe: PretrainRecipe, tokeniser: Tokeniser, config: Mapping[str, Any], max_tokens: int
) -> RowMaker:
    """How rows of at most `max_tokens` tokens on each side are made for the model of `config`.

    Raises MismatchError for tokens that the vocabulary lacks, and a `max_tokens` that leaves no room.
    """
    objective = recipe.objective
    frame = frame_of(tokeniser, config)
    own = len(frame.before) + len(frame.after) + any(one.mode for one in _denoisers(recipe))
    # Beside these, a source has at most as many tokens as its text, and so has a target but for its end.
    row_tokens = max_tokens - max(own, 2)
    if row_tokens < LEAST_TOKENS:
        raise MismatchError(
            f"max_tokens is {max_tokens}, but the special tokens take {max_tokens - row_tokens}; raise it"
        )
    if isinstance(objective, Ul2Objective):
        return RowMaker(row_tokens, _ul2(objective, tokeniser, frame, row_tokens))
    if isinstance(objective, MaskedObjective):
        return RowMaker(row_tokens, _masked(objective, tokeniser, frame))
    if isinstance(objective, CausalObjective):

        def causal(ids: Ids, ends: bool, generator: np.random.Generator) -> MadeRow:
            row = causal_row(ids, frame, ends=ends)
            return MadeRow(row, row, "")

        return RowMaker(row_tokens, causal)

    def prefix(ids: Ids, ends: bool, generator: np.random.Generator) -> MadeRow:
        return MadeRow(prefix_row(ids, frame, ends=ends), prefix_teacher_row(ids, frame, ends=ends), "")

    return RowMaker(row_tokens, prefix)


def frame_of(tokeniser: Tokeniser, config: Mapping[str, Any]) -> Frame:
    """The special tokens of a model, from its tokenizer and its config.json.

    The decoder of a T5Gemma starts with its `<bos>`, as in transformers.

    Raises MismatchError if config.json tells no end.
    """
    before, after = tokeniser.frame
    parts = (config, config.get("decoder") or {}, config.get("text_config") or {})
    end = _first(parts, "eos_token_id")
    if end is None:
        raise MismatchError("config.json has no eos_token_id, which ends a text; add it")
    start = _first((parts[1],), "bos_token_id")
    if start is None:
        start = _first(parts, "decoder_start_token_id")
    if start is None:
        start = _first(parts, "bos_token_id")
    return Frame(before, after, end if start is None else start, end)


def _first(parts: tuple[Mapping[str, Any], ...], key: str) -> int | None:
    """The first token id of that name; of a list its first."""
    for part in parts:
        value = part.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return None


def _denoisers(recipe: PretrainRecipe) -> tuple[AnyDenoiser, ...]:
    return recipe.objective.denoisers if isinstance(recipe.objective, Ul2Objective) else ()


def _label(one: AnyDenoiser) -> str:
    return (
        f"{one.name} {one.mean_span:g} {one.rate:g}"
        if isinstance(one, SpansDenoiser)
        else f"{one.name} {one.rate:g}"
    )


def _ul2(
    objective: Ul2Objective, tokeniser: Tokeniser, frame: Frame, row_tokens: int
) -> Callable[[Ids, bool, np.random.Generator], MadeRow]:
    denoisers: list[Denoiser] = []
    for one in objective.denoisers:
        mode = None
        if one.mode is not None and (mode := tokeniser.id_of(one.mode)) is None:
            raise MismatchError(
                f"objective.denoisers: the mode token {one.mode} is not in the vocabulary; "
                "take one that is, such as <unused99> of Gemma, or none"
            )
        span = one.mean_span if isinstance(one, SpansDenoiser) else None
        denoisers.append(Denoiser(one.rate, span, one.weight, mode))
    wanted = max(most_spans(row_tokens, one) for one in denoisers)
    sentinels = _sentinels(objective.sentinels, tokeniser, wanted, row_tokens)
    for one, denoiser in zip(objective.denoisers, denoisers, strict=True):
        if denoiser.mode in sentinels.tolist():
            raise MismatchError(
                f"objective.denoisers: the mode token {one.mode} stands for a span, too, as up to {wanted:,} "
                f"are taken out of {row_tokens:,} tokens; take another, or lower max_tokens"
            )
    labels = {denoiser: _label(one) for denoiser, one in zip(denoisers, objective.denoisers, strict=True)}

    def make(ids: Ids, ends: bool, generator: np.random.Generator) -> MadeRow:
        denoiser = drawn(denoisers, generator)
        return MadeRow(denoising_row(ids, denoiser, sentinels, frame, generator), None, labels[denoiser])

    return make


def _sentinels(patterns: tuple[str, ...], tokeniser: Tokeniser, wanted: int, row_tokens: int) -> Ids:
    """The tokens of the first pattern whose number 0 is in the vocabulary, as many as may be needed."""
    for pattern in patterns:
        found: list[int] = []
        while len(found) < wanted and (token := tokeniser.id_of(pattern.format(len(found)))) is not None:
            found.append(token)
        if len(found) >= wanted:
            return np.array(found, np.int32)
        if found:
            raise MismatchError(
                f"objective.sentinels: up to {wanted:,} spans are taken out of {row_tokens:,} tokens, but "
                f"the vocabulary has only {len(found):,} of {pattern.format(0)}, {pattern.format(1)} ...; "
                "lower max_tokens, or give a larger mean_span"
            )
    names = " and ".join(pattern.format(0) for pattern in patterns)
    raise MismatchError(
        f"objective.sentinels: {names} are not in the vocabulary, and ul2 needs tokens that stand for spans; "
        "name those that the tokenizer has, such as <reserved_{}>, or choose prefix_lm"
    )


def _masked(
    objective: MaskedObjective, tokeniser: Tokeniser, frame: Frame
) -> Callable[[Ids, bool, np.random.Generator], MadeRow]:
    names = _MASK_TOKENS if objective.mask_token is None else (objective.mask_token,)
    known = [token for name in names if (token := tokeniser.id_of(name)) is not None]
    if not known:
        raise MismatchError(
            f"objective.mask_token: {' and '.join(names)} {'are' if len(names) > 1 else 'is'} not in the "
            "vocabulary; name a token that is and that texts rarely have"
        )
    mask = known[0]

    def make(ids: Ids, ends: bool, generator: np.random.Generator) -> MadeRow:
        return MadeRow(masked_row(ids, objective.rate, mask, frame, generator), None, "")

    return make
