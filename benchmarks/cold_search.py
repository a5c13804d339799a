"""What a cold `gemb search` adds to loading the encoder: from the start of the process to the printed answer.

In one process the clock is read when the query is embedded and when the answer is printed; the bar is on
the ratio of the two, so that a busy machine, which slows both, hardly moves it. The index holds MiniLM-wide
rows around random centres, with texts, titles and metadata, and a graph as gemb index builds it: how near
the rows are to one another does not matter to the time it takes to open them. The first start reads the
graph file through once; it is told apart.

    python -m benchmarks.cold_search --rounds 7
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import REPOSITORY

QUERY = "who wrote the first compiler?"
BAR = 1.15
DIMS = 384
CENTRES = 2_000
ROWS_AT_ONCE = 5_000
WORDS_A_TEXT = 70
CLOCKED = """\
import sys, time
from importlib import import_module
import gemb.retrieval.queries as queries
embed = queries.QueryEncoder.embed
def clocked(self, texts, **settings):
    vectors = embed(self, texts, **settings)
    print(time.monotonic(), file=sys.stderr)
    return vectors
queries.QueryEncoder.embed = clocked
try:
    import_module("gemb.commands").main()
finally:
    sys.stdout.flush()
    print(time.monotonic(), file=sys.stderr)
"""


def make_index(path: Path, rows: int) -> None:
    """An index of `rows` documents at `path`, one row each, with the record of MiniLM."""
    from gemb.model.folder import read_folder
    from gemb.model.hub import find_model
    from gemb.retrieval.index_model import record_of
    from gemb.store import Document, Settings, Writer
    from gemb.text.prompts import DOCUMENT, Prompts

    folder = read_folder(find_model("minilm"))
    prompt = Prompts(folder.prompts, folder.default_prompt).template(DOCUMENT)
    record = record_of(folder, "minilm", document=prompt, max_tokens=folder.max_tokens, passages="off")
    random = np.random.default_rng(0)
    centres = random.standard_normal((CENTRES, DIMS)).astype(np.float32)
    with Writer.open(path, Settings(dims=DIMS, encoder=record)) as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - start)
            vectors = centres[random.integers(0, CENTRES, count)]
            vectors = vectors + random.standard_normal((count, DIMS)).astype(np.float32)
            words = random.integers(0, 20_000, (count, WORDS_A_TEXT))
            documents = [
                Document(
                    f"d{start + place}",
                    " ".join(f"word{word}" for word in words[place]),
                    f"title {start + place}",
                    {"year": 1900 + place % 120},
                )
                for place in range(count)
            ]
            writer.put(documents, vectors)
        writer.compact()


def start(index: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds from the start of a process until its query was embedded, and until its answer was printed."""
    began = time.monotonic()  # of the machine: a child reads the same clock
    command = [sys.executable, "-c", CLOCKED, "search", str(index), QUERY]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=dict(environment)
    )
    embedded, printed = (float(line) - began for line in done.stderr.split())
    if len(done.stdout.splitlines()) != 10:
        raise RuntimeError(f"10 hits were expected, not:\n{done.stdout}")
    return embedded, printed


def main(
    rows: Annotated[int, typer.Option(help="Documents in the index.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Starts.")] = MINIMUM_ROUNDS,
    index: Annotated[Path | None, typer.Option(help="An index that is there, instead of a new one.")] = None,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Measure cold searches."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    with tempfile.TemporaryDirectory(prefix="gemb-cold-") as folder:
        if index is None:
            index = Path(folder) / "docs.gemb"
            make_index(index, rows)
        environment = thread_environment(len(os.sched_getaffinity(0))) | {"GEMB_CACHE": f"{folder}/cache"}
        first = start(index, environment)
        starts = [start(index, environment) for _ in range(rounds)]
    ratios = [printed / embedded for embedded, printed in starts]
    ratio = statistics.median(ratios)
    table = Table(title="gemb search: seconds since the start of the process", title_justify="left")
    for heading in ("", "embedded", "printed", "x"):
        table.add_column(heading, justify="left" if not heading else "right")
    embedded, printed = (statistics.median(times) for times in zip(*starts, strict=True))
    table.add_row("median", f"{embedded:.3f}", f"{printed:.3f}", f"{ratio:.3f}")
    table.add_row("first start", f"{first[0]:.3f}", f"{first[1]:.3f}", f"{first[1] / first[0]:.3f}")
    console.print(table)
    bars = [Bar("cold search: printed over embedded", ratio, BAR, at_most=True)]
    show_bars(console, bars)
    if store:
        result: dict[str, object] = {
            "settings": {"rows": rows, "rounds": rounds, "query": QUERY, "program": CLOCKED},
            "first_start": {"embedded_seconds": first[0], "printed_seconds": first[1]},
            "starts": [{"embedded_seconds": one, "printed_seconds": other} for one, other in starts],
            "ratio": ratio,
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result("cold-search-minilm", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
