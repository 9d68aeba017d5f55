"""``adaptertool push``: publishes an adapter."""

from __future__ import annotations

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command(
    "push",
    cls=ToolCommand,
    example="adaptertool push my-adapter hf://me/my-adapter --private\n"
    "adaptertool push my-adapter file:///srv/adapters/me/my-adapter --tag v1.0",
)
@click.argument("adapter", type=click.Path(readable=False))
@click.argument("ref")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is public.")
@click.option("--revision", help="The branch; made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--tag", help="A tag for the commit or version; one that is taken is never moved.")
@click.option(
    "--include",
    multiple=True,
    metavar="FILE",
    help="Send a file that is not on the list of files of an adapter; may be repeated.",
)
@click.option("--message", help="The title of the commit.")
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@standard_options
def command(
    adapter: str,
    ref: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    tag: str | None,
    include: tuple[str, ...],
    message: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Publish the folder ADAPTER as REF: hf://owner/name, or file:///registry/owner/name, or s3://….

    It is validated first. Everything goes in one commit, with the manifest and an up-to-date model card;
    pushing the same again makes none. Only files on the list of files of an adapter are sent: never a
    symbolic link, and nothing that holds a secret. The token is that of HF_TOKEN or `hf auth login`. A plain
    owner/name is in the registry that ADAPTERTOOL_REGISTRY names, else on the Hub.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.push(
        adapter,
        ref,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        include=include,
        message=message,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    if as_json:
        output.json("push", report.to_json())
        return
    output.notes(report.notes)
    output.notes(f"not sent: {name} ({reason})" for name, reason in report.left)
    if dry_run or verbose:
        output.table(
            "files",
            ("path", "bytes", "SHA-256", "change"),
            [(file.path, f"{file.size:,}", file.sha256 or "", file.change) for file in report.files],
        )
    output.line(report.summary)
