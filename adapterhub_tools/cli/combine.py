"""``adaptertool combine``: makes one adapter of several."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub_tools import api
from adapterhub_tools.cli.low_rank_options import output_options, policy_options, show
from adapterhub_tools.cli.options import DTYPES
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options


@click.command(
    "combine",
    cls=ToolCommand,
    example="adaptertool combine my-style my-facts --weights 0.7,0.3 --method linear --out both",
)
@click.argument("adapters", nargs=-1, required=True, type=click.Path(readable=False))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, readable=False),
    help="The folder to write.",
)
@click.option(
    "--weights",
    multiple=True,
    required=True,
    metavar="W1,W2,…|PATTERN=W1,W2,…",
    help="A number for each adapter, negative to subtract it; with PATTERN for modules whose path ends so. "
    "May be repeated.",
)
@click.option(
    "--method",
    default="linear",
    show_default=True,
    metavar="NAME",
    help="linear, cat, svd, slerp, ties, dare_linear, dare_ties, magnitude_prune, della or breadcrumbs; with "
    "--space factors also ties_svd, dare_linear_svd, dare_ties_svd and magnitude_prune_svd.",
)
@click.option("--density", type=float, help="The share of each delta's values that the method keeps.")
@click.option("--gamma", type=float, help="The share of largest values that breadcrumbs leaves out.")
@click.option("--epsilon", type=float, help="How much della's share varies with the size of a value.")
@click.option(
    "--majority-sign", type=click.Choice(["total", "frequency"]), help="How an election of signs counts."
)
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of masks and sketches.")
@policy_options
@click.option(
    "--base",
    type=click.Path(readable=False),
    help="The base, where what an adapter does depends on it, as with DoRA.",
)
@click.option(
    "--into",
    metavar="BASE",
    type=click.Path(readable=False),
    help="Write this base with the combined deltas, rounded once, instead of an adapter; no rank is lost.",
)
@click.option("--undo", is_flag=True, help="With --into, also write what brings the base back, bit for bit.")
@click.option(
    "--space",
    type=click.Choice(["deltas", "factors"]),
    default="deltas",
    show_default=True,
    help="Combine deltas; or factors, to repeat PEFT's add_weighted_adapter.",
)
@click.option(
    "--full",
    type=click.Choice(["delta", "average", "drop"]),
    default="delta",
    show_default=True,
    help="What becomes of tensors that adapters carry in full.",
)
@click.option("--allow-disjoint", is_flag=True, help="Allow adapters that share no target module.")
@click.option(
    "--dtype",
    type=DTYPES,
    help="The dtype of the factors, the widest of the inputs if not given; with --into, of the base.",
)
@output_options
@standard_options
def command(
    adapters: tuple[str, ...],
    out: Path,
    weights: tuple[str, ...],
    method: str,
    density: float | None,
    gamma: float | None,
    epsilon: float | None,
    majority_sign: str | None,
    seed: int,
    rank: tuple[str, ...],
    energy: float | None,
    max_error: float | None,
    budget: str | None,
    sv_ratio: float | None,
    sv_cumulative: float | None,
    sv_fro: float | None,
    base: str | None,
    into: str | None,
    undo: bool,
    space: str,
    full: str,
    allow_disjoint: bool,
    dtype: str | None,
    replace: bool,
    allow_replace_gap: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Combine two or more ADAPTERS of one base into one.

    What is combined is what they do to the base, not their factors: different ranks, scales and targets,
    rsLoRA and DoRA count as they act. linear, cat, svd and slerp stay factored; linear and cat are exact, and
    their ranks add up unless a policy such as --rank cuts them. The other methods work element by element,
    and their result is approximated at --rank or another policy, with the error measured.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.combine_adapters(
        adapters,
        out=out,
        weights=weights,
        method=method,
        density=density,
        gamma=gamma,
        epsilon=epsilon,
        majority_sign=majority_sign,
        seed=seed,
        rank=rank or None,
        energy=energy,
        max_error=max_error,
        budget=budget,
        sv_ratio=sv_ratio,
        sv_cumulative=sv_cumulative,
        sv_fro=sv_fro,
        base=base,
        into=into,
        undo=undo,
        space=space,
        full=full,
        allow_disjoint=allow_disjoint,
        dtype=dtype,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    from adapterhub_tools.ops.combine_report import CombineReport

    if not isinstance(report, CombineReport):
        if as_json:
            output.json("merge", report.to_json())
            return
        output.notes(report.notes)
        output.line(report.summary)
        return
    if not as_json:
        output.table(
            "adapters",
            ("adapter", "method", "weight", "modules", "ranks", "digest"),
            [
                (i.label, i.method, f"{i.weight:g}", i.modules, ", ".join(i.ranks), i.digest)
                for i in report.inputs
            ],
        )
    show(report, output)
