"""What a validation found, and how to collect it: every problem, each with the class of error that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from adapterhub_tools.errors import (
    EXIT_COULD_NOT_CHECK,
    EXIT_OK,
    EXIT_PROBLEMS,
    AdapterError,
    Problem,
    StoreError,
)

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem, and the error that a command would raise for it.

    Attributes:
        error: the class.
        problem: the problem.
    """

    error: type[AdapterError]
    problem: Problem

    def to_json(self) -> dict[str, str]:
        """Returns the problem with the name of its class."""
        return {"error": self.error.__name__, **self.problem.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """What was checked and what is wrong.

    Attributes:
        path: the adapter, as given.
        checked: the checks that ran to their end, in order.
        skipped: check -> why it did not run.
        findings: everything that is wrong, warnings included.
        unchecked: what could not be read, so that a check could not be made.
        stopped: the class of error that ``unchecked`` is, where it kept everything from being looked at.
    """

    path: str
    checked: tuple[str, ...]
    skipped: dict[str, str]
    findings: tuple[Finding, ...]
    unchecked: tuple[Problem, ...] = ()
    stopped: type[AdapterError] = StoreError

    @classmethod
    def of_error(cls, path: str, error: AdapterError) -> ValidationReport:
        """Returns the report on what could not be looked at, for who goes on with the next.

        Args:
            path: the adapter, as given.
            error: why.
        """
        return cls(
            path=path,
            checked=(),
            skipped={},
            findings=(),
            unchecked=error.problems,
            stopped=type(error),
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem found, warnings included."""
        return tuple(finding.problem for finding in self.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make the adapter invalid."""
        return tuple(finding for finding in self.findings if finding.problem.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether every check was made and none found an error."""
        return not self.errors and not self.unchecked

    @property
    def exit_code(self) -> int:
        """0 if passed, 1 if problems were found, 10 if none were but not everything could be checked.

        Where nothing could be looked at for another reason than a file that cannot be read, it is the code of
        that error: 9 for a remote store that failed.
        """
        if self.errors:
            return EXIT_PROBLEMS
        if self.unchecked:
            return EXIT_COULD_NOT_CHECK if self.stopped is StoreError else self.stopped.exit_code
        return EXIT_OK

    def raise_for_problems(self) -> None:
        """Raises what is wrong as one error, of the class of the first finding; returns if nothing is.

        Raises:
            AdapterError: one of its subclasses, with every problem.
        """
        if self.errors:
            raise self.errors[0].error(*(finding.problem for finding in self.errors))
        if self.unchecked:
            raise self.stopped(*self.unchecked)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "path": self.path,
            "ok": self.ok,
            "exit_code": self.exit_code,
            "checked": list(self.checked),
            "skipped": self.skipped,
            "problems": [finding.to_json() for finding in self.findings],
            "unchecked": [{"error": self.stopped.__name__, **item.to_json()} for item in self.unchecked],
        }


class Collector:
    """Runs checks one after another; what one raises is collected and does not stop the next."""

    def __init__(self) -> None:
        self._checked: list[str] = []
        self._skipped: dict[str, str] = {}
        self._findings: dict[Finding, None] = {}
        self._unchecked: dict[Problem, None] = {}

    def add(self, error: type[AdapterError], problems: Iterable[Problem]) -> None:
        """Adds problems; one that was found before is not added again."""
        for problem in problems:
            self._findings.setdefault(Finding(error=error, problem=problem))

    def skip(self, name: str, reason: str) -> None:
        """Says that a check did not run."""
        self._skipped[name] = reason

    def run(self, name: str, check: Callable[[], R]) -> R | None:
        """Runs one check.

        Returns:
            what it returned; None if it raised.
        """
        try:
            result = check()
        except StoreError as error:
            self._unchecked.update(dict.fromkeys(error.problems))
            self.skip(name, "a file could not be read")
            return None
        except AdapterError as error:
            self.add(type(error), error.problems)
            self._checked.append(name)
            return None
        self._checked.append(name)
        return result

    def report(self, path: str) -> ValidationReport:
        """Returns what was found."""
        return ValidationReport(
            path=path,
            checked=tuple(self._checked),
            skipped=dict(self._skipped),
            findings=tuple(self._findings),
            unchecked=tuple(self._unchecked),
        )
