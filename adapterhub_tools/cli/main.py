"""The program ``adaptertool``: a group that knows its commands by name and loads one only when it runs."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import cast

import click

from adapterhub_tools.cli.allocator import keep_freed_memory
from adapterhub_tools.cli.ending import (
    Interrupted,
    catch_signals,
    drop_output,
    soften_streams,
    system_error,
)
from adapterhub_tools.errors import StoreError
from adapterhub_tools.model.version import VERSION

COMMANDS = {
    "inspect": "Say what an adapter or a base is.",
    "validate": "Check an adapter's files, and how it fits a base.",
    "scan": "Look for what can harm whoever loads a folder.",
    "init": "Write the manifest of an adapter.",
    "hash": "Print the content digest of a base.",
    "merge": "Merge adapters into a base, exactly.",
    "verify": "Check a merged model, and say why it is wrong.",
    "unmerge": "Bring the base of a merge back, bit for bit.",
    "sign": "Sign a folder: a merged model or an adapter.",
    "svd-shrink": "Lower the ranks of an adapter.",
    "combine": "Make one adapter of several.",
    "convert": "Write an adapter as another method.",
    "fit": "Write an adapter so that a server takes it.",
    "extract": "Make an adapter of what a tuned model changed.",
    "push": "Publish an adapter on the Hub or in a registry.",
    "pull": "Bring an adapter from the Hub or a registry, verified.",
    "list": "Say what a registry holds, or the versions of an adapter.",
}
"""Every command and its one-line help; the module has the same name, with underscores for hyphens."""


class LazyGroup(click.Group):
    """A group whose commands are modules of this package, imported only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Returns the commands in the order of the table."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        cmd_name: str,
    ) -> click.Command | None:
        """Loads one command; a name outside the table is never imported."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"adapterhub_tools.cli.{cmd_name.replace('-', '_')}")
        return cast("click.Command", module.command)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        """Writes the list from the table, so that the help imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="adaptertool")
def cli() -> None:
    """Inspect, validate, hash and merge parameter-efficient adapters, on the files alone.

    Exit codes: 0 done or passed; 1 checked and found problems; 2 wrong usage; 3 a file is not what it
    claims to be; 4 not supported; 5 the adapter does not fit the base; 6 not exactly possible; 7 a digest
    differs; 8 could not read or write; 9 a remote store failed; 10 could not check, or there is no such
    device; 128 + n ended by signal n.
    """


def main() -> None:
    """Runs the program and exits."""
    # Importing torch makes some hundred thousand objects that stay; looking through them again and again
    # was a sixth of the time to start.
    gc.set_threshold(50_000, 50, 50)
    keep_freed_memory()
    soften_streams()
    try:
        catch_signals()
        cli.main(prog_name="adaptertool")
    except Interrupted as stop:
        click.echo(f"error: {stop.as_error()}", err=True)
        sys.exit(stop.exit_code)
    except OSError as error:  # the help, or a usage error, on an output that takes nothing
        drop_output()
        click.echo(f"error: {system_error(error)}", err=True)
        sys.exit(StoreError.exit_code)
    finally:
        # The interpreter would look through them once more before it ends: 0.15 s after torch.
        gc.freeze()


if __name__ == "__main__":
    main()
