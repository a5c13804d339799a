"""Retrieval on a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, each maybe gzipped.

Metrics by ir-measures (trec_eval's arithmetic).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gemb.errors import GembError
from gemb.evaluation.extras import load
from gemb.evaluation.tasks import Score, Task, Texts, mean_of
from gemb.evaluation.views import Viewed
from gemb.report import counted
from gemb.text.inputs import lines_of, open_bytes, resolve_inputs
from gemb.text.records import EMPTY_TEXT, ReadOptions, Record, read_records
from gemb.vectors.nearest import nearest

if TYPE_CHECKING:
    from ir_measures.measures import Measure

MAIN = "nDCG@10"
METRICS = (MAIN, "R@10", "R@100", "RR@10", "AP@100")
DEPTH = 100
SPLITS = ("test", "dev", "validation", "train")

Qrels = dict[str, dict[str, int]]
"""Grade by query and document."""


@dataclass(frozen=True)
class Retrieval(Task):
    """Documents ranked for queries."""

    kind: ClassVar[str] = "retrieval"

    query_ids: Sequence[str]
    document_ids: Sequence[str]
    qrels: Qrels
    metrics: Sequence[str] = METRICS

    def score(self, vectors: Mapping[str, Viewed]) -> Score:
        """nDCG@10 and the rest, means over the queries that have judgements."""
        measures = load("ir_measures")
        asked: list[Measure] = [measures.parse_measure(name) for name in self.metrics]
        _, rows = nearest(vectors["queries"].all(), vectors["documents"], DEPTH)
        # Ranks, not scores: trec_eval breaks ties by document id, the search has broken them already.
        run = {
            query: {self.document_ids[row]: float(-rank) for rank, row in enumerate(found)}
            for query, found in zip(self.query_ids, rows.tolist(), strict=True)
        }
        number_of = {query: number for number, query in enumerate(self.query_ids)}
        values = {str(measure): np.zeros(len(self.query_ids)) for measure in asked}
        for result in measures.iter_calc(asked, self.qrels, run):
            values[str(result.measure)][number_of[result.query_id]] = result.value
        main, *others = values
        return mean_of(main, values[main], {name: float(values[name].mean()) for name in others})


def read_beir(folder: Path, *, split: str | None = None, name: str | None = None) -> Retrieval:
    """The retrieval task of a BEIR folder; only queries with judgements in the split are asked.

    Raises GembError for a missing file, a broken row, and judgements of ids that are not there.
    """
    qrels_file = _qrels_file(folder, split)
    qrels, places = _read_qrels(qrels_file)
    corpus, empty = _records(_file(folder, "corpus.jsonl"), titles=True)
    queries, empty_queries = _records(_file(folder, "queries.jsonl"), titles=False, wanted=set(qrels))
    documents = {record.id for record in corpus} | empty
    asked = {record.id for record in queries}
    for query, line in places.items():
        if query not in asked:
            what = "an empty text" if query in empty_queries else "no such query"
            raise GembError(f"{qrels_file}:{line}: {what} {query!r} in {folder / 'queries.jsonl'}")
    for query, grades in qrels.items():
        for document in grades:
            if document not in documents:
                line = _line_of(qrels_file, query, document)
                raise GembError(
                    f"{qrels_file}:{line}: no such document {document!r} in {folder / 'corpus.jsonl'}; "
                    "the judgements belong to another corpus"
                )
    notes = [f"{counted(len(empty), 'document')} without text cannot be found"] if empty else []
    titles = [record.title for record in corpus]
    return Retrieval(
        name or folder.name,
        {
            "queries": Texts([record.text for record in queries], ("query",)),
            "documents": Texts(
                [record.text for record in corpus], ("document",), titles if any(titles) else None
            ),
        },
        [record.id for record in queries],
        [record.id for record in corpus],
        qrels,
        notes=notes,
    )


def is_beir(folder: Path) -> bool:
    """Whether a folder has the files of a BEIR data set."""
    return (folder / "qrels").is_dir() and any(folder.glob("corpus.jsonl*"))


def _file(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz", ".zst"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise GembError(f"{folder} has no {name}; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/")


def _qrels_file(folder: Path, split: str | None) -> Path:
    there = sorted(path for path in (folder / "qrels").glob("*.tsv*"))
    by_split = {path.name.partition(".")[0]: path for path in there}
    wanted = [split] if split else [*SPLITS, *by_split]
    found = next((by_split[name] for name in wanted if name in by_split), None)
    if found is None:
        raise GembError(
            f"{folder / 'qrels'} has no {split or 'test'}.tsv; "
            + (f"it has {', '.join(by_split)}" if by_split else "put the judgements there")
        )
    return found


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """(line, query, document, grade) of a qrels file: query-id, corpus-id, score, or TREC's four columns."""
    (file,) = resolve_inputs([str(path)], input_format="text")
    with open_bytes(file) as stream:
        for line, raw in enumerate(lines_of(file, stream), 1):
            parts = raw.decode("utf-8", "replace").rstrip("\r\n").split("\t")
            if len(parts) == 4:  # TREC's: query, 0, document, grade
                del parts[1]
            if len(parts) != 3:
                if len(parts) == 1 and not parts[0].strip():
                    continue
                raise GembError(
                    f"{path}:{line}: {len(parts)} columns, but query-id, corpus-id and score are 3, with tabs"
                )
            try:
                grade = int(float(parts[2]))
            except (ValueError, OverflowError):
                if line == 1:
                    continue  # the header
                raise GembError(f"{path}:{line}: the score {parts[2]!r} is no number") from None
            yield line, parts[0], parts[1], grade


def _read_qrels(path: Path) -> tuple[Qrels, dict[str, int]]:
    """The judgements, and the line where each query comes first; queries without a relevant one are out."""
    qrels: Qrels = {}
    places: dict[str, int] = {}
    for line, query, document, grade in _judgements(path):
        qrels.setdefault(query, {})[document] = grade
        places.setdefault(query, line)
    qrels = {query: grades for query, grades in qrels.items() if any(grade > 0 for grade in grades.values())}
    if not qrels:
        raise GembError(f"{path} has no judgement above 0; without a relevant document nothing can be scored")
    return qrels, {query: line for query, line in places.items() if query in qrels}


def _line_of(path: Path, query: str, document: str) -> int:
    return next(line for line, *pair, _ in _judgements(path) if pair == [query, document])


def _records(path: Path, *, titles: bool, wanted: set[str] | None = None) -> tuple[list[Record], set[str]]:
    """The rows of a file, those that are wanted, and the ids of rows without a text.

    Raises GembError for a broken row, and for an id that comes twice: a judgement of it could mean either.
    """
    records: list[Record] = []
    empty: set[str] = set()
    seen: set[str] = set()
    for row in read_records(resolve_inputs([str(path)]), ReadOptions(use_titles=titles)):
        if row.id is not None:
            if row.id in seen:
                raise GembError(f"{path}:{row.line}: the id {row.id!r} comes a second time; ids are unique")
            seen.add(row.id)
        if isinstance(row, Record):
            if wanted is None or row.id in wanted:
                records.append(row)
        elif row.reason == EMPTY_TEXT and row.id is not None:
            empty.add(row.id)
        else:
            raise GembError(str(row))
    return records, empty
