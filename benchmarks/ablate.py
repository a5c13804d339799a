"""What each part of the method is worth: small models trained with and without it, three seeds each.

An arm is a recipe in `ablations/`; a comparison is two or three arms that differ in one thing. Every arm and
seed takes one to two minutes on one core and adds one line to `results/ablations.jsonl` when it is done, so
that a rerun does only what is missing; a recipe that was changed is missing, too. `results/ablations.md`
shows means and spreads, and says what is not there yet. Needs `../shared/data`.

    python -m benchmarks.ablate                        everything that is missing, about an hour on one core
    python -m benchmarks.ablate --arm spread_out --seed 1
    python -m benchmarks.ablate --table                only the table, from what is there
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from benchmarks.machine import this_machine
from gemb.files import atomic_write

FOLDER = Path(__file__).parent
ARMS = FOLDER / "ablations"
LINES = FOLDER / "results" / "ablations.jsonl"
TABLE = FOLDER / "results" / "ablations.md"
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Comparison:
    """Arms that differ in one thing."""

    title: str
    arms: Sequence[str]
    views: Sequence[str] = ("f32",)
    """Forms of the vectors that are shown; see `views_of`."""


COMPARISONS = (
    Comparison("Spread-out term", ("contrastive", "spread_out"), ("f32", "quarter", "int8", "binary")),
    Comparison("Hardness of hard negatives", ("hardness_0", "contrastive")),
    Comparison("Equal texts masked", ("no_mask", "mask")),
    Comparison("Same-tower negatives", ("in_batch", "samtone")),
    Comparison("Hard negatives matched", ("matching_no_negatives", "matching")),
    Comparison("Matching, contrastive, both", ("matching", "contrastive", "both")),
)


def digest_of(arm: str) -> str:
    """What tells a recipe from a changed one."""
    return blake2b((ARMS / f"{arm}.yaml").read_bytes(), digest_size=6).hexdigest()


def finished() -> dict[tuple[str, int], dict[str, Any]]:
    """The lines that are there, by arm and seed; those of other recipes are left out."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for text in LINES.read_bytes().splitlines() if LINES.is_file() else ():
        with suppress(orjson.JSONDecodeError):  # what a crash left half-written
            line = orjson.loads(text)
            if (ARMS / f"{line['arm']}.yaml").is_file() and line["recipe"] == digest_of(line["arm"]):
                found[line["arm"], line["seed"]] = line
    return found


def wanted() -> Iterator[tuple[str, int]]:
    """Every arm of a comparison with every seed, all arms with the first seed before the next one."""
    arms = dict.fromkeys(arm for comparison in COMPARISONS for arm in comparison.arms)
    return ((arm, seed) for seed in SEEDS for arm in arms)


def run_arm(arm: str, seed: int) -> dict[str, object]:
    """Train one arm with one seed and measure the result in every view; gives its line.

    What was killed goes on where it was: the run has a folder of its own until its line is written.
    """
    from gemb.jobs import distill, train
    from gemb.recipe import load

    began = time.monotonic()
    source = ARMS / f"{arm}.yaml"
    is_distilled = "\nkind: distill\n" in source.read_text(encoding="utf-8")
    options = {"output": folder_of(arm, seed) / "model", "seed": seed, "threads": 1, "precision": "fp32"}
    recipe = load(source, distill.DistillRecipe if is_distilled else train.TrainRecipe, (), options)
    sets = recipe.evaluation.sets
    # They are measured once, at the end, in all views.
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sets": ()})})
    report = distill.run(recipe) if isinstance(recipe, distill.DistillRecipe) else train.run(recipe)
    data: Mapping[str, Any] = report.data
    after = {f"{name} [f32]": value for name, value in data["measures"].get("after", {}).items()}
    return {
        "arm": arm,
        "seed": seed,
        "recipe": digest_of(arm),
        "measures": {**after, **measures(folder_of(arm, seed) / "model", sets)},
        "steps": data["steps"],
        "tokens": data["tokens"],
        "train_seconds": data["step_seconds"],
        "seconds": round(time.monotonic() - began, 1),
        "machine": this_machine().slug,
        "versions": data["versions"],
    }


def folder_of(arm: str, seed: int) -> Path:
    """Where a run is until its line is written."""
    return Path(tempfile.gettempdir()) / f"gemb-ablate-{arm}-{seed}-{digest_of(arm)}"


def measures(model: Path, sets: Sequence[str]) -> dict[str, float]:
    """The main metric of each data set in each view: `{"nl2bash ndcg@10 [int8]": 0.31}`."""
    from gemb.engine.encoder import Encoder
    from gemb.evaluation import View, evaluate
    from gemb.evaluation.reading import Choices, read_task

    encoder = Encoder.load(model, threads=1, precision="fp32")
    try:
        views = {
            View(encoder.dims): "f32",
            View(encoder.dims // 4): "quarter",
            View(encoder.dims, "int8"): "int8",
            View(encoder.dims, "binary"): "binary",
        }
        tasks = [read_task(Path(path), Choices(seed=0)) for path in sets]
        return {
            f"{result.task.name} {result.score.metric} [{views[result.view]}]": result.score.value
            for result in evaluate(encoder, tasks, list(views))
        }
    finally:
        encoder.close()


def append(line: Mapping[str, object]) -> None:
    """Add one line, on the disk when this returns; what a crash left half-written is ended first."""
    LINES.parent.mkdir(exist_ok=True)
    with LINES.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        file.flush()
        os.fsync(file.fileno())


def table(lines: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """The Markdown page of what is there."""
    missing = [f"{arm}/{seed}" for arm, seed in wanted() if (arm, seed) not in lines]
    total = len(list(wanted()))
    head = [
        "# Ablations",
        "",
        "Mean ± standard deviation over seeds; `n` is how many there are. Made by "
        "`python -m benchmarks.ablate` from the recipes in `benchmarks/ablations`.",
    ]
    if missing:
        head += ["", f"Partial: {total - len(missing)} of {total} runs; missing {', '.join(missing)}."]
    return "\n".join([*head, *(line for one in COMPARISONS for line in _section(one, lines)), ""])


def _section(comparison: Comparison, lines: Mapping[tuple[str, int], Mapping[str, Any]]) -> Iterator[str]:
    runs = {arm: [line for (name, _), line in lines.items() if name == arm] for arm in comparison.arms}
    names = list(
        dict.fromkeys(
            name
            for own in runs.values()
            for line in own
            for name in line["measures"]
            if any(name.endswith(f"[{view}]") for view in comparison.views)
        )
    )
    yield ""
    yield f"## {comparison.title}"
    yield ""
    if not names:
        yield "No run yet."
        return
    yield "| measure | " + " | ".join(f"{arm} (n={len(runs[arm])})" for arm in comparison.arms) + " |"
    yield "| --- |" + " --- |" * len(comparison.arms)
    for name in names:
        shown = (_spread([line["measures"][name] for line in own]) for own in runs.values())
        yield f"| {name.removesuffix(' [f32]')} | " + " | ".join(shown) + " |"


def _spread(values: Sequence[float]) -> str:
    """`0.412 ± 0.006`, or the value alone where there is but one."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main(
    arm: Annotated[str | None, typer.Option(help="Only this arm.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing, write the table.")] = False,
) -> None:
    """Run the arms and seeds that are missing, then write the table."""
    if not only_table:
        for name, number in wanted():
            if arm in (None, name) and seed in (None, number) and (name, number) not in finished():
                line = run_arm(name, number)
                append(line)
                shutil.rmtree(folder_of(name, number), ignore_errors=True)
                print(f"{name} {number}: {line['seconds']} s, {line['measures']}")
    with atomic_write(TABLE) as file:
        file.write(table(finished()).encode())


if __name__ == "__main__":
    typer.run(main)
