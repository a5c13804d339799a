"""The documents of one index or several that fit a query: by meaning, by words, or by both.

Queries come as a text, from a file in batches, as ready vectors, or as a document that is in the index.
Q queries of a batch, D dims.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TextIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gemb.errors import Exit, GembError
from gemb.jobs.hits import WRITERS, Answer
from gemb.recipe import InferenceRecipe, RecipeInput, RecipePath
from gemb.report import Event, OnProgress, Report, counted, ignore
from gemb.retrieval.index import like, open_stored, ranking_of
from gemb.retrieval.queries import QueryEncoder, check_query, check_shared
from gemb.retrieval.several import Found, Wanted, parse_where, search_all
from gemb.store.catalogue import DATABASE
from gemb.text.inputs import STDIN
from gemb.text.records import (
    QUERY_ID_FIELDS,
    QUERY_TEXT_FIELDS,
    ReadOptions,
    Record,
    Reject,
    read_records,
    resolve_inputs,
)
from gemb.vectors import bad_rows, open_vectors

BATCH_QUERIES = 256
"""Queries that are embedded and searched for together."""
NAMED_QUERIES = 3
"""How many queries without a hit a message names."""


class SearchRecipe(InferenceRecipe):
    """What `gemb search` is asked to do; the model is the index's own unless one is given."""

    kind: ClassVar[str] = "search"

    indexes: tuple[RecipePath, ...] = ()
    """The index folders that gemb index made; several must have been made by the same model."""
    query: str | None = None
    """What to search for; - is stdin."""
    queries: RecipeInput | None = None
    """A file of queries, in any format of gemb embed: answered in batches, each hit with its query's id."""
    vectors: RecipePath | None = None
    """A file of ready query vectors, as gemb embed --as query writes it; no model is loaded."""
    like: str | None = None
    """Search for the neighbours of the document with this id, without itself; no model is loaded."""
    k: int = Field(default=10, ge=1)
    """How many documents to show."""
    as_: str | None = None
    """The prompt of the query, by its name in the model, or none; by default what the index has recorded."""
    where: str | None = None
    """Only documents whose metadata fit, as in: year >= 2020 and lang in ('en', 'de')."""
    hybrid: bool = False
    """Rank by meaning and by words together; the score that is shown stays the cosine."""
    lexical: bool = False
    """Rank by words alone (BM25); no model is loaded."""
    exact: bool = False
    """Compare every row instead of the candidates of the first stage."""
    min_score: float | None = Field(default=None, ge=-1, le=1)
    """Leave out documents with a smaller cosine."""
    format: Literal["auto", "table", "jsonl", "trec"] = "auto"
    """How hits are written; auto is a table on a terminal and one JSON object a hit in a pipe."""
    text_field: str | None = None
    """The field of a file of queries that holds the query; by default the first of query, text, contents,
    content, passage, body, sentence, document."""
    id_field: str | None = None
    """The field that names a query; by default the first of query_id, qid, id, _id, doc_id, docid, custom_id,
    else the line number."""
    fail_empty: bool = False
    """End with exit code 8 when nothing is found for a query."""


@dataclass(frozen=True, slots=True)
class Queries:
    """Some queries: texts[Q], or vectors[Q, D] with empty texts; ids[Q] where they have any."""

    texts: Sequence[str]
    ids: Sequence[str] | None = None
    vectors: NDArray[np.float32] | None = None


class Search:
    """Indexes that are open, and the model of their queries; each answer sees what is published by then."""

    def __init__(self, recipe: SearchRecipe, on_progress: OnProgress = ignore) -> None:
        """Opens what `recipe` names, but loads no model. Raises GembError for what does not go together."""
        _check(recipe)
        self.recipe = recipe
        self.names = [str(path) for path in recipe.indexes]
        with ExitStack() as opened:
            self.indexes = [
                opened.enter_context(open_stored(path, recipe.threads)) for path in recipe.indexes
            ]
            self.check()
            for path, index in zip(recipe.indexes, self.indexes, strict=True):
                if not index.state.documents:
                    note = f"{path} holds no documents; gemb index DOCUMENTS -o {path} adds them"
                    on_progress(Event("searching", 0, unit="queries", note=note))
            self._encoder = QueryEncoder(
                self.indexes[0],
                model=recipe.model,
                device=recipe.device,
                precision=recipe.precision,
                threads=recipe.threads,
                batch_tokens=recipe.batch_tokens,
                offline=recipe.offline,
                engine=recipe.engine,
                few_texts=recipe.queries is None,
                announce=lambda line: on_progress(Event("downloading", 0, note=line)),
            )
            opened.callback(self._encoder.close)
            self._opened = opened.pop_all()

    def check(self) -> None:
        """Returns if the recipe goes together and fits the indexes. Raises GembError if not."""
        _check(self.recipe)
        self._wanted(self.recipe)
        if not self.recipe.lexical:
            check_shared(self.indexes)

    def load(self) -> None:
        """Loads the model now, instead of for the first query."""
        from gemb.engine.opening import stdout_guarded

        with stdout_guarded():
            self._encoder.load()

    def answer(self, queries: Queries) -> list[Answer]:
        """One answer a query."""
        recipe = self.recipe
        wanted = self._wanted(recipe)
        vectors, lost = queries.vectors, [0] * len(queries.texts)
        if vectors is None and wanted.ranking != "lexical":
            from gemb.engine.opening import stdout_guarded  # here, because a search by words needs none of it

            with stdout_guarded():
                vectors = self._encoder.embed(queries.texts, as_=recipe.as_)
                lost = self._encoder.lost_tokens(queries.texts, as_=recipe.as_)
        found = search_all(self.indexes, wanted, texts=queries.texts, vectors=vectors)
        ids: Sequence[str | None] = queries.ids or [None] * len(found)
        return [
            Answer(id_, text, hits, self.names, wanted.ranking, cut)
            for id_, text, hits, cut in zip(ids, queries.texts, found, lost, strict=True)
        ]

    def answer_like(self, id_: str) -> Answer:
        """The neighbours of a stored document. Raises GembError if it could be of several indexes."""
        _check_one(self.recipe)
        (index,) = self.indexes
        found = [Found(0, hit) for hit in like(index, id_, self._wanted(self.recipe))]
        return Answer(None, f"like {id_}", found, self.names, "vector")

    def close(self) -> None:
        """Lets go of indexes and model."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wanted(self, recipe: SearchRecipe) -> Wanted:
        where = None if recipe.where is None else parse_where(recipe.where, self.indexes)
        ranking = ranking_of(hybrid=recipe.hybrid, lexical=recipe.lexical)
        return Wanted(recipe.k, ranking, where, recipe.exact, recipe.min_score)


def split_words(words: Sequence[str], *, has_queries: bool) -> tuple[list[str], str | None]:
    """Indexes and query of `gemb search INDEX... [QUERY]`; the query is None where there is none.

    The last word is the query, unless it is the only one, an index, or `has_queries` says that the queries
    come from elsewhere.

    Raises GembError for a query of several words.
    """
    *first, last = words or [""]
    if has_queries or not first or is_index(last):
        return [*words], None
    loose = next((word for word in first[1:] if not os.path.exists(word) and "." not in word), None)
    if loose is not None and is_index(first[0]):
        query = shlex.quote(" ".join([*first[1:], last]))
        raise GembError(
            f"{loose} is no index; a query of several words stands in quotes: gemb search {first[0]} {query}"
        )
    return first, last


def is_index(name: str) -> bool:
    """Whether `name` is a folder that looks like an index; any text may be asked, a long query too."""
    return os.path.isfile(os.path.join(name, DATABASE))


def is_batch(recipe: SearchRecipe) -> bool:
    """Whether the queries come from a file."""
    return recipe.queries is not None or recipe.vectors is not None


def is_conversation(recipe: SearchRecipe, *, json: bool = False) -> bool:
    """Whether to ask for queries one by one: there is none, and a person sits before a terminal."""
    has_query = recipe.query is not None or recipe.like is not None or is_batch(recipe)
    return not (has_query or json) and _is_terminal(sys.stdin) and _is_terminal(sys.stdout)


def run(
    recipe: SearchRecipe,
    on_progress: OnProgress = ignore,
    *,
    output: TextIO | None = None,
    json: bool = False,
) -> Report:
    """Answers the queries and writes the hits to `output`, by default stdout; the report counts them.

    With `json` nothing is written: the hits of the one query are in the report's data.

    Raises GembError for a recipe that does not go together and for a bad query, UnavailableError (7) if
    index or model are not there, MismatchError (5) if they do not belong together.
    """
    output = output or sys.stdout
    if output is None:
        raise GembError("stdout is closed, so there is no place for the hits; leave it open")
    if json and is_batch(recipe):
        raise GembError("--json is one object for one query; leave it out, a pipe gets one object a hit")
    if json and recipe.format in ("table", "trec"):
        raise GembError(f"--json is a form of its own; leave it or --format {recipe.format} out")
    form = recipe.format if recipe.format != "auto" else "table" if output.isatty() else "jsonl"
    started = time.perf_counter()
    count = hits = cut = lost_tokens = 0
    empty: list[str] = []
    data: dict[str, Any] = {}
    with Search(recipe, on_progress) as search:
        for answers in _answers(search):
            for answer in answers:
                count += 1
                hits += len(answer.found)
                cut += answer.lost_tokens > 0
                lost_tokens += answer.lost_tokens
                if not answer.found:
                    empty.append(answer.query_id or answer.query)
                if json:
                    data |= {"query": answer.query, "hits": answer.hits()}
                else:
                    WRITERS[form](answer, output)
            output.flush()
            if is_batch(recipe):
                on_progress(Event("searching", count, unit="queries"))
    if not count:
        raise GembError(f"{recipe.queries or recipe.vectors}: no rows")
    seconds = time.perf_counter() - started
    rows = [("hits", f"{hits:,}")]
    if empty:
        rows.append(("without a hit", _named(empty)))
    if cut:
        those = counted(cut, "query", "queries")
        rows.append(("cut", f"{those} lost about {lost_tokens:,} tokens, which the model does not take"))
    return Report(
        title=f"answered {counted(count, 'query', 'queries')} in {seconds:.1f} s",
        rows=rows,
        data={
            "indexes": search.names,
            **data,
            "queries": count,
            "found": hits,
            "without_hits": len(empty),
            "cut": cut,
            "lost_tokens": lost_tokens,
            "seconds": round(seconds, 6),
        },
        exit_code=Exit.GATE if empty and recipe.fail_empty else Exit.DONE,
    )


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is open and a terminal."""
    return stream is not None and stream.isatty()


def _answers(search: Search) -> Iterator[list[Answer]]:
    recipe = search.recipe
    if recipe.like is not None:
        yield [search.answer_like(recipe.like)]
        return
    for queries in _queries(recipe):
        yield search.answer(queries)


def _queries(recipe: SearchRecipe) -> Iterator[Queries]:
    """The queries, a batch at a time."""
    if recipe.queries is not None:
        yield from _queries_in_file(recipe, recipe.queries)
    elif recipe.vectors is not None:
        with open_vectors(recipe.vectors) as vectors:
            for ids, block in vectors.blocks(BATCH_QUERIES):
                for row in bad_rows(block)[:1]:
                    raise GembError(
                        f"{recipe.vectors}: the vector {ids[row]!r} is zeros only, or has NaN or infinity "
                        "in it; leave it out"
                    )
                yield Queries([""] * len(ids), ids, block)
    else:
        text = recipe.query
        if text is None or text == STDIN:
            text = _from_stdin(recipe)
        check_query(text)
        yield Queries([text])


def _queries_in_file(recipe: SearchRecipe, name: str) -> Iterator[Queries]:
    options = ReadOptions(
        text_field=recipe.text_field,
        id_field=recipe.id_field,
        text_fields=QUERY_TEXT_FIELDS,
        id_fields=QUERY_ID_FIELDS,
        use_titles=False,
    )
    records = read_records(resolve_inputs([name]), options)
    while batch := list(islice(records, BATCH_QUERIES)):
        good: list[Record] = []
        for record in batch:
            if isinstance(record, Reject):
                is_unnamed = record.reason.startswith('no "')
                advice = "name its field with --text-field" if is_unnamed else "correct the queries"
                raise GembError(f"{record}; {advice}")
            good.append(record)
        yield Queries([record.text for record in good], [record.id for record in good])


def _from_stdin(recipe: SearchRecipe) -> str:
    index = recipe.indexes[0]
    if sys.stdin is None or sys.stdin.isatty():
        raise GembError(f"no query given; gemb search {index} 'what to search for'")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise GembError(f"stdin is not UTF-8 text (byte {error.start}); pass a text as the query") from error


def _check(recipe: SearchRecipe) -> None:
    """Returns if the parts of `recipe` go together. Raises GembError for the first two that do not."""
    if not recipe.indexes:
        raise GembError("no index given; gemb search docs.gemb 'what to search for'")
    sources = {
        "a query": recipe.query is not None,
        "--queries": recipe.queries is not None,
        "--vectors": recipe.vectors is not None,
        "--like": recipe.like is not None,
    }
    twice = next((path for place, path in enumerate(recipe.indexes) if path in recipe.indexes[:place]), None)
    if twice is not None:
        raise GembError(f"{twice} is named twice; each index is searched once")
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) > 1:
        raise GembError(f"{given[0]} and {given[1]} are two things to search for; choose one")
    if recipe.query is not None and recipe.query != STDIN:
        check_query(recipe.query)
    for name in ("hybrid", "lexical"):
        if getattr(recipe, name) and given and given[0] in ("--vectors", "--like"):
            raise GembError(f"--{name} needs the words of the query; leave it or {given[0]} out")
    if recipe.like is not None:
        _check_one(recipe)


def _check_one(recipe: SearchRecipe) -> None:
    if len(recipe.indexes) > 1:
        raise GembError("like looks for the neighbours of a document in its own index; name one index")


def _named(queries: Sequence[str]) -> str:
    """How many queries, and which."""
    names = ", ".join(queries[:NAMED_QUERIES])
    return f"{len(queries):,}: {names}{', ...' if len(queries) > NAMED_QUERIES else ''}"
