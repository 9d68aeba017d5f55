"""``adaptertool validate``: checks an adapter and how it fits a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options

if TYPE_CHECKING:
    from adapterhub_tools.ops.validation_report import ValidationReport


@click.command(
    "validate", cls=ToolCommand, example="adaptertool validate my-adapter --base SmolLM2-135M-Instruct"
)
@click.argument("adapter", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that it must fit.")
@click.option(
    "--check-base",
    type=click.Choice(["full", "targets", "off"]),
    default="full",
    show_default=True,
    help="Compare the digest of the whole base, of the target tensors, or nothing.",
)
@click.option(
    "--accept-embeddings", is_flag=True, help="Accept saved embeddings that the config does not mention."
)
@click.option("--cache/--no-cache", default=True, help="Use the digest cache for the base.")
@standard_options
def command(
    adapter: str,
    base: str | None,
    check_base: str,
    accept_embeddings: bool,
    cache: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Check ADAPTER: manifest, config, tensors, values, files, and how it fits a base.

    Every problem is listed, not only the first. Exit code 0: passed; 1: problems; 10: could not check.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.validate(
        adapter,
        base=base,
        check_base=check_base,
        accept_embeddings=accept_embeddings,
        cache=cache,
        progress=progress_for(output),
    )
    if as_json:
        output.json("validate", report.to_json())
    else:
        output.problems([*report.problems, *report.unchecked])
        if verbose:
            output.notes(f"not checked: {name}: {reason}" for name, reason in report.skipped.items())
        output.line(_summary(report))
    click.get_current_context().exit(report.exit_code)


def _summary(report: ValidationReport) -> str:
    made = f"checked {', '.join(report.checked) or 'nothing'}"
    if report.ok:
        return f"valid: {report.path}; {made}"
    if report.errors:
        count = len(report.errors)
        return f"invalid: {report.path}; {count} problem{'s'[: count != 1]}; {made}"
    return f"could not check: {report.path}; {len(report.unchecked)} could not be read; {made}"
