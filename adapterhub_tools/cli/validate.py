"""``adaptertool validate``: checks adapters and how they fit a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.report_forms import form_option, judge, show
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options
from adapterhub_tools.errors import EXIT_COULD_NOT_CHECK

if TYPE_CHECKING:
    from adapterhub_tools.ops.validation_report import ValidationReport


@click.command(
    "validate",
    cls=ToolCommand,
    example="adaptertool validate my-adapter --base SmolLM2-135M-Instruct\n"
    "adaptertool validate adapters/*/ hf://owner/name --format junit",
    unreadable=EXIT_COULD_NOT_CHECK,
)
@click.argument("adapter", type=click.Path(readable=False), nargs=-1, required=True)
@click.option(
    "--base", type=click.Path(readable=False), help="The base that it must fit: a folder or hf://owner/name."
)
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
@form_option
@standard_options
def command(
    adapter: tuple[str, ...],
    base: str | None,
    check_base: str,
    accept_embeddings: bool,
    cache: bool,
    form: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Check each ADAPTER: manifest, config, tensors, values, files, and how it fits a base.

    A file of an adapter stands for its folder, so that a hook can pass the files that changed. Every problem
    is listed, not only the first, and an adapter that cannot be had does not stop the others. Exit code 0:
    passed; 1: problems; else 10: could not check, or that of the error, such as 9 for a remote store.
    """
    form = "json" if as_json else form
    output = Output(as_json=form != "text", quiet=quiet, verbose=verbose)
    progress = progress_for(output)

    def check(item: str) -> ValidationReport:
        try:
            return api.validate(
                item,
                base=base,
                check_base=check_base,
                accept_embeddings=accept_embeddings,
                cache=cache,
                progress=progress,
            )
        finally:
            progress.finish()

    show("validate", judge(adapter, check), form, output, _summary)


def _summary(report: ValidationReport) -> str:
    made = f"checked {', '.join(report.checked) or 'nothing'}"
    if report.ok:
        return f"valid: {report.path}; {made}"
    if report.errors:
        count = len(report.errors)
        return f"invalid: {report.path}; {count} problem{'s'[: count != 1]}; {made}"
    return f"could not check: {report.path}; {len(report.unchecked)} could not be read; {made}"
