"""``adaptertool verify``: checks a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapterhub_tools import api
from adapterhub_tools.cli.options import device_option, threads_option
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, check_scales, finite, standard_options
from adapterhub_tools.errors import EXIT_COULD_NOT_CHECK, AdapterError


def token_ids(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    """Reads lists of numbers, separated by commas."""
    try:
        return tuple(tuple(int(part) for part in value.split(",")) for value in values)
    except ValueError as error:
        raise click.BadParameter("expected whole numbers, such as 1,15,7.", param=param) from error


@click.command(
    "verify", cls=ToolCommand, example="adaptertool verify SmolLM2-135M-Instruct my-adapter merged"
)
@click.argument(
    "models", metavar="[BASE ADAPTER...] MERGED", type=click.Path(readable=False), nargs=-1, required=True
)
@click.option("--receipt", is_flag=True, help="Compare MERGED alone with its receipt, by digests.")
@click.option(
    "--sample",
    type=click.Choice(["rows", "full"]),
    default="rows",
    show_default=True,
    help="Recompute 1 % of the rows exactly and probe the rest, or recompute all.",
)
@device_option("Where to compute.")
@click.option(
    "--scale",
    type=float,
    multiple=True,
    callback=finite,
    help="What the delta was multiplied with, for all or for each; the receipt's, or 1, if not given.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the rows and probes; fresh ones if not given.")
@threads_option
@click.option(
    "--pubkey",
    metavar="KEY",
    type=click.Path(path_type=Path, readable=False),
    help="Check the signature in MERGED with this public key; alone, or beside the rest (extra [sign]).",
)
@click.option(
    "--logits",
    is_flag=True,
    help="Also run base with adapter, and MERGED, in float32 and compare their outputs (extra [verify]).",
)
@click.option(
    "--input-ids",
    multiple=True,
    metavar="ID,ID,...",
    callback=token_ids,
    help="Token ids for --logits; once for each sequence, random ones if not given.",
)
@standard_options
@click.pass_context
def command(
    context: click.Context,
    models: tuple[str, ...],
    receipt: bool,
    sample: str,
    device: str,
    scale: tuple[float, ...],
    seed: int | None,
    threads: int | None,
    pubkey: Path | None,
    logits: bool,
    input_ids: tuple[tuple[int, ...], ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Check that MERGED is what BASE and each ADAPTER make, or with --receipt that it is unchanged.

    With --pubkey, check also, or only, that a signature by that key covers exactly the files in MERGED, which
    may then be any signed folder.

    Works on merges of this tool and of others, and says for each tensor whether it is correctly rounded, or
    why it is wrong. Exit code 0: all is right; 1: something is wrong; 10: could not be checked.
    """
    alone = len(models) == 1
    if (receipt and not alone) or (alone and not receipt and pubkey is None) or len(models) == 2:
        raise click.UsageError(
            "give BASE, ADAPTER and MERGED; or MERGED alone with --receipt or --pubkey.", context
        )
    if (logits and alone) or (input_ids and not logits):
        raise click.UsageError(
            "--logits needs BASE, ADAPTER and MERGED, and --input-ids needs --logits.", context
        )
    if alone and device == "cuda":
        raise click.UsageError("digests and signatures are compared on the CPU: leave --device out.", context)
    check_scales(scale, len(scale) if alone else len(models) - 2)
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    try:
        report = api.verify(
            merged=models[-1],
            base=None if alone else models[0],
            adapter=models[1:-1],
            receipt=receipt,
            sample=sample,
            device=device,
            scale=scale,
            seed=seed,
            threads=threads,
            pubkey=pubkey,
            logits=logits,
            input_ids=input_ids,
            progress=progress_for(output),
        )
    except AdapterError as error:
        # Without base and adapter there is nothing to compare with: that says nothing about the merge.
        error.exit_code = EXIT_COULD_NOT_CHECK
        output.error(error)
        context.exit(error.exit_code)
    if as_json:
        output.json("verify", report.to_json())
        context.exit(report.exit_code)
    output.problems(report.problems)
    output.problems(report.unchecked)
    if verbose:
        output.table(
            "tensors",
            ("name", "verdict", "arithmetic", "rows", "compared"),
            [(t.name, t.verdict, t.arithmetic, str(t.rows), str(t.rows_checked)) for t in report.tensors],
        )
    output.notes(report.notes)
    output.line(report.summary)
    context.exit(report.exit_code)
