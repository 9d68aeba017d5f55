"""The options that the commands of the low-rank algebra share, and how they show what they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from adapterhub_tools.cli.output import Output
    from adapterhub_tools.ops.shrink_report import LowRankReport, ModuleReport

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = click.Choice(["float64", "float32", "bfloat16", "float16"])


def output_options(function: F) -> F:
    """Adds the options of a command that writes an adapter's folder."""
    return _decorate(
        function,
        click.option("--replace", is_flag=True, help="Replace OUT if it exists, in one step."),
        click.option(
            "--allow-replace-gap",
            is_flag=True,
            help="Replace OUT in two steps where the file system cannot exchange folders.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="The number of workers; chosen if not given."
        ),
        click.option("--dry-run", is_flag=True, help="Compute and report; write nothing."),
    )


def policy_options(function: F) -> F:
    """Adds the policies that choose ranks; a command needs exactly one of them."""
    return _decorate(
        function,
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
        click.option(
            "--sv-ratio", type=float, help="Keep singular values above the largest divided by this."
        ),
        click.option("--sv-cumulative", type=float, help="Keep this share of the sum of singular values."),
        click.option("--sv-fro", type=float, help="Keep this share of the Frobenius norm."),
    )


def plot_option(function: F) -> F:
    """Adds ``--plot``."""
    return _decorate(
        function,
        click.option(
            "--plot",
            type=click.Path(path_type=Path, dir_okay=False, readable=False),
            help="Draw the spectra into this .png or .svg file; needs matplotlib.",
        ),
    )


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
            *(
                ()
                if module.refit is None
                else (f"{module.refit.error:.3g}", f"{module.refit.error_kept:.3g}")
            ),
        )
        for module in report.modules
    ]
    output.table("modules", columns, rows)
    if report.kept:
        output.table("other tensors", ("name", "what became of it"), report.kept)
    output.line(report.summary)


def _refit_errors(module: ModuleReport) -> tuple[float, ...]:
    return () if module.refit is None else (module.refit.error, module.refit.error_kept)


def _decorate(function: F, *options: Callable[[Any], Any]) -> F:
    decorated: Any = function
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]
