"""``adaptertool scan``: looks for what can harm whoever loads a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.report_forms import form_option, judge, show
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options
from adapterhub_tools.errors import EXIT_COULD_NOT_CHECK

if TYPE_CHECKING:
    from adapterhub_tools.ops.validation_report import ValidationReport


@click.command(
    "scan",
    cls=ToolCommand,
    example="adaptertool scan my-adapter hf://owner/name --strict",
    unreadable=EXIT_COULD_NOT_CHECK,
)
@click.argument("path", nargs=-1, required=True)
@click.option(
    "--ignore", multiple=True, metavar="RULE", help="Do not apply a rule; may be repeated. See docs/scan.md."
)
@click.option("--strict", is_flag=True, help="Let warnings count as errors.")
@form_option
@standard_options
def command(
    path: tuple[str, ...],
    ignore: tuple[str, ...],
    strict: bool,
    form: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Look through each PATH, an adapter or a base, for what can harm whoever loads it.

    Pickles and what they import, other code and what makes a loader run it, chat templates that reach for
    Python, secrets, files that are not what their names say, links and paths that lead out. Nothing is loaded
    or unpickled; a secret is never printed. A reference (hf://…) is read where it is. A file of an adapter
    stands for its folder. What cannot be had does not stop the others. Exit code 0: no error; 1: problems;
    else 10: could not look at everything, or that of the error, such as 9 for a remote store.
    """
    from adapterhub_tools.ops.scan_rules import RULES

    known = {rule.id: (rule.finds, rule.remedy) for rule in RULES}
    for name in ignore:
        if name not in known:
            raise click.BadParameter(
                f"{name!r} is no rule; the rules are {', '.join(known)}.", param_hint="--ignore"
            )
    form = "json" if as_json else form
    output = Output(as_json=form != "text", quiet=quiet, verbose=verbose)

    def check(item: str) -> ValidationReport:
        return api.scan(item, ignore=ignore, strict=strict)

    show("scan", judge(path, check), form, output, _summary, known)


def _summary(report: ValidationReport) -> str:
    if report.errors:
        count = len(report.errors)
        return f"problems: {report.path}; {count} finding{'s'[: count != 1]}"
    if report.unchecked:
        return f"could not look at everything: {report.path}; {len(report.unchecked)} could not be read"
    warnings = len(report.findings)
    said = f"; {warnings} warning{'s'[: warnings != 1]}" if warnings else ""
    return f"nothing found: {report.path}; {len(report.checked)} rules{said}"
