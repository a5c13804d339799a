"""The share of the processor's peak: what is counted, measured and remembered."""

from pathlib import Path

import pytest

from gemb.device import pick
from gemb.model.folder import read_folder
from gemb.model.trainable import TrainableEncoder
from gemb.training import peak
from gemb.training.peak import matrix_peak, work_of_a_token
from gemb.training.watch import Watch
from tests.models import tiny_folder


def test_the_work_of_a_token_is_six_operations_for_each_number_of_the_matrices(tmp_path: Path) -> None:
    model = TrainableEncoder.load(read_folder(tiny_folder(tmp_path / "model", "qwen3")))
    # 4 layers, 64 wide: 4 heads and 2 shared ones of 16, a gated feed-forward of 96.
    numbers = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    assert work_of_a_token(model.named_parameters()) == 6 * numbers


def test_the_peak_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path))
    device = pick("cpu", "fp32", 1)
    found = matrix_peak(device)
    assert found is not None
    assert found > 1e8
    monkeypatch.setattr(peak, "_measured", lambda device: pytest.fail("measured again"))
    assert matrix_peak(device) == found
    (file,) = (tmp_path / "peaks").iterdir()
    file.write_text("broken")
    monkeypatch.setattr(peak, "_measured", lambda device: 5.0)
    assert matrix_peak(device) == 5.0


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(peak, "_measured", lambda device: 7.0)
    assert matrix_peak(pick("cpu", "fp32", 1)) == 7.0


def test_the_line_of_a_step_tells_the_share_where_it_is_known() -> None:
    lines: list[str] = []
    watch = Watch(lambda event: lines.append(event.detail or ""))
    watch.step(1, 100, 0.5)
    watch.step(2, 200, 0.25, 0.614)
    assert lines == ["loss 0.5000", "loss 0.2500, 61 % of the processor's peak"]
