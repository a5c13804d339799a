"""The help of a group of commands."""

from typing import Any

import typer
from typer.core import TyperGroup


class Group(TyperGroup):
    """A group whose help shows the first sentence of each command whole, on as many lines as it takes."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ANN401  # as typer
        """Write the list of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(_WHOLE)) for name, one in commands if one and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


_WHOLE = 1_000
"""Characters, more than any sentence has; what is longer is cut with three dots."""
