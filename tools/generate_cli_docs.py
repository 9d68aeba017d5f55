"""Writes docs/cli.md from the commands' own `--help`, or checks with `--check` that it is up to date.

The page is the same on every machine: the width is fixed, colours are removed, and the program is
always called `adaptertool`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import click

from adapterhub_tools.cli.main import cli

PROGRAM = "adaptertool"
WIDTH = 100
PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
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


def main(arguments: list[str] | None = None) -> int:
    """Write the page; with `--check`, print how it differs instead and return 1."""
    parser = argparse.ArgumentParser(description="Generate docs/cli.md from the commands' help.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it is out of date")
    options = parser.parse_args(arguments)

    expected = page()
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if found == expected:
        return 0
    if options.check:
        sys.stdout.writelines(
            difflib.unified_diff(
                found.splitlines(keepends=True),
                expected.splitlines(keepends=True),
                fromfile="docs/cli.md",
                tofile="generated from the commands",
            )
        )
        print("docs/cli.md is out of date: run `make docs` and commit it.", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(expected, encoding="utf-8")
    print(f"wrote docs/cli.md, {len(expected.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
