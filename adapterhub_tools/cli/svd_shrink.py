"""``adaptertool svd-shrink``: lowers the ranks of an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub_tools import api
from adapterhub_tools.cli.low_rank_options import output_options, plot_option, policy_options, show
from adapterhub_tools.cli.options import DTYPES
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command("svd-shrink", cls=ToolCommand, example="adaptertool svd-shrink my-adapter small --energy 0.99")
@click.argument("adapter", type=click.Path(readable=False))
@click.argument("out", type=click.Path(path_type=Path, readable=False))
@policy_options
@click.option(
    "--refit",
    metavar="BASE",
    type=click.Path(path_type=Path, readable=False),
    help="Compute DoRA's magnitudes anew on this base; kept if not given.",
)
@click.option("--dtype", type=DTYPES, help="The dtype of the factors; their own if not given.")
@plot_option
@output_options
@standard_options
def command(
    adapter: str,
    out: Path,
    rank: tuple[str, ...],
    energy: float | None,
    max_error: float | None,
    budget: str | None,
    sv_ratio: float | None,
    sv_cumulative: float | None,
    sv_fro: float | None,
    refit: Path | None,
    dtype: str | None,
    plot: Path | None,
    replace: bool,
    allow_replace_gap: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Lower the ranks of a LoRA or DoRA ADAPTER, and write it to the folder OUT.

    Each delta becomes its best approximation of the new rank (Eckart-Young), computed in float64 from the
    factors alone. Give exactly one policy: --rank, --energy, --max-error, --budget, --sv-ratio,
    --sv-cumulative or --sv-fro. The scaling stays exact; DoRA keeps its magnitudes; everything else is
    carried along.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.svd_shrink(
        adapter,
        out,
        rank=rank or None,
        energy=energy,
        max_error=max_error,
        budget=budget,
        sv_ratio=sv_ratio,
        sv_cumulative=sv_cumulative,
        sv_fro=sv_fro,
        refit=refit,
        dtype=dtype,
        plot=plot,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    show(report, output)
