"""The most this machine's matrix products give at a model's shapes: the yardstick for "share of the peak".

For each weight of a layer, torch's `F.linear` and the prepacked oneDNN product are timed at 512 to
2,048 tokens on one thread; the best of all is the peak of that shape, and the layer's peak is its
work divided by the sum of the best times. Nothing that a CPU library offers for these shapes is
faster, so a whole encoder that reaches 80 % spends at most a fifth of its time elsewhere.

    python -m benchmarks.gemm_peak --model gemma300m --precision fp32
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import MODELS, REPOSITORY

TOKENS = (512, 1024, 2048)
ROUNDS = 5
SECONDS_A_ROUND = 0.05
"""Long enough for the clock, short enough that a shape's rounds interleave with the others'."""

if TYPE_CHECKING:
    import torch


def measure(model: str, precision: str) -> dict[str, dict[str, float]]:
    """Best GFLOP/s by shape ("768x1280") and kernel ("F.linear at 512"), processor time of this process."""
    import torch

    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    generator = torch.Generator().manual_seed(1)
    best: dict[str, dict[str, float]] = {}
    trials: list[tuple[str, str, int, Callable[[], object]]] = []
    for inputs, outputs, _ in MODELS[model].work.matrices:
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        for tokens in TOKENS:
            rows = torch.randn(tokens, inputs, generator=generator).to(dtype)
            flops = 2 * tokens * inputs * outputs
            for kernel, work in _kernels(rows, weight).items():
                trials.append((f"{inputs}x{outputs}", f"{kernel} at {tokens}", flops, work))
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for shape, kernel, flops, work in trials:
                work()
                start, calls = time.process_time(), 0
                while (taken := time.process_time() - start) < SECONDS_A_ROUND or not calls:
                    work()
                    calls += 1
                rate = calls * flops / taken / 1e9
                kernels = best.setdefault(shape, {})
                kernels[kernel] = max(rate, kernels.get(kernel, 0.0))
    return best


def _kernels(rows: "torch.Tensor", weight: "torch.Tensor") -> dict[str, Callable[[], object]]:
    import torch

    kernels: dict[str, Callable[[], object]] = {"F.linear": lambda: torch.nn.functional.linear(rows, weight)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        prepacked: Callable[[], object] = partial(
            torch.ops.mkldnn._linear_pointwise, rows, packed, None, "none", [], ""
        )
        prepacked()
    except (RuntimeError, AttributeError):
        return kernels  # a private product that some builds and processors don't have
    return {**kernels, "prepacked": prepacked}


def peak_gflops(model: str, rates: dict[str, dict[str, float]]) -> float:
    """The peak of one layer of `model` in GFLOP/s, from the rates `measure` gave."""
    flops = seconds = 0.0
    for inputs, outputs, count in MODELS[model].work.matrices:
        work = 2.0 * inputs * outputs * count
        flops += work
        seconds += work / max(rates[f"{inputs}x{outputs}"].values())
    return flops / seconds


def measured_apart(model: str, precision: str, instructions: str = "native") -> dict[str, dict[str, float]]:
    """What `measure` gives, in a process of its own, so that instruction limits hold and memory goes back."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gemm_peak", "--model", model, "--precision", precision, "--raw"],
        env=thread_environment(1, instructions),
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    rates: dict[str, dict[str, float]] = json.loads(finished.stdout)
    return rates


def main(
    model: Annotated[str, typer.Option(help="minilm or gemma300m.")] = "gemma300m",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    instructions: Annotated[
        str, typer.Option(help="native, avx512 or avx2: the most torch may use.")
    ] = "native",
    raw: Annotated[bool, typer.Option("--raw", hidden=True, help="Only the rates, as JSON.")] = False,
) -> None:
    """Print and store the peak rate of a model's matrix products on one thread."""
    if raw:
        sys.stdout.write(json.dumps(measure(model, precision)))
        return
    console, machine = Console(), this_machine(instructions)
    for line in machine.lines():
        console.print(line, highlight=False)
    rates = measured_apart(model, precision, instructions)
    table = Table(title=f"{MODELS[model].title}, {precision}, one thread")
    table.add_column("inputs x outputs")
    table.add_column("best kernel")
    table.add_column("GFLOP/s", justify="right")
    for shape, kernels in rates.items():
        kernel = max(kernels, key=lambda name: kernels[name])
        table.add_row(shape, kernel, f"{kernels[kernel]:.1f}")
    peak = peak_gflops(model, rates)
    table.add_row("layer", "", f"{peak:.1f}")
    console.print(table)
    path = write_result(
        f"gemm-peak-{model}-{precision}", machine, {"peak_gflops": peak, "gflops_by_shape_and_kernel": rates}
    )
    console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
