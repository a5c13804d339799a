"""`Index`: an index that is open for searching, while others search it and one writer changes it.

Every search looks at one generation as a whole; the next one sees what was committed in between. Candidates
come from int8 codes (a scan, or a graph) and are scored anew from the stored vectors, so a score is the
cosine of query and stored vector whatever path found it, to the bit. Q queries, R candidates of a query, D
dims, N rows of a segment.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError, MismatchError, UnavailableError
from gemb.store import catalogue as catalogues
from gemb.store.blocks import MissingFileError
from gemb.store.candidates import LiveSegment, Queries
from gemb.store.catalogue import Catalogue, Known, Settings, State, advice
from gemb.store.conditions import Condition
from gemb.store.documents import Document, Hit, Span, content_hash, metadata_json
from gemb.store.field_types import FieldType
from gemb.store.fusion import fuse
from gemb.store.segments import Segment, spread
from gemb.vectors import bad_rows, cut
from gemb.vectors.checks import is_safe, squared_norms

FUSED_DEPTH = 100
"""How far down each of the two rankings a fused search looks."""
QUERIES_A_BLOCK = 1024
REMEMBERED_BYTES = 32 << 20
"""Of the keys that filters gave; 8 a document."""
_RETRIES = 20
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest documents of each query: keys[Q, k] (0 fills up) and cosines[Q, k], falling.

    `passages`[Q, k] is the number of the document's best passage, from 0.
    """

    keys: NDArray[np.uint64]
    scores: NDArray[np.float32]
    passages: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Exported:
    """Some documents with their passages' unit vectors[R, D] in order, `counts` rows a document."""

    documents: list[Document]
    spans: list[tuple[Span, ...] | None]
    counts: list[int]
    vectors: NDArray[np.float32]


Difference = Literal["new", "text", "metadata", "none"]
"""Of a document and what is indexed under its id; `new` and `text` need vectors."""


@dataclass(slots=True)
class _View:
    state: State
    segments: list[LiveSegment]
    identity: tuple[int, ...] = ()
    keys_where: dict[tuple[object, ...], NDArray[np.uint64]] = field(default_factory=dict)
    """What filters gave in this generation."""


class Index:
    """An index, open for reading; safe to use from several threads, which take turns.

    >>> import numpy as np
    >>> from gemb.store import Document, Index, Settings, Writer
    >>> with Writer.open("animals.gemb", Settings(dims=2)) as writer:
    ...     writer.put([Document("cat"), Document("dog")], np.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> with Index.open("animals.gemb") as index:
    ...     [hit.id for hit in index.search(np.array([0.9, 0.1], np.float32), k=1)[0]]
    ['cat']
    """

    def __init__(self, catalogue: Catalogue, threads: int, cache: Path | None) -> None:
        self.folder = catalogue.folder
        self.settings = catalogue.settings()
        self._catalogue = catalogue
        self._threads = threads
        self._cache = cache
        self._turn = threading.RLock()
        self._view = _View(State(), [])
        self._is_closed = False

    @classmethod
    def open(cls, path: Path | str, *, threads: int = 1, cache: Path | None = None) -> Index:
        """The index at `path`.

        `threads` search a graph together where there are several queries. `cache` is a folder that
        remembers which graph files were found whole, so that they are not read through again; without it
        each opening reads them.

        Raises UnavailableError (7) if nothing is there, MismatchError (5) for a newer format, DamagedError
        (1) where a file is missing or cut off, GembError if it is no index.
        """
        catalogue = Catalogue.open_for_reading(Path(path))
        try:
            index = cls(catalogue, threads, cache)
            with index._looking():
                return index
        except BaseException:
            catalogue.close()
            raise

    # ------------------------------------------------------------------ searching

    def search(
        self,
        vectors: NDArray[np.floating] | None = None,
        *,
        words: Sequence[str] | None = None,
        k: int = 10,
        where: Condition | None = None,
        exact: bool = False,
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """The k best documents of each query, best first.

        `vectors` are [Q, D], or [D] for one query; `words` the queries as text. With vectors, documents are
        ranked by cosine; with words by BM25 of title and text; with both by the reciprocal ranks of the two
        (Cormack 2009, k 60). `where` keeps only documents for which it is true. `exact` scores every row.
        `min_score` drops documents below this cosine. Of equal documents the one indexed first comes first.

        Raises MismatchError if D is not the index's, GembError for k below 1 and for a vector that is none.
        """
        queries = None if vectors is None else self._checked(vectors)
        count = len(queries) if queries is not None else len(words or ())
        if words is not None and len(words) != count:
            raise ValueError(f"{len(words)} queries as words, but {count} as vectors")
        if words is not None and not self.settings.words:
            raise GembError(f"{self.folder} keeps no words; search it by vectors, or make it with words")
        found: list[list[Hit]] = []
        with self._looking():
            keys = self._keys_where(where)
            for start in range(0, count, QUERIES_A_BLOCK):
                stop = min(count, start + QUERIES_A_BLOCK)
                part = None if queries is None else queries[start:stop]
                texts = None if words is None else words[start:stop]
                ranked = self._ranked(part, texts, k, where, keys, exact)
                found += self._hits(ranked, min_score)
        return found

    def nearest(
        self,
        vectors: NDArray[np.floating],
        k: int = 10,
        *,
        where: Condition | None = None,
        exact: bool = False,
    ) -> Neighbours:
        """What `search` finds by vectors, as arrays; `documents` gives what lies under the keys."""
        queries = self._checked(vectors)
        parts = []
        with self._looking():
            keys = self._keys_where(where)
            for start in range(0, len(queries), QUERIES_A_BLOCK):
                parts.append(self._nearest(queries[start : start + QUERIES_A_BLOCK], k, keys, exact))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Neighbours(
                np.empty((0, k), np.uint64), np.empty((0, k), np.float32), np.empty((0, k), np.int64)
            )
        return Neighbours(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.passages for part in parts]),
        )

    def like(
        self, id_: str, k: int = 10, *, where: Condition | None = None, exact: bool = False
    ) -> list[Hit]:
        """The documents nearest to a stored one, without itself; of several passages the mean is taken.

        Raises GembError if there is no such id.
        """
        with self._looking():
            known = self._catalogue.known([id_]).get(id_)
            if known is None:
                raise GembError(f"{self.folder} has no document {id_!r}")
            vector = self._vectors_of(known.key).mean(axis=0)
            hits = self.search(vector, k=k + 1, where=where, exact=exact)[0]
        return [hit for hit in hits if hit.id != id_][:k]

    # ------------------------------------------------------------------ looking

    @property
    def state(self) -> State:
        """Generation, documents and rows, as of now."""
        with self._looking() as view:
            return view.state

    @property
    def encoder(self) -> Mapping[str, Any]:
        """What tells the model that made the vectors, and its prompts."""
        return self.settings.encoder

    def fields(self) -> dict[str, FieldType]:
        """The metadata fields and their types, for `gemb.store.where.parse`."""
        with self._looking():
            return self._catalogue.fields()

    def segments(self) -> list[tuple[str, int, int, bool]]:
        """Name, rows, live rows, and whether there is a graph, of each segment."""
        with self._looking() as view:
            return [
                (live.segment.record.name, live.segment.rows, live.live_rows, live.segment.record.has_graph)
                for live in view.segments
            ]

    def documents(self, keys: NDArray[np.uint64]) -> dict[int, Document]:
        """The documents under keys that `nearest` gave; one that was removed since is left out."""
        with self._looking():
            found = self._catalogue.documents(int(key) for key in np.unique(keys) if key)
        return {key: stored.document for key, stored in found.items()}

    def has(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are there."""
        with self._looking():
            return set(self._catalogue.known(ids))

    def compare(self, documents: Sequence[Document]) -> list[Difference]:
        """What `Writer.compare` would find of each document; nothing is changed. The ids are unique."""
        with self._looking():
            known = self._catalogue.known([document.id for document in documents])
        return [_difference(known.get(document.id), document) for document in documents]

    def get(self, ids: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, as far as they are there."""
        with self._looking():
            known = self._catalogue.known(ids)
            found = self._catalogue.documents(entry.key for entry in known.values())
        return {stored.document.id: stored.document for stored in found.values()}

    def export(self, where: Condition | None = None, *, block: int = 1024) -> Iterator[Exported]:
        """Every document with its vectors, in blocks, in the order they were indexed; all one generation.

        A writer that is at work goes on meanwhile; one that begins waits for the last block to be taken.
        """
        with self._looking() as view:
            keys = self._keys_where(where)
            if keys is None:
                stream = self._catalogue.all_documents()
            else:
                stream = (
                    self._catalogue.documents(part.tolist())[int(key)]
                    for part in (keys[start : start + block] for start in range(0, len(keys), block))
                    for key in part
                )
            while stored := list(islice(stream, block)):
                own = np.array([entry.key for entry in stored], dtype=np.uint64)
                vectors, counts = _vectors_of(view.segments, own, self.settings.dims)
                for entry, count in zip(stored, counts.tolist(), strict=True):
                    if entry.rows != count:
                        raise self._catalogue.damaged(
                            f"{entry.document.id!r} has {count} vectors, but {entry.rows} were stored"
                        )
                yield Exported(
                    [entry.document for entry in stored],
                    [entry.spans for entry in stored],
                    counts.tolist(),
                    vectors,
                )

    def close(self) -> None:
        """Lets go of the files."""
        with self._turn:
            self._is_closed = True
            for live in self._view.segments:
                live.segment.close()
            self._view = _View(State(), [])
            self._catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _looking(self) -> _Looking:
        return _Looking(self)

    def _refresh(self, state: State) -> None:
        """Brings the view to the generation of the snapshot at hand, whose state it is given."""
        identity = self._catalogue.identity  # another index that took this one's place may be at its number
        if (state, identity) == (self._view.state, self._view.identity) and state.generation:
            for live in self._view.segments:
                live.segment.refresh()
            return
        settings = self._catalogue.settings()
        if (settings.dims, _model_of(settings)) != (self.settings.dims, _model_of(self.settings)):
            raise MismatchError(
                f"{self.folder} was replaced by an index of another model; open it again, with that one"
            )
        self.settings = settings
        open_ones = {live.segment.record.name: live.segment for live in self._view.segments}
        segments = []
        opened: list[Segment] = []
        try:
            for entry in self._catalogue.complete_segments():
                segment = open_ones.get(entry.record.name)
                if segment is None:
                    segment = Segment(
                        self.folder / catalogues.SEGMENTS / entry.record.name,
                        entry.record,
                        self._catalogue.checksums(entry.record),
                        self.settings.layout(),
                        advice=advice(self.folder),
                        cache=self._cache,
                    )
                    opened.append(segment)
                segments.append(LiveSegment(segment, entry.dead_rows(), entry.live_rows))
        except BaseException:
            for segment in opened:
                segment.close()
            raise
        kept = {live.segment.record.name for live in segments}
        for name, segment in open_ones.items():
            if name in kept:
                segment.refresh()
            else:
                segment.close()
        self._view = _View(state, segments, identity)

    def _checked(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Unit queries[Q, D]."""
        given = np.atleast_2d(np.asarray(vectors))
        if given.ndim != 2 or given.shape[1] != self.settings.dims:
            raise MismatchError(
                f"{self.folder} holds {self.settings.dims}-wide vectors, but the query is "
                f"{given.shape[-1]} wide; search with the model that made it"
            )
        if given.dtype == np.float32:
            given = np.ascontiguousarray(given)
            squares = squared_norms(given)
            if is_safe(squares).all():  # nearly always: what `cut` would make of them, without asking twice
                rows: NDArray[np.float32] = given / np.sqrt(squares)[:, None]
                return rows
        bad = bad_rows(given)
        if bad.size:
            raise GembError(f"the vector of query {int(bad[0])} is zeros only, or has NaN or infinity in it")
        return cut(given, self.settings.dims, normalise=True)

    def _keys_where(self, where: Condition | None) -> NDArray[np.uint64] | None:
        """The keys of the documents for which `where` is true, ascending; remembered for this generation.

        A filter asks every document, some tens of milliseconds for 100,000; most programs use a few.
        """
        if where is None:
            return None
        statement, values = where.sql()
        known = self._view.keys_where
        asked = (
            statement,
            *((type(value), value) for value in values),
        )  # 1, 1.0 and true are equal in Python
        found = known.pop(asked, None)
        if found is None:
            found = self._catalogue.keys_where(statement, values)
        known[asked] = found  # at the end: the first is the one that was not asked for the longest
        while sum(keys.nbytes for keys in known.values()) > REMEMBERED_BYTES:
            del known[next(iter(known))]
        return found

    def _nearest(
        self, vectors: NDArray[np.float32], k: int, keys: NDArray[np.uint64] | None, exact: bool
    ) -> Neighbours:
        if k < 1:
            raise GembError(f"k is {k}; ask for at least 1 document")
        queries = Queries(vectors, self.settings.code_dims)
        state = self._view.state
        share = max(1, -(-state.rows // max(state.documents, 1)))
        wanted = k if share == 1 else 2 * k * share  # rows, of which several can belong to one document
        possible = state.documents if keys is None else len(keys)
        width = min(k, possible)
        found = self._gather(queries, wanted, keys, exact, width)
        while width and wanted < state.rows:
            short = np.flatnonzero(found.keys[:, width - 1] == 0)
            if not short.size:
                break
            # Documents with many passages pushed others out: look further down for these queries.
            wanted = min(state.rows, 4 * wanted)
            more = self._gather(queries.part(short), wanted, keys, exact, width)
            found.keys[short], found.scores[short] = more.keys, more.scores
            found.passages[short] = more.passages
        return _padded(found, k)

    def _gather(
        self, queries: Queries, wanted: int, keys: NDArray[np.uint64] | None, exact: bool, width: int
    ) -> Neighbours:
        """The `width` best documents among the `wanted` best rows of each segment."""
        count = len(queries)
        several = self._view.state.rows != self._view.state.documents
        parts: list[list[NDArray[Any]]] = []  # keys, scores, passages of each segment, [Q, R]
        for live in self._view.segments:
            chosen = live.choose(keys)
            if not chosen.count:
                continue
            rows, scores = live.best(queries, wanted, chosen, exact=exact, threads=self._threads)
            own = live.segment.keys
            found = own[np.maximum(rows, 0)]
            found[rows < 0] = 0
            part: list[NDArray[Any]] = [found, scores]
            if several:
                part.append(rows - np.searchsorted(own, found, "left"))
            parts.append(part)
        if not parts:
            return Neighbours(
                np.zeros((count, width), np.uint64),
                np.zeros((count, width), np.float32),
                np.zeros((count, width), np.int64),
            )
        joined = (
            parts[0] if len(parts) == 1 else [np.concatenate(own, axis=1) for own in zip(*parts, strict=True)]
        )
        order = np.lexsort((*joined[:1:-1], joined[0], -joined[1]), axis=-1)
        if not several:
            order = order[:, :width]
        found_keys, found_scores, *rest = (array[np.arange(count)[:, None], order] for array in joined)
        passages = rest[0] if rest else np.zeros_like(found_keys, dtype=np.int64)
        if several:
            for query in range(count):
                _, first = np.unique(found_keys[query], return_index=True)
                first = np.sort(first)
                for array in (found_keys, found_scores, passages):
                    array[query, : len(first)] = array[query, first]
                found_keys[query, len(first) :] = 0
                # The padding's key 0 sorts last by its score of minus infinity.
        return Neighbours(*(_to_width(array, width) for array in (found_keys, found_scores, passages)))

    def _ranked(
        self,
        vectors: NDArray[np.float32] | None,
        words: Sequence[str] | None,
        k: int,
        where: Condition | None,
        keys: NDArray[np.uint64] | None,
        exact: bool,
    ) -> list[list[_Ranked]]:
        if k < 1:
            raise GembError(f"k is {k}; ask for at least 1 document")
        by_words = None
        if words is not None:
            depth = k if vectors is None else max(FUSED_DEPTH, k)
            condition = None if where is None else where.sql("documents.metadata")
            by_words = [self._by_words(text, depth, condition) for text in words]
        if vectors is None:
            return [[_Ranked(key, None, 0, score) for key, score in ranking] for ranking in by_words or ()]
        depth = k if by_words is None else max(FUSED_DEPTH, k)
        near = self._nearest(vectors, depth, keys, exact)
        ranked = []
        for query in range(len(vectors)):
            entries = {
                int(key): _Ranked(int(key), float(score), int(passage), None)
                for key, score, passage in zip(
                    near.keys[query], near.scores[query], near.passages[query], strict=True
                )
                if key
            }
            if by_words is not None:
                entries = self._fused(entries, by_words[query], vectors[query], k)
            ranked.append(list(entries.values()))
        return ranked

    def _by_words(
        self, text: str, depth: int, condition: tuple[str, Sequence[Any]] | None
    ) -> list[tuple[int, float]]:
        terms = dict.fromkeys(_WORD.findall(text.lower()))
        if not terms:
            return []
        query = " OR ".join(f'"{term}"' for term in terms)
        return self._catalogue.keys_with_words(query, depth, condition)

    def _fused(
        self, near: dict[int, _Ranked], by_words: list[tuple[int, float]], vector: NDArray[np.float32], k: int
    ) -> dict[int, _Ranked]:
        words = dict(by_words)
        order = [key for key, _ in fuse([list(near), list(words)])][:k]
        fused = {}
        for key in order:
            entry = near.get(key)
            if entry is None:
                scores = np.einsum("ij,j->i", self._vectors_of(key), vector)
                best = int(np.argmax(scores))
                entry = _Ranked(key, float(scores[best]), best, None)
            fused[key] = _Ranked(key, entry.score, entry.passage, words.get(key))
        return fused

    def _hits(self, ranked: list[list[_Ranked]], min_score: float | None) -> list[list[Hit]]:
        stored = self._catalogue.documents({entry.key for entries in ranked for entry in entries})
        found = []
        for entries in ranked:
            hits = []
            for entry in entries:
                if min_score is not None and (entry.score is None or entry.score < min_score):
                    continue
                if entry.key not in stored:
                    raise self._catalogue.damaged(
                        f"there is a vector of document {entry.key}, but no document"
                    )
                own = stored[entry.key]
                document, spans = own.document, own.spans
                span = None if spans is None or entry.score is None else spans[entry.passage]
                hits.append(
                    Hit(
                        document.id,
                        entry.score,
                        document.title,
                        document.text,
                        document.metadata,
                        span,
                        entry.words,
                    )
                )
            found.append(hits)
        return found

    def _vectors_of(self, key: int) -> NDArray[np.float32]:
        vectors, _ = _vectors_of(self._view.segments, np.array([key], np.uint64), self.settings.dims)
        if not len(vectors):
            raise self._catalogue.damaged(f"there is a document {key}, but no vector of it")
        return vectors


@dataclass(frozen=True, slots=True)
class _Ranked:
    key: int
    score: float | None
    passage: int
    words: float | None


class _Looking:
    """A block in which an index shows one generation; blocks in one another share the outer one's."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._is_outer = False

    def __enter__(self) -> _View:
        index = self._index
        index._turn.acquire()
        try:
            if index._is_closed:
                raise ValueError(f"{index.folder} is closed")
            if not index._catalogue.in_transaction:
                self._is_outer = True
                self._begin()
            return index._view
        except BaseException:
            index._turn.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_outer:
                self._index._catalogue.roll_back()
        finally:
            self._index._turn.release()

    def _begin(self) -> None:
        """Begins a snapshot whose files are all there: a writer removes those of older generations."""
        index = self._index
        for attempt in range(_RETRIES):
            state = index._catalogue.begin_snapshot()
            try:
                index._refresh(state)
                return
            except MissingFileError as error:
                if not index.folder.exists():
                    index._catalogue.roll_back()
                    raise UnavailableError(
                        f"there is no index {index.folder} any more; was it moved? open it where it is now"
                    ) from error
                seen = index._catalogue.state().generation
                index._catalogue.roll_back()
                index._catalogue.begin_snapshot()
                is_new = index._catalogue.state().generation != seen
                index._catalogue.roll_back()
                if not is_new or attempt == _RETRIES - 1:
                    raise
                time.sleep(0.001 * attempt)
            except BaseException:
                index._catalogue.roll_back()
                raise


def _vectors_of(
    segments: Sequence[LiveSegment], keys: NDArray[np.uint64], dims: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors[R, D] of the documents keys[B], ascending, and how many rows each has, [B]."""
    counts = np.zeros(len(keys), dtype=np.int64)
    found = [np.empty((0, dims), np.float32)]
    for live in segments:
        first, stop = live.segment.spans_of(keys)
        counts += stop - first
        rows = spread(first, stop)
        if rows.size:
            found.append(live.segment.vectors(rows))
    return np.concatenate(found), counts


def _model_of(settings: Settings) -> object:
    return settings.encoder.get("fingerprint")


def _difference(known: Known | None, document: Document) -> Difference:
    if known is None:
        return "new"
    if known.content != content_hash(document):
        return "text"
    return "none" if known.metadata == metadata_json(document) else "metadata"


def _to_width(array: NDArray[Any], width: int) -> NDArray[Any]:
    """The first `width` columns of array[Q, n], with zeros behind the last where n is smaller."""
    if array.shape[1] >= width:
        return np.ascontiguousarray(array[:, :width])
    return np.concatenate([array, np.zeros((len(array), width - array.shape[1]), array.dtype)], axis=1)


def _padded(found: Neighbours, k: int) -> Neighbours:
    if found.keys.shape[1] == k and found.keys.all():
        return found
    keys, scores = _to_width(found.keys, k), _to_width(found.scores, k)
    scores[keys == 0] = -np.inf
    return Neighbours(keys, scores, _to_width(found.passages, k))
