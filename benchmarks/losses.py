"""The contrastive loss at four Matryoshka sizes against one size and against sentence-transformers.

Value and gradient of random embeddings 768 wide, pairs without hard negatives, one thread, processor time;
each round runs all contestants one after the other, and a ratio is the median of those inside a round.

    python -m benchmarks.losses --batch 64 --batch 1024
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import write_result
from benchmarks.machine import this_machine

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 768
SIZES = (768, 512, 256, 128)  # EmbeddingGemma
TEMPERATURE = 0.05
WARM_UP_FLOATS = 1 << 23
"""A block of 32 MB, freed at once, lets the C library keep what it frees later, as a training run does;
otherwise the figures are those of page faults."""


def contestants(batch: int) -> dict[str, Callable[[], object]]:
    """A value and gradient of the same batch by each way."""
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from gemb.losses import contrastive

    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(batch, WIDTH, generator=generator)
    positives = queries + torch.randn(batch, WIDTH, generator=generator)
    leaves = queries.requires_grad_(), positives.requires_grad_()

    def plain(size: int) -> "Tensor":
        x, y = (torch.nn.functional.normalize(rows[:, :size], dim=1) for rows in leaves)
        return torch.nn.functional.cross_entropy(x @ y.T / TEMPERATURE, torch.arange(batch))

    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(),  # type: ignore[arg-type]
        scale=1 / TEMPERATURE,
    )

    def sentence_transformers(size: int) -> "Tensor":
        prefixes = [torch.nn.functional.normalize(rows[:, :size], dim=1) for rows in leaves]
        loss: Tensor = theirs.compute_loss_from_embeddings(prefixes, torch.empty(0))
        return loss

    def trained(loss: Callable[[], "Tensor"]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), leaves)

    return {
        "gemb, four sizes": trained(lambda: contrastive(*leaves, sizes=SIZES, temperature=TEMPERATURE).sum()),
        "gemb, one size": trained(lambda: contrastive(*leaves, temperature=TEMPERATURE).sum()),
        "plain torch, one size": trained(lambda: plain(WIDTH)),
        "sentence-transformers, four sizes": trained(
            lambda: torch.stack([sentence_transformers(size) for size in SIZES]).sum()
        ),
    }


def measure(batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each contestant, and the medians of the ratios of the first to the others."""
    import torch

    torch.set_num_threads(1)
    torch.empty(WARM_UP_FLOATS)
    ways = contestants(batch)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for warm in range(rounds + 2):
        for name, work in ways.items():
            start = time.process_time()
            work()
            if warm >= 2:
                taken[name].append(1e3 * (time.process_time() - start))
    first, *others = taken
    result = {f"{name}, ms": statistics.median(times) for name, times in taken.items()}
    for name in others:
        ratios = [ours / one for ours, one in zip(taken[first], taken[name], strict=True)]
        result[f"{first} / {name}"] = statistics.median(ratios)
    return result


def main(
    batch: Annotated[list[int] | None, typer.Option(help="pairs; several times for several")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 51,
    store: Annotated[bool, typer.Option(help="write the result file")] = False,
) -> None:
    """Time the contrastive loss at four Matryoshka sizes."""
    machine = this_machine()
    measured = {str(size): measure(size, rounds) for size in batch or (64, 128, 256, 512, 1024)}
    table = Table("", *measured)
    for name in next(iter(measured.values())):
        table.add_row(name, *(f"{figures[name]:.2f}" for figures in measured.values()))
    Console().print(table)
    if store:
        written = write_result(
            "losses", machine, {"width": WIDTH, "sizes": SIZES, "rounds": rounds, "batches": measured}
        )
        print(written, file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
