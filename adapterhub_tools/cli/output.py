"""What a command prints: tables for people, or one JSON object for programs.

Tables are made by rich, which is loaded only when a table is printed and leaves colours out where
``NO_COLOR`` is set or standard output is no terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from adapterhub_tools.errors import AdapterError, Problem, escape

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 160
"""The width of tables where no terminal gives one."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a command talks.

    Attributes:
        as_json: one JSON object on standard output and nothing else.
        quiet: only the last line.
        verbose: every module and note.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Output:
        """Takes the three flags from a command's parameters."""
        return cls(
            as_json=bool(params.get("as_json")),
            quiet=bool(params.get("quiet")),
            verbose=bool(params.get("verbose")),
        )

    def json(self, report: str, data: Mapping[str, Any]) -> None:
        """Prints an object, with the name and version of its form as ``report``."""
        value = {"report": f"{report}-1.0", **data}
        text = json.dumps(value, ensure_ascii=False, indent=2)
        try:
            text.encode(sys.stdout.encoding or "ascii")
        except UnicodeEncodeError:
            # A path that is no UTF-8, or a terminal that is not: JSON has escapes of its own.
            text = json.dumps(value, indent=2)
        click.echo(text)

    def line(self, text: str) -> None:
        """Prints a line that says what was done or found; shown even when quiet."""
        click.echo(text)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Prints a table; numbers should come as text."""
        if self.quiet:
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            # Text, not str: a name such as "[red]" is no markup.
            table.add_row(*(Text(escape(cell)) for cell in row))
        _console().print(table)

    def facts(self, title: str, pairs: Iterable[tuple[str, object]]) -> None:
        """Prints names and values, one pair a line; values that are None are left out."""
        if self.quiet:
            return
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in pairs:
            if value is not None:
                grid.add_row(name, Text(escape(value)))
        console = _console()
        console.print(Text(escape(title), style="bold underline"))
        console.print(grid)

    def problems(self, problems: Sequence[Problem], *, kinds: bool = False) -> None:
        """Prints problems, one a line, errors first; with their kinds where these are rules to be named."""
        if self.quiet:
            return
        for problem in sorted(problems, key=lambda item: item.severity != "error"):
            kind = f" [{problem.kind}]" if kinds else ""
            click.echo(f"{problem.severity}{kind}: {problem}")

    def notes(self, notes: Iterable[str]) -> None:
        """Prints remarks, one a line."""
        if self.quiet:
            return
        for note in notes:
            click.echo(f"note: {escape_line(note)}")

    def error(self, error: AdapterError) -> None:
        """Prints an error: the problems on standard error, or the same content as JSON."""
        if self.as_json:
            self.json("error", error.to_json())
            return
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)


def _console() -> Console:
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program with 1; see ToolCommand

    # rich keeps bold text under NO_COLOR; without a colour system it writes no escape sequence at all.
    return PlainConsole(
        width=None if sys.stdout.isatty() else PIPE_COLUMNS,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
    )


def escape_line(text: str) -> str:
    """Returns a line of any length with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def size_text(nbytes: int) -> str:
    """Returns bytes for people: ``"13.5 GB"``; powers of 1000."""
    value = float(nbytes)
    for unit in _UNITS[:-1]:
        if value < 999.95:
            return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {_UNITS[-1]}"


def share_text(share: float) -> str:
    """Returns a share as a percentage with two significant digits at least."""
    return f"{share:.2%}" if share >= 0.01 else f"{100 * share:.2g}%"


def distribution_text(counts: Mapping[str, int]) -> str:
    """Returns ``"16"``, or ``"8 (12 modules), 16 (20 modules)"`` where values differ."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} module{'s'[: count != 1]})" for value, count in counts.items())
