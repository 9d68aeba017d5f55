"""``adaptertool list``: says what a registry holds."""

from __future__ import annotations

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output, size_text
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command(
    "list",
    cls=ToolCommand,
    example="adaptertool list file:///srv/adapters\nadaptertool list hf://me/my-adapter",
)
@click.argument("ref", required=False)
@standard_options
def command(ref: str | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Say what a registry holds, or, with a reference to one adapter, its versions and tags.

    REF is a registry (file:///folder, s3://bucket/prefix) or one adapter (hf://owner/name, owner/name).
    Without REF it is the registry that ADAPTERTOOL_REGISTRY names.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.list_adapters(ref)
    if as_json:
        output.json("list", report.to_json())
        return
    if report.adapters:
        output.table(
            "adapters",
            ("name", "versions", "latest", "made", "size", "tags"),
            [
                (
                    item.name,
                    str(item.versions),
                    item.latest,
                    item.created,
                    size_text(item.nbytes),
                    ", ".join(item.tags),
                )
                for item in report.adapters
            ],
        )
    if report.versions:
        output.table(
            "versions",
            ("number", "id", "made", "title", "tags"),
            [
                (
                    "" if item.number is None else str(item.number),
                    item.id,
                    item.created,
                    item.message,
                    ", ".join(item.tags),
                )
                for item in report.versions
            ],
        )
    count = len(report.versions or report.adapters)
    word = "version" if report.versions else "adapter"
    output.line(f"{report.ref}: {count:,} {word}{'s'[: count != 1]}")
