"""Pictures of evaluations; matplotlib is loaded when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemb.evaluation.extras import load
from gemb.evaluation.running import Result
from gemb.evaluation.space import BINS, RATIO_RANGE, Numbers, Space
from gemb.evaluation.views import BITS
from gemb.files import atomic_write

SOFTWARE = "gemb"
"""What the pictures say in their PNG text that they were made by."""
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
        figure.savefig(file, format="png", metadata={"Software": SOFTWARE})


def draw_spaces(spaces: Sequence[tuple[str, Space]], path: Path) -> None:
    """A PNG with a row a space, each with the name of its model: both towers, nearest cosines, ratios."""
    figures = load("matplotlib.figure")
    figure = figures.Figure(figsize=(13, 4.6 * len(spaces)), dpi=130, layout="constrained")
    rows = figure.subplots(len(spaces), 3, squeeze=False)
    for (model, space), (towers, nearest, balance) in zip(spaces, rows, strict=True):
        _draw_towers(space, towers)
        towers.set_ylabel(f"{space.name}, {model}", fontsize="large")
        shown = (min(0.0, float(space.top1.min())), 1.0)
        _draw_histogram(nearest, space.top1, shown, _COLOURS[0])
        _title(
            nearest,
            "nearest document of each query",
            f"alignment {space.alignment:.3f}; uniformity of queries {space.query_uniformity:.2f}, "
            f"of documents {space.document_uniformity:.2f}",
        )
        nearest.set(xlabel="cosine", ylabel="queries")
        balance.axvline(1, color=_COLOURS[1], label="balanced: 1")
        # Cosines near 0 give ratios of any size: the far ends are left out, the middle never.
        low, high = np.quantile(space.ratios, [0.05, 0.95])
        shown = (min(RATIO_RANGE[0], float(low)), max(RATIO_RANGE[1], float(high)))
        _draw_histogram(balance, space.ratios, shown, _COLOURS[2])
        outside = 1 - np.mean((space.ratios >= shown[0]) & (space.ratios <= shown[1]))
        _title(balance, "self-balancing ratio of random pairs", f"{outside:.0%} lie outside of the picture")
        balance.set(xlabel="s(query i, query j) / s(query i, document j)", ylabel="pairs")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": SOFTWARE})


def _draw_towers(space: Space, axes: Any) -> None:  # noqa: ANN401  # matplotlib is an extra
    for number, (name, colour) in enumerate((("queries", _COLOURS[0]), ("documents", _COLOURS[1]))):
        places = space.places[number * space.pairs : (number + 1) * space.pairs]
        axes.scatter(*places.T, s=10, alpha=0.65, linewidths=0, color=colour, label=name)
    axes.set(xticks=[], yticks=[])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, markerscale=2, frameon=False)
    _title(
        axes,
        f"t-SNE of {space.pairs} queries and their documents",
        f"a linear probe tells {space.probe_accuracy:.0%} of them apart; gap of the means {space.gap:.3f}",
    )


def _draw_histogram(
    axes: Any,  # noqa: ANN401
    values: Numbers,
    between: tuple[float, float],
    colour: str,
) -> None:
    axes.hist(values, bins=BINS, range=between, color=colour)
    median = float(np.median(values))
    axes.axvline(median, color="black", linestyle="--", label=f"median {median:.3f}")
    axes.legend()


def _title(axes: Any, title: str, line: str) -> None:  # noqa: ANN401
    axes.set_title(f"{title}\n{line}", fontsize=9.5)


def _mean(results: Sequence[Result], view: object) -> float:
    values = [result.score.value for result in results if result.view == view]
    return sum(values) / len(values)
