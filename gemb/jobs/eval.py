"""`gemb eval`: how good a model is on data of the user, at any size, beside another model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gemb.engine.encoder import Encoder
from gemb.engine.opening import stdout_guarded
from gemb.errors import Exit, GembError
from gemb.evaluation import Comparison, Result, Task, View, compare, evaluate
from gemb.evaluation.reading import Choices, read_task
from gemb.evaluation.views import DTYPES, Dtype
from gemb.files import check_writable, os_errors_explained, write_json
from gemb.model.hub import DEFAULT_MODEL
from gemb.recipe import InferenceRecipe, ModelName, RecipeInput, RecipePath, resolved
from gemb.report import Event, OnProgress, Report, Table, ignore

if TYPE_CHECKING:
    from gemb.evaluation.space import Space

Kind = Literal[
    "retrieval", "similarity", "pair-classification", "classification", "clustering", "bitext", "reranking"
]

_MARK_BYTES = 1024
"""From the start of a picture; what it was made by stands there."""


class EvalRecipe(InferenceRecipe):
    """What `gemb eval` is asked to do."""

    kind: ClassVar[str] = "eval"

    data: tuple[RecipeInput, ...] = ()
    """BEIR folders, files of pairs with a score or label, labelled texts, candidates, or translations."""
    against: ModelName | None = None
    """Another model, evaluated too; every difference gets a verdict by a paired bootstrap."""
    dims: tuple[int, ...] = ()
    """Sizes to evaluate, cut from the same vectors (Matryoshka); by default what the model gives."""
    dtype: tuple[Dtype, ...] = ()
    """Stored types to evaluate: f32, f16, bf16, int8, binary; by default f32."""
    task: Kind | None = None
    """What is asked of the data; by default told by its shape."""
    split: str | None = None
    """Which part of the data: test, dev, ...; by default test, or what there is."""
    positive: str | None = None
    """The label of pairs that belong together, in pair classification."""
    samples: int = Field(default=8, ge=1)
    """Texts a label that a classification probe learns from."""
    draws: int = Field(default=10, ge=1)
    """How often probes learn and clusters start; the mean counts."""
    seed: int = 42
    """Of draws and bootstrap."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest text in tokens; by default what the model declares."""
    output: RecipePath | None = None
    """A .json file for the results."""
    plot: RecipePath | None = None
    """A .png file for a picture of quality against dims and bytes."""
    space: RecipePath | None = None
    """A .png file for a picture of how queries and documents lie in the space of the model, at the first of
    the sizes; its numbers are in the results. For retrieval, reranking and bitext."""
    cache: RecipePath | None = None
    """A folder that keeps vectors by content, so that a text embedded before costs nothing; gemb embed may
    share it."""
    fail_on_regression: bool = False
    """End with exit code 8 if any verdict is REGRESSION."""
    fail_under: tuple[str, float] | None = None
    """A metric and a value: end with exit code 8 if it is lower in any data set and view that has it."""

    @field_validator("dims")
    @classmethod
    def _check_dims(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(dims < 1 for dims in value):
            raise ValueError("a size is at least 1")
        return value


@dataclass(frozen=True)
class _Evaluated:
    """What one model did."""

    model: str
    encoder: Encoder
    results: Sequence[Result]
    spaces: Sequence[Space]


@dataclass(frozen=True)
class _Verdict:
    """One data set, or all of them, in one view, against the other model."""

    name: str
    view: View
    other: float
    comparison: Comparison


def run(recipe: EvalRecipe, on_progress: OnProgress = ignore) -> Report:
    """Evaluate what the recipe says.

    Raises GembError as the reading of data and models does, before a model is loaded where it can.
    """
    if not recipe.data:
        raise GembError("no data given; gemb eval MODEL scifact/ stsb.test.jsonl")
    if recipe.fail_on_regression and recipe.against is None:
        raise GembError("--fail-on-regression compares with another model; name it with --against")
    _check_outputs(recipe)
    choices = Choices(recipe.task, recipe.split, recipe.positive, recipe.samples, recipe.draws, recipe.seed)
    tasks = [read_task(Path(name), choices) for name in recipe.data]
    if recipe.space is not None:
        from gemb.evaluation.space import drawn_pairs

        for task in tasks:
            drawn_pairs(task, seed=recipe.seed)  # what has no space shows before a model is loaded
    began = time.monotonic()
    own = _evaluated(recipe, recipe.model or DEFAULT_MODEL, tasks, on_progress)
    verdicts: list[_Verdict] = []
    other: _Evaluated | None = None
    if recipe.against is not None:
        other = _evaluated(recipe, recipe.against, tasks, on_progress)
        verdicts = _verdicts(own.results, other.results, recipe.seed)
    report = _report(recipe, own, other, verdicts, time.monotonic() - began)
    for path in report.outputs:
        with os_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    if recipe.output is not None:
        write_json(recipe.output, {**report.data, "recipe": resolved(recipe)})
    if recipe.plot is not None:
        from gemb.evaluation.plots import draw_sizes

        draw_sizes(own.results, recipe.plot)
    if recipe.space is not None:
        from gemb.evaluation.plots import draw_spaces

        both = [own] if other is None else [own, other]
        # The end of a long path is what tells two runs apart, and fits beside the picture.
        named = [("/".join(Path(each.model).parts[-2:]), space) for each in both for space in each.spaces]
        draw_spaces(named, recipe.space)
    return report


def _check_outputs(recipe: EvalRecipe) -> None:
    """Raises GembError for a result that cannot be written, or would take the place of something else."""
    outputs = {"--output": recipe.output, "--plot": recipe.plot, "--space": recipe.space}
    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        suffix = ".json" if option == "--output" else ".png"
        if path.suffix.lower() != suffix:
            raise GembError(f"{option} {path} is no {suffix} file; give it a name that ends so")
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise GembError(f"{other} and {option} are both {path}; give each a file of its own")
        check_writable(path)
        if path.is_file() and not _is_ours(path):
            raise GembError(
                f"{option} {path} exists and is no result of gemb eval; choose another path, or remove it"
            )


def _is_ours(file: Path) -> bool:
    """Whether a file that exists is an earlier result, which a new one may replace."""
    with os_errors_explained(file):
        if file.suffix.lower() == ".png":
            from gemb.evaluation.plots import SOFTWARE

            with file.open("rb") as opened:
                return b"Software\0" + SOFTWARE.encode() in opened.read(_MARK_BYTES)
        try:
            held = orjson.loads(file.read_bytes())
        except orjson.JSONDecodeError:
            return False
    return isinstance(held, dict) and {"fingerprint", "results", "means"} <= held.keys()


def _evaluated(recipe: EvalRecipe, model: str, tasks: Sequence[Task], on_progress: OnProgress) -> _Evaluated:
    encoder = _opened(recipe, model)
    sizes = recipe.dims or (encoder.folder.truncate_dims or encoder.dims,)
    views = [View(dims, dtype) for dims in sizes for dtype in recipe.dtype or DTYPES[:1]]
    spaces: list[Space] = []

    def tell(task: Task, done: int, total: int) -> None:
        on_progress(Event(f"embedding {task.name}", done, total))

    def look(task: Task, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        if recipe.space is not None:
            from gemb.evaluation.space import measure_space

            spaces.append(measure_space(task, vectors, View(sizes[0]), seed=recipe.seed))

    try:
        return _Evaluated(model, encoder, list(evaluate(encoder, tasks, views, tell, look)), spaces)
    finally:
        encoder.close()


def _opened(recipe: EvalRecipe, model: str) -> Encoder:
    load: Callable[..., Encoder] = Encoder.load
    if recipe.cache is not None:
        from gemb.evaluation.cached import load_cached

        load = partial(load_cached, cache=recipe.cache)
    with stdout_guarded():
        return load(
            model,
            device=recipe.device,
            precision=recipe.precision,
            threads=recipe.threads,
            max_tokens=recipe.max_tokens,
            batch_tokens=recipe.batch_tokens,
            offline=recipe.offline,
            engine=recipe.engine,
        )


def _verdicts(mine: Sequence[Result], other: Sequence[Result], seed: int) -> list[_Verdict]:
    """One for each data set and view, and one for all data sets of a view where there are several.

    The two models may have different sizes: their views are compared in the order asked for.
    """
    found = [
        _Verdict(own.task.name, own.view, its.score.value, compare([own.score], [its.score], seed=seed))
        for own, its in zip(mine, other, strict=True)
    ]
    for view in dict.fromkeys(result.view for result in mine):
        pairs = [(own.score, its.score) for own, its in zip(mine, other, strict=True) if own.view == view]
        if len(pairs) > 1:
            own_scores, its_scores = zip(*pairs, strict=True)
            mean = float(np.mean([score.value for score in its_scores]))
            found.append(_Verdict("mean", view, mean, compare(own_scores, its_scores, seed=seed)))
    return found


def _report(
    recipe: EvalRecipe,
    own: _Evaluated,
    other: _Evaluated | None,
    verdicts: Sequence[_Verdict],
    seconds: float,
) -> Report:
    encoder, results = own.encoder, own.results
    failed = recipe.fail_on_regression and any(
        verdict.comparison.verdict == "REGRESSION" for verdict in verdicts
    )
    rows = [("model", f"{own.model} ({encoder.fingerprint[:12]})")]
    if other is not None:
        rows.append(("against", f"{other.model} ({other.encoder.fingerprint[:12]})"))
    rows.append(("device", encoder.device_line))
    tasks = list({id(result.task): result.task for result in results}.values())
    rows += [("note", f"{task.name}: {note}") for task in tasks for note in task.notes]
    for each in [own] if other is None else [own, other]:
        rows += [("space", f"{each.model}, {_shown_space(space)}") for space in each.spaces]
    under = _under(recipe.fail_under, results)
    rows += [("under", line) for line in under]
    data: dict[str, object] = {
        "model": own.model,
        "fingerprint": encoder.fingerprint,
        "device": encoder.device_line,
        "seconds": round(seconds, 3),
        "results": [_as_json(result) for result in results],
        "means": [_mean_as_json(view, results) for view in dict.fromkeys(result.view for result in results)],
        "notes": {task.name: list(task.notes) for task in tasks if task.notes},
    }
    if recipe.space is not None:
        data["space"] = [space.as_json() for space in own.spaces]
    if other is not None:
        if recipe.space is not None:
            data["against_space"] = [space.as_json() for space in other.spaces]
        data |= {
            "against": other.model,
            "against_fingerprint": other.encoder.fingerprint,
            "verdicts": [_verdict_as_json(verdict) for verdict in verdicts],
        }
    return Report(
        title=f"evaluated {len(tasks)} data set{'s' if len(tasks) > 1 else ''} in {seconds:.1f} s",
        rows=rows,
        data=data,
        outputs=[path for path in (recipe.output, recipe.plot, recipe.space) if path is not None],
        tables=[_table(results, verdicts)],
        exit_code=Exit.GATE if failed or under else Exit.DONE,
    )


def _under(bound: tuple[str, float] | None, results: Sequence[Result]) -> list[str]:
    """A line for each data set and view whose metric is lower than the bound.

    Raises GembError if none has the metric.
    """
    if bound is None:
        return []
    metric, least = bound
    found = [(result, result.score.metrics[metric]) for result in results if metric in result.score.metrics]
    if not found:
        known = dict.fromkeys(name for result in results for name in result.score.metrics)
        raise GembError(f"--fail-under: no data set has {metric}; there is {', '.join(known)}")
    return [
        f"{result.task.name}, {result.view}: {metric} {value:.4f} is under {least:g}"
        for result, value in found
        if value < least
    ]


def _shown_space(space: Space) -> str:
    numbers = {
        "probe": space.probe_accuracy,
        "gap": space.gap,
        "alignment": space.alignment,
        "uniformity of queries": space.query_uniformity,
        "of documents": space.document_uniformity,
        "top-1 cosine": float(np.median(space.top1)),
        "self-balancing ratio": float(np.median(space.ratios)),
    }
    return f"{space.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def _as_json(result: Result) -> dict[str, object]:
    return {
        "data": result.task.name,
        "task": result.task.kind,
        "dims": result.view.dims,
        "dtype": result.view.dtype,
        "bytes": result.view.bytes,
        "metric": result.score.metric,
        "value": result.score.value,
        "items": result.score.items,
        "metrics": dict(result.score.metrics),
        "prompts": result.prompts,
    }


def _mean_as_json(view: View, results: Sequence[Result]) -> dict[str, object]:
    values = [result.score.value for result in results if result.view == view]
    return {"dims": view.dims, "dtype": view.dtype, "bytes": view.bytes, "value": float(np.mean(values))}


def _verdict_as_json(verdict: _Verdict) -> dict[str, object]:
    comparison = verdict.comparison
    return {
        "data": verdict.name,
        "dims": verdict.view.dims,
        "dtype": verdict.view.dtype,
        "against": verdict.other,
        "difference": comparison.difference,
        "low": comparison.low,
        "high": comparison.high,
        "verdict": comparison.verdict,
    }


def _table(results: Sequence[Result], verdicts: Sequence[_Verdict]) -> Table:
    """A line a data set and view, and a line for the mean where there are several data sets."""
    by_line = {(verdict.name, verdict.view): verdict for verdict in verdicts}
    columns = ["data", "task", "dims", "dtype", "bytes", "metric", "value"]
    numbers = ["dims", "bytes", "value"]
    if verdicts:
        columns += ["against", "difference", "95 % of draws", "verdict"]
        numbers += ["against", "difference"]
    else:
        columns.append("also")
    lines = []
    for result in results:
        line = [result.task.name, result.task.kind, *_shown(result.view), result.score.metric]
        line.append(f"{result.score.value:.4f}")
        others = (f"{name} {value:.4f}" for name, value in result.score.metrics.items())
        if verdicts:
            lines.append([*line, *_shown_verdict(by_line.get((result.task.name, result.view)))])
        else:
            lines.append([*line, "  ".join(list(others)[1:])])
    views = list(dict.fromkeys(result.view for result in results))
    if len(results) > len(views):
        for view in views:
            mean = np.mean([result.score.value for result in results if result.view == view])
            line = ["mean", "", *_shown(view), "", f"{mean:.4f}"]
            lines.append([*line, *_shown_verdict(by_line.get(("mean", view)))] if verdicts else [*line, ""])
    return Table(columns, lines, right_aligned=numbers)


def _shown(view: View) -> list[str]:
    return [str(view.dims), view.dtype, f"{view.bytes:,}"]


def _shown_verdict(verdict: _Verdict | None) -> list[str]:
    if verdict is None:
        return ["", "", "", ""]
    found = verdict.comparison
    between = f"{found.low:+.4f} to {found.high:+.4f}"
    return [f"{verdict.other:.4f}", f"{found.difference:+.4f}", between, found.verdict]
