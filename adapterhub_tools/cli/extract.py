"""``adaptertool extract``: makes an adapter of what a tuned model changed in its base."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub_tools import api
from adapterhub_tools.cli.low_rank_options import output_options, plot_option, policy_options, show
from adapterhub_tools.cli.options import DTYPES
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command(
    "extract",
    cls=ToolCommand,
    example="adaptertool extract SmolLM2-135M-Instruct my-tuned-model my-adapter --rank 32",
)
@click.argument("base", type=click.Path(readable=False))
@click.argument("tuned", type=click.Path(readable=False))
@click.argument("out", type=click.Path(path_type=Path, readable=False))
@policy_options
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="The dtype of the factors.")
@click.option(
    "--leave-out",
    multiple=True,
    metavar="PATTERN",
    help="Leave out the tensors whose names end so, such as embed_tokens.weight; may be repeated.",
)
@click.option("--allow-lossy", is_flag=True, help="Leave out changes that no adapter can express.")
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of the random sketches.")
@plot_option
@output_options
@standard_options
def command(
    base: str,
    tuned: str,
    out: Path,
    rank: tuple[str, ...],
    energy: float | None,
    max_error: float | None,
    budget: str | None,
    sv_ratio: float | None,
    sv_cumulative: float | None,
    sv_fro: float | None,
    dtype: str,
    leave_out: tuple[str, ...],
    allow_lossy: bool,
    seed: int,
    plot: Path | None,
    replace: bool,
    allow_replace_gap: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Extract the adapter that takes BASE to the model TUNED, and write it to the folder OUT.

    For full fine-tunes, GaLore runs and merged models. Each changed matrix becomes its best approximation of
    the chosen rank, with a measured error. Norms, embeddings, heads, grown vocabularies and biases that
    changed are carried in full. Give exactly one policy: --rank, --energy, --max-error, --budget, --sv-ratio,
    --sv-cumulative or --sv-fro.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.extract(
        base,
        tuned,
        out,
        rank=rank or None,
        energy=energy,
        max_error=max_error,
        budget=budget,
        sv_ratio=sv_ratio,
        sv_cumulative=sv_cumulative,
        sv_fro=sv_fro,
        dtype=dtype,
        leave_out=leave_out,
        allow_lossy=allow_lossy,
        seed=seed,
        plot=plot,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    show(report, output)
