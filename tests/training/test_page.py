"""The page of a run: pictures of what metrics.jsonl holds, and nothing from elsewhere."""

from pathlib import Path

import numpy as np

from gemb.training.metrics import Metrics, read_metrics
from gemb.training.page import page, write_page
from gemb.training.verdict import compare

LINES = [
    {
        "step": step,
        "loss": 3.0 / step,
        "loss/contrastive": 2.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
    }
    for step in range(1, 1001)
]


def test_every_measure_has_its_line_and_long_runs_few_points() -> None:
    html = page(
        [*LINES, {"step": 0, "eval/docs/nDCG@10": 0.4}, {"step": 9, "eval/docs/nDCG@10": 0.6}], {}, "m", []
    )
    for name in ("loss/contrastive", "learning_rate", "grad_norm", "docs/nDCG@10"):
        assert f"</span> {name}" in html
    assert html.count("<svg") == 4
    line = html.partition('points="')[2].partition('"')[0]
    assert 300 <= len(line.split()) <= 400


def test_numbers_that_are_not_finite_are_left_out() -> None:
    html = page([{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}], {}, "m", [])
    assert "nan" not in html
    assert "<circle" in html  # a single point is seen


def test_names_and_verdicts_are_escaped() -> None:
    verdict = compare("<b>/nDCG@10", np.zeros(3), np.ones(3))
    html = page(LINES[:3], {"before": {"<i>": [1, 2, 3]}}, "<script>", [verdict])
    assert "<script" not in html
    assert "<b>/" not in html
    assert "&lt;b&gt;/nDCG@10" in html
    assert "WIN" in html


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    write_page(tmp_path, "m")
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!doctype html>")


def test_metrics_are_cut_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.write({"step": 1, "loss": 1.0})
        place = metrics.position
        metrics.write({"step": 2, "loss": float("nan")})
        metrics.sync()
    assert list(read_metrics(path)) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
    with Metrics(path, place) as again:
        again.write({"step": 2, "loss": 0.5})
    assert list(read_metrics(path)) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert len(list(read_metrics(path))) == 2
