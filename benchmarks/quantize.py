"""`gemb embed` with a quantised folder against the plain one: size, what was lost, time and memory.

Each run is a process from its start to the written vectors, the folders in turn. The weights become floats
when they are loaded, so that texts run at one speed; the start and the table of tokens differ.

    python -m benchmarks.quantize                    a minute; --model gemma300m some more
"""

import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.corpus import corpus
from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.merge import Run, measured
from benchmarks.models import MODELS, REPOSITORY
from gemb.files import read_json

FORMATS = ("int4", "int8", "mixed")
BITS = {"minilm": {"int4": 4.9, "int8": 8.8}, "gemma300m": {"int4": 4.6, "int8": 8.6}}
"""The most bits a weight, tokenizer aside."""
SPEED_BAR = 1.05
"""Time over that of the plain folder; 5 % is what a busy machine adds to either."""


def run(model: str, *, texts: int, rounds: int, threads: int, console: Console) -> dict[str, object]:
    """Measure, print the table, and give the result as JSON values."""
    source = MODELS[model].folder()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        place = Path(scratch)
        passages = corpus("docs").texts[:texts]
        lines = [" ".join(text.split()) for text in passages]
        (place / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
        folders = {"plain": source, **{name: place / name for name in FORMATS}}
        gemb = [sys.executable, "-m", "gemb"]
        common = ["--threads", str(threads), "-q"]
        for name in FORMATS:
            command = [*gemb, "quantize", str(source), "-o", str(folders[name]), "--format", name, *common]
            runs.append(measured("quantize", name, command, threads, ""))
        records = {name: read_json(folders[name] / "gemb.json") for name in FORMATS}
        for number in range(rounds + 1):  # the first fills the caches
            for name, folder in folders.items():
                command = [
                    *gemb,
                    "embed",
                    str(place / "texts.txt"),
                    "-m",
                    str(folder),
                    "--precision",
                    "fp32",
                    "--engine",
                    "torch",
                ]
                output = ["-o", str(place / "vectors.npy"), "--overwrite", *common]
                one = measured("embed", name, [*command, *output], threads, "")
                if number:
                    runs.append(one)
                    console.print(f"{name}: {one.cpu_seconds:.2f} CPU-s", highlight=False)
    bars = _bars(model, runs, records)
    _show(console, model, runs, records)
    show_bars(console, bars)
    return {
        "settings": {"model": model, "texts": texts, "threads": threads, "rounds": rounds},
        "runs": [asdict(one) for one in runs],
        "formats": {
            name: {key: record[key] for key in ("bytes", "bits_per_weight", "gate")}
            for name, record in records.items()
        },
        "bars": [bar.as_dict() for bar in bars],
    }


def _least(runs: list[Run], folder: str, what: str) -> float:
    return float(min(getattr(one, what) for one in runs if (one.name, one.method) == ("embed", folder)))


def _bars(model: str, runs: list[Run], records: dict[str, dict[str, object]]) -> list[Bar]:
    bars = [
        Bar(f"bits a weight of {name}", float(str(records[name]["bits_per_weight"])), most, at_most=True)
        for name, most in BITS[model].items()
    ]
    plain = _least(runs, "plain", "cpu_seconds")
    return bars + [
        Bar(
            f"CPU time of {name} over plain",
            _least(runs, name, "cpu_seconds") / plain,
            SPEED_BAR,
            at_most=True,
        )
        for name in FORMATS
    ]


def _show(console: Console, model: str, runs: list[Run], records: dict[str, dict[str, object]]) -> None:
    title = f"{model}, least of all rounds"
    table = Table(title=title, title_justify="left")
    headings = (
        "",
        "bits a weight",
        "cosine median",
        "minimum",
        "overlap",
        "CPU-s",
        "anonymous MiB",
        "peak MiB",
    )
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("plain", *FORMATS):
        record = records.get(name)
        lost = ["32.00", "1", "1", "1"]
        if record is not None:
            gate = record["gate"]
            if not isinstance(gate, dict):
                raise TypeError("the gate of a record is an object")
            lost = [f"{float(str(record['bits_per_weight'])):.2f}"]
            lost += [f"{gate[key]:.5f}" for key in ("cosine_median", "cosine_min", "overlap")]
        memory = (_least(runs, name, what) / 2**20 for what in ("peak_anonymous_bytes", "peak_rss_bytes"))
        seconds = _least(runs, name, "cpu_seconds")
        table.add_row(name, *lost, f"{seconds:.2f}", *(f"{one:,.0f}" for one in memory))
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(BITS)}.")] = "minilm",
    texts: Annotated[int, typer.Option(help="Texts to embed.")] = 400,
    rounds: Annotated[int, typer.Option(help="Rounds, the folders in turn, after one to warm up.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of each run.")] = 1,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Embed the same texts with a model and with its quantised folders."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(model, texts=texts, rounds=rounds, threads=threads, console=console)
    if store:
        path = write_result(f"quantize-{model}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
