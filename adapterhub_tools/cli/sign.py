"""``adaptertool sign``: signs a folder."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command("sign", cls=ToolCommand, example="adaptertool sign my-adapter --key key.pem")
@click.argument("folder", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path, readable=False),
    help="The private key, a PEM file.",
)
@click.option("--replace", is_flag=True, help="Replace a signature that is there.")
@standard_options
def command(folder: Path, key: Path, replace: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Sign every file in FOLDER, a merged model or an adapter, with an elliptic-curve key (extra [sign]).

    The signature is one by the OpenSSF library model-signing, made offline. README.md and what belongs to git
    are not covered. `adaptertool verify FOLDER --pubkey KEY` checks it. Keys: `openssl ecparam -name
    prime256v1 -genkey -noout -out key.pem` and `openssl ec -in key.pem -pubout -out key.pub`.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.sign(folder, key=key, replace=replace)
    if as_json:
        output.json("sign", report.to_json())
        return
    if verbose:
        output.table("covered", ("file",), [(name,) for name in report.files])
    output.line(report.summary)
