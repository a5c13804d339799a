"""What a cold `gemb search` takes: from the start of the process to the printed answer.

Two questions. What does the search add to loading the encoder with torch? In one process the clock is read
when the query is embedded and when the answer is printed; the bar is on the ratio of the two, so that a busy
machine, which slows both, hardly moves it. And what does the whole command take where the model's ONNX graph
is in the cache, beside the shortest script that embeds one text with sentence-transformers? Those starts are
interleaved; wall time, processor time and peak memory are those of the whole process. The index holds
MiniLM-wide rows around random centres, with texts, titles and metadata, and a graph as gemb index builds it:
how near the rows are to one another does not matter to the time it takes to open them. The first start reads
the graph file through once; it is told apart.

    python -m benchmarks.cold_search --rounds 7
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cold_start import SHORTEST_SCRIPT
from benchmarks.encode import show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import MODELS, REPOSITORY

QUERY = "who wrote the first compiler?"
BAR = 1.15
WHOLE_BAR = 0.12
MEMORY_BAR_MB = 350
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
    command = [sys.executable, "-c", CLOCKED, "search", str(index), QUERY, "--engine", "torch"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=dict(environment)
    )
    embedded, printed = (float(line) - began for line in done.stderr.split())
    if len(done.stdout.splitlines()) != 10:
        raise RuntimeError(f"10 hits were expected, not:\n{done.stdout}")
    return embedded, printed


@dataclass(frozen=True, slots=True)
class Whole:
    """What one process took from its start to its end."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_mb: float

    @classmethod
    def of(cls, command: Sequence[str], environment: Mapping[str, str], text: str) -> "Whole":
        """Run `command` with `text` on stdin. Raises RuntimeError if it fails or prints nothing."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdin, tempfile.TemporaryFile() as stdout:
            stdin.write(text)
            stdin.seek(0)
            began = time.monotonic()
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, cwd=REPOSITORY, env=dict(environment)
            )
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.monotonic() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode or not stdout.tell():
                raise RuntimeError(f"{command} ended with {process.returncode} and {stdout.tell()} bytes")
        return cls(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)  # KiB on Linux


def whole_starts(index: Path, environment: Mapping[str, str], rounds: int) -> tuple[list[Whole], list[Whole]]:
    """Starts of the script of sentence-transformers and of `gemb search`, in turn, after one of each."""
    script = [sys.executable, "-c", SHORTEST_SCRIPT, str(MODELS["minilm"].folder())]
    search = [sys.executable, "-m", "gemb", "search", str(index), QUERY]
    starts = [
        (Whole.of(script, environment, QUERY), Whole.of(search, environment, "")) for _ in range(rounds + 1)
    ]
    theirs, ours = zip(*starts[1:], strict=True)  # the first of each warms the file cache
    return list(theirs), list(ours)


def write_graph(environment: Mapping[str, str]) -> None:
    """The graph of MiniLM in the cache that `environment` names, as gemb index leaves it there."""
    program = """\
from gemb.engine.onnx_engine import write_cached_graph
from gemb.model.folder import read_folder
from gemb.model.hub import find_model
write_cached_graph(read_folder(find_model("minilm")))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, env=dict(environment))


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
        write_graph(environment)
        theirs, ours = whole_starts(index, environment, rounds)
    ratios = [printed / embedded for embedded, printed in starts]
    ratio = statistics.median(ratios)
    table = Table(title="gemb search: seconds since the start of the process", title_justify="left")
    for heading in ("", "embedded", "printed", "x"):
        table.add_column(heading, justify="left" if not heading else "right")
    embedded, printed = (statistics.median(times) for times in zip(*starts, strict=True))
    table.add_row("median", f"{embedded:.3f}", f"{printed:.3f}", f"{ratio:.3f}")
    table.add_row("first start", f"{first[0]:.3f}", f"{first[1]:.3f}", f"{first[1] / first[0]:.3f}")
    console.print(table)
    table = Table(title="the whole process", title_justify="left")
    for heading in ("", "wall s", "CPU s", "peak MB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, wholes in (("sentence-transformers, one text", theirs), ("gemb search, onnx", ours)):
        medians = [
            statistics.median(values)
            for values in zip(*(asdict(one).values() for one in wholes), strict=True)
        ]
        table.add_row(name, f"{medians[0]:.2f}", f"{medians[1]:.2f}", f"{medians[2]:.0f}")
    console.print(table)
    by_clock = statistics.median(
        mine.wall_seconds / other.wall_seconds for mine, other in zip(ours, theirs, strict=True)
    )
    by_processor = statistics.median(
        mine.cpu_seconds / other.cpu_seconds for mine, other in zip(ours, theirs, strict=True)
    )
    memory = max(one.peak_rss_mb for one in ours)
    bars = [
        Bar("cold search: printed over embedded", ratio, BAR, at_most=True),
        Bar(
            "cold search without torch: wall time over sentence-transformers",
            by_clock,
            WHOLE_BAR,
            at_most=True,
        ),
        Bar("the same: processor time", by_processor, WHOLE_BAR, at_most=True),
        Bar("the same: peak memory in MB", memory, MEMORY_BAR_MB, at_most=True),
    ]
    show_bars(console, bars)
    if store:
        result: dict[str, object] = {
            "settings": {"rows": rows, "rounds": rounds, "query": QUERY, "program": CLOCKED},
            "first_start": {"embedded_seconds": first[0], "printed_seconds": first[1]},
            "starts": [{"embedded_seconds": one, "printed_seconds": other} for one, other in starts],
            "ratio": ratio,
            "whole": {
                "sentence-transformers": [asdict(one) for one in theirs],
                "gemb search": [asdict(one) for one in ours],
                "script": SHORTEST_SCRIPT,
            },
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result("cold-search-minilm", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
