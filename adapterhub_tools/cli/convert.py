"""``adaptertool convert``: writes an adapter as another method."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub_tools import api
from adapterhub_tools.cli.low_rank_options import output_options, show
from adapterhub_tools.cli.options import DTYPES
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command(
    "convert",
    cls=ToolCommand,
    example="adaptertool convert my-dora my-lora --to lora --base SmolLM2-135M-Instruct --rank auto",
)
@click.argument("adapter", type=click.Path(readable=False))
@click.argument("out", type=click.Path(path_type=Path, readable=False))
@click.option("--to", type=click.Choice(["lora", "dora"]), required=True, help="The method to write.")
@click.option(
    "--base",
    type=click.Path(readable=False),
    help="The base, where what the adapter does depends on it.",
)
@click.option(
    "--initial",
    type=click.Path(readable=False),
    help="The adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.",
)
@click.option(
    "--rank", metavar="N|auto", help="The rank of the result; auto is the smallest within --max-error."
)
@click.option(
    "--max-error",
    type=float,
    default=0.01,
    show_default=True,
    help="The relative error that each module may have, in the Frobenius norm.",
)
@click.option("--allow-lossy", is_flag=True, help="Allow a larger error; the report tells it.")
@click.option(
    "--fold-scale",
    is_flag=True,
    help="Put alpha, rsLoRA and patterns into the factors, for readers that ignore them.",
)
@click.option("--dtype", type=DTYPES, help="The dtype of computed factors; the adapter's if not given.")
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of the random sketches.")
@output_options
@standard_options
def command(
    adapter: str,
    out: Path,
    to: str,
    base: str | None,
    initial: str | None,
    rank: str | None,
    max_error: float,
    allow_lossy: bool,
    fold_scale: bool,
    dtype: str | None,
    seed: int,
    replace: bool,
    allow_replace_gap: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Convert ADAPTER to plain LoRA or to DoRA, and write it to the folder OUT.

    LoRA to DoRA is exact. DoRA, and any other method that can be merged, to LoRA is the best approximation of
    its true effect on the base; its error is measured for each module, and above --max-error nothing is
    written.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.convert(
        adapter,
        out,
        to=to,
        base=base,
        initial=initial,
        rank=rank,
        max_error=max_error,
        allow_lossy=allow_lossy,
        fold_scale=fold_scale,
        dtype=dtype,
        seed=seed,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    show(report, output)
