"""The last step of every command: show the result and leave with its exit code."""

import typer

from gemb import report
from gemb.errors import Exit


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
