"""What a scan's findings mean for files that are about to be sent, or that have just come."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from adapterhub_tools.errors import Problem
from adapterhub_tools.ops import scan_rules as rules
from adapterhub_tools.ops.secrets import redacted
from adapterhub_tools.ops.validation_report import Finding

_BY_ID = {rule.id: rule for rule in rules.RULES}


def sift(
    findings: Iterable[Finding | Problem], *, accepted: Collection[str], refuse_secrets: bool = True
) -> tuple[str, ...]:
    """Raises what must not travel, and returns the rest as notes.

    Errors of rules that are not ``sendable`` are raised. A file that the user named may be anything but a
    carrier of secrets.

    Args:
        findings: what ``file_findings`` gave.
        accepted: files that the user named although they are not on the list of files of an adapter.
        refuse_secrets: whether a secret is raised too; who receives one can only be told.

    Raises:
        FormatError: what must not travel, all of it; or UnsupportedError, after the class of the first.
    """
    refused: list[Finding] = []
    notes: list[str] = []
    for found in findings:
        if not isinstance(found, Finding):
            continue
        problem = found.problem
        rule = _BY_ID[problem.kind]
        secret = rule is rules.SECRET
        travels = rule.sendable or (not refuse_secrets if secret else problem.file in accepted)
        if problem.severity == "error" and not travels:
            refused.append(found)
        else:
            notes.append(redacted(f"scan: {problem.kind}: {problem}"))
    if refused:
        raise refused[0].error(*(found.problem for found in refused))
    return tuple(dict.fromkeys(notes))
