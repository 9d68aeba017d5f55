"""What every command has in common: its flags, and how an error becomes a message and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from adapterhub_tools.cli.output import Output
from adapterhub_tools.errors import AdapterError

F = TypeVar("F", bound=Callable[..., Any])


class ToolCommand(click.Command):
    """A command that ends with the exit code of the error it raised.

    The message goes to standard error; with ``--json`` the same content goes to standard output as JSON.
    Other exceptions are errors of this program and are not hidden.

    Args:
        example: a command line, shown in the help.
    """

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the description, then the example on a line that is never wrapped."""
        super().format_help_text(ctx, formatter)
        formatter.write_paragraph()
        formatter.write(f"  Example:\n    {self.example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        output = Output.of(ctx.params)
        try:
            return super().invoke(ctx)
        except AdapterError as error:
            output.error(error)
            ctx.exit(error.exit_code)


def standard_options(function: F) -> F:
    """Adds ``--json``, ``-q`` and ``-v``, passed to the function as one ``output``."""

    def take(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        if value and ctx.params.get("quiet"):
            raise click.UsageError("-q and -v exclude each other.", ctx)
        return value

    options = (
        click.option("-v", "--verbose", is_flag=True, callback=take, help="Print every module and note."),
        click.option("-q", "--quiet", is_flag=True, is_eager=True, help="Print only the last line."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
    )
    decorated: Callable[..., Any] = function
    for option in options:
        decorated = option(decorated)
    return decorated  # type: ignore[return-value]
