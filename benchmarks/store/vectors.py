"""The vectors of the store's benchmarks: MiniLM's of real text, extended to any size and to 768 dims.

The first REAL_ROWS rows are all-MiniLM-L6-v2's vectors (bf16) of real passages out of ../shared/data: the
English retrieval corpora, then documentation, medical, textbook, encyclopedia and dictionary passages, each
cut at LONGEST_CHARACTERS, shuffled. Queries are real test queries of the retrieval sets, never rows: half of
them to measure with, half to choose settings with.

Rows beyond: take a real row and three of its NEAREST nearest real rows, mix the four with weights drawn
evenly from all convex ones, add Gaussian noise in all directions whose norm is the cluster's spread (the
root mean square distance of the real row's neighbours from their mean), bring to unit length. A mix alone
would lie in the middle of its cluster and be easy to walk to; the noise puts it as far out as the real rows.

768 dims: beside the 384 stand 384 numbers of Gaussian noise whose norm is the median spread, of rows and
queries alike, so that the nearest rows differ by less; then everything is turned by one orthogonal matrix,
which changes no cosine. `768` is turned at random: every coordinate carries as much as the next. `768m` is
turned so that the coordinates stand by falling second moment, as a Matryoshka model's do: its first 256 are
what a first stage looks at.

    python -m benchmarks.store.vectors --rows 1010000 --kind 384       makes and keeps what is not there yet

Kept in `$GEMB_BENCH_CACHE/store`, or `~/.cache/gemb-bench/store`. Seeds are fixed.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.models import MODELS, SHARED_DATA, cache_folder

RETRIEVAL = ("scifact", "nl2bash", "npl", "tlcodesum-java", "tldr-commands", "cacm", "cranfield", "time")
PAIRS = (
    "docs-section",
    "squad-question-sentence",
    "medquad",
    "openstax-section",
    "openstax-glossary",
    "scitldr-abstract",
    "tldr-command",
    "wordnet-definition",
)
LONGEST_CHARACTERS = 600
REAL_ROWS = 100_000
QUERIES = 1_000
"""To measure with; as many others to choose settings with."""
NEAREST = 10
MIXED = 4
SEED = 4
KINDS = ("384", "768", "768m")
BLOCK_ROWS = 10_000

Vectors = NDArray[np.float32]


def folder() -> Path:
    """Where the vectors are kept; made if it is not there."""
    found = cache_folder() / "store"
    found.mkdir(parents=True, exist_ok=True)
    return found


def base_rows(rows: int, kind: str) -> Vectors:
    """The first `rows` unit rows[rows, D] of a kind, mapped; made if they are not there."""
    path = folder() / f"rows-{kind}.npy"
    if not path.exists() or len(np.load(path, mmap_mode="r")) < rows:
        _make(path, rows, kind)
    mapped: Vectors = np.load(path, mmap_mode="r")[:rows]
    return mapped


def queries(kind: str, *, tune: bool = False) -> Vectors:
    """QUERIES unit queries[QUERIES, D]; with `tune` those that settings are chosen with."""
    _, found = _real()
    if kind != "384":
        # Made together, so that neither half depends on which one was asked for.
        found = _widened(found, np.random.default_rng((SEED, 768)), _spread_of_all(), _turn(kind))
    return found[QUERIES:] if tune else found[:QUERIES]


def describe(kind: str) -> str:
    """One sentence on what the rows are, to stand beside figures."""
    made = (
        f"MiniLM bf16 vectors of {REAL_ROWS:,} real passages; beyond, mixes of {MIXED} real neighbours plus "
        "noise of the cluster's spread; queries are real test queries"
    )
    turned = {"768": "turned at random", "768m": "turned to falling moments"}
    return made if kind == "384" else f"{made}; 384 noise dims of the median spread beside, {turned[kind]}"


def truth(
    rows: int, kind: str, *, tune: bool = False, where: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The numbers[QUERIES, NEAREST] of the nearest of the first `rows` rows, by float32 products of all.

    `where`[rows] keeps some of them; then nothing is remembered.
    """
    path = folder() / f"truth-{kind}-{rows}{'-tune' if tune else ''}.npy"
    if where is None and path.exists():
        known: NDArray[np.int64] = np.load(path)
        return known
    all_rows, asked = base_rows(rows, kind), queries(kind, tune=tune)
    best = np.full((len(asked), NEAREST), -np.inf, np.float32)
    found = np.full((len(asked), NEAREST), -1, np.int64)
    for start in range(0, rows, BLOCK_ROWS):
        cosines = asked @ np.asarray(all_rows[start : start + BLOCK_ROWS]).T
        if where is not None:
            cosines[:, ~where[start : start + BLOCK_ROWS]] = -np.inf
        width = min(NEAREST, cosines.shape[1])
        places = np.argpartition(-cosines, width - 1, axis=1)[:, :width]
        both = np.concatenate([best, np.take_along_axis(cosines, places, 1)], axis=1)
        numbers = np.concatenate([found, start + places], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :NEAREST]
        best, found = np.take_along_axis(both, order, 1), np.take_along_axis(numbers, order, 1)
    found[best == -np.inf] = -1
    if where is None:
        _save(path, found)
    return found


def recall(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """The share of the wanted rows[Q, k] (-1 is none) that was found."""
    hits = sum(
        len(set(own[own >= 0].tolist()) & set(right[right >= 0].tolist()))
        for own, right in zip(found, wanted, strict=True)
    )
    return hits / int((wanted >= 0).sum())


def _texts() -> tuple[list[str], list[str]]:
    """All passages and all queries, shuffled, none twice."""
    passages: dict[str, None] = {}
    asked: dict[str, None] = {}
    for name in RETRIEVAL:
        at = SHARED_DATA / "retrieval" / name
        for entry in _lines(at / "corpus.jsonl"):
            passages[f"{entry.get('title') or ''} {entry['text']}".strip()[:LONGEST_CHARACTERS]] = None
        judged = {
            line.split("\t")[0] for line in (at / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]
        }
        asked.update(
            (str(entry["text"]), None) for entry in _lines(at / "queries.jsonl") if entry["_id"] in judged
        )
    for name in PAIRS:
        for entry in _lines(SHARED_DATA / "pairs" / f"{name}.jsonl.gz"):
            passages[str(entry["positive"]).strip()[:LONGEST_CHARACTERS]] = None
            if len(passages) > 1.1 * REAL_ROWS:
                break
    draw = np.random.default_rng(SEED)
    texts = [text for text in passages if text and text not in asked]
    questions = list(asked)
    return (
        [texts[place] for place in draw.permutation(len(texts))[:REAL_ROWS]],
        [questions[place] for place in draw.permutation(len(questions))[: 2 * QUERIES]],
    )


def _lines(path: Path) -> Iterator[dict[str, object]]:
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        for line in file:
            yield json.loads(line)


def _real() -> tuple[Vectors, Vectors]:
    """The real rows[REAL_ROWS, 384], mapped, and the queries[2 * QUERIES, 384]."""
    rows_at, queries_at = folder() / "real.npy", folder() / "queries.npy"
    if not (rows_at.exists() and queries_at.exists()):
        from gemb import Encoder

        texts, questions = _texts()
        encoder = Encoder.load(str(MODELS["minilm"].folder()), precision="bf16", threads=1)
        _save(queries_at, _unit(encoder.embed(questions)))
        _save(rows_at, _unit(encoder.embed(texts)))
        encoder.close()
    return np.load(rows_at, mmap_mode="r"), np.load(queries_at)


def _neighbours() -> tuple[NDArray[np.int32], Vectors]:
    """The nearest real rows[REAL_ROWS, NEAREST] of each real row, and its cluster's spread[REAL_ROWS]."""
    near_at, spread_at = folder() / "near.npy", folder() / "spread.npy"
    if not (near_at.exists() and spread_at.exists()):
        import torch

        real = np.array(_real()[0])
        torch.set_num_threads(1)
        # In bf16: which ones exactly are nearest does not matter for neighbours to mix with.
        half = torch.from_numpy(real).bfloat16()
        near = np.empty((len(real), NEAREST), np.int32)
        spread = np.empty(len(real), np.float32)
        for start in range(0, len(real), 1000):
            stop = min(len(real), start + 1000)
            cosines = half[start:stop] @ half.T
            cosines[torch.arange(stop - start), torch.arange(start, stop)] = -1
            near[start:stop] = _largest(cosines.float().numpy(), NEAREST)
            own = real[near[start:stop]]  # [B, NEAREST, D]
            spread[start:stop] = np.sqrt(
                np.square(own - own.mean(axis=1, keepdims=True)).sum(axis=2).mean(axis=1)
            )
        _save(near_at, near)
        _save(spread_at, spread)
    return np.load(near_at), np.load(spread_at)


def _largest(values: Vectors, count: int) -> NDArray[np.int32]:
    """The places[B, count] of the largest values[B, N]: by a floor first, because few values pass it."""
    found = np.empty((len(values), count), np.int32)
    sample = np.sort(values[:, :: max(1, values.shape[1] // 2000)], axis=1)
    floor = sample[:, -(max(2, count // 4))]
    for row, (own, least) in enumerate(zip(values, floor, strict=True)):
        places = np.flatnonzero(own >= least)
        if len(places) < count:
            places = np.arange(len(own))
        found[row] = places[np.argpartition(-own[places], count - 1)[:count]]
    return found


def _spread_of_all() -> float:
    return float(np.median(_neighbours()[1]))


def _blocks(rows: int) -> Iterator[Vectors]:
    """384-wide rows, in blocks that are the same whatever the number of rows."""
    real, (near, spread) = _real()[0], _neighbours()
    for start in range(0, rows, BLOCK_ROWS):
        if start < REAL_ROWS:
            yield np.ascontiguousarray(real[start : start + BLOCK_ROWS])
            continue
        draw = np.random.default_rng((SEED, 384, start))
        own = draw.integers(0, REAL_ROWS, BLOCK_ROWS)
        which = np.argsort(draw.random((BLOCK_ROWS, NEAREST)), axis=1)[:, : MIXED - 1]
        members = np.concatenate([own[:, None], np.take_along_axis(near[own], which, 1)], axis=1)
        weights = draw.dirichlet(np.ones(MIXED), BLOCK_ROWS).astype(np.float32)
        mixed = np.einsum("bm,bmd->bd", weights, real[members])
        yield _unit(mixed + _noise(draw, BLOCK_ROWS, 384, spread[own][:, None]))


def _noise(draw: np.random.Generator, rows: int, dims: int, norm: NDArray[np.floating] | float) -> Vectors:
    drawn: Vectors = draw.standard_normal((rows, dims), np.float32) * (norm / np.float32(np.sqrt(dims)))
    return drawn


def _widened(rows: Vectors, draw: np.random.Generator, spread: float, turn: Vectors) -> Vectors:
    return _unit(np.concatenate([rows, _noise(draw, len(rows), 384, spread)], axis=1) @ turn)


def _turn(kind: str) -> Vectors:
    """The orthogonal matrix[768, 768] of a kind."""
    draw = np.random.default_rng((SEED, 7))
    random, _ = np.linalg.qr(draw.standard_normal((768, 768)))
    if kind == "768":
        return random.astype(np.float32)
    sample = _widened(
        np.ascontiguousarray(_real()[0][:50_000]), draw, _spread_of_all(), np.eye(768, dtype=np.float32)
    )
    _, directions = np.linalg.eigh(sample.T.astype(np.float64) @ sample)
    return np.ascontiguousarray(directions[:, ::-1]).astype(np.float32)


def _make(path: Path, rows: int, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose from {', '.join(KINDS)}")
    rows = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    spread, turn = (0.0, np.empty(0, np.float32)) if kind == "384" else (_spread_of_all(), _turn(kind))
    made = np.lib.format.open_memmap(
        path.with_suffix(".part"), "w+", np.dtype("<f4"), (rows, 384 if kind == "384" else 768)
    )
    for number, block in enumerate(_blocks(rows)):
        start = number * BLOCK_ROWS
        if kind != "384":
            block = _widened(block, np.random.default_rng((SEED, 769, start)), spread, turn)
        made[start : start + len(block)] = block
    made.flush()
    os.replace(path.with_suffix(".part"), path)


def _unit(rows: Vectors) -> Vectors:
    scaled: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def _save(path: Path, array: NDArray[np.generic]) -> None:
    with path.with_suffix(".part").open("wb") as file:
        np.save(file, array)
    os.replace(path.with_suffix(".part"), path)


def main(
    rows: Annotated[int, typer.Option(help="Rows to have.")] = 1_010_000,
    kind: Annotated[str, typer.Option(help="384, 768 or 768m.")] = "384",
) -> None:
    """Make the rows and queries of a kind, and say how near the queries' nearest rows are."""
    made = base_rows(rows, kind)
    found = queries(kind, tune=True)
    nearest = np.sort(found[:100] @ np.asarray(made[:REAL_ROWS]).T, axis=1)[:, -10:]
    typer.echo(
        f"{len(made):,} x {made.shape[1]}; of 100 queries the cosine of the nearest real row is "
        f"{np.median(nearest[:, -1]):.3f}, of the tenth {np.median(nearest[:, 0]):.3f} (medians)"
    )


if __name__ == "__main__":
    typer.run(main)
