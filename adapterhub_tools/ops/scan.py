"""Looks for what can harm whoever loads a folder: code, disguises, secrets, and ways out of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from adapterhub_tools.errors import AdapterError, HubError, Problem, StoreError
from adapterhub_tools.ops.scan_file import file_findings
from adapterhub_tools.ops.scan_files import Listing, ScannedFile, list_files
from adapterhub_tools.ops.scan_rules import RULES
from adapterhub_tools.ops.secrets import redacted
from adapterhub_tools.ops.validation_report import Finding, ValidationReport

RULE_IDS = tuple(rule.id for rule in RULES)
"""The identifiers of all rules."""

_LEFT_TO_OTHERS = {
    "tensor values": "left to validate: NaN, infinities, names, shapes and files against the manifest",
}


def scan(path: Path, *, ignore: Collection[str] = (), strict: bool = False) -> ValidationReport:
    """Holds every file of an adapter's or a base's folder against the rules.

    Nothing is loaded or unpickled: of weights only the header and a few bytes are read.

    Args:
        path: the folder, or one file.
        ignore: rules that are not applied.
        strict: whether warnings count as errors.

    Returns:
        a report with every finding; nothing that is wrong with the folder is raised.

    Raises:
        ValueError: ``ignore`` names no rule.
    """
    return scan_listing(str(path), lambda: list_files(path), ignore=ignore, strict=strict)


def scan_listing(
    path: str, list_them: Callable[[], Listing], *, ignore: Collection[str] = (), strict: bool = False
) -> ValidationReport:
    """Holds listed files against the rules; as ``scan``, for files that may be elsewhere.

    Args:
        path: what the report calls the folder.
        list_them: lists its files.
        ignore: rules that are not applied.
        strict: whether warnings count as errors.

    Raises:
        ValueError: ``ignore`` names no rule.
    """
    unknown = sorted(set(ignore) - set(RULE_IDS))
    if unknown:
        raise ValueError(f"no rule is called {', '.join(unknown)}; the rules are {', '.join(RULE_IDS)}")
    try:
        listing = list_them()
    except StoreError as error:
        listing = Listing(unchecked=list(error.problems))
    findings = list(listing.findings)
    unchecked = list(listing.unchecked)
    stopped: type[AdapterError] = StoreError
    for number, file in enumerate(listing.files, 1):
        try:
            looked = _findings(file)
        except HubError as error:
            # A server that fails for one file is not asked for the rest; what was found until then counts.
            stopped = HubError
            unchecked.extend(_in_file(error, file.path))
            unchecked.extend(_left(len(listing.files) - number))
            break
        findings.extend(found for found in looked if isinstance(found, Finding))
        unchecked.extend(found for found in looked if isinstance(found, Problem))
    kept = [_clean(finding, strict) for finding in findings if finding.problem.kind not in ignore]
    told = {finding.problem.kind for finding in kept if finding.problem.severity == "error"}
    complete = stopped is StoreError and (bool(listing.files) or not unchecked)
    return ValidationReport(
        path=path,
        checked=tuple(rule for rule in RULE_IDS if rule not in told and rule not in ignore and complete),
        skipped={**_LEFT_TO_OTHERS, **listing.skipped, **dict.fromkeys(sorted(ignore), "ignored")},
        findings=tuple(dict.fromkeys(kept)),
        unchecked=tuple(unchecked),
        stopped=stopped,
    )


def _in_file(error: HubError, path: str) -> list[Problem]:
    return [replace(problem, file=problem.file or path) for problem in error.problems]


def _left(count: int) -> list[Problem]:
    if not count:
        return []
    message = f"{count} further file{'s'[: count != 1]} could not be looked at."
    return [Problem(kind="not-looked-at", message=message, remedy="Scan it again when the server answers.")]


def _findings(file: ScannedFile) -> list[Finding | Problem]:
    """Returns what one file gives; what could not be read is a Problem.

    Raises:
        HubError: the server that has it failed.
    """
    found: list[Finding | Problem] = []
    try:
        with file.open() as source:
            found.extend(file_findings(file.path, source))
    except StoreError as error:
        found.extend(error.problems)
    return found


def _clean(finding: Finding, strict: bool) -> Finding:
    """Returns a finding that quotes no secret."""
    problem = finding.problem
    severity = "error" if strict else problem.severity
    clean = replace(problem, message=redacted(problem.message), loc=redacted(problem.loc), severity=severity)
    return replace(finding, problem=clean)
