"""`gemb index`: documents into an index, and what is done to an index. Without a verb it adds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gemb import recipe as recipes
from gemb.jobs.index import IndexRecipe
from gemb.recipe import ComputeRecipe
from gemb.report import progress

from ._groups import Group
from ._options import (
    DryRunOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    SetOption,
    VerboseOption,
    given,
    option,
)
from ._show import show

DEFAULT_VERB = "add"
HELP = ("-h", "--help")


class VerbsWithDefault(Group):
    """Verbs of which `add` need not be said: a first word that is no verb begins its arguments.

    Options may stand before the first word. A file that is called like a verb is written ./verify.
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:  # noqa: ANN401
        """The context of the verb that the arguments begin with, of the group for its help, else of `add`."""
        place = self._first_word(args)
        if place is not None and args[place] in self.commands:
            args = [args[place], *args[:place], *args[place + 1 :]]
        elif place is not None or not set(args) & {*HELP, "--show-completion", "--install-completion"}:
            return self.commands[DEFAULT_VERB].make_context(info_name, args, parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """The help of `add`, without its name, and the verbs."""
        add = self.commands[DEFAULT_VERB]
        formatter.write_usage(ctx.command_path, "[VERB] [OPTIONS] [INPUT...]")
        self.format_help_text(ctx, formatter)
        type(add).format_options(add, ctx, formatter)
        self.format_commands(ctx, formatter)

    def _first_word(self, args: Sequence[str]) -> int | None:
        """Where the first argument stands that is neither an option nor the value of one."""
        takes_value = {
            name
            for command in self.commands.values()
            for parameter in command.params
            if parameter.param_type_name == "option"
            and not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
            for name in parameter.opts
        }
        is_value = False
        for place, argument in enumerate(args):
            if is_value:
                is_value = False
            elif argument == "--":
                return None
            elif argument.startswith("-") and argument != "-":
                is_value = argument in takes_value
            else:
                return place
        return None


app = typer.Typer(
    cls=VerbsWithDefault,
    name="index",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": list(HELP)},
)

IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="The index folder.", show_default=False)]
ThreadsOption = Annotated[int | None, option(ComputeRecipe, "threads")]
WaitOption = Annotated[float, option(IndexRecipe, "wait_lock")]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where", help="Only documents for which this is true, like \"year < 2000 and lang = 'en'\"."
    ),
]


@app.callback()
def index() -> None:
    """Build a searchable index of documents.

    Example: gemb index docs.jsonl -o docs.gemb

    The same command again brings the index up to date: what has not changed is not embedded again. Verbs
    check and change an index that is there; a file that is called like one is written ./verify.
    """


@app.command("add")
def add(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders or patterns of documents, - for stdin.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, option(IndexRecipe, "output")] = None,
    model: Annotated[str | None, option(IndexRecipe, "model")] = None,
    as_: Annotated[str | None, option(IndexRecipe, "as_")] = None,
    text_field: Annotated[str | None, option(IndexRecipe, "text_field")] = None,
    title_field: Annotated[str | None, option(IndexRecipe, "title_field")] = None,
    id_field: Annotated[str | None, option(IndexRecipe, "id_field")] = None,
    keep: Annotated[str | None, option(IndexRecipe, "keep")] = None,
    input_format: Annotated[str | None, option(IndexRecipe, "input_format")] = None,
    vectors: Annotated[Path | None, option(IndexRecipe, "vectors")] = None,
    ids: Annotated[Path | None, option(IndexRecipe, "ids")] = None,
    vector_field: Annotated[str | None, option(IndexRecipe, "vector_field")] = None,
    passages: Annotated[str | None, option(IndexRecipe, "passages")] = None,
    dims: Annotated[int | None, option(IndexRecipe, "dims")] = None,
    dtype: Annotated[str | None, option(IndexRecipe, "dtype")] = None,
    prune: Annotated[bool | None, option(IndexRecipe, "prune")] = None,
    compact: Annotated[bool | None, option(IndexRecipe, "compact")] = None,
    empty: Annotated[str | None, option(IndexRecipe, "empty")] = None,
    on_error: Annotated[str | None, option(IndexRecipe, "on_error")] = None,
    max_rejects: Annotated[str | None, option(IndexRecipe, "max_rejects")] = None,
    limit_rows: Annotated[int | None, option(IndexRecipe, "limit_rows")] = None,
    max_seconds: Annotated[float | None, option(IndexRecipe, "max_seconds")] = None,
    device: Annotated[str | None, option(IndexRecipe, "device")] = None,
    precision: Annotated[str | None, option(IndexRecipe, "precision")] = None,
    engine: Annotated[str | None, option(IndexRecipe, "engine")] = None,
    threads: Annotated[int | None, option(IndexRecipe, "threads")] = None,
    batch_tokens: Annotated[int | None, option(IndexRecipe, "batch_tokens")] = None,
    cache: Annotated[Path | None, option(IndexRecipe, "cache")] = None,
    force: Annotated[bool | None, option(IndexRecipe, "force")] = None,
    onnx: Annotated[bool | None, option(IndexRecipe, "onnx")] = None,
    wait_lock: Annotated[float | None, option(IndexRecipe, "wait_lock")] = None,
    offline: Annotated[bool | None, option(IndexRecipe, "offline")] = None,
    overwrite: OverwriteOption = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Add documents; those that have not changed are left as they are.

    Example: gemb index add docs.jsonl -o docs.gemb --prune

    The word add may be left out.
    """
    from gemb.jobs import index as job
    from gemb.jobs.embed import split_words

    source, overrides, words = split_words(inputs or [], recipe)
    keys = {
        **given(IndexRecipe, locals()),
        "inputs": tuple(words) or None,
    }
    wanted = recipes.load(source, IndexRecipe, [*overrides, *(set_ or ())], keys)
    if dry_run:
        show(job.plan(wanted, overwrite=overwrite), json=json, product=True)
        return
    with progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        report = job.run(wanted, on_progress, overwrite=overwrite)
    show(report, json=json, quiet=quiet)


@app.command("verify")
def verify(index: IndexArgument, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Check every byte and row of an index.

    Example: gemb index verify docs.gemb

    Exit code 1 if one is not what was written; the report says what to run then.
    """
    from gemb.jobs import index_care as job

    with progress(quiet=quiet, json=json) as on_progress:
        report = job.verify(index, on_progress)
    show(report, json=json, quiet=quiet)


@app.command("compact")
def compact(
    index: IndexArgument,
    full: Annotated[
        bool, typer.Option("--full", help="Write every part anew that has a dead row, however few they are.")
    ] = False,
    threads: ThreadsOption = None,
    wait_lock: WaitOption = 0.0,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge the parts of an index and build its graphs.

    Example: gemb index compact docs.gemb

    The rows of documents that are gone, dead rows, are dropped where they are more than a fifth of a part;
    small parts need no graph. gemb index does this at its end.
    """
    from gemb.jobs import index_care as job

    with progress(quiet=quiet, json=json) as on_progress:
        report = job.compact(index, on_progress, full=full, threads=threads, wait_lock=wait_lock)
    show(report, json=json, quiet=quiet)


@app.command("rebuild")
def rebuild(
    index: IndexArgument, threads: ThreadsOption = None, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Make a damaged index whole from what is intact.

    Example: gemb index rebuild docs.gemb

    The damaged one is kept beside it. Exit code 3 if documents were lost; gemb index adds them again.
    """
    from gemb.jobs import index_care as job

    with progress(quiet=quiet, json=json) as on_progress:
        report = job.rebuild(index, on_progress, threads=threads)
    show(report, json=json, quiet=quiet)


@app.command("upgrade")
def upgrade(
    index: IndexArgument, threads: ThreadsOption = None, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Bring an index of an older gemb to the present format.

    Example: gemb index upgrade docs.gemb

    The old one is kept beside it.
    """
    from gemb.jobs import index_care as job

    with progress(quiet=quiet, json=json) as on_progress:
        report = job.upgrade(index, on_progress, threads=threads)
    show(report, json=json, quiet=quiet)


@app.command("delete")
def delete(
    index: IndexArgument,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Documents to delete.", show_default=False)
    ] = None,
    ids_from: Annotated[
        Path | None, typer.Option("--ids-from", help="A file with an id a line; - is stdin.")
    ] = None,
    where: WhereOption = None,
    wait_lock: WaitOption = 0.0,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Delete documents from an index, by id or by a filter.

    Example: gemb index delete docs.gemb --where "year < 2000" --dry-run
    """
    from gemb.jobs import index_care as job

    with progress(quiet=quiet, json=json) as on_progress:
        report = job.delete(
            index,
            on_progress,
            ids=ids or (),
            ids_from=ids_from,
            where=where,
            dry_run=dry_run,
            wait_lock=wait_lock,
        )
    show(report, json=json, quiet=quiet, product=dry_run)


@app.command("export")
def export(
    index: IndexArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .parquet, .jsonl or .npy.")
    ],
    where: WhereOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the documents of an index with their vectors to a file.

    Example: gemb index export docs.gemb -o docs.parquet
    """
    from gemb.jobs import index_export as job

    with progress(quiet=quiet, json=json) as on_progress:
        report = job.export(index, output, on_progress, where=where, overwrite=overwrite)
    show(report, json=json, quiet=quiet)
