from pathlib import Path
from typing import Any

from benchmarks.train import DATA_SETS, bars, data_sets, size_bars, trainers, trainers_by_sizes


def row(name: str, speed: float, peak: int) -> dict[str, Any]:
    return {"name": name, "speed_against_peer": speed, "peak_rss_bytes": peak}


def judged(batch_size: int, *, cached: bool) -> dict[str, tuple[float, float, bool]]:
    rows = [row("gemb", 2.0, 50), row("st", 1.0, 100)]
    found = bars(rows, batch_size=batch_size, cached=cached)
    return {bar.claim: (bar.measured, bar.bound, bar.met) for bar in found}


def test_speed_and_memory_are_judged_at_batch_64_and_speed_alone_against_the_cached_loss() -> None:
    assert judged(64, cached=False) == {
        "gemb: tokens/s over st at batch 64": (2.0, 2.5, False),
        "gemb: peak memory over st at batch 64": (0.5, 0.6, True),
    }
    assert judged(512, cached=True) == {"gemb: tokens/s over st at batch 512": (2.0, 1.8, True)}


def test_both_train_the_same_sizes_and_gradcache_runs_against_the_cached_loss_only() -> None:
    plain = trainers(Path("model"), 64, cached=False, width=256)
    assert [one.name for one in plain] == ["gemb", "st-plain"]
    cached = trainers(Path("model"), 512, cached=True, width=256)
    assert [(one.name, one.cached, one.tokens_with_graph == 0) for one in cached] == [
        ("gemb", False, False),
        ("gemb-gradcache", False, True),
        ("st-cached", True, False),
    ]
    assert {one.sizes for one in [*plain, *cached]} == {(256, 128, 64)}


def test_four_sizes_may_cost_a_tenth_more_than_one() -> None:
    four, one = trainers_by_sizes(Path("model"), 64, width=768)
    assert (four.sizes, one.sizes) == ((768, 512, 256, 128), (768,))
    (bar,) = size_bars([{"speed_against_peer": 0.8, "settings": {"sizes": four.sizes}}])
    assert (bar.claim, bar.measured, bar.met) == (
        "gemb: time of a step with 4 sizes over that with one",
        1.25,
        False,
    )


def test_few_batches_are_spread_over_the_data_sets() -> None:
    assert data_sets(16) == DATA_SETS
    assert data_sets(4) == DATA_SETS[::2]
