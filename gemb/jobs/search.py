"""The documents of an index nearest in meaning to a question: exact cosine, all rows, in blocks.

K dims, N documents, k hits.
"""

import textwrap
import time
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field

from gemb.errors import GembError, MismatchError
from gemb.jobs.index import SHOWN_DIGITS, Index, open_index
from gemb.model.folder import fingerprint, read_folder
from gemb.model.hub import find_model
from gemb.recipe import ComputeRecipe, RecipePath
from gemb.report import Event, OnProgress, Report, Table, ignore
from gemb.vectors import VectorFile, cut

BLOCK_ROWS = 16_384
SNIPPET_CHARACTERS = 160


class SearchRecipe(ComputeRecipe):
    """What `gemb search` is asked to do; the model is the index's own unless one is given."""

    kind: ClassVar[str] = "search"

    index: RecipePath | None = None
    """The index folder that gemb index made."""
    query: str = ""
    """The question."""
    k: int = Field(default=10, ge=1)
    """How many documents to show."""
    as_: str = "query"
    """What the question is, which chooses the model's prompt: query, a prompt's name, or none."""


def run(recipe: SearchRecipe, on_progress: OnProgress = ignore) -> Report:
    """The k nearest documents, best first; of equal scores the one that was indexed first.

    Raises UnavailableError if index or model are not there, MismatchError if they do not belong together.
    """
    if recipe.index is None:
        raise GembError("no index given; gemb search docs.gemb 'a question'")
    if not recipe.query.strip():
        raise GembError(f"the question is empty; gemb search {recipe.index} 'a question'")
    return search(open_index(recipe.index), [recipe.query], recipe, on_progress)[0]


def search(
    index: Index, queries: list[str], recipe: SearchRecipe, on_progress: OnProgress = ignore
) -> list[Report]:
    """One report a query; the model is loaded once."""
    vectors = _embed(index, queries, recipe, on_progress)
    started = time.perf_counter()
    scores, rows = nearest(index.vectors, vectors, recipe.k)
    seconds = (time.perf_counter() - started) / len(queries)
    return [_report(index, query, scores[place], rows[place], seconds) for place, query in enumerate(queries)]


def nearest(
    documents: VectorFile, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores [Q, k] and rows [Q, k] of the k documents with the largest dot products, best first.

    `queries` is float32[Q, K]. k is cut to the number of documents; of equal scores the smaller row wins.
    """
    k = min(k, documents.rows)
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, documents.rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, documents.rows)
        block = queries @ documents.block(start, stop).T  # [Q, rows of the block]
        scores = np.concatenate([scores, block], axis=1)
        numbers = np.broadcast_to(np.arange(start, stop, dtype=np.int64), block.shape)
        rows = np.concatenate([rows, numbers], axis=1)
        # Stable, and rows stand in ascending order among equals, so that the smaller row stays in front.
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return scores, rows


def json_lines(reports: Iterable[Report]) -> bytes:
    """The hits of each report, one JSON object a line, for a pipe."""
    lines = []
    for report in reports:
        hits = report.data["hits"]
        if isinstance(hits, list):
            lines += [orjson.dumps(hit, option=orjson.OPT_APPEND_NEWLINE) for hit in hits]
    return b"".join(lines)


def _embed(
    index: Index, queries: list[str], recipe: SearchRecipe, on_progress: OnProgress
) -> NDArray[np.float32]:
    """Unit vectors [Q, K] of the queries, by the model of the index."""
    name = recipe.model or index.model

    def announce(line: str) -> None:
        on_progress(Event("downloading", 0, note=line))

    folder = read_folder(find_model(name, offline=recipe.offline, announce=announce))
    found = fingerprint(folder)
    if found != index.fingerprint:
        raise MismatchError(
            f"{index.path} holds vectors of the model {index.model} ({index.fingerprint[:SHOWN_DIGITS]}), "
            f"but {name} is {found[:SHOWN_DIGITS]}; search with the model that made the index, "
            "or index the documents again"
        )
    from gemb.engine.encoder import Encoder  # here, because it loads torch

    encoder = Encoder.load(
        folder.path, device=recipe.device, precision=recipe.precision, threads=recipe.threads
    )
    vectors = encoder.embed(queries, as_=recipe.as_)
    return cut(vectors, index.vectors.dims, normalise=True)


def _report(
    index: Index, query: str, scores: NDArray[np.float32], rows: NDArray[np.int64], seconds: float
) -> Report:
    hits: list[dict[str, object]] = []
    table = []
    for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
        document = index.document(int(row))
        hits.append({
            "rank": rank,
            "score": round(float(score), 6),
            "id": document.id,
            "title": document.title,
            "text": document.text,
        })  # fmt: skip
        table.append(
            (f"{score:.3f}", document.id, _title(document.title, document.id), snippet(document.text))
        )
    has_titles = any(title for _, _, title, _ in table)
    columns = ("score", "id", "title", "text") if has_titles else ("score", "id", "text")
    shown = table if has_titles else [(score, id_, text) for score, id_, _, text in table]
    return Report(
        title=query,
        data={"query": query, "index": str(index.path), "hits": hits, "seconds": round(seconds, 6)},
        tables=[Table(columns, shown, right_aligned=("score",))],
    )


def _title(title: str, id_: str) -> str:
    """The title, unless it only repeats the id."""
    return "" if title == id_ else title


def snippet(text: str) -> str:
    """The beginning of a text on one line, cut at a word."""
    return textwrap.shorten(text, SNIPPET_CHARACTERS, placeholder=" …")
