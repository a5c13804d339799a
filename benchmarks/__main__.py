"""The quick set: a look at every bar in some minutes, MiniLM only unless asked.

Nothing is stored; the published figures come from the single scripts, see README.md.
"""

from typing import Annotated

import typer
from rich.console import Console

from benchmarks import cold_start, encode, padding_and_invariance
from benchmarks.machine import this_machine

QUICK_ROUNDS = 3
QUICK_TEXTS = 96


def main(
    model: Annotated[str, typer.Option(help=encode.MODEL_HELP)] = "minilm",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each race.")] = QUICK_ROUNDS,
) -> None:
    """Race over two corpora, start cold, count padding and check batch invariance."""
    console, machine = Console(width=110), this_machine()
    for corpus in ("docs", "uniform" if model == "minilm" else "prose"):
        encode.run(model, corpus, rounds=rounds, texts=QUICK_TEXTS, best=False, console=console)
    cold_start.run(model, rounds, console)
    padding_and_invariance.run(model, ["fp32", "bf16"] if machine.has_bf16 else ["fp32"], console)


if __name__ == "__main__":
    typer.run(main)
