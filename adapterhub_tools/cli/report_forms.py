"""What validate and scan have in common: folders named by their files, and a report in four forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterhub_tools import __version__
from adapterhub_tools.cli.output import Output
from adapterhub_tools.errors import EXIT_COULD_NOT_CHECK, EXIT_OK, EXIT_PROBLEMS

if TYPE_CHECKING:
    from adapterhub_tools.ops.validation_report import ValidationReport

F = TypeVar("F", bound=Callable[..., Any])


def form_option(function: F) -> F:
    """Adds ``--format``, passed to the function as ``form``."""
    option = click.option(
        "--format",
        "form",
        type=click.Choice(["text", "json", "junit", "sarif"]),
        default="text",
        show_default=True,
        help="The form of the report: for people, programs, test reports or code scanning.",
    )
    return option(function)


def folders(given: Iterable[str]) -> list[str]:
    """Returns what is to be checked: each folder once, named by itself or by a file in it."""
    found: dict[str, None] = {}
    for item in given:
        path = Path(item)
        inside = "://" not in item and path.suffix != ".safetensors" and path.is_file()
        inside = inside or path.name == "adapter_model.safetensors"
        found[str(path.parent) if inside else item] = None
    return list(found)


def show(
    command: str,
    reports: Sequence[ValidationReport],
    form: str,
    output: Output,
    summary: Callable[[ValidationReport], str],
    rules: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Prints reports in one of the four forms, and ends the command with the exit code that they give.

    Args:
        command: its name.
        reports: one for each folder.
        form: ``"text"``, ``"json"``, ``"junit"`` or ``"sarif"``.
        output: how the command talks.
        summary: the last line of a report, for people.
        rules: kind of problem -> what it is and the remedy, where there is a table of them.
    """
    if form == "text":
        for report in reports:
            output.problems([*report.problems, *report.unchecked], kinds=rules is not None)
            if output.verbose:
                output.notes(f"not checked: {name}: {reason}" for name, reason in report.skipped.items())
            output.line(summary(report))
    elif form == "json":
        found = [report.to_json() for report in reports]
        output.json(command, found[0] if len(found) == 1 else {"adapters": found})
    else:
        from adapterhub_tools.ops import report_formats

        if form == "junit":
            click.echo(report_formats.to_junit(reports))
        else:
            click.echo(json.dumps(report_formats.to_sarif(reports, __version__, rules), indent=2))
    codes = {report.exit_code for report in reports}
    worst = next((code for code in (EXIT_PROBLEMS, EXIT_COULD_NOT_CHECK) if code in codes), EXIT_OK)
    click.get_current_context().exit(worst)
