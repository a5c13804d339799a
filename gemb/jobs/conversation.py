"""Many queries to the same indexes, one after the other at a prompt, with the model loaded once."""

import contextlib
import re
import sys
from collections.abc import Callable
from typing import TextIO

from gemb.errors import GembError
from gemb.jobs.hits import write_table
from gemb.jobs.search import Queries, Search, SearchRecipe
from gemb.report import Event, counted
from gemb.retrieval.queries import check_query

PROMPT = "search: "
HELP = """\
  any text         search for it
  :k 20            show 20 documents
  :where EXPR      only documents that fit; :where alone takes all again
  :vector          rank by meaning
  :hybrid          rank by meaning and by words
  :lexical         rank by words alone
  :like ID         the neighbours of a document
  :help            this list
  Ctrl-D           end
"""


def converse(
    recipe: SearchRecipe, *, ask: Callable[[str], str] = input, output: TextIO | None = None
) -> None:
    """Answers what `ask` gives until it raises EOFError; a mistake is told and ends nothing.

    Raises GembError, before the first prompt, for indexes that cannot be searched and a model that cannot
    be had.
    """
    screen = sys.stdout if output is None else output

    def tell(event: Event) -> None:
        screen.write(f"{event.note}\n" if event.note else "")

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and the usual keys
    with Search(recipe, tell) as search:
        if not recipe.lexical:
            search.load()
        documents = sum(index.state.documents for index in search.indexes)
        screen.write(
            f"{', '.join(search.names)}: {counted(documents, 'document')}; :help explains, Ctrl-D ends\n"
        )
        while True:
            try:
                _obey(search, ask(PROMPT).strip(), screen)
            except EOFError:
                screen.write("\n")
                return
            except GembError as error:
                screen.write(f"{error}\n")
            except KeyboardInterrupt:  # the line, or a long search, is given up
                screen.write("\n")
            screen.flush()


def _obey(search: Search, line: str, output: TextIO) -> None:
    """Answers a query, or follows a command."""
    if not line.startswith(":"):
        if line:
            check_query(line)
            _show(search, line, output)
        return
    command, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    match command:
        case "k":
            if not re.fullmatch("[1-9][0-9]{0,8}", argument):
                raise GembError(f":k {argument}: not a number of documents; write one such as :k 20")
            _change(search, k=int(argument))
        case "where":
            _change(search, where=argument or None)
        case "vector" | "hybrid" | "lexical":
            _change(search, hybrid=command == "hybrid", lexical=command == "lexical")
        case "like":
            write_table(search.answer_like(argument), output)
        case "help" | "h" | "?":
            output.write(HELP)
        case _:
            raise GembError(f":{command}: no such command; :help lists them")


def _show(search: Search, line: str, output: TextIO) -> None:
    (answer,) = search.answer(Queries([line]))
    write_table(answer, output)


def _change(search: Search, **changes: object) -> None:
    """Changes what is asked for; a change that does not fit leaves it as it was."""
    before = search.recipe
    search.recipe = before.model_copy(update=changes)
    try:
        search.check()
    except GembError:
        search.recipe = before
        raise
