"""Writes docs/cli.md from the commands' own `--help`, or checks with `--check` that it is up to date.

The page is the same on every machine: the width is fixed, colours are removed, and the program is
always called `adaptertool`.
"""

from __future__ import annotations

import sys

import click

from adapterhub_tools.cli.main import cli
from generated_file import write_or_check

PROGRAM = "adaptertool"
WIDTH = 100
INTRODUCTION = """\
# Commands

This page is generated from the commands' own help. Change the command, then run `make docs`.
"""


def help_text(command: click.Command, name: str, parent: click.Context | None) -> tuple[str, click.Context]:
    """The `--help` of one command as printed on a terminal WIDTH columns wide, and its context."""
    context = click.Context(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        color=False,
        **command.context_settings,
    )
    lines = click.unstyle(command.get_help(context)).splitlines()
    return "\n".join(line.rstrip() for line in lines), context


def sections(command: click.Command, name: str, parent: click.Context | None) -> list[str]:
    """One section for a command, then one for each of its subcommands, in the order that it lists them."""
    text, context = help_text(command, name, parent)
    found = [f"## {context.command_path}\n\n```text\n{text}\n```\n"]
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            if child is None:
                raise click.ClickException(f"{PROGRAM} lists the command {child_name!r} but cannot load it")
            if not child.hidden:
                found += sections(child, child_name, context)
    return found


def page() -> str:
    """The whole page as text."""
    return "\n".join([INTRODUCTION, *sections(cli, PROGRAM, None)])


if __name__ == "__main__":
    sys.exit(write_or_check("docs/cli.md", page, remedy="run `make docs` and commit it."))
