"""Pictures of evaluations; matplotlib is loaded when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemb.evaluation.extras import load
from gemb.evaluation.running import Result
from gemb.evaluation.views import BITS
from gemb.files import atomic_write

_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6a4c93")


def draw_sizes(results: Sequence[Result], path: Path) -> None:
    """A PNG of quality against dims and against bytes: a line a stored type, means over all data sets."""
    figures = load("matplotlib.figure")
    dtypes = [dtype for dtype in BITS if any(result.view.dtype == dtype for result in results)]
    figure = figures.Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    by_dims, by_bytes = figure.subplots(1, 2, sharey=True)
    for dtype, colour in zip(dtypes, _COLOURS, strict=False):
        views = sorted({r.view for r in results if r.view.dtype == dtype}, key=lambda view: view.dims)
        values = [_mean(results, view) for view in views]
        for axes, places in ((by_dims, [v.dims for v in views]), (by_bytes, [v.bytes for v in views])):
            axes.plot(places, values, marker="o", color=colour, label=dtype)
    names = list(dict.fromkeys(result.task.name for result in results))
    shown = ", ".join(names) if len(names) <= 4 else f"{len(names)} data sets"
    by_dims.set_ylabel("mean of the main metrics" if len(names) > 1 else results[0].score.metric)
    for axes, label in ((by_dims, "dims"), (by_bytes, "bytes a vector")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_dims.legend(title="stored as")
    figure.suptitle(f"Quality and size: {shown}")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _mean(results: Sequence[Result], view: object) -> float:
    values = [result.score.value for result in results if result.view == view]
    return sum(values) / len(values)
