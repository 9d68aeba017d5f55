"""What every command has in common: its flags, and how an error becomes a message and an exit code."""

from __future__ import annotations

from math import isfinite
from typing import Any, NoReturn

import click

from adapterhub_tools.cli.ending import Interrupted, drop_output, remove_unfinished, system_error
from adapterhub_tools.cli.options import Decorator, together
from adapterhub_tools.cli.output import Output
from adapterhub_tools.errors import AdapterError, StoreError


class ToolCommand(click.Command):
    """A command that ends with the exit code of the error it raised.

    The message goes to standard error; with ``--json`` the same content goes to standard output as JSON.
    A system call that failed anywhere else, as when standard output is full, counts as a StoreError; a reader
    that closed the pipe is told nothing. A signal ends the command with 128 + its number. Other exceptions
    are errors of this program and are not hidden.

    Args:
        example: a command line, shown in the help; several are on a line each.
        unreadable: the exit code where something could not be read or written.
    """

    def __init__(
        self, *args: Any, example: str, unreadable: int = StoreError.exit_code, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self._unreadable = unreadable

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the description, then the examples on lines that are never wrapped."""
        super().format_help_text(ctx, formatter)
        formatter.write_paragraph()
        lines = self.example.splitlines()
        formatter.write(f"  {'Example' if len(lines) == 1 else 'Examples'}:\n")
        for line in lines:
            formatter.write(f"    {line}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        output = Output.of(ctx.params)
        try:
            return super().invoke(ctx)
        except StoreError as error:
            self._end(ctx, output, error, self._unreadable)
        except AdapterError as error:
            self._end(ctx, output, error, error.exit_code)
        except BrokenPipeError:
            drop_output()
            ctx.exit(self._unreadable)
        except OSError as error:
            self._end(ctx, output, system_error(error), self._unreadable)
        except Interrupted as stop:
            remove_unfinished()
            self._end(ctx, output, stop.as_error(), stop.exit_code)

    def _end(self, ctx: click.Context, output: Output, error: AdapterError, code: int) -> NoReturn:
        ctx.close()  # the progress display goes first
        try:
            output.error(error)
        except OSError:
            # With --json the error itself may be what standard output has no room for.
            Output().error(error)
        drop_output()
        ctx.exit(code)


def finite(_: click.Context, param: click.Parameter, values: tuple[float, ...]) -> tuple[float, ...]:
    """Refuses a repeated number that is NaN or infinite; the callback of an option."""
    for value in values:
        if not isfinite(value):
            raise click.BadParameter(f"{value} is not a finite number.", param=param)
    return values


def check_scales(scales: tuple[float, ...], adapters: int) -> None:
    """Refuses scales that are neither one for all adapters nor one for each.

    Raises:
        click.UsageError: there are more or fewer.
    """
    if len(scales) not in (0, 1, adapters):
        raise click.UsageError(
            f"{len(scales)} scales were given for {adapters} adapters; give one for all, or one for each.",
            click.get_current_context(),
        )


def _not_with_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value and ctx.params.get("quiet"):
        raise click.UsageError("-q and -v exclude each other.", ctx)
    return value


standard_options: Decorator = together(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
    click.option("-q", "--quiet", is_flag=True, is_eager=True, help="Print only the last line."),
    click.option(
        "-v", "--verbose", is_flag=True, callback=_not_with_quiet, help="Print every module and note."
    ),
)
"""``--json``, ``-q`` and ``-v``, of every command."""
