"""``adaptertool unmerge``: brings the base of a merge back."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub_tools import api
from adapterhub_tools.cli.options import device_option, replace_options, threads_option
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command("unmerge", cls=ToolCommand, example="adaptertool unmerge merged base --adapter my-adapter")
@click.argument("merged", type=click.Path(path_type=Path, readable=False))
@click.argument("out", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--adapter",
    multiple=True,
    required=True,
    type=click.Path(readable=False),
    help="An adapter of the merge; once for each, in any order.",
)
@click.option(
    "--approximate", is_flag=True, help="Subtract, where there is no undo file; the result is not the base."
)
@replace_options
@device_option("Where to compute; the bytes are the same.")
@threads_option
@click.option("--dry-run", is_flag=True, help="Check; write nothing.")
@standard_options
def command(
    merged: Path,
    out: Path,
    adapter: tuple[str, ...],
    approximate: bool,
    replace: bool,
    allow_replace_gap: bool,
    device: str,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the base that MERGED was made from, bit for bit, to the folder OUT.

    MERGED is a folder that `merge --undo` wrote. What is restored is compared with the base's digest in the
    receipt before OUT appears. Merges on top of each other are undone in order, the last one first.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.unmerge(
        merged,
        out,
        adapter=adapter,
        approximate=approximate,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        device=device,
        threads=threads,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    if as_json:
        output.json("unmerge", report.to_json())
        return
    output.notes(report.notes)
    output.line(report.summary)
