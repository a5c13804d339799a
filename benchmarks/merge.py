"""`gemb merge` against mergekit: three models of one shape, linear and TIES, time and peak memory.

Each merge is a process of its own, ours and theirs in turn. Peak memory is counted twice, each time over the
process and all that it starts: VmHWM, with the pages of mapped files, and the highest sum of anonymous pages
(RssAnon), which is what a merge needs.
Before each merge all that was written is on the disk. Ours hashes the result, and every model that gemb has
not seen before, which theirs does not; so it runs twice: the models are new to it, then the same again.
mergekit is installed once, without its dependencies, into the cache of the benchmarks, and uses our packages.

    python -m benchmarks.merge                    some minutes, 8 GB of disk
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import MODELS, REPOSITORY, build_once, cache_folder

PACKAGES = ("mergekit==0.1.5", "peft==0.21.2", "immutables==0.21")
METHODS: Mapping[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 1.0}},
    "ties": {"parameters": {"weight": 1.0, "density": 0.2}},
}
MERGEKIT = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config = MergeConfiguration.model_validate(json.load(open(sys.argv[1])))
run_merge(config, sys.argv[2], options=MergeOptions(copy_tokenizer=False, quiet=True))
"""
TIME_BAR, MEMORY_BAR = 0.5, 0.35
NEW, KNOWN, MERGEKIT_NAME = "gemb", "gemb again", "mergekit"
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """One merge."""

    name: str
    method: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def write_models(source: Path, place: Path) -> list[Path]:
    """The base and three models near it: every tensor with noise of a hundredth of its deviation."""
    import torch
    from safetensors.torch import load_file, save_file

    folders = [place / "base", *(place / name for name in "abc")]
    for seed, folder in enumerate(folders):
        shutil.copytree(source, folder)
        generator = torch.Generator().manual_seed(seed)
        for file in folder.rglob("*.safetensors") if seed else ():
            tensors = load_file(file)
            for tensor in tensors.values():
                if tensor.is_floating_point() and tensor.numel() > 1:
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor += noise.mul_(0.01 * float(tensor.std())).to(tensor.dtype)
            save_file(tensors, file, metadata={"format": "pt"})
    return folders


def mergekit_folder() -> Path:
    """Where mergekit is installed; needs the package index once."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]

    def write(folder: Path) -> None:
        subprocess.run([*install, str(folder), *PACKAGES], check=True, capture_output=True)

    return build_once(cache_folder() / PACKAGES[0].replace("==", "-"), write)


def measured(
    name: str, method: str, command: list[str], threads: int, path: str, cache: Path | None = None
) -> Run:
    """Run a command to its end, with a `cache` of gemb of its own. Raises RuntimeError if it fails."""
    environment = {**thread_environment(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    if cache is not None:
        environment["GEMB_CACHE"] = str(cache)
    os.sync()  # what the run before left to be written would be written during this one
    before = os.times()
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, stdout=subprocess.DEVNULL, cwd=REPOSITORY, env=environment
        )
        peak = anonymous = 0
        while process.poll() is None:
            statuses = list(_statuses(process.pid))
            peak = max(peak, sum(_kib(text, "VmHWM:") for text in statuses) * 1024)
            anonymous = max(anonymous, sum(_kib(text, "RssAnon:") for text in statuses) * 1024)
            time.sleep(POLL_SECONDS)
        if process.wait():
            stderr.seek(0)
            raise RuntimeError(f"{name} ended with {process.returncode}:\n{stderr.read()[-3000:]}")
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(name, method, wall, cpu, peak, anonymous)


def _statuses(process: int) -> Iterator[str]:
    """/proc/PID/status of a process and of all that it started and that are still there."""
    try:
        yield Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [child for one in threads for child in (one / "children").read_text("ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _statuses(int(child))


def _kib(status: str, key: str) -> int:
    for line in status.splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return 0  # a process that has ended and not been waited for has no memory left to tell of


def run(model: str, *, rounds: int, threads: int, console: Console) -> dict[str, object]:
    """Measure, print the table, and give the result as JSON values."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        place = Path(scratch)
        mergekit = mergekit_folder()
        base, *models = write_models(MODELS[model].folder(), place)
        for _ in range(rounds):
            for method, settings in METHODS.items():
                config: dict[str, Any] = {
                    "merge_method": method,
                    "models": [{"model": str(folder)} for folder in models],
                    "dtype": "float32",
                    **settings,
                }
                if method != "linear":
                    config["base_model"] = str(base)
                recipe = place / f"{method}.yaml"
                recipe.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
                output = place / "merged"
                ours = [sys.executable, "-m", "gemb", "merge", str(recipe), "-o", str(output)]
                theirs = [sys.executable, "-c", MERGEKIT, str(recipe), str(output)]
                cache = place / f"cache-{len(runs)}"  # an empty one at first: no model is known
                for name, command, path in (
                    (NEW, ours, ""),
                    (KNOWN, ours, ""),
                    (MERGEKIT_NAME, theirs, str(mergekit)),
                ):
                    runs.append(measured(name, method, command, threads, path, cache))
                    console.print(f"{name} {method}: {runs[-1].wall_seconds:.1f} s", highlight=False)
                    shutil.rmtree(output)
    table = Table(title=f"three models of the shape of {model}, {threads} threads", title_justify="left")
    for heading in ("", "method", "seconds", "CPU-s", "peak MiB", "anonymous MiB"):
        table.add_column(heading, justify="left" if heading in ("", "method") else "right")
    for entry in runs:
        table.add_row(
            entry.name,
            entry.method,
            f"{entry.wall_seconds:.1f}",
            f"{entry.cpu_seconds:.1f}",
            f"{entry.peak_rss_bytes / 2**20:,.0f}",
            f"{entry.peak_anonymous_bytes / 2**20:,.0f}",
        )
    console.print(table)
    bars = [bar for method in METHODS for name in (NEW, KNOWN) for bar in _bars(name, method, runs)]
    show_bars(console, bars)
    return {
        "settings": {"model": model, "threads": threads, "rounds": rounds, "packages": PACKAGES},
        "runs": [asdict(entry) for entry in runs],
        "bars": [bar.as_dict() for bar in bars],
    }


def _bars(own: str, method: str, runs: list[Run]) -> list[Bar]:
    """The median of our rounds over the median of theirs."""

    def middle(name: str, what: str) -> float:
        found = [getattr(entry, what) for entry in runs if (entry.name, entry.method) == (name, method)]
        return float(median(found))

    return [
        Bar(
            f"{own}, {method}: {label} over mergekit's",
            middle(own, what) / middle(MERGEKIT_NAME, what),
            bar,
            at_most=True,
        )
        for label, what, bar in (
            ("CPU time", "cpu_seconds", TIME_BAR),
            ("time", "wall_seconds", TIME_BAR),
            ("peak memory without mapped files", "peak_anonymous_bytes", MEMORY_BAR),
        )
    ]


def main(
    model: Annotated[str, typer.Option(help=f"The shape: {', '.join(MODELS)}.")] = "gemma300m",
    rounds: Annotated[int, typer.Option(help="Rounds, ours and theirs in turn.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of both.")] = 2,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Merge three models with gemb and with mergekit."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(model, rounds=rounds, threads=threads, console=console)
    if store:
        path = write_result(f"merge-{model}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
