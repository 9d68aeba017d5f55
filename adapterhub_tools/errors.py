"""Every error that adapterhub_tools raises, in one tree.

The class of an error is the exit code of the command line::

    AdapterError
    ├ FormatError 3        bytes or JSON are not what they claim
    │ └ UnsupportedVersionError 3
    ├ UnsupportedError 4   understood, but this tool cannot do that with it
    ├ MismatchError 5      the adapter does not fit this base
    ├ LossyError 6         not exactly representable or invertible; a named flag allows it
    ├ IntegrityError 7     an input's digest or signature differs from what is recorded
    ├ StoreError 8         could not read or commit; the destination is untouched
    ├ HubError 9           every error of a remote store, mapped
    └ DeviceError 10       the device that was asked for is not here

0 is done or passed, 1 is "ran and found problems", 2 is a usage error, 10 is "could not check", or not
compute on the device that was asked for.
A script may retry on 8 and 10; 1 to 7 stay the same however often they are tried.

A message names the file, the tensor or key, what was found, what was expected and the remedy.
Names that come from files may hold anything, so control characters are escaped before they
reach a terminal. This module imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

EXIT_OK = 0
EXIT_PROBLEMS = 1
EXIT_USAGE = 2
EXIT_COULD_NOT_CHECK = 10

_MAX_QUOTED = 200


def escape(text: object) -> str:
    """Returns ``text`` safe to print: control, bidirectional and surrogate characters are escaped.

    Args:
        text: anything; ``str`` is applied first. More than 200 characters are cut, and said so.
    """
    raw = str(text)
    cut = raw if len(raw) <= _MAX_QUOTED else raw[:_MAX_QUOTED]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return shown if len(raw) <= _MAX_QUOTED else f"{shown}… ({len(raw)} characters)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: a stable, lower-case identifier such as ``"duplicate-key"``; programs branch on it.
        message: what was found and what was expected, for people.
        file: the file concerned, relative to its folder where there is one; empty if none.
        loc: the key, tensor or byte position inside the file; empty if it is the file as a whole.
        remedy: what the user can do about it; empty only where nothing can be done.
        severity: ``"error"``, or ``"warning"`` for what does not stop any command.
    """

    kind: str
    message: str
    file: str = ""
    loc: str = ""
    remedy: str = ""
    severity: str = "error"

    def __str__(self) -> str:
        """Formats as ``file: loc: message. remedy``."""
        head = "".join(f"{escape(part)}: " for part in (self.file, self.loc) if part)
        tail = f" {self.remedy}" if self.remedy else ""
        return f"{head}{self.message}{tail}"

    def to_json(self) -> dict[str, str]:
        """Returns the problem as a JSON object, every field present."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "file": escape(self.file),
            "loc": escape(self.loc),
            "message": self.message,
            "remedy": self.remedy,
        }


_Error = TypeVar("_Error", bound="AdapterError")


class AdapterError(Exception):
    """The root: any error that this package raises on purpose.

    Attributes:
        problems: everything found, at least one.
        exit_code: what the command line exits with.
    """

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        """Keeps the problems; the text is one line per problem."""
        self.problems: tuple[Problem, ...] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def of(
        cls: type[_Error], kind: str, message: str, *, file: str = "", loc: str = "", remedy: str = ""
    ) -> _Error:
        """Makes an error of this class with a single problem."""
        return cls(Problem(kind=kind, message=message, file=file, loc=loc, remedy=remedy))

    def to_json(self) -> dict[str, object]:
        """Returns class, exit code and problems as a JSON object."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "problems": [problem.to_json() for problem in self.problems],
        }


class FormatError(AdapterError):
    """Bytes or JSON are not what they claim to be."""

    exit_code = 3


class UnsupportedVersionError(FormatError):
    """A format version that is newer than this tool."""


class UnsupportedError(AdapterError):
    """Understood, but this tool cannot do what was asked with it."""

    exit_code = 4


class MismatchError(AdapterError):
    """The adapter does not fit this base."""

    exit_code = 5


class LossyError(AdapterError):
    """Not exactly representable or invertible; a named flag allows it."""

    exit_code = 6


class IntegrityError(AdapterError):
    """An input's digest or signature differs from what is recorded."""

    exit_code = 7


class StoreError(AdapterError):
    """Could not read or commit; the destination is untouched."""

    exit_code = 8


class HubError(AdapterError):
    """A remote store failed, refused or answered something unusable."""

    exit_code = 9


class DeviceError(AdapterError):
    """The device that was asked for is not here, so nothing was computed; elsewhere it may be."""

    exit_code = EXIT_COULD_NOT_CHECK


def raise_for(problems: Sequence[Problem], error: type[AdapterError]) -> None:
    """Raises ``error`` with every problem of severity "error"; returns if there is none."""
    serious = [problem for problem in problems if problem.severity == "error"]
    if serious:
        raise error(*serious)
