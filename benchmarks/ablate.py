"""What each part of the method is worth: small models trained with and without it, three seeds each.

An arm is a recipe in `ablations/`; a comparison is some arms that differ in one thing. Every arm and
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer
from numpy.typing import NDArray

from benchmarks.machine import this_machine
from gemb.files import atomic_write

FOLDER = Path(__file__).parent
ARMS = FOLDER / "ablations"
LINES = FOLDER / "results" / "ablations.jsonl"
TABLE = FOLDER / "results" / "ablations.md"
SEEDS = (1, 2, 3)
Run = tuple[str, int]
"""Arm and seed."""
ArmOption = Annotated[str | None, typer.Option(help="Only this arm.")]
SeedOption = Annotated[int | None, typer.Option(help="Only this seed.")]
TableOption = Annotated[bool, typer.Option("--table", help="Run nothing, write the table.")]


@dataclass(frozen=True)
class Comparison:
    """Arms that differ in one thing."""

    title: str
    arms: Sequence[str]
    views: Sequence[str] = ("f32",)
    """Forms of the vectors that are shown; see `measures`."""


COMPARISONS = (
    Comparison("Spread-out term", ("contrastive", "spread_out"), ("f32", "quarter", "int8", "binary")),
    Comparison("Hardness of hard negatives", ("hardness_0", "contrastive")),
    Comparison("Equal texts masked", ("no_mask", "mask")),
    Comparison("Same-tower negatives", ("in_batch", "samtone"), ("f32", "space")),
    Comparison("Hard negatives matched", ("matching_no_negatives", "matching")),
    Comparison("Matching, contrastive, both", ("matching", "contrastive", "both")),
    Comparison("Soup of three mixtures", ("mixture_nli", "mixture_tldr", "mixture_bash", "soup")),
)

BEGINNINGS = {"mixture_nli": "contrastive", "mixture_tldr": "contrastive", "mixture_bash": "contrastive"}
"""Arms that go on from the model of another arm of the same seed."""

INGREDIENTS = {"soup": ("mixture_nli", "mixture_tldr", "mixture_bash")}
"""Arms that are merged from the models of others."""


def digest_of(arm: str) -> str:
    """What tells a recipe, and those of the arms it begins with, from changed ones."""
    digest = blake2b(recipe_of(arm).read_bytes(), digest_size=6)
    for other in before(arm):
        digest.update(digest_of(other).encode())
    return digest.hexdigest()


def recipe_of(arm: str) -> Path:
    """The file of an arm."""
    return ARMS / f"{arm}.yaml"


def before(arm: str) -> tuple[str, ...]:
    """The arms whose models an arm begins with."""
    return (BEGINNINGS[arm],) if arm in BEGINNINGS else INGREDIENTS.get(arm, ())


def arms() -> list[str]:
    """Every arm of a comparison."""
    return list(dict.fromkeys(arm for comparison in COMPARISONS for arm in comparison.arms))


def finished() -> dict[Run, dict[str, Any]]:
    """The lines that are there, by arm and seed; those of other recipes are left out."""
    return lines_in(LINES, {arm: digest_of(arm) for arm in arms()})


def lines_in(file: Path, digests: Mapping[str, str]) -> dict[Run, dict[str, Any]]:
    """The lines of a file by arm and seed, those with the digest that their arm has now."""
    found: dict[Run, dict[str, Any]] = {}
    for text in file.read_bytes().splitlines() if file.is_file() else ():
        with suppress(orjson.JSONDecodeError):  # what a crash left half-written
            line = orjson.loads(text)
            if digests.get(line["arm"]) == line["recipe"]:
                found[line["arm"], line["seed"]] = line
    return found


def wanted() -> Iterator[Run]:
    """Every arm with every seed, all arms with the first seed before the next one."""
    return ((arm, seed) for seed in SEEDS for arm in arms())


def missing(
    runs: Iterable[Run], done: Callable[[], Collection[Run]], arm: str | None, seed: int | None
) -> Iterator[Run]:
    """Those of some runs, of one arm or seed if told, that are not `done` when their turn comes."""
    for run in runs:
        if arm in (None, run[0]) and seed in (None, run[1]) and run not in done():
            yield run


def run_arm(arm: str, seed: int) -> dict[str, object]:
    """Make the model of one arm with one seed and measure it in every view; gives its line.

    What was killed goes on where it was: the run has a folder of its own until its line is written.
    """
    began = time.monotonic()
    data = made(arm, seed)
    sets = sets_of(next(iter(INGREDIENTS.get(arm, (arm,)))))
    after = {f"{name} [f32]": value for name, value in data.get("measures", {}).get("after", {}).items()}
    return {
        "arm": arm,
        "seed": seed,
        "recipe": digest_of(arm),
        "measures": {**after, **measures(folder_of(arm, seed) / "model", sets)},
        **{key: data[key] for key in ("steps", "tokens") if key in data},
        "train_seconds": data.get("step_seconds", 0.0),
        "seconds": round(time.monotonic() - began, 1),
        "machine": this_machine().slug,
        "versions": data["versions"],
    }


def made(arm: str, seed: int) -> Mapping[str, Any]:
    """The report of the run that made the model of an arm, which it is made by now if it was not."""
    from gemb.jobs import distill, merge, train
    from gemb.recipe import load

    record = folder_of(arm, seed) / "report.json"
    if record.is_file():
        found: dict[str, Any] = orjson.loads(record.read_bytes())
        return found
    for other in before(arm):
        made(other, seed)
    source, output = recipe_of(arm), folder_of(arm, seed) / "model"
    data: Mapping[str, Any]
    if arm in INGREDIENTS:
        models = [str(folder_of(other, seed) / "model") for other in INGREDIENTS[arm]]
        data = merge.run(load(source, merge.MergeRecipe, (), {"output": output, "models": models})).data
    else:
        options: dict[str, Any] = {"output": output, "seed": seed, "threads": 1, "precision": "fp32"}
        if arm in BEGINNINGS:
            options["model"] = str(folder_of(BEGINNINGS[arm], seed) / "model")
        recipe = load(source, _kind_of(source), (), options)
        # They are measured once, at the end, in all views.
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sets": ()})})
        run = distill.run if isinstance(recipe, distill.DistillRecipe) else train.run
        data = run(recipe).data
    record.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(record) as file:
        file.write(orjson.dumps(data))
    return data


def sets_of(arm: str) -> Sequence[str]:
    """The data sets that an arm is measured on."""
    from gemb.recipe import load

    sets: Sequence[str] = load(recipe_of(arm), _kind_of(recipe_of(arm))).evaluation.sets
    return sets


def _kind_of(source: Path) -> type[Any]:
    """The class of a recipe of training."""
    from gemb.jobs.distill import DistillRecipe
    from gemb.jobs.train import TrainRecipe

    return DistillRecipe if "\nkind: distill\n" in source.read_text(encoding="utf-8") else TrainRecipe


def folder_of(arm: str, seed: int) -> Path:
    """Where a model is, until all arms that need it have their lines."""
    return Path(tempfile.gettempdir()) / f"gemb-ablate-{arm}-{seed}-{digest_of(arm)}"


def measures(model: Path, sets: Sequence[str]) -> dict[str, float]:
    """The main metric of each data set in each view: `{"nl2bash ndcg@10 [int8]": 0.31}`.

    The view `space` has the numbers of `gemb eval --space` of the sets with queries and documents.
    """
    from gemb.engine.encoder import Encoder
    from gemb.evaluation import View, evaluate
    from gemb.evaluation.ranking import Bitext, Reranking
    from gemb.evaluation.reading import Choices, read_task
    from gemb.evaluation.retrieval import Retrieval
    from gemb.evaluation.space import measure_space
    from gemb.evaluation.tasks import Task

    encoder = Encoder.load(model, threads=1, precision="fp32")
    spaces: dict[str, float] = {}

    def look(task: Task, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        if isinstance(task, Retrieval | Reranking | Bitext):
            space = measure_space(task, vectors, View(encoder.dims))
            spaces.update({
                f"{task.name} probe accuracy [space]": space.probe_accuracy,
                f"{task.name} gap [space]": space.gap,
                f"{task.name} alignment [space]": space.alignment,
                f"{task.name} uniformity of queries [space]": space.query_uniformity,
                f"{task.name} uniformity of documents [space]": space.document_uniformity,
                f"{task.name} top-1 similarity [space]": float(space.top1.mean()),
            })  # fmt: skip

    try:
        views = {
            View(encoder.dims): "f32",
            View(encoder.dims // 4): "quarter",
            View(encoder.dims, "int8"): "int8",
            View(encoder.dims, "binary"): "binary",
        }
        tasks = [read_task(Path(path), Choices(seed=0)) for path in sets]
        scores = {
            f"{result.task.name} {result.score.metric} [{views[result.view]}]": result.score.value
            for result in evaluate(encoder, tasks, list(views), on_vectors=look)
        }
        return {**scores, **spaces}
    finally:
        encoder.close()


def append(line: Mapping[str, object], lines: Path) -> None:
    """Add one line, on the disk when this returns; what a crash left half-written is ended first."""
    lines.parent.mkdir(exist_ok=True)
    with lines.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        file.flush()
        os.fsync(file.fileno())


def table(lines: Mapping[Run, Mapping[str, Any]]) -> str:
    """The Markdown page of what is there."""
    about = (
        "Mean ± standard deviation over seeds; `n` is how many there are. Made by "
        "`python -m benchmarks.ablate` from the recipes in `benchmarks/ablations`."
    )
    sections = (text for one in COMPARISONS for text in section(one, lines))
    return page("Ablations", about, lines, wanted(), sections)


def page(title: str, about: str, lines: Collection[Run], runs: Iterable[Run], sections: Iterable[str]) -> str:
    """A Markdown page that says which of the `runs` have no line yet."""
    every = list(runs)
    left = [f"{arm}/{seed}" for arm, seed in every if (arm, seed) not in lines]
    head = [f"# {title}", "", about]
    if left:
        head += ["", f"Partial: {len(every) - len(left)} of {len(every)} runs; missing {', '.join(left)}."]
    return "\n".join([*head, *sections, ""])


def section(comparison: Comparison, lines: Mapping[Run, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of Markdown of one comparison."""
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


def clear_away() -> None:
    """Remove the models that no missing arm needs."""
    done = finished()
    left = [run for run in wanted() if run not in done]
    needed = set(left)
    for arm, seed in left:
        needed.update((first, seed) for other in before(arm) for first in (other, *before(other)))
    for arm, seed in done:
        if (arm, seed) not in needed:
            shutil.rmtree(folder_of(arm, seed), ignore_errors=True)


def main(arm: ArmOption = None, seed: SeedOption = None, only_table: TableOption = False) -> None:
    """Run the arms and seeds that are missing, then write the table."""
    for name, number in () if only_table else missing(wanted(), finished, arm, seed):
        line = run_arm(name, number)
        append(line, LINES)
        clear_away()
        print(f"{name} {number}: {line['seconds']} s, {line['measures']}")
    with atomic_write(TABLE) as file:
        file.write(table(finished()).encode())


if __name__ == "__main__":
    typer.run(main)
