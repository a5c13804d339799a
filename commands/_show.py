"""The last steps of every command: run its job, show the result, and leave with its exit code."""

from collections.abc import Callable
from typing import Protocol

import typer

from gemb import report
from gemb.errors import Exit
from gemb.recipe import Recipe


class Job(Protocol):
    """A module of `gemb.jobs`; its functions take a recipe, and `run` hears who wants the progress."""

    @property
    def plan(self) -> Callable[..., report.Plan]:
        """What would be done."""
        ...

    @property
    def run(self) -> Callable[..., report.Report]:
        """Do it."""
        ...


def plan_or_run(
    job: Job, *recipe: Recipe, dry_run: bool, json: bool, quiet: bool, verbose: int, **options: bool
) -> None:
    """Show what a job would do, or do it and show that; `options` are those of `job.run`."""
    if dry_run:
        show(job.plan(*recipe), json=json, product=True)
        return
    with report.progress(quiet=quiet, json=json, verbose=verbose) as on_progress:
        done = job.run(*recipe, on_progress, **options)
    show(done, json=json, quiet=quiet)


def show(
    result: report.Plan | report.Report,
    *,
    json: bool = False,
    quiet: bool = False,
    product: bool = False,
    stdout_taken: bool = False,
) -> None:
    """Show `result` as `gemb.report.show` does; a report that is not a plain success ends the command."""
    report.show(result, json=json, quiet=quiet, product=product, stdout_taken=stdout_taken)
    if result.exit_code != Exit.DONE:
        raise typer.Exit(result.exit_code)
