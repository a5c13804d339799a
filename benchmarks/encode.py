"""A list of strings to an array of vectors: gemb against its peers, speed, exactness and memory at once.

    python -m benchmarks.encode --model minilm --corpus docs
    python -m benchmarks.encode --model gemma300m --corpus prose --threads 2 --rounds 5

Speed is real tokens a second: prompt and special tokens counted, padding not. "x" is the ratio to
sentence-transformers fp32 at batch 32 in the same round, median over the rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import corpus as corpora
from benchmarks import gemm_peak
from benchmarks.corpus import Sample
from benchmarks.harness import MINIMUM_ROUNDS, Bar, Track, best_batch_size, race, write_result
from benchmarks.machine import Machine, this_machine, versions
from benchmarks.models import MODELS, REPOSITORY, Model, prompt_text, token_counts
from benchmarks.peers import REFERENCE, Contestant, attributes, contestants

TEXTS = {
    "minilm": {"docs": 192, "prose": 192, "queries": 512, "uniform": 96},
    "gemma300m": {"docs": 128, "prose": 128, "queries": 256, "uniform": 64},
}
"""Texts a round, by model and corpus: some seconds for the slowest peer."""
WINDOW = 32
BATCH_SIZES = {"minilm": (1, 4, 8, 16, 32, 64, 128), "gemma300m": (1, 4, 8, 16, 32)}
"""Batch sizes tried for the peers. At 32 the batches of a 300M model are long past every cache."""
SEARCH_WINDOWS = 2
MODEL_HELP = "minilm or gemma300m."
INSTRUCTIONS_HELP = "native, avx512 or avx2: the most torch may use (onnxruntime can't be limited)."


def draw_sample(model: Model, name: str, texts: int, window: int = WINDOW, prompt: str = "none") -> Sample:
    """`texts` texts of the corpus called `name`, tokens counted with the model's own tokenizer."""
    folder = model.folder()
    prefix = prompt_text(folder, prompt)
    return corpora.sample(
        corpora.corpus(name), texts, window, lambda chosen: token_counts(folder, chosen, prefix)
    )


def with_best_batch_sizes(
    model: Model, entrants: Sequence[Contestant], corpus: str, instructions: str
) -> tuple[list[Contestant], dict[str, dict[int, float]]]:
    """The entrants and, for each peer whose best batch size isn't the one it comes with, that one too.

    Also the seconds each peer took at each size over the sample that decided.
    """
    sizes = BATCH_SIZES[model.name]
    # A batch of 128 must meet 128 neighbours in length, or it is charged for padding no large corpus has.
    window = max(sizes)
    search = draw_sample(model, corpus, SEARCH_WINDOWS * window, window)
    result: list[Contestant] = []
    searched: dict[str, dict[int, float]] = {}
    for entrant in entrants:
        result.append(entrant)
        if entrant.engine not in ("sentence-transformers", "onnxruntime"):
            continue
        best, searched[entrant.name] = best_batch_size(
            entrant, search.texts, sizes, instructions=instructions
        )
        if best != entrant.batch_size:
            result.append(replace(entrant, name=f"{entrant.name}-best", batch_size=best))
    return result, searched


def bars(
    model: Model, sample: Sample, tracks: Mapping[str, Track], machine: Machine, share: float | None
) -> list[Bar]:
    """The project's promises that this race can judge on this machine."""
    found: list[Bar] = []
    reference = tracks[REFERENCE]
    for precision, cosine in (("fp32", 0.99999), ("bf16", 0.9998)):
        ours = tracks.get(f"gemb-{precision}")
        if ours is None:
            continue
        found.append(
            Bar(f"gemb-{precision}: minimum cosine to {REFERENCE}", ours.cosines_with(reference)[0], cosine)
        )
        speed = _speed_bar(model.name, sample.corpus, precision, machine)
        if speed is not None:
            found.append(
                Bar(f"gemb-{precision}: speed over {REFERENCE}", ours.speed_against(reference), speed)
            )
        twin = tracks.get(f"st-{precision}")
        if precision == "bf16" and twin and model.name == "gemma300m" and machine.has_bf16:
            found.append(Bar("gemb-bf16: speed over st-bf16", ours.speed_against(twin), 1.6))
        best = tracks.get(f"st-{precision}-best")
        if best:
            claim = (
                f"gemb-{precision}: speed over {best.contestant.name} (batch {best.contestant.batch_size})"
            )
            found.append(Bar(claim, ours.speed_against(best), 1.15))
    found.extend(_onnxruntime_bars(tracks))
    if share is not None and model.name == "gemma300m" and machine.has_avx512:
        found.append(Bar("gemb-fp32: share of the measured GEMM peak", share, 0.70))
    return found


def _speed_bar(model: str, corpus: str, precision: str, machine: Machine) -> float | None:
    """The promised ratio to sentence-transformers fp32 at batch 32, None where nothing is promised."""
    if precision == "bf16":
        if not machine.has_bf16 or corpus != "docs":
            return None
        return {"gemma300m": 3.2, "minilm": 2.4}[model]
    wide = machine.has_avx512
    promised = {
        ("gemma300m", "docs"): 1.9 if wide else 1.6,
        ("gemma300m", "prose"): 1.3 if wide else 1.2,
        ("minilm", "docs"): 1.6 if wide else 1.45,
        ("minilm", "uniform"): 1.2,
    }
    return promised.get((model, corpus))


def _onnxruntime_bars(tracks: Mapping[str, Track]) -> Iterator[Bar]:
    ours = tracks.get("gemb-fp32")
    if ours is None:
        return
    for name in ("ort-fp32", "ort-fp32-best"):
        if name in tracks:
            size = tracks[name].contestant.batch_size
            yield Bar(
                f"gemb-fp32: speed over {name} (token-sorted, batch {size})",
                ours.speed_against(tracks[name]),
                1.0,
            )
    if "fastembed-way" in tracks:
        theirs = tracks["fastembed-way"]
        yield Bar("gemb-fp32: speed over fastembed-way", ours.speed_against(theirs), 1.0)
        memory = ours.peak_rss_bytes() / theirs.peak_rss_bytes()
        yield Bar("gemb-fp32: peak memory over fastembed-way", memory, 1.0, at_most=True)


def run(
    model_name: str,
    corpus: str,
    *,
    precisions: Sequence[str] = (),
    threads: int = 1,
    rounds: int = MINIMUM_ROUNDS,
    texts: int = 0,
    prompt: str = "none",
    instructions: str = "native",
    only: Sequence[str] = (),
    best: bool = True,
    console: Console,
) -> dict[str, object]:
    """Race, print the table and the bars, and give the result as JSON values."""
    model, machine = MODELS[model_name], this_machine(instructions)
    chosen = tuple(precisions) or (("fp32", "bf16") if machine.has_bf16 else ("fp32",))
    entrants = contestants(model, chosen, threads, prompt)
    if only:
        entrants = [entrant for entrant in entrants if entrant.name in only or entrant.name == REFERENCE]
    searched: dict[str, dict[int, float]] = {}
    if best:
        entrants, searched = with_best_batch_sizes(model, entrants, corpus, instructions)
    window = max(
        [WINDOW, *(entrant.batch_size for entrant in entrants if entrant.engine == "sentence-transformers")]
    )
    wanted = texts or TEXTS[model_name][corpus]
    sample = draw_sample(model, corpus, max(window, wanted // window * window), window, prompt)
    tracks = race(entrants, sample.texts, rounds=rounds, instructions=instructions)
    peaks = {
        precision: gemm_peak.peak_gflops(
            model_name, gemm_peak.measured_apart(model_name, precision, instructions)
        )
        for precision in chosen
    }
    rows = [_row(model, sample, track, tracks[REFERENCE], peaks) for track in tracks.values()]
    own = next((row for row in rows if row["name"] == "gemb-fp32"), None)
    share = own["share_of_gemm_peak"] if own and threads == 1 else None
    verdicts = bars(model, sample, tracks, machine, share if isinstance(share, float) else None)
    _show(
        console,
        f"{model.title}: {corpus}, {threads} thread{'s' * (threads > 1)}",
        machine,
        sample,
        rows,
        verdicts,
    )
    return {
        "settings": {
            "model": model_name,
            "threads": threads,
            "time": "processor seconds" if threads == 1 else "wall seconds",
            "rounds": rounds,
            "window": window,
        },
        "sample": sample.as_dict(),
        "gemm_peak_gflops_one_thread": peaks,
        "contestants": rows,
        "seconds_by_batch_size": searched,
        "bars": [bar.as_dict() for bar in verdicts],
    }


def _row(
    model: Model, sample: Sample, track: Track, reference: Track, peaks: Mapping[str, float]
) -> dict[str, object]:
    """One contestant's figures."""
    seconds = track.median_seconds()
    lowest, mean = track.cosines_with(reference)
    peak = peaks.get(track.contestant.precision)
    gflops = model.work.flops(sample.lengths) / seconds / 1e9
    return {
        "name": track.contestant.name,
        **attributes(track.contestant),
        "tokens_per_second": sample.tokens / seconds,
        "texts_per_second": len(sample.texts) / seconds,
        "speed_over_reference": track.speed_against(reference),
        "share_of_gemm_peak": gflops / peak / track.contestant.threads if peak else None,
        "cosine_min": lowest,
        "cosine_mean": mean,
        "peak_rss_mib": track.peak_rss_bytes() / 2**20,
        "anonymous_rss_mib": track.anonymous_rss_bytes() / 2**20,
        "load_seconds": track.load.wall_seconds,
        "seconds_by_round": track.seconds(),
        "wall_seconds_by_round": [lap.wall_seconds for lap in track.laps],
    }


def _show(
    console: Console,
    title: str,
    machine: Machine,
    sample: Sample,
    rows: Sequence[Mapping[str, object]],
    verdicts: Sequence[Bar],
) -> None:
    for line in [*machine.lines(), ", ".join(f"{name} {number}" for name, number in versions().items())]:
        console.print(line, highlight=False)
    figures = sample.as_dict()
    console.print(
        f"{len(sample.texts)} texts from {sample.origin}, {sample.tokens:,} tokens: median "
        f"{figures['tokens_median']:.0f}, mean {figures['tokens_mean']:.0f}, p95 {figures['tokens_p95']}, "
        f"longest {figures['tokens_longest']}; sorted by characters and padded, 32 a batch: "
        f"{sample.padding(32):.2f} computed per real "
        f"({sample.padding_of_corpus:.2f} in the corpus)",
        highlight=False,
    )
    table = Table(title=title, title_justify="left")
    for heading in ("", "batch", "tok/s", "x", "GEMM peak", "cos min", "cos mean", "peak MiB", "spread"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        share, rounds = row["share_of_gemm_peak"], row["seconds_by_round"]
        if not isinstance(rounds, list):
            raise TypeError("seconds_by_round is not a list")
        table.add_row(
            str(row["name"]),
            "tokens" if row["engine"] == "gemb" else str(row["batch_size"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_over_reference']:.2f}",
            f"{share:.0%}" if isinstance(share, float) else "",
            f"{row['cosine_min']:.6f}",
            f"{row['cosine_mean']:.6f}",
            f"{row['peak_rss_mib']:,.0f}",
            f"{max(rounds) / min(rounds) - 1:.0%}",
        )
    console.print(table)
    show_bars(console, verdicts)


def show_bars(console: Console, verdicts: Sequence[Bar]) -> None:
    """One line a bar: the verdict, the claim, what was measured and the bound."""
    for bar in verdicts:
        verdict = "[green]PASS[/green]" if bar.met else "[red]FAIL[/red]"
        bound = f"{'<=' if bar.at_most else '>='} {bar.bound:g}"
        console.print(f"{verdict}  {bar.claim}: {bar.measured:.6g} (bar {bound})", highlight=False)


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "minilm",
    corpus: Annotated[str, typer.Option(help="docs, prose, queries or uniform.")] = "docs",
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 or bf16, repeatable; both where the processor has bf16.")
    ] = None,
    threads: Annotated[int, typer.Option(help="1: processor time; more: wall time.")] = 1,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = MINIMUM_ROUNDS,
    texts: Annotated[
        int, typer.Option(help="Texts a round, a multiple of the window; 0: the model's own.")
    ] = 0,
    prompt: Annotated[str, typer.Option(help="A prompt of the folder that everybody uses.")] = "none",
    instructions: Annotated[str, typer.Option(help=INSTRUCTIONS_HELP)] = "native",
    only: Annotated[
        list[str] | None, typer.Option(help="Contestants beside the reference, repeatable.")
    ] = None,
    best: Annotated[bool, typer.Option(help="Search the peers' best batch sizes first.")] = True,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Race gemb and its peers over one corpus."""
    console = Console(width=110)
    result = run(
        model,
        corpus,
        precisions=precision or (),
        threads=threads,
        rounds=rounds,
        texts=texts,
        prompt=prompt,
        instructions=instructions,
        only=only or (),
        best=best,
        console=console,
    )
    if store:
        name = f"encode-{model}-{corpus}-{threads}thread"
        console.print(
            f"stored in {write_result(name, this_machine(instructions), result).relative_to(REPOSITORY)}"
        )


if __name__ == "__main__":
    typer.run(main)
