"""``adaptertool hash``: prints the content digest of a base."""

from __future__ import annotations

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output, size_text
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command("hash", cls=ToolCommand, example="adaptertool hash SmolLM2-135M-Instruct")
@click.argument("base", type=click.Path(readable=False))
@click.option(
    "--algorithm",
    type=click.Choice(["blake3", "sha256"]),
    default="blake3",
    show_default=True,
    help="The hash function of the tree.",
)
@click.option("--cache/--no-cache", default=True, help="Use the digest cache.")
@standard_options
def command(base: str, algorithm: str, cache: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print the content digest of BASE: the same for one file or many shards, whatever their headers.

    With -v or --json, also that of its config and of every tensor. Digests are kept in a small cache and used
    again while path, size, inode and time of a file stay the same.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    found = api.content_digest(base, algorithm=algorithm, cache=cache, progress=progress_for(output))
    if as_json:
        output.json("hash", found.to_json())
        return
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    if verbose:
        output.table("tensors", ("name", "digest"), found.tensors.items())
        output.facts(
            found.path,
            (
                ("config", found.config_digest),
                ("tensors", len(found.tensors)),
                ("bytes", f"{found.bytes:,} ({size_text(found.bytes)})"),
                ("files", len(found.files)),
            ),
        )
    output.line(found.digest)
