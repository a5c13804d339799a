"""`gemb search`: the documents of an index nearest in meaning to a query."""

from pathlib import Path
from typing import Annotated

import typer

from gemb import recipe as recipes
from gemb.jobs.search import SearchRecipe
from gemb.report import progress

from ._options import JsonOption, QuietOption, RecipeOption, SetOption, given, option
from ._show import show

_K_HELP = f"{SearchRecipe.model_fields['k'].description}  [default: {SearchRecipe.model_fields['k'].default}]"


def search(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INDEX... [QUERY]",
            help="The index folders that gemb index made, then what to search for; - is stdin.",
        ),
    ] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help=_K_HELP, show_default=False)] = None,
    where: Annotated[str | None, option(SearchRecipe, "where")] = None,
    hybrid: Annotated[bool | None, option(SearchRecipe, "hybrid")] = None,
    lexical: Annotated[bool | None, option(SearchRecipe, "lexical")] = None,
    like: Annotated[str | None, option(SearchRecipe, "like", metavar="ID")] = None,
    queries: Annotated[str | None, option(SearchRecipe, "queries", metavar="FILE")] = None,
    vectors: Annotated[Path | None, option(SearchRecipe, "vectors")] = None,
    min_score: Annotated[float | None, option(SearchRecipe, "min_score")] = None,
    exact: Annotated[bool | None, option(SearchRecipe, "exact")] = None,
    as_: Annotated[str | None, option(SearchRecipe, "as_")] = None,
    format_: Annotated[str | None, option(SearchRecipe, "format")] = None,
    fail_empty: Annotated[bool | None, option(SearchRecipe, "fail_empty")] = None,
    text_field: Annotated[str | None, option(SearchRecipe, "text_field")] = None,
    id_field: Annotated[str | None, option(SearchRecipe, "id_field")] = None,
    model: Annotated[str | None, option(SearchRecipe, "model")] = None,
    device: Annotated[str | None, option(SearchRecipe, "device")] = None,
    precision: Annotated[str | None, option(SearchRecipe, "precision")] = None,
    engine: Annotated[str | None, option(SearchRecipe, "engine")] = None,
    threads: Annotated[int | None, option(SearchRecipe, "threads")] = None,
    batch_tokens: Annotated[int | None, option(SearchRecipe, "batch_tokens")] = None,
    offline: Annotated[bool | None, option(SearchRecipe, "offline")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search an index with a question.

    Example: gemb search docs.gemb "who wrote the first compiler?"

    The score is the cosine of query and document: higher is better, 1 the most. A terminal gets a table, a
    pipe one JSON object a hit; without a query a terminal gets a prompt for many.
    """
    from gemb.jobs import search as job

    has_queries = any(source is not None for source in (queries, vectors, like))
    indexes, query = job.split_words(words or [], has_queries=has_queries)
    keys = {
        **given(SearchRecipe, locals()),
        "indexes": tuple(indexes) or None,
        "format": format_,
    }
    wanted = recipes.load(recipe, SearchRecipe, set_ or (), keys)
    if job.is_conversation(wanted, json=json):
        from gemb.jobs.conversation import converse

        converse(wanted)
        return
    with progress(quiet=quiet, json=json) as on_progress:
        report = job.run(wanted, on_progress, json=json)
    # An answer to one query speaks for itself, unless the query was cut.
    show(report, json=json, quiet=quiet or not (job.is_batch(wanted) or report.data["cut"]))
