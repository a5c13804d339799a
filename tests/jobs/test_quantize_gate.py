"""What an export lost, from vectors worked out by hand."""

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from gemb.errors import GateError
from gemb.evaluation import Score, Task
from gemb.evaluation.tasks import mean_of
from gemb.evaluation.views import Viewed
from gemb.jobs.quantize_gate import NEIGHBOURS, Gate, Measured
from gemb.jobs.quantize_probes import PROBES


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def random(seed: int) -> NDArray[np.float32]:
    return unit(np.random.default_rng(seed).standard_normal((len(PROBES), 48), dtype=np.float32))


def gate(source: NDArray[np.float32], export: NDArray[np.float32]) -> Gate:
    return Gate((), Measured(source, ()), Measured(export, ()))


def test_a_model_loses_nothing_against_itself_and_all_against_another() -> None:
    same = gate(random(0), random(0))
    assert same.cosine_min == pytest.approx(1)
    assert same.overlap == 1
    assert same.drop == pytest.approx(0, abs=1e-6)
    other = gate(random(0), random(1))
    assert other.cosine_median == pytest.approx(0, abs=0.1)
    assert other.overlap == pytest.approx(NEIGHBOURS / (len(PROBES) - 1), abs=0.06)  # as by chance


def test_a_rotation_keeps_the_neighbours_and_not_the_cosines() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((48, 48)))
    turned = gate(random(0), (random(0) @ rotation).astype(np.float32))
    assert turned.overlap == 1
    assert turned.cosine_median < 0.5


def test_the_text_that_moved_farthest_is_named() -> None:
    export = random(0)
    export[5] = unit(export[5:6] + 0.2 * random(3)[5:6])
    moved = gate(random(0), export)
    assert dict(moved.rows)["cosine"].endswith(f"({PROBES[5][:40]!r})")
    assert moved.cosine_median == pytest.approx(1)
    assert moved.cosine_min == pytest.approx(float(random(0)[5] @ export[5]))


SCORES = ((0.5, 0.7), (0.4, 0.76))


class Named(Task):
    """A task that is never scored here."""

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        raise NotImplementedError


def test_with_data_the_drop_is_that_of_the_mean_metric() -> None:
    scores = [[mean_of("ndcg@10", np.array([value]), {}) for value in both] for both in SCORES]
    measured = Gate([Named("sts", {}), Named("sts", {})], *(Measured(random(0), each) for each in scores))
    assert measured.drop == pytest.approx(0.02)
    measured.check("int4", 0.021)
    with pytest.raises(GateError, match=r"^int4 loses 0\.0200 of the mean score against its source"):
        measured.check("int4", 0.019)
    ((_, _, source, export, difference), _) = measured.tables[0].rows
    assert (source, export, difference) == ("0.5000", "0.4000", "-0.1000")


def test_vectors_that_are_not_finite_fail_without_max_drop() -> None:
    export = random(0)
    export[3, 7] = np.nan
    with pytest.raises(GateError) as caught:
        gate(random(0), export).check("gguf f16", None)
    assert str(caught.value) == (
        f"gguf f16 gives no finite vector for 1 of {len(PROBES)} probe texts, such as {PROBES[3][:40]!r}; "
        "nothing was kept; take another format"
    )
