"""`Index`: search in Python, with texts or vectors; the same path that `gemb search` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from gemb.device import available_threads
from gemb.errors import GembError
from gemb.model.hub import cache_folder
from gemb.retrieval.queries import QueryEncoder, check_query
from gemb.retrieval.several import Ranking, Wanted, parse_where, search_all
from gemb.store import Document, Hit
from gemb.store import Index as StoredIndex
from gemb.store.conditions import Condition
from gemb.store.field_types import FieldType

if TYPE_CHECKING:
    from gemb.engine.opening import EngineName

Where = str | Condition
"""A filter as text (`"year >= 2020 and lang = 'en'"`), or one that `gemb.store.where.parse` has read."""


class Index:
    """An index that is open for searching; the model is loaded when the first text is asked for.

    Several threads may search, they take turns; others may read the same folder, and one writer change it:
    each search sees what was published when it began.

    >>> from gemb import Index
    >>> with Index.open("films.gemb") as index:
    ...     hits = index.search("robots that dream", k=2, where="year < 1990")
    ...     [(hit.id, hit.metadata["year"]) for hit in hits]
    [('android', 1982), ('metropolis', 1927)]
    """

    def __init__(self, stored: StoredIndex, encoder: QueryEncoder) -> None:
        self._stored = stored
        self._encoder = encoder

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        model: str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        offline: bool = False,
        engine: EngineName = "auto",
    ) -> Self:
        """The index at `path`, which gemb index made.

        `model` says where the index's model lies now, if not where it was; another model is refused.
        `device`, `precision`, `threads` and `engine` are those of `Encoder.load`; nothing of it is used
        before a text is embedded. `offline` forbids to download a model.

        Raises UnavailableError (7) if nothing is there, MismatchError (5) if a newer gemb wrote it,
        MachineError (1) where a file is damaged, GembError (2) if it is no index.
        """
        stored = open_stored(path, threads)
        encoder = QueryEncoder(
            stored,
            model=None if model is None else str(model),
            device=device,
            precision=precision,
            threads=threads,
            offline=offline,
            engine=engine,
        )
        return cls(stored, encoder)

    @overload
    def search(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too; it is taken as one
        self,
        queries: str,
        *,
        k: int = 10,
        where: Where | None = None,
        hybrid: bool = False,
        lexical: bool = False,
        exact: bool = False,
        min_score: float | None = None,
        as_: str | None = None,
    ) -> list[Hit]: ...

    @overload
    def search(
        self,
        queries: Sequence[str] | NDArray[np.floating],
        *,
        k: int = 10,
        where: Where | None = None,
        hybrid: bool = False,
        lexical: bool = False,
        exact: bool = False,
        min_score: float | None = None,
        as_: str | None = None,
    ) -> list[list[Hit]]: ...

    def search(
        self,
        queries: str | Sequence[str] | NDArray[np.floating],
        *,
        k: int = 10,
        where: Where | None = None,
        hybrid: bool = False,
        lexical: bool = False,
        exact: bool = False,
        min_score: float | None = None,
        as_: str | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """The k best documents, best first: a list of hits for one text, one such list a query for several.

        `queries` is a text, a sequence of texts, or ready vectors [Q, D] of any length above zero.
        `Hit.score` is the cosine of the query and the document's best passage, whatever decides the order:
        the cosine itself, with `hybrid` the reciprocal ranks by cosine and by BM25, with `lexical` BM25
        alone, for which no model is loaded and `Hit.score` is None. `where` keeps only the documents that
        fit; k of them are found whenever k of them are there. `exact` compares every row. `min_score` drops
        hits with a smaller cosine. `as_` names another prompt than the index's own for queries.

        A text longer than the model takes is cut, and nothing is said of it here; `gemb search` reports it.

        Raises GembError for a wrong argument or expression, MismatchError (5) for vectors of another width
        or another model, UnavailableError (7) if the model cannot be had.
        """
        wanted = self._wanted(k, where, ranking_of(hybrid=hybrid, lexical=lexical), exact, min_score)
        if isinstance(queries, np.ndarray):
            if wanted.ranking != "vector":
                raise GembError(f"a {wanted.ranking} search needs words; pass texts instead of vectors")
            if queries.ndim != 2:
                raise GembError(f"query vectors have the shape [Q, D], but these {list(queries.shape)}")
            found = search_all([self._stored], wanted, vectors=queries)
        else:
            texts = [queries] if isinstance(queries, str) else list(queries)
            for number, text in enumerate(texts):
                check_query(text, "the query" if isinstance(queries, str) else f"query {number}")
            is_lexical = wanted.ranking == "lexical"
            vectors = None if is_lexical or not texts else self._encoder.embed(texts, as_=as_)
            found = search_all([self._stored], wanted, texts=texts, vectors=vectors) if texts else []
        answers = [[one.hit for one in answer] for answer in found]
        return answers[0] if isinstance(queries, str) else answers

    def like(
        self,
        id_: str,
        *,
        k: int = 10,
        where: Where | None = None,
        exact: bool = False,
        min_score: float | None = None,
    ) -> list[Hit]:
        """The k documents nearest to one that is in the index, without itself; no model is loaded.

        Raises GembError if there is no document of this id.
        """
        wanted = self._wanted(k, where, "vector", exact, min_score)
        return like(self._stored, id_, wanted)

    def get(self, ids: Sequence[str]) -> dict[str, Document]:
        """The documents with these ids, by id; those that are not there are left out."""
        if isinstance(ids, str):
            raise TypeError("ids is one string; pass a list of ids")
        return self._stored.get(ids)

    def fields(self) -> dict[str, FieldType]:
        """The metadata fields that `where` can ask for, and what they hold."""
        return self._stored.fields()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._stored.folder

    @property
    def dims(self) -> int:
        """D, the width of the stored vectors."""
        return self._stored.settings.dims

    @property
    def encoder(self) -> Mapping[str, Any]:
        """What the index has recorded of the model that made it; empty where it has none."""
        return self._stored.encoder

    def __len__(self) -> int:
        """How many documents there are now."""
        return self._stored.state.documents

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}, dims={self.dims})"

    def close(self) -> None:
        """Lets go of the files and of the model; nothing can be searched afterwards."""
        self._stored.close()
        self._encoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wanted(
        self, k: int, where: Where | None, ranking: Ranking, exact: bool, min_score: float | None
    ) -> Wanted:
        condition = parse_where(where, [self._stored], "where") if isinstance(where, str) else where
        return Wanted(k, ranking, condition, exact, min_score)


def open_stored(path: Path | str, threads: int | None = None) -> StoredIndex:
    """The index at `path`, with the memory of checked files in the user's cache folder."""
    return StoredIndex.open(path, threads=threads or available_threads(), cache=cache_folder())


def ranking_of(*, hybrid: bool, lexical: bool) -> Ranking:
    """What the two switches choose. Raises GembError for both at once."""
    if hybrid and lexical:
        raise GembError("hybrid and lexical are two ways to search; choose one")
    return "hybrid" if hybrid else "lexical" if lexical else "vector"


def like(stored: StoredIndex, id_: str, wanted: Wanted) -> list[Hit]:
    """The documents nearest to a stored one, without itself; those below `min_score` are dropped."""
    hits = stored.like(id_, wanted.k, where=wanted.where, exact=wanted.exact)
    least = wanted.min_score
    return hits if least is None else [hit for hit in hits if hit.score is not None and hit.score >= least]


__all__ = ["Index", "Where", "like", "open_stored", "ranking_of"]
