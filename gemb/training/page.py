"""report.html: a run as pictures on one page that needs nothing else, drawn from metrics.jsonl.

Every line of a chart is inline SVG; the page has no script and opens no connection.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemb.files import atomic_write, read_json
from gemb.training.metrics import read_metrics
from gemb.training.verdict import Verdict

WIDTH, HEIGHT = 460, 220
_LEFT, _BOTTOM, _TOP, _RIGHT = 56, 24, 10, 10
_POINTS = 400
"""Most points of a line; of longer ones the mean of each stretch is drawn."""
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;max-width:1000px;color:#222}"
    "h1{font-size:1.4em}h2{font-size:1em;margin:0}"
    "figure{display:inline-block;margin:0 1em 1.5em 0;vertical-align:top}"
    "svg{background:#fafafa;border:1px solid #ddd}text{font:11px system-ui,sans-serif;fill:#555}"
    ".grid{stroke:#e4e4e4}.key{font-size:12px}"
    "table{border-collapse:collapse}td,th{padding:2px 10px;text-align:left}"
)

Points = Sequence[tuple[float, float]]


def write_page(run: Path, model: str, verdicts: Sequence[Verdict] = ()) -> None:
    """Write run/report.html from run/metrics.jsonl, and from baseline.json and final.json where they are."""
    lines = list(read_metrics(run / "metrics.jsonl"))
    histograms = {
        when: read_json(run / f"{name}.json").get("histograms", {})
        for when, name in (("before", "baseline"), ("after", "final"))
        if (run / f"{name}.json").is_file()
    }
    with atomic_write(run / "report.html") as file:
        file.write(page(lines, histograms, model, verdicts).encode())


def page(
    lines: Sequence[Mapping[str, Any]],
    histograms: Mapping[str, Mapping[str, Sequence[int]]],
    model: str,
    verdicts: Sequence[Verdict],
) -> str:
    """The HTML of a run whose metrics are `lines`."""
    names = sorted({name for line in lines for name in line})
    charts = [
        ("loss", [name for name in names if name == "loss" or name.startswith("loss/")]),
        ("evaluation", [name for name in names if name.startswith("eval/")]),
        ("learning rate", ["learning_rate"]),
        ("gradient norm", ["grad_norm"]),
        ("tokens a second", ["tokens_per_second"]),
    ]
    figures = []
    for title, members in charts:
        series = {name.removeprefix("eval/"): _points(lines, name) for name in members}
        series = {name: points for name, points in series.items() if points}
        if series:
            figures.append(_figure(title, series, "step"))
    for name in sorted({name for one in histograms.values() for name in one}):
        series = {when: _histogram(one[name]) for when, one in histograms.items() if name in one}
        figures.append(_figure(f"cosines: {name}", series, "cosine"))
    table = "".join(
        f"<tr><td>{html.escape(one.word)}</td><td>{html.escape(one.metric)}</td>"
        f"<td>{one.before:.4f}</td><td>{one.after:.4f}</td><td>{one.low:+.4f} to {one.high:+.4f}</td></tr>"
        for one in verdicts
    )
    if table:
        head = "<tr><th>verdict</th><th>measure</th><th>before</th><th>after</th><th>95 %</th></tr>"
        table = f"<table>{head}{table}</table>"
    steps = max((int(line["step"]) for line in lines), default=0)
    title = html.escape(f"{model}: {steps:,} steps")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{table}{''.join(figures)}</html>\n"
    )


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of a measure, at most 400 of them, means of stretches where there are more."""
    found = [
        (float(line["step"]), float(line[name]))
        for line in lines
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]
    stretch = -(-len(found) // _POINTS) if found else 1
    parts = [found[start : start + stretch] for start in range(0, len(found), stretch)]
    return [
        (sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part))
        for part in parts
    ]


def _histogram(counts: Sequence[int]) -> list[tuple[float, float]]:
    """(cosine, share) at the middle of each bin from -1 to 1."""
    total = max(1, sum(counts))
    size = 2 / len(counts)
    return [(-1 + size * (number + 0.5), count / total) for number, count in enumerate(counts)]


def _figure(title: str, series: Mapping[str, Points], unit: str) -> str:
    """One chart with its lines and their names."""
    every = [point for points in series.values() for point in points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    low_y, high_y = min(y for _, y in every), max(y for _, y in every)
    if high_x == low_x:
        high_x = low_x + 1
    if high_y == low_y:
        low_y, high_y = low_y - 0.5, high_y + 0.5
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - low_x) / (high_x - low_x) * inner_width
        down = _TOP + (high_y - y) / (high_y - low_y) * inner_height
        return f"{across:.1f},{down:.1f}"

    marks = []
    for part in range(5):
        y = low_y + (high_y - low_y) * part / 4
        down = _TOP + inner_height * (1 - part / 4)
        marks.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        marks.append(f'<text x="{_LEFT - 4}" y="{down + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        across = place(x, low_y).partition(",")[0]
        marks.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="{anchor}">{unit} {x:,.4g}</text>')
    drawn, key = [], []
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        if len(points) == 1:
            middle = path.split(",")
            drawn.append(f'<circle cx="{middle[0]}" cy="{middle[1]}" r="3" fill="{colour}"/>')
        key.append(f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}')
    return (
        f"<figure><h2>{html.escape(title)}</h2>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(marks)}{"".join(drawn)}</svg>'
        f'<div class="key">{" &nbsp; ".join(key)}</div></figure>'
    )
