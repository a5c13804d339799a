"""Which entries of a delta stay."""

import pytest
import torch

from gemb.merging.thinning import (
    drop_at_random,
    drop_by_rank,
    keep_between,
    keep_chances,
    keep_largest,
    keep_within,
    largest,
    nth_largest,
)

DELTA = torch.tensor([1, -2, 0.5, 3, -0.1, 0.2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rank", [1, 2, 20, 4_000, 10_000, 20_900, 20_973])
def test_the_nth_largest_of_a_stream_is_the_sorted_entry_of_the_whole(rank: int) -> None:
    tensors = [torch.randn(317, 11, generator=seeded(1)) * 10.0**-power for power in range(6)] + [
        torch.zeros(50),
        torch.tensor(1e-40),
    ]
    entries = torch.cat([tensor.reshape(-1) for tensor in tensors]).abs().sort(descending=True).values
    assert nth_largest(lambda: tensors, rank) == float(entries[rank - 1])


def test_the_largest_half_of_six_is_three() -> None:
    assert keep_largest(DELTA, 0.5).tolist() == [1, -2, 0, 3, 0, 0]
    assert keep_largest(DELTA, 1.0).tolist() == DELTA.tolist()


def test_trimming_the_whole_is_not_trimming_each_part() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])]
    bounds = largest(lambda: parts, 4, 0.5)
    assert bounds.least == 10
    assert [keep_within(part, bounds).tolist() for part in parts] == [[0, 0], [10, 20]]
    assert [keep_largest(part, 0.5).tolist() for part in parts] == [[0, 2], [0, 20]]


def test_entries_as_large_as_the_border_all_stay() -> None:
    assert keep_largest(torch.tensor([1.0, -1.0, 1.0, 0.5]), 0.5).tolist() == [1, -1, 1, 0]


def test_dare_keeps_the_mean_and_has_the_variance_of_its_formula() -> None:
    generator, draws, drop = seeded(), 20_000, 0.75
    seen = drop_at_random(DELTA.expand(draws, 6).clone(), 1 - drop, generator)
    variance = DELTA**2 * drop / (1 - drop)
    # Five standard errors of a mean over the draws.
    assert ((seen.mean(dim=0) - DELTA).abs() < 5 * (variance / draws).sqrt()).all()
    torch.testing.assert_close(seen.var(dim=0), variance, rtol=0.05, atol=0)
    assert set((seen[:, 0]).tolist()) == {0, 4}


def test_dare_at_density_1_changes_nothing() -> None:
    assert drop_at_random(DELTA, 1.0, seeded()) is DELTA


def test_the_chances_of_della_are_linear_in_the_rank() -> None:
    chances = keep_chances(DELTA, 0.5, 0.2)
    torch.testing.assert_close(chances, torch.tensor([0.54, 0.62, 0.46, 0.70, 0.30, 0.38]))
    assert float(chances.mean()) == pytest.approx(0.5)
    rows = keep_chances(torch.stack([DELTA, -3 * DELTA.flip(0)]), 0.5, 0.2)
    torch.testing.assert_close(rows, torch.stack([chances, chances.flip(0)]))


def test_della_keeps_the_mean() -> None:
    draws = 20_000
    seen = drop_by_rank(DELTA.expand(draws, 6).clone(), 0.5, 0.2, seeded())
    chances = keep_chances(DELTA, 0.5, 0.2)
    error = (DELTA**2 * (1 - chances) / chances / draws).sqrt()
    assert ((seen.mean(dim=0) - DELTA).abs() < 5 * error).all()


def test_della_without_a_window_is_dare() -> None:
    delta = torch.randn(20, 30, generator=seeded(5))
    torch.testing.assert_close(drop_by_rank(delta, 0.4, 0.0, seeded()), drop_at_random(delta, 0.4, seeded()))


def test_rescaling_by_norm_keeps_the_sum_of_magnitudes() -> None:
    delta = torch.randn(50, 40, generator=seeded(2))
    thinned = drop_at_random(delta, 0.3, seeded(), rescale="norm")
    assert float(thinned.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    nothing = torch.zeros(4)
    assert not drop_at_random(nothing, 0.3, seeded(), rescale="norm").any()
    bare = drop_at_random(delta, 0.3, seeded(), rescale="none")
    assert set((bare[bare != 0] - delta[bare != 0]).tolist()) == {0}


def test_breadcrumbs_leave_out_the_largest_and_the_smallest() -> None:
    assert keep_between(DELTA, 0.5, 1 / 6).tolist() == [1, -2, 0.5, 0, 0, 0]
    assert keep_between(DELTA, 0.5, 0.0).tolist() == [1, -2, 0, 3, 0, 0]
    assert keep_between(torch.tensor([1.0, 4.0, 2.0, 3.0]), 0.75, 0.5).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.1, 0.1), (0.5, 0.6), (0.5, -0.1)])
def test_chances_outside_of_0_to_1_are_refused(density: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"^density .* leaves the open range from 0 to 1$"):
        keep_chances(DELTA, density, epsilon)
