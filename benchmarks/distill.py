"""Does the recipe teach? `distill_minilm` from its first step to its last, then both models measured.

The student is trained as `gemb distill distill_minilm` does it, on two cores within 40 minutes; a run that
was stopped goes on, and a student that is there is measured alone. Then student and teacher are measured on
STS-B's test pairs and all English retrieval sets of `../shared/data`.

    python -m benchmarks.distill --output /tmp/student          three quarters of an hour
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY, SHARED_DATA
from gemb.files import read_json
from gemb.model.folder import read_folder

RETRIEVAL = ("cacm", "cranfield", "nl2bash", "npl", "scifact", "time", "tlcodesum-java", "tldr-commands")
STS = "stsb-en"


def main(
    output: Annotated[Path, typer.Option(help="The folder of the student.")],
    threads: Annotated[int, typer.Option(help="Threads of the training.")] = 2,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Train the student and measure it beside its teacher."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    if not (output / "gemb.json").is_file():
        _gemb("distill", "distill_minilm", "-o", str(output), "--threads", str(threads))
    sets = [f"{SHARED_DATA}/retrieval/{name}" for name in RETRIEVAL]
    sets.append(f"{SHARED_DATA}/sts/stsb/{STS}.test.jsonl")
    found = json.loads(_gemb("eval", str(output), *sets, "--against", "minilm", "--json"))
    student = {result["data"]: result["value"] for result in found["results"]}
    teacher = {verdict["data"]: verdict["against"] for verdict in found["verdicts"]}
    record = read_json(output / "gemb.json")
    means = [sum(scores[name] for name in RETRIEVAL) / len(RETRIEVAL) for scores in (student, teacher)]
    parameters = read_folder(output).weights().parameters
    table = Table(title=f"distill_minilm, {parameters:,} parameters, {record['steps']:,} steps")
    for name in ("data", "student", "teacher"):
        table.add_column(name, justify="left" if name == "data" else "right")
    for name in (*RETRIEVAL, next(name for name in student if name.startswith(STS))):
        table.add_row(name, f"{student[name]:.4f}", f"{teacher[name]:.4f}")
    table.add_row("mean nDCG@10", *(f"{mean:.4f}" for mean in means))
    console.print(table)
    sts = next(value for name, value in student.items() if name.startswith(STS))
    bars = [
        Bar("mean nDCG@10 of eight sets over the teacher's", means[0] / means[1], 0.7),
        Bar("STS-B test, Spearman", sts, 0.72),
        Bar("minutes of training", record["seconds"] / 60, 40, at_most=True),
        Bar("parameters", parameters, 12e6, at_most=True),
    ]
    show_bars(console, bars)
    if store:
        result: dict[str, Any] = {
            "settings": {"threads": record["recipe"]["threads"], "steps": record["steps"]},
            "device": record["device"],
            "parameters": parameters,
            "seconds": record["seconds"],
            "student": student,
            "teacher": teacher,
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result("distill-minilm", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


def _gemb(*words: str) -> str:
    """What a command of gemb prints on stdout, run in the repository, as the recipe's paths want it."""
    command = [sys.executable, "-m", "gemb", *words]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


if __name__ == "__main__":
    typer.run(main)
