"""nDCG@10 of search by vectors, by words, and by both, on the English retrieval sets of ../shared/data.

MiniLM in bf16, no prompts, at most 256 tokens a document. The bar: the default of both together is, on
average, not below the better of the two by more than 0.01.

    python -m benchmarks.store.hybrid
"""

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.encode import show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import MODELS, REPOSITORY, SHARED_DATA
from benchmarks.store import vectors
from gemb.evaluation.retrieval import Retrieval, read_beir
from gemb.store import Document, Index, Settings, Writer

SETS = ("cacm", "cranfield", "nl2bash", "scifact", "time", "tldr-commands")
ALLOWED = 0.01
Found = dict[str, list[str]]
"""Ids of documents, best first, by query."""


def ndcg(found: Sequence[str], grades: Mapping[str, int], depth: int = 10) -> float:
    """The nDCG with linear gain and log2 discount (Jaervelin and Kekaelaeinen 2002)."""
    gains = [grades.get(id_, 0) for id_ in found[:depth]]
    best = sorted(grades.values(), reverse=True)[:depth]
    ideal = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(best))
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains)) / ideal


def embedded(task: Retrieval) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of the documents[N, D] and of the queries[Q, D] of a set, kept beside the others."""
    paths = [vectors.folder() / f"hybrid-{task.name}-{what}.npy" for what in ("documents", "queries")]
    if not all(path.exists() for path in paths):
        from gemb import Encoder

        encoder = Encoder.load(str(MODELS["minilm"].folder()), precision="bf16", threads=1)
        for path, what in zip(paths, ("documents", "queries"), strict=True):
            texts = task.roles[what]
            titles = texts.titles or [None] * len(texts.texts)
            whole = [f"{title or ''} {text}".strip() for title, text in zip(titles, texts.texts, strict=True)]
            np.save(path, encoder.embed(whole))
        encoder.close()
    return np.load(paths[0]), np.load(paths[1])


def searched(task: Retrieval) -> dict[str, Found]:
    """What the three kinds of search find in an index of the set."""
    documents, asked = embedded(task)
    texts = task.roles["documents"]
    titles = texts.titles or [None] * len(texts.texts)
    words = list(task.roles["queries"].texts)
    with tempfile.TemporaryDirectory(prefix="gemb-bench-") as scratch:
        at = Path(scratch) / "set.gemb"
        with Writer.open(at, Settings(dims=documents.shape[1])) as writer:
            writer.put(
                [
                    Document(id_, text, title or "")
                    for id_, text, title in zip(task.document_ids, texts.texts, titles, strict=True)
                ],
                documents,
            )
        with Index.open(at) as index:
            hits = {
                "vector": index.search(asked),
                "lexical": index.search(words=words),
                "hybrid": index.search(asked, words=words),
            }
    return {
        kind: {query: [hit.id for hit in own] for query, own in zip(task.query_ids, found, strict=True)}
        for kind, found in hits.items()
    }


def main(
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Search every set in three ways and compare."""
    console, machine = Console(width=110), this_machine()
    lines: list[dict[str, object]] = []
    means: dict[str, list[float]] = {"vector": [], "lexical": [], "hybrid": []}
    table = Table(title="nDCG@10, MiniLM bf16", title_justify="left")
    for heading in ("set", "queries", *means):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name in SETS:
        task = read_beir(SHARED_DATA / "retrieval" / name)
        own = {
            kind: statistics.fmean(ndcg(found[query], task.qrels[query]) for query in task.query_ids)
            for kind, found in searched(task).items()
        }
        lines.append({"set": name, "queries": len(task.query_ids), **own})
        table.add_row(name, str(len(task.query_ids)), *(f"{own[kind]:.4f}" for kind in means))
        for kind, value in own.items():
            means[kind].append(value)
    mean = {kind: statistics.fmean(values) for kind, values in means.items()}
    table.add_row("mean", "", *(f"{mean[kind]:.4f}" for kind in means))
    console.print(table)
    lost = statistics.fmean(
        max(vector, lexical) - hybrid for vector, lexical, hybrid in zip(*means.values(), strict=True)
    )
    bars = [
        Bar("hybrid below the better of the two, mean over the sets", lost, ALLOWED, at_most=True),
        Bar(
            "hybrid below the better mean",
            max(mean["vector"], mean["lexical"]) - mean["hybrid"],
            ALLOWED,
            True,
        ),
    ]
    show_bars(console, bars)
    if store:
        result = {
            "settings": {"model": "minilm", "precision": "bf16", "k": 10},
            "lines": lines,
            "means": mean,
            "bars": [bar.as_dict() for bar in bars],
        }
        path = write_result("store-hybrid-minilm", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
