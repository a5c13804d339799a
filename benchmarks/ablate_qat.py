"""What training for a format is worth: MiniLM taught by itself to live on the grids of int4 and of mixed.

The gap of a format is what the model loses where its weights are rounded to the grids, as `gemb quantize`
has them. An arm is a recipe in `ablations_qat/` that distils MiniLM into itself with `qat`; what it trained
is measured on the same grids, and the table says which share of the gap that closes. Many retrieval and
similarity sets are asked, none of which is trained on: the gap of one set is small beside its noise. Every
arm and seed takes some minutes on one core and adds a line to `results/ablations-qat.jsonl`, so that a rerun
does only what is missing. Needs `../shared/data`.

    python -m benchmarks.ablate_qat                        everything that is missing, an hour
    python -m benchmarks.ablate_qat --arm int4 --seed 1
    python -m benchmarks.ablate_qat --table                only the table, from what is there
"""

import gzip
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
import typer

from benchmarks import ablate
from benchmarks.machine import this_machine
from benchmarks.models import SHARED_DATA, minilm_folder
from gemb.evaluation.retrieval import Retrieval
from gemb.evaluation.tasks import Task, Texts
from gemb.files import atomic_write

ARMS = ablate.FOLDER / "ablations_qat"
LINES = ablate.FOLDER / "results" / "ablations-qat.jsonl"
TABLE = ablate.FOLDER / "results" / "ablations-qat.md"
SEEDS = (1, 2, 3)
SOURCE = "source"
"""The arm that trains nothing: MiniLM as it is."""
FLOAT = "float"
FORMATS = ("int4", "mixed")
"""Each is the name of the arm that trains for it, too."""
SHARE_BAR = 0.5
PAIRS = ("squad-question-sentence", "openstax-glossary")
"""Files of pairs that are asked as retrieval sets: some of the anchors for all of their positives."""
BEIR = ("tldr-commands", "nl2bash")
SIMILARITY = ("stsb/stsb-en.test", "sts12", "sts14", "sts15")
_MOST_PAIRS = 4_000


def digest_of(arm: str) -> str:
    """What tells a recipe from a changed one."""
    recipe = b"" if arm == SOURCE else (ARMS / f"{arm}.yaml").read_bytes()
    asked = " ".join((*PAIRS, *BEIR, *SIMILARITY)).encode()
    return blake2b(recipe + asked, digest_size=6).hexdigest()


def finished() -> dict[ablate.Run, dict[str, Any]]:
    """The lines that are there, by arm and seed; those of other recipes are left out."""
    return ablate.lines_in(LINES, {arm: digest_of(arm) for arm in (SOURCE, *FORMATS)})


def wanted() -> Iterator[ablate.Run]:
    """The source once, then every arm with every seed, all arms with the first seed before the next one."""
    yield SOURCE, 0
    for seed in SEEDS:
        for arm in FORMATS:
            yield arm, seed


def run_arm(arm: str, seed: int) -> dict[str, object]:
    """Train one arm with one seed and measure it on the grids of its format; gives its line.

    What was killed goes on where it was: the run has a folder of its own until its line is written.
    """
    began = time.monotonic()
    place = folder_of(arm, seed)
    place.mkdir(parents=True, exist_ok=True)
    measures: dict[str, float] = {}
    told: dict[str, object] = {}
    if arm == SOURCE:
        trained = minilm_folder()
        measures |= {f"{name} [{FLOAT}]": value for name, value in scores(trained).items()}
    else:
        trained, told = trained_arm(arm, seed)
    for weight_format in FORMATS if arm == SOURCE else (arm,):
        snapped = snapped_folder(trained, place / weight_format, weight_format)
        measures |= {f"{name} [{weight_format}]": value for name, value in scores(snapped).items()}
    return {
        "arm": arm,
        "seed": seed,
        "recipe": digest_of(arm),
        "measures": measures,
        **told,
        "seconds": round(time.monotonic() - began, 1),
        "machine": this_machine().slug,
    }


def trained_arm(arm: str, seed: int) -> tuple[Path, dict[str, object]]:
    """The model of an arm and seed, and what its line tells of the training."""
    from gemb.jobs import distill
    from gemb.recipe import load

    output = folder_of(arm, seed) / "model"
    options = {"output": output, "seed": seed, "threads": 1}
    data = distill.run(load(ARMS / f"{arm}.yaml", distill.DistillRecipe, (), options)).data
    kept = ("steps", "tokens", "precision", "versions")
    return output, {key: data[key] for key in kept if key in data} | {"train_seconds": data["step_seconds"]}


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


def scores(model: Path) -> dict[str, float]:
    """The main metric of each data set: `{"nl2bash nDCG@10": 0.31}`."""
    from gemb.engine.encoder import Encoder
    from gemb.evaluation import evaluate

    encoder = Encoder.load(model, threads=1, precision="fp32")
    try:
        return {
            f"{result.task.name} {result.score.metric}": result.score.value
            for result in evaluate(encoder, tasks())
        }
    finally:
        encoder.close()


def tasks() -> Sequence[Task]:
    """What every model is asked."""
    from gemb.evaluation.reading import Choices, read_task

    paths = [SHARED_DATA / "retrieval" / name for name in BEIR]
    paths += [SHARED_DATA / "sts" / f"{name}.jsonl" for name in SIMILARITY]
    asked = [task_of_pairs(SHARED_DATA / "pairs" / f"{name}.jsonl.gz") for name in PAIRS]
    return [*asked, *(read_task(path, Choices(seed=0)) for path in paths)]


def task_of_pairs(path: Path) -> Retrieval:
    """At most 4,000 pairs, evenly spaced in their file: which of the positives belongs to an anchor?"""
    with gzip.open(path) as file:
        rows = [orjson.loads(line) for line in file]
    rows = rows[:: -(-len(rows) // _MOST_PAIRS)]
    numbers: dict[str, int] = {}
    for row in rows:
        numbers.setdefault(row["positive"], len(numbers))
    qrels = {f"q{query}": {f"d{numbers[row['positive']]}": 1} for query, row in enumerate(rows)}
    return Retrieval(
        path.name.partition(".")[0],
        {
            "queries": Texts([row["anchor"] for row in rows], ("query",)),
            "documents": Texts(list(numbers), ("document",)),
        },
        list(qrels),
        [f"d{number}" for number in numbers.values()],
        qrels,
    )


def shares(
    lines: Mapping[tuple[str, int], Mapping[str, Any]], weight_format: str
) -> Iterator[tuple[str, dict[str, float]]]:
    """For each measure, then for the mean of each metric: means over seeds, and the share that is closed.

    `float` is the model as it is, `without` the same quantised, `with` the one trained for the format,
    quantised, `spread` the standard deviation of that over the seeds. No share where there is no gap.
    """
    trained = [lines[weight_format, seed]["measures"] for seed in SEEDS if (weight_format, seed) in lines]
    if (SOURCE, 0) not in lines or not trained:
        return
    source = lines[SOURCE, 0]["measures"]
    names = [name.removesuffix(f" [{FLOAT}]") for name in source if name.endswith(f"[{FLOAT}]")]
    groups = {name: [name] for name in names}
    for metric in dict.fromkeys(name.rpartition(" ")[2] for name in names):
        alike = [name for name in names if name.endswith(metric)]
        groups[f"mean {metric} of {len(alike)}"] = alike
    for title, group in groups.items():

        def mean(measures: Mapping[str, float], form: str, group: Sequence[str] = group) -> float:
            return statistics.fmean(measures[f"{name} [{form}]"] for name in group)

        with_training = [mean(measures, weight_format) for measures in trained]
        found = {
            FLOAT: mean(source, FLOAT),
            "without": mean(source, weight_format),
            "with": statistics.fmean(with_training),
            "spread": statistics.stdev(with_training) if len(trained) > 1 else 0.0,
            "seeds": len(trained),
        }
        gap = found[FLOAT] - found["without"]
        if gap > 0:
            found["share"] = (found["with"] - found["without"]) / gap
        yield title, found


def table(lines: Mapping[ablate.Run, Mapping[str, Any]]) -> str:
    """The Markdown page of what is there."""
    about = (
        "MiniLM as it is, rounded to a format, and rounded after it was taught by itself with `qat` (mean ± "
        "standard deviation over seeds); the last column is the share of the gap between the first two "
        f"which that closes (bar: {SHARE_BAR:.0%}). Made by `python -m benchmarks.ablate_qat` from the "
        "recipes in `benchmarks/ablations_qat`."
    )
    sections = (text for one in FORMATS for text in _section(one, lines))
    return ablate.page("Training for a format", about, lines, wanted(), sections)


def _section(weight_format: str, lines: Mapping[ablate.Run, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of Markdown of one format."""
    rows = list(shares(lines, weight_format))
    yield from ("", f"## {weight_format}", "")
    if not rows:
        yield "No run yet."
        return
    yield (
        f"| measure (n={rows[0][1]['seeds']}) | float | {weight_format} without | {weight_format} with | "
        "of the gap |"
    )
    yield "| --- | --- | --- | --- | --- |"
    for name, found in rows:
        share = f"{found['share']:.0%}" if "share" in found else "no gap"
        shown = f"{found[FLOAT]:.4f} | {found['without']:.4f} | {found['with']:.4f}"
        yield f"| {name} | {shown} ± {found['spread']:.4f} | {share} |"


def main(
    arm: ablate.ArmOption = None, seed: ablate.SeedOption = None, only_table: ablate.TableOption = False
) -> None:
    """Run the arms and seeds that are missing, then write the table."""
    for name, number in () if only_table else ablate.missing(wanted(), finished, arm, seed):
        line = run_arm(name, number)
        ablate.append(line, LINES)
        shutil.rmtree(folder_of(name, number), ignore_errors=True)
        print(f"{name} {number}: {line['seconds']} s, {line['measures']}")
    with atomic_write(TABLE) as file:
        file.write(table(finished()).encode())


if __name__ == "__main__":
    typer.run(main)
