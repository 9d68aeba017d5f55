"""What a validation found in the forms that continuous integration reads: JUnit XML and SARIF 2.1.0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape as escape_xml
from xml.sax.saxutils import quoteattr

from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.ops.validation_report import ValidationReport

SARIF_VERSION = "2.1.0"
_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LINE = re.compile(r"line (\d{1,9})$")
_LEVELS = {"error": "error", "warning": "warning"}


def to_junit(reports: Sequence[ValidationReport]) -> str:
    """Returns one test suite for each adapter, as JUnit XML.

    A check that was made is a test that passed; each problem is one that failed; what could not be read is an
    error; what was not checked was skipped. Warnings go to the suite's ``system-out``.

    Args:
        reports: what was found, one for each adapter.
    """
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>"]
    for report in reports:
        errors = [finding.problem for finding in report.errors]
        counts = (
            len(report.checked) + len(errors) + len(report.unchecked) + len(report.skipped),
            len(errors),
        )
        lines.append(
            f"<testsuite name={_attribute(report.path)} tests='{counts[0]}' failures='{counts[1]}' "
            f"errors='{len(report.unchecked)}' skipped='{len(report.skipped)}'>"
        )
        lines += [_case(report, name, "") for name in report.checked]
        lines += [_case(report, _name(problem), _outcome("failure", problem)) for problem in errors]
        lines += [_case(report, _name(problem), _outcome("error", problem)) for problem in report.unchecked]
        lines += [
            _case(report, name, f"<skipped message={_attribute(reason)}/>")
            for name, reason in report.skipped.items()
        ]
        warnings = [problem for problem in report.problems if problem.severity != "error"]
        if warnings:
            text = "\n".join(_text(problem) for problem in warnings)
            lines.append(f"<system-out>{escape_xml(text)}</system-out>")
        lines.append("</testsuite>")
    return "\n".join([*lines, "</testsuites>"])


def to_sarif(
    reports: Sequence[ValidationReport], version: str, described: Mapping[str, tuple[str, str]] | None = None
) -> dict[str, Any]:
    """Returns the problems as a SARIF 2.1.0 log with one run; the kind of a problem is the rule.

    Args:
        reports: what was found, one for each adapter.
        version: the version of this tool.
        described: rule -> what it finds and the remedy, where there is a table of rules.
    """
    words = described or {}
    found = [
        (report.path, problem) for report in reports for problem in (*report.problems, *report.unchecked)
    ]
    rules = sorted({problem.kind for _, problem in found})
    driver = {
        "name": "adaptertool",
        "version": version,
        "rules": [_rule(rule, words.get(rule)) for rule in rules],
    }
    results = [_result(path, problem, rules.index(problem.kind)) for path, problem in found]
    return {
        "$schema": _SARIF_SCHEMA,
        "version": SARIF_VERSION,
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _rule(rule: str, words: tuple[str, str] | None) -> dict[str, Any]:
    made: dict[str, Any] = {"id": rule, "shortDescription": {"text": rule.replace("-", " ")}}
    if words is not None:
        made |= {"fullDescription": {"text": words[0]}, "help": {"text": words[1]}}
    return made


def _result(path: str, problem: Problem, rule: int) -> dict[str, Any]:
    line = _LINE.match(problem.loc)
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": quote("/".join(part for part in (path, problem.file) if part))},
            # Most files are binary or generated, so that a problem has no line of its own.
            "region": {"startLine": int(line.group(1)) if line else 1},
        }
    }
    if problem.loc:
        location["logicalLocations"] = [{"fullyQualifiedName": escape(problem.loc)}]
    return {
        "ruleId": problem.kind,
        "ruleIndex": rule,
        "level": _LEVELS.get(problem.severity, "note"),
        "message": {"text": _text(problem)},
        "locations": [location],
    }


def _case(report: ValidationReport, name: str, inside: str) -> str:
    head = f"<testcase classname={_attribute(report.path)} name={_attribute(name)}"
    return f"{head}>{inside}</testcase>" if inside else f"{head}/>"


def _outcome(tag: str, problem: Problem) -> str:
    attributes = f"type={_attribute(problem.kind)} message={_attribute(problem.message)}"
    return f"<{tag} {attributes}>{escape_xml(_text(problem))}</{tag}>"


def _name(problem: Problem) -> str:
    return " ".join(part for part in (problem.kind, problem.file, problem.loc) if part)


def _text(problem: Problem) -> str:
    """The problem in words; control characters have no place in XML."""
    return "".join(char if char.isprintable() else " " for char in str(problem))


def _attribute(text: str) -> str:
    return quoteattr(escape(text))
