"""Objectives bound to a model's tokens: rows that fit, and errors that name what is missing."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from gemb.errors import MismatchError
from gemb.recipe import load
from gemb.text.denoising import NO_TARGET, Frame
from gemb.training.pretrain_documents import Piece
from gemb.training.pretrain_recipe import PretrainRecipe
from gemb.training.pretrain_rows import RowMaker, frame_of, row_maker
from tests.training.pretrain_fakes import CONFIG, SPECIAL, tokeniser

SPANS = {"name": "spans", "mean_span": 3.0, "rate": 0.15}


def recipe(objective: Any, **changes: Any) -> PretrainRecipe:  # noqa: ANN401
    named = {"name": objective} if isinstance(objective, str) else objective
    return PretrainRecipe.model_validate_json(json.dumps({"objective": named, **changes}))


def maker(objective: Any, max_tokens: int = 34, **changes: Any) -> RowMaker:  # noqa: ANN401
    return row_maker(recipe(objective), changes.get("tokens", tokeniser()), CONFIG, max_tokens)


def piece(length: int, text: int = 0, number: int = 0, ends: bool = True) -> Piece:
    return Piece(np.arange(length, dtype=np.int32) % 30 + 40, text, number, ends)


@pytest.mark.parametrize("objective", ["ul2", "prefix_lm", "causal", "mntp"])
@pytest.mark.parametrize("frame", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_no_row_is_longer_than_max_tokens_and_each_has_a_target(objective: str, frame: str) -> None:
    made = maker(objective, tokens=tokeniser(frame=frame))
    for length in (2, 3, 17, made.row_tokens):
        for text in range(30):
            row = made.of(piece(length, text), 0, 0).row
            assert len(row.ids) == len(row.targets) <= 34
            assert len(row.source) <= 34
            assert (row.targets != NO_TARGET).any()
            assert bool(len(row.source)) == (objective in ("ul2", "prefix_lm"))


def test_a_row_follows_from_seed_epoch_and_place_only() -> None:
    made = maker("ul2")

    def sources(seed: int, epoch: int, number: int, texts: Iterable[int] = range(20)) -> list[list[int]]:
        return [made.of(piece(30, text, number), seed, epoch).row.source.tolist() for text in texts]

    rows = sources(5, 1, 2)
    assert sources(5, 1, 2, reversed(range(20))) == rows[::-1]
    for other in (sources(6, 1, 2), sources(5, 2, 2), sources(5, 1, 1), sources(5, 1, 2, range(1, 21))):
        assert other != rows


def test_the_default_mixture_is_that_of_t5gemma_2() -> None:
    denoisers = recipe("ul2").objective.denoisers  # type: ignore[union-attr]
    shown = [(one.name, getattr(one, "mean_span", None), one.rate, one.weight) for one in denoisers]
    assert shown == [
        ("spans", 3, 0.15, 1),
        ("spans", 12, 0.5, 1),
        ("spans", 32, 0.15, 1),
        ("spans", 32, 0.5, 1),
        ("suffix", None, 0.75, 4),
    ]
    made = maker("ul2")
    labels = [made.of(piece(30, text), 0, 0).label for text in range(4000)]
    assert labels.count("suffix 0.75") == pytest.approx(2000, abs=160)  # 5 standard deviations
    assert labels.count("spans 12 0.5") == pytest.approx(500, abs=105)


def test_a_mode_token_stands_before_the_text() -> None:
    made = maker({"name": "ul2", "denoisers": [{**SPANS, "mode": "<unused29>"}]})
    source = made.of(piece(20), 0, 0).row.source
    assert source[:2].tolist() == [2, SPECIAL.index("<unused29>")]
    assert made.row_tokens == 32


def test_a_teacher_reads_the_text_as_it_is_and_has_the_same_targets() -> None:
    for objective in ("causal", "prefix_lm"):
        for length in (2, 3, 8, 9):
            row = maker(objective).of(piece(length), 0, 0)
            assert row.teacher is not None
            told = [one[one != NO_TARGET].tolist() for one in (row.row.targets, row.teacher.targets)]
            assert told[0] == told[1]
            assert row.teacher.ids.tolist() == [2, *piece(length).ids]
    assert maker("ul2").of(piece(9), 0, 0).teacher is None


def test_the_decoder_of_an_encoder_decoder_starts_with_its_own_bos() -> None:
    found = frame_of(tokeniser(), {"eos_token_id": 1, "decoder": {"bos_token_id": 7}, "bos_token_id": 2})
    assert found == Frame(before=(2,), after=(), start=7, end=1)
    assert frame_of(tokeniser(), CONFIG) == Frame((2,), (), 2, 1)
    assert frame_of(tokeniser(), {"eos_token_id": 1, "decoder_start_token_id": 0}).start == 0


def refused(objective: Any, max_tokens: int = 34, **changes: Any) -> str:  # noqa: ANN401
    with pytest.raises(MismatchError) as error:
        maker(objective, max_tokens, **changes)
    return str(error.value)


def test_what_the_vocabulary_lacks_is_named() -> None:
    plain = tokeniser(SPECIAL[:4])
    assert refused("ul2", tokens=plain) == (
        "objective.sentinels: <unused0> and <extra_id_0> are not in the vocabulary, and ul2 needs tokens "
        "that stand for spans; name those that the tokenizer has, such as <reserved_{}>, or choose prefix_lm"
    )
    assert refused("ul2", 1000) == (
        "objective.sentinels: up to 50 spans are taken out of 998 tokens, but the vocabulary has only 30 of "
        "<unused0>, <unused1> ...; lower max_tokens, or give a larger mean_span"
    )
    assert refused({"name": "ul2", "denoisers": [{**SPANS, "mode": "[R]"}]}) == (
        "objective.denoisers: the mode token [R] is not in the vocabulary; take one that is, such as "
        "<unused99> of Gemma, or none"
    )
    spans = {"name": "spans", "mean_span": 3, "rate": 0.5, "mode": "<unused4>"}
    assert refused({"name": "ul2", "denoisers": [{**spans, "rate": 0.15}, spans]}) == (
        "objective.denoisers: the mode token <unused4> stands for a span, too, as up to 5 are taken out of 32"
        " tokens; take another, or lower max_tokens"
    )
    assert refused("mntp", tokens=plain) == (
        "objective.mask_token: <mask> and [MASK] and _ are not in the vocabulary; name a token that is and "
        "that texts rarely have"
    )
    assert refused({"name": "mntp", "mask_token": "<gap>"}) == (
        "objective.mask_token: <gap> is not in the vocabulary; name a token that is and that texts rarely "
        "have"
    )


def test_sentinels_of_t5_and_of_other_names_are_found() -> None:
    t5 = tokeniser((*SPECIAL[:4], *(f"<extra_id_{number}>" for number in range(30))))
    assert maker("ul2", tokens=t5).of(piece(20), 0, 0).row.source.max() >= 4
    own = tokeniser((*SPECIAL[:4], *(f"<gap {number}>" for number in range(30))))
    maker({"name": "ul2", "sentinels": ["<gap {}>"]}, tokens=own)


def test_max_tokens_must_leave_room() -> None:
    message = refused("causal", 3)
    assert message == "max_tokens is 3, but the special tokens take 2; raise it"


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("t5gemma/2-ul2", 99),  # Gemma 2's tokenizer: <unused0> to <unused98>
        ("t5gemma2/2-ul2", 6242),  # Gemma 3's: to <unused6241>
        ("embeddinggemma/2-pretrain", 6242),
    ],
)
def test_the_tokenizer_of_a_recipes_model_has_a_token_for_each_span(name: str, unused: int) -> None:
    tokens = tokeniser([*SPECIAL[:4], *(f"<unused{number}>" for number in range(unused))])
    row_maker(load(name, PretrainRecipe), tokens, CONFIG, load(name, PretrainRecipe).max_tokens or 0)
