"""From the start of a process to nDCG@10: `gemb eval` against sentence-transformers' evaluator.

Both read a BEIR folder, load MiniLM from a folder, embed queries and corpus, search exactly and print
nDCG@10; the time is that of the whole process, imports included. The reference is the shortest script
around InformationRetrievalEvaluator, as its documentation shows it. Rounds are interleaved; everything
runs on one thread, so that the processor time of the process counts and a busy neighbour hardly moves it.

    python -m benchmarks.eval --data scifact --data nl2bash --rounds 5
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, write_result
from benchmarks.machine import Machine, this_machine, thread_environment
from benchmarks.models import MODELS, REPOSITORY, SHARED_DATA

REFERENCE_SCRIPT = """\
import csv, json, sys
from pathlib import Path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

model, folder, precision = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
relevant = {}
with open(folder / "qrels/test.tsv") as file:
    for row in csv.DictReader(file, delimiter="\\t"):
        if int(row["score"]) > 0:
            relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
corpus, queries = {}, {}
with open(folder / "corpus.jsonl") as file:
    for row in map(json.loads, file):
        text = f"{row.get('title') or ''} {row['text']}".strip()
        if row["text"].strip():
            corpus[row["_id"]] = text
with open(folder / "queries.jsonl") as file:
    for row in map(json.loads, file):
        if row["_id"] in relevant:
            queries[row["_id"]] = row["text"]
kwargs = {"model_kwargs": {"dtype": "bfloat16"}} if precision == "bf16" else {}
found = InformationRetrievalEvaluator(queries, corpus, relevant, write_csv=False)(
    SentenceTransformer(model, device="cpu", **kwargs)
)
print(json.dumps(found["cosine_ndcg@10"]))
"""
BARS = {"scifact": 0.85, "nl2bash": 0.70}
"""Of the reference's time, in fp32 on any processor."""
BF16_BAR = 0.6
SAME = 1e-4


@dataclass(slots=True)
class Evaluation:
    """A command that prints nDCG@10, and what each of its runs took and found."""

    name: str
    command: Sequence[str]
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    ndcg: float = float("nan")

    def run(self, environment: Mapping[str, str]) -> None:
        """Run it once. Raises RuntimeError with its stderr if it fails or prints no nDCG."""
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stderr:
            done = subprocess.run(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=REPOSITORY,
                env=environment,
            )
            wall = time.perf_counter() - started
            stderr.seek(0)
            if done.returncode:
                raise RuntimeError(f"{self.name} ended with {done.returncode}:\n{stderr.read()}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.ndcg = ndcg_of(self.name, done.stdout)
        self.wall_seconds.append(wall)
        self.cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def against(self, reference: "Evaluation") -> tuple[float, float]:
        """Wall and processor time over the reference's: medians of the ratios of the rounds."""
        return (
            _median_ratio(self.wall_seconds, reference.wall_seconds),
            _median_ratio(self.cpu_seconds, reference.cpu_seconds),
        )


def ndcg_of(name: str, output: str) -> float:
    """The nDCG@10 in what a command printed: a number, or the JSON object of gemb.

    Raises RuntimeError if there is none.
    """
    try:
        found = json.loads(output)
        return float(found["results"][0]["metrics"]["nDCG@10"] if isinstance(found, dict) else found)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise RuntimeError(f"{name} printed no nDCG@10: {output[:200]!r}") from error


def evaluations(folder: Path, machine: Machine) -> list[Evaluation]:
    """The commands that are compared; the first is the reference."""
    model = str(MODELS["minilm"].folder())
    script = [sys.executable, "-c", REFERENCE_SCRIPT, model, str(folder)]
    gemb = [sys.executable, "-m", "gemb", "eval", model, str(folder), "--threads", "1", "--json", "-q"]
    found = [
        Evaluation("sentence-transformers fp32", [*script, "fp32"]),
        Evaluation("gemb fp32", [*gemb, "--precision", "fp32"]),
    ]
    if machine.has_bf16:
        found.append(Evaluation("gemb bf16", [*gemb, "--precision", "bf16"]))
    return found


def run(data: str, rounds: int, machine: Machine, console: Console) -> dict[str, object]:
    """Run all of them `rounds` times in turn, print the table, and give the result as JSON values."""
    environment = thread_environment(1)
    entrants = evaluations(SHARED_DATA / "retrieval" / data, machine)
    for _ in range(rounds):
        for entrant in entrants:
            entrant.run(environment)
    reference = entrants[0]
    title = f"{data}: process start to nDCG@10, 1 thread each, {rounds} interleaved rounds"
    table = Table(title=title, title_justify="left")
    for heading in ("", "wall s", "x", "CPU s", "x", "nDCG@10"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows: list[dict[str, object]] = []
    for entrant in entrants:
        wall, cpu = entrant.against(reference)
        rows.append(
            {
                "name": entrant.name,
                "threads": 1,
                "ndcg@10": entrant.ndcg,
                "wall_seconds": statistics.median(entrant.wall_seconds),
                "wall_over_reference": wall,
                "cpu_seconds": statistics.median(entrant.cpu_seconds),
                "cpu_over_reference": cpu,
                "wall_seconds_by_round": entrant.wall_seconds,
                "cpu_seconds_by_round": entrant.cpu_seconds,
            }
        )
        table.add_row(
            entrant.name,
            f"{statistics.median(entrant.wall_seconds):.1f}",
            f"{wall:.2f}",
            f"{statistics.median(entrant.cpu_seconds):.1f}",
            f"{cpu:.2f}",
            f"{entrant.ndcg:.5f}",
        )
    console.print(table)
    verdicts = bars(data, entrants)
    show_bars(console, verdicts)
    return {
        "settings": {"data": data, "rounds": rounds, "threads": 1, "script": REFERENCE_SCRIPT},
        "evaluations": rows,
        "bars": [bar.as_dict() for bar in verdicts],
    }


def bars(data: str, entrants: Sequence[Evaluation]) -> list[Bar]:
    """What the project promises of these runs; the first is the reference."""
    reference, ours, *rest = entrants
    found = [Bar(f"{data}: nDCG@10, difference", abs(ours.ndcg - reference.ndcg), SAME, at_most=True)]
    if data in BARS:
        claim = f"{data}: processor time of the whole process over sentence-transformers"
        found.append(Bar(f"{claim}, fp32", ours.against(reference)[1], BARS[data], at_most=True))
        found += [Bar(f"{claim}, bf16", own.against(reference)[1], BF16_BAR, at_most=True) for own in rest]
    return found


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def main(
    data: Annotated[list[str] | None, typer.Option(help="A folder of ../shared/data/retrieval.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved runs of each.")] = MINIMUM_ROUNDS,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Compare whole evaluations."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    for name in data or list(BARS):
        result = run(name, rounds, machine, console)
        if store:
            path = write_result(f"eval-minilm-{name}", machine, result)
            console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
