"""Pretraining: gemb against transformers' Seq2SeqTrainer, in tokens a second and peak memory.

    python -m benchmarks.pretrain                         T5Gemma, UL2
    python -m benchmarks.pretrain --shape gemma3-10m      a decoder, causal language modelling
    python -m benchmarks.pretrain --help

Both train the same model from the same random weights on the same rows of real text in the same order, in
fp32, with cross entropy and AdamW. Speed is real tokens a second, those of both towers together; padding does
not count.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.encode import show_bars
from benchmarks.harness import MINIMUM_ROUNDS, Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import REPOSITORY, SHARED_DATA, build_once, cache_folder
from benchmarks.pretrainers import TokenRow
from benchmarks.train import race, results_of, show_results
from benchmarks.trainers import TrainerSettings
from gemb.errors import UnavailableError
from gemb.text.denoising import Denoiser, Frame, Row, causal_row, denoising_row, drawn

TEXTS = SHARED_DATA / "text" / "docs.train.jsonl.gz"
MAX_TOKENS = 512
VOCABULARY = 8192
SENTINELS = 100
_LEAST_TOKENS = 8  # of a row; headings teach little
SEED = 11
PAD, END, START = 0, 1, 2

UL2 = (
    Denoiser(0.15, 3),
    Denoiser(0.5, 12),
    Denoiser(0.15, 32),
    Denoiser(0.5, 32),
    Denoiser(0.75, None, weight=4),
)
"""T5Gemma 2's mixture (arXiv 2512.14856)."""

_TOWER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 256,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
}
_DEEPER = {**_TOWER, "num_hidden_layers": 8}
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "t5gemma-10m": ("T5GemmaForConditionalGeneration", {"encoder": _TOWER, "decoder": _TOWER}),
    "gemma3-10m": ("Gemma3ForCausalLM", _DEEPER),
}
"""Model class and config by name: 11.3 and 8.4 million parameters, the tables counted."""


def shape_folder(shape: str) -> Path:
    """A folder of transformers with random weights and a BPE tokenizer of the texts, built in the cache."""
    return build_once(cache_folder() / f"pretrain-{shape}", lambda place: _write_shape(shape, place))


def _write_shape(shape: str, into: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    name, settings = SHAPES[shape]
    config = getattr(transformers, name).config_class(**settings)
    torch.manual_seed(SEED)
    getattr(transformers, name)(config).save_pretrained(into)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", *(f"<extra_id_{number}>" for number in range(SENTINELS))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text for _, text in zip(range(1000), texts(), strict=False)), trainer)
    tokenizer.save(str(into / "tokenizer.json"))


def texts() -> Iterator[str]:
    """The documents of the shared data. Raises UnavailableError where they are not there."""
    if not TEXTS.exists():
        raise UnavailableError(f"{TEXTS} does not exist; the pretraining benchmark needs its texts")
    with gzip.open(TEXTS, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def read_rows(folder: Path, count: int, *, is_causal: bool) -> list[TokenRow]:
    """`count` rows of at most MAX_TOKENS tokens in no order: paragraphs for a decoder, as they are.

    For an encoder-decoder whole documents, cut and corrupted by UL2.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    generator = np.random.default_rng(SEED)
    sentinels = np.arange(3, 3 + SENTINELS, dtype=np.int32)
    frame = Frame(before=(START,), after=(), start=START, end=END)
    rows: list[TokenRow] = []
    for text in texts():
        for part in text.split("\n\n") if is_causal else [text]:
            ids = np.array(tokenizer.encode(part, add_special_tokens=False).ids, dtype=np.int32)
            for first in range(0, len(ids), MAX_TOKENS):
                body = ids[first : first + MAX_TOKENS]
                if len(body) < _LEAST_TOKENS:
                    continue
                row = (
                    causal_row(body, frame, ends=True)
                    if is_causal
                    else denoising_row(body, drawn(UL2, generator), sentinels, frame, generator)
                )
                rows.append(_as_lists(row))
        if len(rows) >= 8 * count:
            break
    # Rows of one document are not neighbours, as in a shuffled training.
    return [rows[place] for place in generator.permutation(len(rows))[:count]]


def _as_lists(row: Row) -> TokenRow:
    return row.source.tolist(), [*row.ids[:1].tolist(), *row.targets.tolist()]


def run(
    shape: str,
    *,
    batch_size: int,
    batches: int,
    rounds: int,
    threads: int,
    instructions: str,
    console: Console,
) -> dict[str, Any]:
    """Race, print the table and the bar, and give the result as JSON values."""
    folder = shape_folder(shape)
    is_causal = shape.startswith("gemma3")
    rows = read_rows(folder, batch_size * batches, is_causal=is_causal)
    tokens = sum(len(source) + len(whole) - 1 for source, whole in rows)
    own = TrainerSettings("gemb", "gemb", str(folder), batch_size, ())
    peer = TrainerSettings("transformers", "transformers", str(folder), batch_size, ())
    tracks = race(
        [own, peer],
        rows,
        rounds=rounds,
        threads=threads,
        instructions=instructions,
        module="benchmarks.pretrainers",
    )
    results = results_of(tracks, tokens, threads, shape)
    verdicts = [Bar("gemb: tokens/s over transformers", results[0]["speed_against_peer"], 1.5)]
    objective = "causal language modelling" if is_causal else "UL2"
    title = f"{shape}, {objective}, batch {batch_size}, {tokens:,} tokens, {threads} threads, fp32"
    show_results(console, title, results)
    show_bars(console, verdicts)
    return {
        "settings": {
            "shape": {"name": shape, "class": SHAPES[shape][0], "config": SHAPES[shape][1]},
            "objective": objective,
            "batch_size": batch_size,
            "batches": batches,
            "max_tokens": MAX_TOKENS,
            "tokens": tokens,
            "padded_tokens": _padded_tokens(rows, batch_size),
            "threads": threads,
            "time": "processor seconds" if threads == 1 else "wall seconds",
            "rounds": rounds,
        },
        "trainers": results,
        "bars": [bar.as_dict() for bar in verdicts],
    }


def _padded_tokens(rows: Sequence[TokenRow], batch_size: int) -> int:
    """What a trainer computes that pads each batch to its longest row."""
    total = 0
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        longest = max(len(source) for source, _ in batch) + max(len(whole) - 1 for _, whole in batch)
        total += len(batch) * longest
    return total


def main(
    shape: Annotated[str, typer.Option(help="t5gemma-10m or gemma3-10m.")] = "t5gemma-10m",
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    batches: Annotated[int, typer.Option(help="Steps a round.")] = 6,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = MINIMUM_ROUNDS,
    threads: Annotated[int, typer.Option(help="1: processor time; more: wall time.")] = 1,
    instructions: Annotated[str, typer.Option(help="native, avx512 or avx2.")] = "native",
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Race one shape."""
    console, machine = Console(width=110), this_machine(instructions)
    for line in machine.lines():
        console.print(line, highlight=False)
    result = run(
        shape,
        batch_size=batch_size,
        batches=batches,
        rounds=rounds,
        threads=threads,
        instructions=instructions,
        console=console,
    )
    if store:
        path = write_result(f"pretrain-{shape}-batch{batch_size}-{threads}thread", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
