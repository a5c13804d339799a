"""Rows for pretraining: what is taken out comes back, in the shares that were asked for."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import MismatchError
from gemb.text.denoising import (
    NO_TARGET,
    Denoiser,
    Frame,
    causal_row,
    denoising_row,
    drawn,
    masked_row,
    noise_mask,
    prefix_row,
    take_out,
)

FRAME = Frame(before=(2,), after=(1,), start=3, end=1)
BARE = Frame(before=(), after=(), start=3, end=1)
SENTINELS = np.arange(900, 1000, dtype=np.int32)

T5GEMMA2 = (
    Denoiser(0.15, 3),
    Denoiser(0.5, 12),
    Denoiser(0.15, 32),
    Denoiser(0.5, 32),
    Denoiser(0.75, None, weight=4),
)


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def body(length: int) -> NDArray[np.int32]:
    """Tokens 10, 11, 12 ..."""
    return np.arange(10, 10 + length, dtype=np.int32)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spans_of(mask: NDArray[np.bool_]) -> int:
    return int((mask & ~np.concatenate(([False], mask[:-1]))).sum())


def put_back(
    source: NDArray[np.int32], target: NDArray[np.int32], sentinels: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The row that `take_out` gave (source, target) of."""
    places = np.flatnonzero(np.isin(target, sentinels))
    spans = dict(zip(target[places].tolist(), np.split(target, places)[1:], strict=True))
    parts = [spans[token][1:] if token in spans else [token] for token in source.tolist()]
    return np.concatenate(parts).astype(np.int32)


@pytest.mark.parametrize("denoiser", T5GEMMA2)
@pytest.mark.parametrize("length", [2, 3, 7, 64, 200])
def test_spans_put_back_give_the_row(denoiser: Denoiser, length: int) -> None:
    for seed in range(20):
        mask = noise_mask(length, denoiser, generator(seed))
        source, target = take_out(body(length), mask, SENTINELS)
        np.testing.assert_array_equal(put_back(source, target, SENTINELS), body(length))


@pytest.mark.parametrize("denoiser", T5GEMMA2)
@pytest.mark.parametrize("length", [2, 7, 64, 101, 200])
def test_the_share_taken_out_and_the_number_of_spans_are_those_asked_for(
    denoiser: Denoiser, length: int
) -> None:
    mask = noise_mask(length, denoiser, generator())
    noise = min(max(round(length * denoiser.rate), 1), length - 1)
    wanted = max(1, round(noise / denoiser.mean_span)) if denoiser.mean_span else 1
    assert mask.sum() == noise
    assert spans_of(mask) == min(wanted, length - noise)
    source, target = take_out(body(length), mask, SENTINELS)
    assert np.isin(source, SENTINELS).sum() == np.isin(target, SENTINELS).sum() == spans_of(mask)


def test_one_span_is_the_end_of_the_row() -> None:
    mask = noise_mask(8, Denoiser(0.75, None), generator())
    assert mask.tolist() == [False, False] + [True] * 6
    source, target = take_out(body(8), mask, SENTINELS)
    assert source.tolist() == [10, 11, 900]
    assert target.tolist() == [900, 12, 13, 14, 15, 16, 17]


def test_denoisers_are_drawn_one_to_one_to_one_to_one_to_four() -> None:
    source = generator(7)
    counts = {denoiser: 0 for denoiser in T5GEMMA2}
    for _ in range(16_000):
        counts[drawn(T5GEMMA2, source)] += 1
    # 16,000 draws of probability 1/8 have a standard deviation of 42.
    assert [count / 2000 for count in counts.values()] == pytest.approx([1, 1, 1, 1, 4], abs=0.1)


def test_all_partitions_are_equally_likely() -> None:
    counts: dict[str, int] = {}
    source = generator(3)
    for _ in range(9_000):
        mask = noise_mask(6, Denoiser(0.5, 1.5), source)  # 3 tokens in 2 spans, 3 others in 2 stretches
        word = "".join("x" if one else "." for one in mask)
        counts[word] = counts.get(word, 0) + 1
    assert sorted(counts) == sorted([".x..xx", ".xx..x", "..x.xx", "..xx.x"])
    assert all(count == pytest.approx(2250, abs=200) for count in counts.values())  # 5 deviations of 41


def test_the_same_generator_gives_the_same_row() -> None:
    rows = [
        denoising_row(body(50), T5GEMMA2[0], SENTINELS, FRAME, generator(seed)).source for seed in (4, 4, 5)
    ]
    assert rows[0].tolist() == rows[1].tolist() != rows[2].tolist()


def test_the_example_of_the_docstring() -> None:
    mask = np.array([False, True, False, True, True])
    source, target = take_out(ids(10, 11, 12, 13, 14), mask, SENTINELS)
    assert source.tolist() == [10, 900, 12, 901]
    assert target.tolist() == [900, 11, 901, 13, 14]


def test_the_decoder_of_a_denoising_row_reads_what_it_has_predicted() -> None:
    row = denoising_row(body(8), Denoiser(0.75, None, mode=77), SENTINELS, FRAME, generator())
    assert row.source.tolist() == [2, 77, 10, 11, 900, 1]
    assert row.ids.tolist() == [3, 900, 12, 13, 14, 15, 16, 17]
    assert row.targets.tolist() == [900, 12, 13, 14, 15, 16, 17, 1]


@pytest.mark.parametrize("length", [2, 3, 8, 9])
@pytest.mark.parametrize("ends", [False, True])
def test_prefix_and_target_are_the_row_in_two_halves(length: int, ends: bool) -> None:
    row = prefix_row(body(length), FRAME, ends=ends)
    prefix = row.source[1:-1]
    target = row.targets[:-1] if ends else row.targets
    assert np.concatenate([prefix, target]).tolist() == body(length).tolist()
    assert len(target) - len(prefix) == length % 2
    assert row.ids.tolist() == [3, *row.targets[:-1]]
    assert (row.targets[-1] == FRAME.end) == ends


def test_a_causal_row_predicts_every_token_from_those_before() -> None:
    row = causal_row(body(3), FRAME, ends=True)
    assert (row.ids.tolist(), row.targets.tolist()) == ([2, 10, 11, 12], [10, 11, 12, 1])
    row = causal_row(body(3), BARE, ends=False)
    assert (row.ids.tolist(), row.targets.tolist()) == ([10, 11], [11, 12])
    assert not len(row.source)


def test_a_masked_token_is_predicted_from_the_state_before_it() -> None:
    row = masked_row(body(20), 0.2, 99, FRAME, generator(1))
    assert (row.ids == 99).sum() == 4
    for place in np.flatnonzero(row.ids == 99):
        assert row.targets[place - 1] == 10 + place - 1  # the first token of the text stands at place 1
    assert (row.targets != NO_TARGET).sum() == 4
    restored = row.ids.copy()
    restored[1:][row.targets[:-1] != NO_TARGET] = row.targets[:-1][row.targets[:-1] != NO_TARGET]
    assert restored.tolist() == [2, *body(20), 1]


def test_without_a_token_before_the_text_its_first_one_is_never_masked() -> None:
    for seed in range(50):
        row = masked_row(body(3), 0.9, 99, BARE, generator(seed))
        assert row.ids.tolist() == [10, 99, 99]
        assert row.targets.tolist() == [11, 12, NO_TARGET]


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^1 token cannot be corrupted; a row has 2 or more$"):
        noise_mask(1, T5GEMMA2[0], generator())
    with pytest.raises(ValueError, match=r"^1 token has no two halves; a row has 2 or more$"):
        prefix_row(body(1), FRAME, ends=True)
    with pytest.raises(ValueError, match=r"^of 1 tokens none can be masked$"):
        masked_row(body(1), 0.2, 99, BARE, generator())
    wanted = re.escape(
        "10 spans are taken out of 100 tokens, but there are 4 sentinel tokens; lower max_tokens, or give a "
        "larger mean_span"
    )
    with pytest.raises(MismatchError, match=f"^{wanted}$"):
        take_out(body(100), noise_mask(100, Denoiser(0.3, 3), generator()), SENTINELS[:4])
