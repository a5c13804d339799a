"""Training: gemb against SentenceTransformerTrainer, in tokens a second and peak memory.

    python -m benchmarks.train --shape 10m                batch 64, the plain loss
    python -m benchmarks.train --shape 10m --batch-size 512 --cached
    python -m benchmarks.train --shape 30m --matryoshka   gemb against itself: four sizes, or one
    python -m benchmarks.train --help

Both train the same Gemma 3 shape from the same random weights on the same real pairs in the same order, in
fp32, with the in-batch contrastive loss at three Matryoshka sizes and AdamW. Every batch is from one data
set, as both would have it in use. Speed is real tokens a second: special tokens counted, padding not.
"""

import gzip
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import models
from benchmarks.encode import show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, ContestantFailed, Lap, write_result
from benchmarks.machine import this_machine, thread_environment
from benchmarks.models import REPOSITORY, SHARED_DATA, build_once, cache_folder, token_counts
from benchmarks.trainers import Pair, TrainerSettings
from gemb.errors import UnavailableError

DATA_SETS = (
    "docs-section",
    "medquad",
    "openstax-section",
    "scitldr-abstract",
    "squad-question-sentence",
    "tldr-command",
    "wiki-split",
    "multi30k-captions-en",
)
"""Long answers, abstracts, sections, sentences and commands: what a mixture holds."""
MAX_TOKENS = 512
SEED = 11

SHAPES: Mapping[str, Mapping[str, int]] = {
    # EmbeddingGemma's proportions: one key head of D / heads... channels, feed-forward of 1.5 to 2 D.
    "10m": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "head_dim": 64},
    "30m": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 768, "head_dim": 128},
}
"""Gemma 3 with four query heads, one key head and MiniLM's vocabulary of 30,522; the table is counted."""


def shape_folder(shape: str) -> Path:
    """A sentence-transformers folder of a Gemma 3 with random weights, built in the cache.

    Raises UnavailableError if MiniLM, whose tokenizer it takes, is not installed.
    """
    return build_once(cache_folder() / f"gemma3-{shape}", lambda place: _write_shape(shape, place))


def _write_shape(shape: str, into: Path) -> None:
    import torch
    from transformers import Gemma3TextConfig, Gemma3TextModel

    tokenizer = models.minilm_folder()
    torch.manual_seed(SEED)
    settings: dict[str, Any] = dict(SHAPES[shape])
    config = Gemma3TextConfig(
        vocab_size=30_522,
        num_attention_heads=4,
        num_key_value_heads=1,
        query_pre_attn_scalar=SHAPES[shape]["head_dim"],
        sliding_window=512,
        max_position_embeddings=2048,
        use_bidirectional_attention=True,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        **settings,
    )
    Gemma3TextModel(config).save_pretrained(into)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, into / name)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    _write(into / "modules.json", entries)
    _write(into / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    _write(
        into / "1_Pooling/config.json",
        {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True},
    )
    _write(into / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def data_sets(batches: int) -> tuple[str, ...]:
    """The data sets of so many batches: all of them, or some, evenly from long texts to short ones."""
    if batches >= len(DATA_SETS):
        return DATA_SETS
    return tuple(DATA_SETS[number * len(DATA_SETS) // batches] for number in range(batches))


def read_pairs(batch_size: int, batches: int) -> list[Pair]:
    """`batches` batches of real pairs, each from one of `data_sets(batches)`, in turn.

    Raises UnavailableError where the shared data are not there.
    """
    streams: dict[str, Iterator[Pair]] = {}
    pairs: list[Pair] = []
    names = data_sets(batches)
    for number in range(batches):
        name = names[number % len(names)]
        stream = streams.setdefault(name, _pairs_of(name))
        pairs.extend(next(stream) for _ in range(batch_size))
    return pairs


def _pairs_of(name: str) -> Iterator[Pair]:
    path = SHARED_DATA / "pairs" / f"{name}.jsonl.gz"
    if not path.exists():
        raise UnavailableError(f"{path} does not exist; the training benchmark needs its pairs")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["anchor"], row["positive"]


@dataclass(frozen=True, slots=True)
class TrainingLap(Lap):
    """What one pass over the pairs took, and the loss of each step."""

    losses: tuple[float, ...] = ()


@dataclass(slots=True)
class Track:
    """All laps of one trainer."""

    settings: TrainerSettings
    laps: list[TrainingLap] = field(default_factory=list)

    def seconds(self, threads: int) -> list[float]:
        """The time that counts of each round."""
        return [lap.seconds(threads) for lap in self.laps]

    def peak_rss_bytes(self) -> int:
        """The highest resident memory of the process."""
        return max(lap.peak_rss_bytes for lap in self.laps)


class Process:
    """A trainer in its own process."""

    def __init__(self, settings: TrainerSettings, threads: int, instructions: str, module: str) -> None:
        self.settings = settings
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=REPOSITORY,
            env=thread_environment(threads, instructions),
        )

    def ask(self, **command: object) -> TrainingLap:
        """The answer to one command. Raises ContestantFailed with the end of stderr if there is none."""
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the process has no pipes")
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._stderr.seek(0)
            tail = "".join(self._stderr.readlines()[-15:])
            raise ContestantFailed(f"{self.settings.name} ended with {self._process.returncode}:\n{tail}")
        fields = json.loads(answer)
        return TrainingLap(**{**fields, "losses": tuple(fields["losses"])})

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()
        self._stderr.close()


@contextmanager
def started(
    settings: Sequence[TrainerSettings], threads: int, instructions: str, module: str = "benchmarks.trainers"
) -> Iterator[list[Process]]:
    """One process a trainer, its model loaded."""
    with ExitStack() as stack:
        processes = []
        for one in settings:
            processes.append(Process(one, threads, instructions, module))
            stack.callback(processes[-1].end)
            processes[-1].ask(do="load", trainer=asdict(one))
        yield processes


def race(
    settings: Sequence[TrainerSettings],
    pairs: Sequence[tuple[Any, Any]],
    *,
    rounds: int,
    threads: int,
    instructions: str = "native",
    module: str = "benchmarks.trainers",
) -> list[Track]:
    """The laps of the trainers of `module` over interleaved rounds, after one step of each to warm up."""
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        whole, part = Path(scratch) / "pairs.json", Path(scratch) / "warm-up.json"
        whole.write_text(json.dumps(list(pairs)), encoding="utf-8")
        part.write_text(json.dumps(list(pairs)[-settings[0].batch_size :]), encoding="utf-8")
        with started(settings, threads, instructions, module) as processes:
            tracks = [Track(process.settings) for process in processes]
            for process in processes:
                process.ask(do="train", rows=str(part))
            for _ in range(rounds):
                for process, track in zip(processes, tracks, strict=True):
                    track.laps.append(process.ask(do="train", rows=str(whole)))
            return tracks


def trainers(folder: Path, batch_size: int, *, cached: bool, width: int) -> list[TrainerSettings]:
    """One for gemb and one for its peer; against the Cached loss one for gemb with GradCache too."""
    plain = TrainerSettings("gemb", "gemb", str(folder), batch_size, (width, width // 2, width // 4))
    peer = replace(
        plain, name=f"st-{'cached' if cached else 'plain'}", engine="sentence-transformers", cached=cached
    )
    if not cached:
        return [plain, peer]
    gradcache = replace(plain, name="gemb-gradcache", tokens_with_graph=0)
    return [plain, gradcache, peer]


def trainers_by_sizes(folder: Path, batch_size: int, *, width: int) -> list[TrainerSettings]:
    """One trainer at four sizes, in the proportions of 768, 512, 256 and 128, and at the full one alone."""
    sizes = (width, 2 * width // 3, width // 3, width // 6)
    four = TrainerSettings("gemb-4-sizes", "gemb", str(folder), batch_size, sizes)
    return [four, replace(four, name="gemb-1-size", sizes=(width,))]


def run(
    shape: str,
    *,
    batch_size: int,
    cached: bool,
    matryoshka: bool = False,
    batches: int,
    rounds: int,
    threads: int,
    instructions: str,
    console: Console,
) -> dict[str, Any]:
    """Race, print the table and the bars, and give the result as JSON values."""
    folder = shape_folder(shape)
    pairs = read_pairs(batch_size, batches)
    counts = token_counts(folder, [text for pair in pairs for text in pair])
    width = SHAPES[shape]["hidden_size"]
    racers = (
        trainers_by_sizes(folder, batch_size, width=width)
        if matryoshka
        else trainers(folder, batch_size, cached=cached, width=width)
    )
    tracks = race(
        racers,
        pairs,
        rounds=rounds,
        threads=threads,
        instructions=instructions,
    )
    rows = results_of(tracks, sum(counts), threads, shape)
    show_results(
        console,
        f"Gemma 3, {shape}, batch {batch_size}, {sum(counts):,} tokens, {threads} threads, fp32",
        rows,
    )
    verdicts = size_bars(rows) if matryoshka else bars(rows, batch_size=batch_size, cached=cached)
    show_bars(console, verdicts)
    return {
        "settings": {
            "shape": {"name": shape, **SHAPES[shape]},
            "batch_size": batch_size,
            "batches": batches,
            "data_sets": data_sets(batches),
            "max_tokens": MAX_TOKENS,
            "tokens": sum(counts),
            "threads": threads,
            "time": "processor seconds" if threads == 1 else "wall seconds",
            "rounds": rounds,
        },
        "trainers": rows,
        "bars": [bar.as_dict() for bar in verdicts],
    }


def results_of(tracks: Sequence[Track], tokens: int, threads: int, shape: str) -> list[dict[str, Any]]:
    """What each trainer took, as JSON values; the last is the peer."""
    peer = tracks[-1].seconds(threads)
    found = []
    for track in tracks:
        seconds = track.seconds(threads)
        found.append({
            "name": track.settings.name,
            "settings": {**asdict(track.settings), "folder": shape},
            "tokens_per_second": tokens / statistics.median(seconds),
            "speed_against_peer": statistics.median(
                theirs / own for own, theirs in zip(seconds, peer, strict=True)
            ),
            "seconds": seconds,
            "spread": max(seconds) / min(seconds) - 1,
            "peak_rss_bytes": track.peak_rss_bytes(),
            "losses": track.laps[0].losses,
        })  # fmt: skip
    return found


def show_results(console: Console, title: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of what `results_of` gives."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "tokens/s", "x", "peak MiB", "first loss", "last loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for one in results:
        table.add_row(
            one["name"],
            f"{one['tokens_per_second']:,.0f}",
            f"{one['speed_against_peer']:.2f}",
            f"{one['peak_rss_bytes'] / 2**20:,.0f}",
            f"{one['losses'][0]:.4f}",
            f"{one['losses'][-1]:.4f}",
        )
    console.print(table)


def bars(rows: Sequence[Mapping[str, Any]], *, batch_size: int, cached: bool) -> list[Bar]:
    """The project's promises that this race can judge."""
    peer = rows[-1]
    found = []
    for row in rows[:-1]:
        speed = f"{row['name']}: tokens/s over {peer['name']} at batch {batch_size}"
        found.append(Bar(speed, row["speed_against_peer"], 1.8 if cached else 2.5))
    if batch_size == 64:
        memory = f"gemb: peak memory over {peer['name']} at batch 64"
        found.append(Bar(memory, rows[0]["peak_rss_bytes"] / peer["peak_rss_bytes"], 0.6, at_most=True))
    return found


def size_bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The promise about the cost of Matryoshka sizes."""
    claim = f"gemb: time of a step with {len(rows[0]['settings']['sizes'])} sizes over that with one"
    return [Bar(claim, 1 / rows[0]["speed_against_peer"], 1.1, at_most=True)]


def main(
    shape: Annotated[str, typer.Option(help="10m or 30m: parameters, the table counted.")] = "10m",
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 64,
    cached: Annotated[bool, typer.Option(help="Against the Cached loss.")] = False,
    matryoshka: Annotated[bool, typer.Option(help="gemb at four Matryoshka sizes against one.")] = False,
    batches: Annotated[int, typer.Option(help="Steps a round.")] = len(DATA_SETS),
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = MINIMUM_ROUNDS,
    threads: Annotated[int, typer.Option(help="1: processor time; more: wall time.")] = 1,
    instructions: Annotated[str, typer.Option(help="native, avx512 or avx2.")] = "native",
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Race one shape at one batch size."""
    console, machine = Console(width=110), this_machine(instructions)
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(
        shape,
        batch_size=batch_size,
        cached=cached,
        matryoshka=matryoshka,
        batches=batches,
        rounds=rounds,
        threads=threads,
        instructions=instructions,
        console=console,
    )
    if store:
        kind = "-matryoshka" if matryoshka else "-cached" if cached else ""
        name = f"train-{shape}-batch{batch_size}{kind}-{threads}thread"
        path = write_result(name, machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
