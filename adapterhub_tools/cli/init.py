"""``adaptertool init``: writes the manifest of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


def _read_object(_ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Reads an option whose value is a JSON object."""
    if value is None:
        return None
    try:
        data = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"is not JSON: {error}", param=param) from error
    if not isinstance(data, dict):
        raise click.BadParameter("is not a JSON object", param=param)
    return data


def _read_pairs(_ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, Any] | None:
    """Reads ``key=value`` options; a value that is JSON is taken as such, any other as text."""
    found: dict[str, Any] = {}
    for pair in value:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not key=value", param=param)
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found or None


@click.command(
    "init",
    cls=ToolCommand,
    example="adaptertool init my-adapter --base SmolLM2-135M-Instruct --licence apache-2.0",
)
@click.argument("adapter", type=click.Path(path_type=Path, readable=False))
@click.option("--base", type=click.Path(readable=False), help="The base, whose digests are recorded then.")
@click.option("--replace", is_flag=True, help="Replace a manifest; what no file can tell is kept.")
@click.option("--base-id", help="The base's repository id.")
@click.option("--revision", help="The base's commit or tag.")
@click.option("--licence", help="The adapter's licence, such as apache-2.0.")
@click.option("--tag", multiple=True, help="A tag; may be repeated.")
@click.option(
    "--quantisation",
    metavar="JSON",
    callback=_read_object,
    help='How the base was quantised while training, such as \'{"scheme": "bitsandbytes-nf4"}\'.',
)
@click.option(
    "--training",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_read_pairs,
    help="A fact about training, such as optimizer=adamw; may be repeated.",
)
@click.option("--cache/--no-cache", default=True, help="Use the digest cache for the base.")
@standard_options
def command(
    adapter: Path,
    base: str | None,
    replace: bool,
    base_id: str | None,
    revision: str | None,
    licence: str | None,
    tag: tuple[str, ...],
    quantisation: dict[str, Any] | None,
    training: dict[str, Any] | None,
    cache: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write adapter_manifest.json into the folder ADAPTER; its own files stay as they are."""
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.init(
        adapter,
        base=base,
        replace=replace,
        base_id=base_id,
        revision=revision,
        licence=licence,
        tag=tag,
        quantisation=quantisation,
        training=training,
        cache=cache,
        progress=progress_for(output),
    )
    if as_json:
        output.json("init", report.to_json())
        return
    output.notes(report.notes)
    output.line(report.summary)
