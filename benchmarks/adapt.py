"""`gemb adapt` at the shape of EmbeddingGemma-300M: its writing beside a copy with fsync, and its proofs.

A round writes the weights and copies the file that was written, each in a process of its own, so that both
meet the same disk; the time is that of the bytes alone, the start of the process is told beside it. Then the
whole command runs once, with its proofs. Memory is the highest sum of anonymous pages (RssAnon): the pages of
files that are read belong to the kernel.

    python -m benchmarks.adapt                              a minute or two, 4 GB of disk
    python -m benchmarks.adapt --to encoder-decoder         6 GB of disk
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.merge import Run, measured
from benchmarks.models import MODELS, REPOSITORY

TARGETS = ("encoder", "encoder-decoder")
WRITE = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from gemb.model.folder import read_folder
from gemb.model.adapting import Wanted, plan
from gemb.model.adapting.encoder_decoder import plan as plan_encoder_decoder
from gemb.model.adapting.streaming import write_pieces
source, target, to, told = sys.argv[1:]
folder = read_folder(Path(source))
planned = plan(folder, Wanted()) if to == "encoder" else plan_encoder_decoder(folder)
Path(target).mkdir()
started = time.perf_counter()
write_pieces([origin.piece for origin in planned.tensors.origins], Path(target))
ended = time.perf_counter()
Path(told).write_text(json.dumps([started - began, ended - started]))
"""
COPY = """
import json, os, shutil, sys, time
began = time.perf_counter()
source, target, told = sys.argv[1:]
os.mkdir(target)
copy = os.path.join(target, "model.safetensors")
shutil.copyfile(source, copy)
with open(copy, "rb") as file:
    os.fsync(file.fileno())
with open(told, "w") as file:
    json.dump([0.0, time.perf_counter() - began], file)
"""
TIME_BAR = 1.5
MEMORY_BAR_BYTES = 500_000_000


@dataclass(frozen=True, slots=True)
class Lap:
    """One process that writes or copies."""

    start_seconds: float
    """Imports and the plan."""
    seconds: float
    """Until the bytes are on disk."""
    peak_anonymous_bytes: int


def write_decoder(encoder: Path, place: Path) -> Path:
    """A Gemma 3 decoder with the weights and the tokenizer of `encoder`, which stay where they are."""
    place.mkdir()
    for file in encoder.iterdir():
        if file.name == "model.safetensors" or "tokenizer" in file.name:
            (place / file.name).symlink_to(file.resolve())
    config: dict[str, Any] = json.loads((encoder / "config.json").read_text("utf-8"))
    config.pop("use_bidirectional_attention", None)
    (place / "config.json").write_text(json.dumps(config), "utf-8")
    return place


def run(model: str, to: str, *, rounds: int, threads: int, console: Console) -> dict[str, object]:
    """Measure, print the table, and give the result as JSON values."""
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        place = Path(scratch)
        source = write_decoder(MODELS[model].folder(), place / "source")
        told, kept = place / "told.json", place / "kept"

        def lap(name: str, program: str, words: list[str]) -> Lap:
            ended = measured(name, to, [sys.executable, "-c", program, *words, str(told)], threads, "")
            start, seconds = json.loads(told.read_text("utf-8"))
            return Lap(start, seconds, ended.peak_anonymous_bytes)

        lap("first", WRITE, [str(source), str(kept), to])  # its file is what the copies copy
        written = kept / "model.safetensors"
        laps: dict[str, list[Lap]] = {"gemb": [], "copy": []}
        for _ in range(rounds):
            for name, program, words in (
                ("copy", COPY, [str(written), str(place / "out")]),
                ("gemb", WRITE, [str(source), str(place / "out"), to]),
            ):
                laps[name].append(lap(name, program, words))
                shutil.rmtree(place / "out")
                console.print(f"{name}: {laps[name][-1].seconds:.2f} s", highlight=False)
        size_bytes = written.stat().st_size
        shutil.rmtree(kept)
        words = ["-m", "gemb", "adapt", str(source), "--to", to, "-o", str(place / "out"), "--quiet"]
        whole = measured("gemb adapt", to, [sys.executable, *words], threads, "")
        seconds = json.loads((place / "out" / "adapt_report.json").read_text("utf-8"))["seconds"]
    bars = bars_of(laps)
    show(laps, whole, seconds, f"{to}, {size_bytes / 1e9:.2f} GB, {threads} threads", console)
    show_bars(console, bars)
    return {
        "settings": {
            "model": model,
            "to": to,
            "rounds": rounds,
            "threads": threads,
            "size_bytes": size_bytes,
        },
        "laps": {name: [asdict(one) for one in of_name] for name, of_name in laps.items()},
        "command": {**asdict(whole), "seconds": seconds},
        "bars": [bar.as_dict() for bar in bars],
    }


def bars_of(laps: Mapping[str, list[Lap]]) -> list[Bar]:
    """Writing over copying in the same round, the median; and the most memory of any."""
    ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(laps["gemb"], laps["copy"], strict=True)]
    peak = max(one.peak_anonymous_bytes for one in laps["gemb"])
    return [
        Bar("writing over a copy with fsync", statistics.median(ratios), TIME_BAR, at_most=True),
        Bar("anonymous memory of writing, GB", peak / 1e9, MEMORY_BAR_BYTES / 1e9, at_most=True),
    ]


def show(
    laps: Mapping[str, list[Lap]], whole: Run, seconds: Mapping[str, float], title: str, console: Console
) -> None:
    """Print what each part takes: medians of the rounds, and the whole command once."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "seconds", "start, seconds", "anonymous MiB"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, label in (("gemb", "writing"), ("copy", "a copy with fsync")):
        table.add_row(
            label,
            f"{statistics.median(one.seconds for one in laps[name]):.2f}",
            f"{statistics.median(one.start_seconds for one in laps[name]):.1f}",
            f"{max(one.peak_anonymous_bytes for one in laps[name]) / 2**20:,.0f}",
        )
    start = whole.wall_seconds - sum(seconds.values())
    table.add_row(
        f"gemb adapt, of it proofs {seconds['proofs']:.1f} s",
        f"{whole.wall_seconds:.1f}",
        f"{start:.1f}",
        f"{whole.peak_anonymous_bytes / 2**20:,.0f}",
    )
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="The shape: gemma300m.")] = "gemma300m",
    to: Annotated[str, typer.Option(help=f"What it becomes: {', '.join(TARGETS)}.")] = "encoder",
    rounds: Annotated[int, typer.Option(help="Rounds, a copy and a writing in turn.")] = MINIMUM_ROUNDS,
    threads: Annotated[int, typer.Option(help="Threads of the proofs.")] = 2,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Adapt a decoder of 300 million parameters, and time its parts."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(model, to, rounds=rounds, threads=threads, console=console)
    if store:
        path = write_result(f"adapt-{to}-{model}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
