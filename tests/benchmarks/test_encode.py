from dataclasses import replace

import numpy as np
import pytest

from benchmarks.corpus import Sample
from benchmarks.encode import bars
from benchmarks.harness import Lap, Track
from benchmarks.machine import Machine
from benchmarks.models import MODELS
from benchmarks.peers import Contestant, contestants

AVX512_BF16 = Machine("processor", "1/2/3", 2, ("avx2", "avx512f", "avx512_bf16"), "native", 2**34, "Linux")
AVX2 = replace(AVX512_BF16, flags=("avx2",))


def track(name: str, seconds: float) -> Track:
    precision = "bf16" if "bf16" in name else "fp32"
    lap = Lap(seconds, seconds, 2**20, 2**20)
    unit = np.array([[1.0, 0.0]], dtype=np.float32)
    return Track(Contestant(name, "fake", "", precision), lap, [lap], unit)


TRACKS = {
    name: track(name, seconds)
    for name, seconds in {
        "st-fp32": 6.0,
        "st-fp32-best": 5.0,
        "st-bf16": 3.0,
        "gemb-fp32": 3.0,
        "gemb-bf16": 1.5,
        "ort-fp32": 4.0,
    }.items()
}


def judged(model: str, corpus: str, machine: Machine) -> dict[str, tuple[float, float]]:
    sample = Sample(corpus, "here", ("text",), (1,), 1.0)
    share = 0.75
    found = bars(MODELS[model], sample, TRACKS, machine, share)
    return {bar.claim: (bar.measured, bar.bound) for bar in found}


@pytest.mark.parametrize(
    ("model", "corpus", "machine", "bound"),
    [
        ("gemma300m", "docs", AVX512_BF16, 1.9),
        ("gemma300m", "docs", AVX2, 1.6),
        ("gemma300m", "prose", AVX512_BF16, 1.3),
        ("gemma300m", "prose", AVX2, 1.2),
        ("minilm", "docs", AVX512_BF16, 1.6),
        ("minilm", "docs", AVX2, 1.45),
        ("minilm", "uniform", AVX2, 1.2),
    ],
)
def test_the_bar_of_a_race_goes_by_model_texts_and_processor(
    model: str, corpus: str, machine: Machine, bound: float
) -> None:
    assert judged(model, corpus, machine)["gemb-fp32: speed over st-fp32"] == (2.0, bound)


def test_bf16_is_judged_only_where_the_processor_has_it() -> None:
    assert judged("gemma300m", "docs", AVX512_BF16)["gemb-bf16: speed over st-fp32"] == (4.0, 3.2)
    assert judged("gemma300m", "docs", AVX512_BF16)["gemb-bf16: speed over st-bf16"] == (2.0, 1.6)
    assert "gemb-bf16: speed over st-fp32" not in judged("gemma300m", "docs", AVX2)


def test_the_best_batch_size_and_onnxruntime_have_bars_of_their_own() -> None:
    found = judged("minilm", "docs", AVX2)
    assert found["gemb-fp32: speed over st-fp32-best (batch 32)"] == (5 / 3, 1.15)
    assert found["gemb-fp32: speed over ort-fp32 (token-sorted, batch 32)"] == (4 / 3, 1.0)


def test_the_share_of_the_peak_is_judged_with_avx512_only() -> None:
    claim = "gemb-fp32: share of the measured GEMM peak"
    assert judged("gemma300m", "docs", AVX512_BF16)[claim] == (0.75, 0.7)
    assert claim not in judged("gemma300m", "docs", AVX2)


def test_the_reference_is_there_whatever_precision_is_asked_for() -> None:
    names = [entrant.name for entrant in contestants(MODELS["minilm"], ["bf16"], threads=1)]
    assert names == ["st-fp32", "st-bf16", "gemb-bf16", "ort-fp32", "ort-int8", "fastembed-way"]
