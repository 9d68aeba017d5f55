"""What validate and scan have in common: many folders, each judged, and the reports in four forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterhub_tools import __version__
from adapterhub_tools.cli.output import Output, escape_line
from adapterhub_tools.errors import EXIT_OK, EXIT_PROBLEMS, AdapterError, escape

if TYPE_CHECKING:
    from adapterhub_tools.ops.validation_report import ValidationReport

F = TypeVar("F", bound=Callable[..., Any])

_NAMES_SHOWN = 10


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
        # A pattern such as adapters/*/ gives folders with a slash behind them.
        whole = item if "://" in item else item.rstrip("/") or item
        found[str(path.parent) if inside else whole] = None
    return list(found)


def judge(given: Iterable[str], check: Callable[[str], ValidationReport]) -> Iterator[ValidationReport]:
    """Yields a report for each folder or reference; one that cannot be had does not stop the others.

    Args:
        given: the arguments of the command.
        check: looks at one.
    """
    from adapterhub_tools.ops.validation_report import ValidationReport

    for item in folders(given):
        try:
            yield check(item)
        except AdapterError as error:
            yield ValidationReport.of_error(item, error)


def show(
    command: str,
    reports: Iterable[ValidationReport],
    form: str,
    output: Output,
    summary: Callable[[ValidationReport], str],
    rules: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Prints reports in one of the four forms, and ends the command with the exit code that they give.

    Text comes while the work goes on, a report at a time. The exit code is the smallest that any report has,
    0 left out: problems that were found (1) stand before what could not be looked at (3 to 10).

    Args:
        command: its name.
        reports: one for each folder.
        form: ``"text"``, ``"json"``, ``"junit"`` or ``"sarif"``.
        output: how the command talks.
        summary: the last line of a report, for people.
        rules: kind of problem -> what it is and the remedy, where there is a table of them.
    """
    made = []
    for report in reports:
        made.append(report)
        if form == "text" and (report.exit_code or not output.quiet):
            _show_one(report, output, summary, kinds=rules is not None)
    if form == "text":
        if len(made) > 1:
            output.line(_total(made))
        elif output.quiet and made[0].ok:
            output.line(summary(made[0]))
    elif form == "json":
        found = [report.to_json() for report in made]
        output.json(command, found[0] if len(found) == 1 else {"adapters": found, **_counts(made)})
    else:
        from adapterhub_tools.ops import report_formats

        if form == "junit":
            click.echo(report_formats.to_junit(made))
        else:
            click.echo(json.dumps(report_formats.to_sarif(made, __version__, rules), indent=2))
    click.get_current_context().exit(_exit_code(made))


def _show_one(
    report: ValidationReport, output: Output, summary: Callable[[ValidationReport], str], *, kinds: bool
) -> None:
    if not report.checked and not report.findings and len(report.unchecked) == 1:
        # Nothing but this one reason: a line is enough.
        output.line(f"could not check: {escape_line(report.path)}; {report.unchecked[0]}")
        return
    output.problems([*report.problems, *report.unchecked], kinds=kinds)
    if output.verbose:
        output.notes(f"not checked: {name}: {reason}" for name, reason in report.skipped.items())
    output.line(summary(report))


def _exit_code(reports: Iterable[ValidationReport]) -> int:
    return min((report.exit_code for report in reports if report.exit_code), default=EXIT_OK)


def _counts(reports: list[ValidationReport]) -> dict[str, int]:
    codes = [report.exit_code for report in reports]
    passed, failed = codes.count(EXIT_OK), codes.count(EXIT_PROBLEMS)
    return {
        "passed": passed,
        "with_problems": failed,
        "not_checked": len(codes) - passed - failed,
        "exit_code": _exit_code(reports),
    }


def _total(reports: list[ValidationReport]) -> str:
    """Returns the last line about several: how many passed, and which did not."""
    counts = _counts(reports)
    parts = [f"{counts['passed']:,} passed"]
    for word, problems in (("with problems", True), ("could not be checked", False)):
        names = [r.path for r in reports if r.exit_code and (r.exit_code == EXIT_PROBLEMS) == problems]
        if names:
            more = f" and {len(names) - _NAMES_SHOWN:,} more" * (len(names) > _NAMES_SHOWN)
            parts.append(f"{len(names):,} {word}: {', '.join(map(escape, names[:_NAMES_SHOWN]))}{more}")
    return f"{len(reports):,} checked: {'; '.join(parts)}"
