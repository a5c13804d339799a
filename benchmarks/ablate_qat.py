"""What training for a format is worth: MiniLM fine-tuned in floats and for int4 and mixed, then quantised.

An arm is a recipe in `ablations_qat/`; the three differ in `qat` alone. A trained model is measured as it is
and with its weights on the grids of a format, as `gemb quantize` has them. The gap of a format is what the
model tuned in floats loses by it; the table says which share of it training for the format closes. Every
arm and seed takes one to two minutes on one core and adds a line to `results/ablations-qat.jsonl`, so that a
rerun does only what is missing. Needs `../shared/data`.

    python -m benchmarks.ablate_qat                        everything that is missing, a quarter of an hour
    python -m benchmarks.ablate_qat --arm int4 --seed 1
    python -m benchmarks.ablate_qat --table                only the table, from what is there
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from benchmarks import ablate
from benchmarks.machine import this_machine
from gemb.files import atomic_write

ARMS = ablate.FOLDER / "ablations_qat"
LINES = ablate.FOLDER / "results" / "ablations-qat.jsonl"
TABLE = ablate.FOLDER / "results" / "ablations-qat.md"
SEEDS = (1, 2, 3)
FLOAT = "float"
FORMATS = ("int4", "mixed")
"""Each is the name of the arm that trains for it, too."""
SHARE_BAR = 0.5


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
    """Every arm with every seed, all arms with the first seed before the next one."""
    return ((arm, seed) for seed in SEEDS for arm in (FLOAT, *FORMATS))


def run_arm(arm: str, seed: int) -> dict[str, object]:
    """Train one arm with one seed and measure it in every format; gives its line.

    What was killed goes on where it was: the run has a folder of its own until its line is written.
    """
    from gemb.jobs import train
    from gemb.recipe import load

    began = time.monotonic()
    place = folder_of(arm, seed)
    options = {"output": place / "model", "seed": seed, "threads": 1, "precision": "fp32"}
    recipe = load(ARMS / f"{arm}.yaml", train.TrainRecipe, (), options)
    sets = recipe.evaluation.sets
    # They are measured once, at the end, in all formats.
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sets": ()})})
    data: Mapping[str, Any] = train.run(recipe).data
    measures = {f"{name} [{FLOAT}]": value for name, value in scores(place / "model", sets).items()}
    for weight_format in FORMATS if arm == FLOAT else (arm,):
        snapped = snapped_folder(place / "model", place / weight_format, weight_format)
        measures |= {f"{name} [{weight_format}]": value for name, value in scores(snapped, sets).items()}
    return {
        "arm": arm,
        "seed": seed,
        "recipe": digest_of(arm),
        "measures": measures,
        "steps": data["steps"],
        "tokens": data["tokens"],
        "train_seconds": data["step_seconds"],
        "seconds": round(time.monotonic() - began, 1),
        "machine": this_machine().slug,
        "versions": data["versions"],
    }


def folder_of(arm: str, seed: int) -> Path:
    """Where a run is until its line is written."""
    return Path(tempfile.gettempdir()) / f"gemb-ablate-qat-{arm}-{seed}-{digest_of(arm)}"


def snapped_folder(source: Path, target: Path, weight_format: str) -> Path:
    """A copy of a model folder with its weights on the grids of a format; gives `target`."""
    from safetensors.torch import load_file, save_file

    from gemb.quantization.roles import grid_of, role_of

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("run"))
    for file in target.rglob("model.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            role = role_of(name, weight.shape)
            if role is not None:
                weights[name] = grid_of(role, weight_format).snap(weight)  # type: ignore[arg-type]
        save_file(weights, file, metadata={"format": "pt"})
    return target


def scores(model: Path, sets: Sequence[str]) -> dict[str, float]:
    """The main metric of each data set: `{"nl2bash nDCG@10": 0.31}`."""
    from gemb.engine.encoder import Encoder
    from gemb.evaluation import evaluate
    from gemb.evaluation.reading import Choices, read_task

    encoder = Encoder.load(model, threads=1, precision="fp32")
    try:
        tasks = [read_task(Path(path), Choices(seed=0)) for path in sets]
        return {
            f"{result.task.name} {result.score.metric}": result.score.value
            for result in evaluate(encoder, tasks)
        }
    finally:
        encoder.close()


def append(line: Mapping[str, object]) -> None:
    """Add one line, on the disk when this returns; what a crash left half-written is ended first."""
    ablate.append(line, LINES)


def shares(
    lines: Mapping[tuple[str, int], Mapping[str, Any]], weight_format: str
) -> Iterator[tuple[str, dict[str, float]]]:
    """For each measure: means over the seeds that have both arms, and the share of the gap that is closed.

    `float` is the model trained in floats, `without` the same quantised, `with` the one trained for the
    format, quantised. The share is of the means: a gap of one seed may be nothing but noise.
    """
    seeds = [seed for seed in SEEDS if {(FLOAT, seed), (weight_format, seed)} <= lines.keys()]
    if not seeds:
        return
    names = [name.removesuffix(f" [{FLOAT}]") for name in lines[FLOAT, seeds[0]]["measures"]
             if name.endswith(f"[{FLOAT}]")]  # fmt: skip
    for name in names:

        def mean(arm: str, form: str, name: str = name) -> float:
            return statistics.fmean(lines[arm, seed]["measures"][f"{name} [{form}]"] for seed in seeds)

        found = {
            FLOAT: mean(FLOAT, FLOAT),
            "without": mean(FLOAT, weight_format),
            "with": mean(weight_format, weight_format),
        }
        gap = found[FLOAT] - found["without"]
        if gap > 0:
            found["share"] = (found["with"] - found["without"]) / gap
        yield name, {**found, "seeds": len(seeds)}


def table(lines: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """The Markdown page of what is there."""
    missing = [f"{arm}/{seed}" for arm, seed in wanted() if (arm, seed) not in lines]
    total = len(list(wanted()))
    page = [
        "# Training for a format",
        "",
        "Means over seeds of a model trained in floats, of the same quantised, and of one trained for "
        "the format and quantised; the share is that of the gap between the first two which training for "
        f"the format closes (bar: {SHARE_BAR:.0%}). Made by `python -m benchmarks.ablate_qat` from the "
        "recipes in `benchmarks/ablations_qat`.",
    ]
    if missing:
        page += ["", f"Partial: {total - len(missing)} of {total} runs; missing {', '.join(missing)}."]
    for weight_format in FORMATS:
        rows = list(shares(lines, weight_format))
        page += ["", f"## {weight_format}", ""]
        if not rows:
            page.append("No run yet.")
            continue
        page += [
            f"| measure (n={rows[0][1]['seeds']}) | float | {weight_format} without | {weight_format} with | "
            "of the gap |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, found in rows:
            share = f"{found['share']:.0%}" if "share" in found else "no gap"
            shown = " | ".join(f"{found[key]:.4f}" for key in (FLOAT, "without", "with"))
            page.append(f"| {name} | {shown} | {share} |")
    return "\n".join([*page, ""])


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
