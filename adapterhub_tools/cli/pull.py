"""``adaptertool pull``: brings an adapter here."""

from __future__ import annotations

import click

from adapterhub_tools import api
from adapterhub_tools.cli.options import replace_options
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command(
    "pull",
    cls=ToolCommand,
    example="adaptertool pull hf://me/my-adapter@v1.0 my-adapter\n"
    "adaptertool pull file:///srv/adapters/me/my-adapter my-adapter",
)
@click.argument("ref")
@click.argument("out", type=click.Path(readable=False))
@click.option(
    "--base",
    type=click.Path(readable=False),
    help="A folder for the base: what is there is checked; if nothing is, the base is pulled into it.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="FILE",
    help="Bring a file that is not on the list of files of an adapter; may be repeated.",
)
@replace_options
@click.option("--dry-run", is_flag=True, help="Only say what would be brought.")
@standard_options
def command(
    ref: str,
    out: str,
    base: str | None,
    include: tuple[str, ...],
    replace: bool,
    allow_replace_gap: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Bring the adapter REF into the folder OUT: hf://owner/name@revision/folder, file:///registry/…, s3://….

    The revision is pinned to a commit first. Every file is checked against the commit, and against the
    manifest where there is one. OUT holds all of it or does not exist; where it came from is recorded in
    .adapter_origin.json. The token is that of HF_TOKEN or `hf auth login`. A plain owner/name is in the
    registry that ADAPTERTOOL_REGISTRY names, else on the Hub.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.pull(
        ref,
        out,
        base=base,
        include=include,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    if as_json:
        output.json("pull", report.to_json())
        return
    output.notes(report.notes)
    # Each repository of the Hub has a .gitattributes, which says nothing of an adapter.
    left = [pair for pair in report.left if verbose or pair[0] != ".gitattributes"]
    output.notes(f"not brought: {name} ({reason})" for name, reason in left)
    for link in report.chain:
        known = f"@{link.commit}" if link.commit else ""
        kind = "" if link.kind == "unknown" else f"{link.kind} "
        output.notes([f"trained on {kind}{link.id}{known}{': ' * bool(link.note)}{link.note}"])
    if report.base is not None:
        output.notes([f"base {report.base}"])
    if dry_run or verbose:
        output.table(
            "files",
            ("path", "bytes", "SHA-256"),
            [(file.path, f"{file.size:,}", file.sha256 or "") for file in report.files],
        )
    output.line(report.summary)
