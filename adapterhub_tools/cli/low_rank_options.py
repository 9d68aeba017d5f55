"""The options that the commands of the low-rank algebra share, and how they show what they did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub_tools.cli.options import Decorator, replace_options, threads_option, together

if TYPE_CHECKING:
    from adapterhub_tools.cli.output import Output
    from adapterhub_tools.ops.shrink_report import LowRankReport, ModuleReport

output_options: Decorator = together(
    replace_options,
    threads_option,
    click.option("--dry-run", is_flag=True, help="Compute and report; write nothing."),
)
"""The options of a command that computes an adapter and writes its folder."""

policy_options: Decorator = together(
    click.option(
        "--rank",
        multiple=True,
        metavar="N|PATTERN=N",
        help="A rank for all modules, or for those whose path ends in PATTERN; may be repeated.",
    ),
    click.option(
        "--energy", type=float, help="Keep this share of the squared singular values of each module."
    ),
    click.option(
        "--max-error", type=float, help="Allow each module this relative error, in the Frobenius norm."
    ),
    click.option(
        "--budget",
        metavar="50%|2M|8MiB",
        help="Allot ranks over all modules within a share, a number of parameters, or bytes.",
    ),
    click.option("--sv-ratio", type=float, help="Keep singular values above the largest divided by this."),
    click.option("--sv-cumulative", type=float, help="Keep this share of the sum of singular values."),
    click.option("--sv-fro", type=float, help="Keep this share of the Frobenius norm."),
)
"""The policies that choose ranks; a command needs exactly one of them."""

plot_option: Decorator = click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="Draw the spectra into this .png or .svg file; needs matplotlib.",
)
"""``--plot``."""


def show(report: LowRankReport, output: Output) -> None:
    """Prints a report: a table of modules, what was kept, and one line that proves what was done."""
    if output.as_json:
        output.json(report.operation, report.to_json())
        return
    output.notes(report.notes)
    refit_columns = () if report.refit is None else ("merged error", "with magnitudes kept")
    columns = ("module", "rank", "norm", "energy kept", "error", *refit_columns)
    rows = [
        (
            module.path,
            str(module.rank) if module.rank_before is None else f"{module.rank_before} → {module.rank}",
            f"{module.norm:.4g}",
            f"{module.energy:.6f}",
            f"{module.error:.3g}",
            *(f"{error:.3g}" for error in _refit_errors(module)),
        )
        for module in report.modules
    ]
    output.table("modules", columns, rows)
    if report.kept:
        output.table("other tensors", ("name", "what became of it"), report.kept)
    output.line(report.summary)


def _refit_errors(module: ModuleReport) -> tuple[float, ...]:
    return () if module.refit is None else (module.refit.error, module.refit.error_kept)
