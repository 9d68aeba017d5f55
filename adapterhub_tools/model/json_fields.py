"""Reads typed fields out of a parsed JSON object, collecting all that is wrong, not only the first."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from adapterhub_tools.errors import Problem, escape

T = TypeVar("T")

MAX_INTEGER = 2**53
"""Integers beyond this are not the same number to every JSON reader, so no record holds one."""


def pointer(loc: str, part: str | int) -> str:
    """Returns ``loc`` extended by one key or index, as a JSON pointer (RFC 6901)."""
    return f"{loc}/{str(part).replace('~', '~0').replace('/', '~1')}"


class Fields:
    """One JSON object being read: every field is taken at most once, and what is left over is unknown.

    Attributes:
        data: the object; empty if it was none.
        loc: where it stands in the file, as a JSON pointer.
        file: the file's name, for messages.
        problems: the list that problems are added to, shared with nested objects.
    """

    def __init__(self, data: Any, *, loc: str, file: str, problems: list[Problem]) -> None:
        self.loc = loc
        self.file = file
        self.problems = problems
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        self._taken: set[str] = set()
        if not isinstance(data, dict):
            self.complain("type", f"is {_named(data)}, expected an object.")

    def complain(self, kind: str, message: str, *, at: str | int | None = None, remedy: str = "") -> None:
        """Adds a problem at this object, or at one of its fields."""
        loc = self.loc if at is None else pointer(self.loc, at)
        self.problems.append(
            Problem(kind=kind, message=message, file=self.file, loc=loc or "/", remedy=remedy)
        )

    def nested(self, data: Any, *parts: str | int) -> Fields:
        """Returns a reader of an object that lies below this one."""
        loc = self.loc
        for part in parts:
            loc = pointer(loc, part)
        return Fields(data, loc=loc, file=self.file, problems=self.problems)

    def raw(self, name: str, *, required: bool = False) -> Any:
        """Takes a field of any type; None if it is absent."""
        self._taken.add(name)
        if name not in self.data:
            if required:
                self.complain("missing-field", f"the field {name!r} is missing.")
            return None
        return self.data[name]

    def text(
        self, name: str, *, required: bool = False, pattern: re.Pattern[str] | None = None
    ) -> str | None:
        """Takes a string that is not empty and matches ``pattern`` as a whole, if one is given."""

        def reads(value: Any) -> str | None:
            if not isinstance(value, str):
                return None
            if not value:
                self.complain("value", "is empty.", at=name)
            elif pattern is not None and pattern.fullmatch(value) is None:
                self.complain("value", f"is {escape(value)!r}, expected {pattern.pattern}", at=name)
            return value

        return self._take(name, "a string", reads, required)

    def integer(self, name: str, *, required: bool = False, at_least: int = 0) -> int | None:
        """Takes an integer between ``at_least`` and 2^53."""

        def reads(value: Any) -> int | None:
            if not _is_integer(value):
                return None
            if not at_least <= value <= MAX_INTEGER:
                self.complain("range", f"is {value}, expected {at_least} to 2^53.", at=name)
            return int(value)

        return self._take(name, "an integer", reads, required)

    def number(self, name: str, *, required: bool = False) -> float | int | None:
        """Takes a number: an integer stays one."""
        return self._take(name, "a number", lambda v: v if _is_number(v) else None, required)

    def boolean(self, name: str) -> bool | None:
        """Takes true or false."""
        return self._take(name, "true or false", lambda v: v if isinstance(v, bool) else None, False)

    def mapping(self, name: str, *, required: bool = False) -> dict[str, Any] | None:
        """Takes an object as it stands."""
        return self._take(name, "an object", lambda v: v if isinstance(v, dict) else None, required)

    def items(self, name: str, *, required: bool = False) -> list[Any]:
        """Takes an array; an absent one is empty."""
        found = self._take(name, "an array", lambda v: v if isinstance(v, list) else None, required)
        return [] if found is None else found

    def objects(self, name: str, *, required: bool = False) -> list[Fields]:
        """Takes an array of objects, each as a reader of its own."""
        return [self.nested(item, name, i) for i, item in enumerate(self.items(name, required=required))]

    def integers(self, name: str, *, required: bool = False) -> tuple[int, ...] | None:
        """Takes an array of integers from 0 to 2^53."""

        def reads(value: Any) -> tuple[int, ...] | None:
            if not isinstance(value, list) or not all(
                _is_integer(v) and 0 <= v <= MAX_INTEGER for v in value
            ):
                return None
            return tuple(value)

        return self._take(name, "an array of integers from 0 to 2^53", reads, required)

    def texts(self, name: str) -> tuple[str, ...]:
        """Takes an array of strings; an absent one is empty."""

        def reads(value: Any) -> tuple[str, ...] | None:
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                return None
            return tuple(value)

        return self._take(name, "an array of strings", reads, False) or ()

    def rest(self) -> dict[str, Any]:
        """Returns the fields that nothing has taken: those of a newer minor version."""
        return {name: value for name, value in self.data.items() if name not in self._taken}

    def refuse_rest(self) -> None:
        """Complains about every field that nothing has taken, because it may change what is computed."""
        for name in self.rest():
            self.complain(
                "unknown-field",
                f"the field {escape(name)!r} is not known here, and this block decides what is computed.",
                at=name,
                remedy="Use a version of adaptertool that knows it.",
            )

    def _take(self, name: str, expected: str, reads: Callable[[Any], T | None], required: bool) -> T | None:
        value = self.raw(name, required=required)
        if name not in self.data:
            return None
        found = reads(value)
        if found is None:
            self.complain("type", f"is {_named(value)}, expected {expected}.", at=name)
        return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(value: Any) -> str:
    """What a JSON value is, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value!r}"[:60]
    if isinstance(value, str):
        return f"the string {escape(value)[:40]!r}"
    return "an array" if isinstance(value, list) else "an object"
