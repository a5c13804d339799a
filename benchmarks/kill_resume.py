"""`gemb embed` killed with SIGKILL at random moments and run again; in the end the bytes are compared.

The moments are drawn over the whole life of a process: import, load, computing, writing, publishing. The
file of an uninterrupted run is the reference.

    python -m benchmarks.kill_resume                     50 kills, .npy
    python -m benchmarks.kill_resume --output folder --dtype int8 --kills 10
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.memory import write_rows
from benchmarks.models import MODELS, REPOSITORY


def embed_command(source: Path, output: Path, dtype: str) -> list[str]:
    """The command under test."""
    folder = str(MODELS["minilm"].folder())
    command = [sys.executable, "-m", "gemb", "embed", str(source), "-o", str(output), "-m", folder]
    return [*command, "--dtype", dtype, "--precision", "fp32", "--threads", "1", "--quiet"]


def finished_files(folder: Path) -> dict[str, bytes]:
    """Everything in `folder` by name, but for the records with times in them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("gemb.json")
    }


def kill_until_done(command: list[str], kills: int, longest_seconds: float, seed: int) -> tuple[int, int]:
    """Run `command` and kill it `kills` times, then let it end; (kills, runs that ended before their kill).

    Raises RuntimeError if a run ends with an error.
    """
    draw = random.Random(seed)
    done = early = 0
    environment = thread_environment(1)
    while done < kills:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)
        time.sleep(draw.uniform(0, longest_seconds))
        process.kill()
        _, stderr = process.communicate()
        if process.returncode == -signal.SIGKILL:
            done += 1
        elif process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {stderr.decode()[-2000:]}")
        else:
            early += 1
            if early > kills:
                raise RuntimeError(f"the job was done after {done} kills; pass more --rows")
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    return done, early


def main(
    rows: Annotated[int, typer.Option(help="Rows of the file.")] = 20_000,
    kills: Annotated[int, typer.Option(help="How often the job is killed.")] = 50,
    longest_seconds: Annotated[float, typer.Option(help="A process lives so long at most.")] = 6.0,
    output: Annotated[str, typer.Option(help="Name of the output, which tells the format.")] = "docs.npy",
    dtype: Annotated[str, typer.Option(help="Stored type.")] = "f32",
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Kill `gemb embed` many times and compare its file with that of an uninterrupted run."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        source = Path(scratch) / "docs.jsonl"
        write_rows(source, rows)
        files = []
        folders = [Path(scratch) / name for name in ("whole", "killed")]
        for folder in folders:
            folder.mkdir()
        began = time.monotonic()
        subprocess.run(
            embed_command(source, folders[0] / output, dtype),
            cwd=REPOSITORY,
            env=thread_environment(1),
            check=True,
        )
        whole_seconds = time.monotonic() - began
        console.print(f"uninterrupted: {whole_seconds:.1f} s")
        began = time.monotonic()
        done, early = kill_until_done(
            embed_command(source, folders[1] / output, dtype), kills, longest_seconds, seed
        )
        killed_seconds = time.monotonic() - began
        files = [finished_files(folder) for folder in folders]
        same = sum(files[0].get(name) == content for name, content in files[1].items())
        names = len(files[0].keys() | files[1].keys())
    console.print(f"killed {done} times, {early} runs ended before: {killed_seconds:.1f} s")
    bars = [
        Bar(f"share of {names} files that are the same to the byte after {done} kills", same / names, 1.0)
    ]
    show_bars(console, bars)
    if store:
        result = {
            "settings": {"rows": rows, "kills": kills, "output": output, "dtype": dtype, "seed": seed},
            "kills": done,
            "runs_that_ended_before_their_kill": early,
            "whole_seconds": whole_seconds,
            "killed_seconds": killed_seconds,
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result(f"kill-resume-{Path(output).suffix[1:] or 'folder'}-{dtype}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")
    if not all(bar.met for bar in bars):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
