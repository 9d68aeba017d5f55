"""JSON read strictly: what two readers could understand differently, or what could exhaust one, is refused.

Python's own reader accepts duplicate keys (the last wins, elsewhere the first), NaN and infinities, numbers
that overflow to infinity, and lone surrogates. Each of these lets one file mean two things, so each is an
error here. The limits hold memory below 300 MB for any input of at most 16 MiB.
"""

from __future__ import annotations

import json
import re
from math import isfinite
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import FormatError, Problem, escape, raise_for
from adapterhub_tools.store.files import LFS_REMEDY, LocalFile, is_lfs_pointer

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
"""The default limit on the size of a JSON file."""
MAX_DEPTH = 64
"""The deepest nesting of objects and arrays."""
MAX_CONTAINERS = 1_000_000
"""The most opening brackets, and also the most colons, in one file; inside strings too, to count quickly."""
MAX_ITEMS = 2_500_000
"""The most commas in one file, inside strings too."""
MAX_REPORTED = 100
"""The most problems listed for one file; the rest are counted."""

_MAX_DIGITS = 400
_LONG_DIGITS = re.compile(rb"[0-9]{19}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def parse_json(data: bytes, *, file: str, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the value of a JSON text.

    Args:
        data: the whole text, UTF-8.
        file: what to call it in a message.
        max_bytes: the largest text accepted.

    Raises:
        FormatError: not UTF-8, a byte order mark, malformed, duplicate keys at any level, NaN or infinities,
            integers outside -2**63 ... 2**64 - 1, lone surrogates, nested deeper than 64, too large, or a Git
            LFS pointer in place of the file. Lists every problem that the text's damage leaves visible.
    """
    value, problems = examine_json(data, file=file, max_bytes=max_bytes)
    raise_for(problems, FormatError)
    return value


def read_json(path: Path, *, file: str | None = None, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the value of a JSON file.

    Args:
        path: the file; anything but a regular file is refused.
        file: what to call it in a message; the path's last part if not given.
        max_bytes: the largest file accepted; a larger one is not read.

    Raises:
        FormatError: as ``parse_json``.
        StoreError: the file cannot be read.
    """
    name = path.name if file is None else file
    with LocalFile(path, name=name) as source:
        raise_for(_size_problems(source.length, name, max_bytes), FormatError)
        return parse_json(source.read(0, source.length), file=name, max_bytes=max_bytes)


def read_json_object(path: Path, *, file: str | None = None, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        FormatError: as ``parse_json``, or the value is not an object.
        StoreError: the file cannot be read.
    """
    name = path.name if file is None else file
    value = read_json(path, file=name, max_bytes=max_bytes)
    if not isinstance(value, dict):
        message = f"found {json_type(value)}, expected a JSON object."
        raise FormatError.of("json-type", message, file=name, remedy="Restore the file from its source.")
    return value


def examine_json(
    data: bytes, *, file: str, max_bytes: int = MAX_BYTES, loc: str = ""
) -> tuple[Any, list[Problem]]:
    """Returns the value of a JSON text and all problems; the value is None if the text could not be parsed.

    Where there are problems but the text could be parsed, the value is what remains of it (of duplicate keys,
    the last), so that a caller can look for more problems.
    """
    early = _size_problems(len(data), file, max_bytes, loc) or _text_problems(data, file, loc)
    if early:
        return None, early
    problems: list[Problem] = []

    def report(kind: str, message: str) -> None:
        if len(problems) <= MAX_REPORTED:
            problems.append(Problem(kind=kind, message=message, file=file, loc=loc, remedy=_REMEDY))

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            counts: dict[str, int] = {}
            for key, _ in pairs:
                counts[key] = counts.get(key, 0) + 1
            for key, count in counts.items():
                if count > 1:
                    report("duplicate-key", f"the key '{escape(key)}' stands {count} times in one object.")
        return made

    def integer_of(text: str) -> int | float:
        if text == "-0":  # a negative zero is a float to every other reader
            return -0.0
        value = int(text) if len(text) <= 20 else None
        if value is None or not _INT_MIN <= value <= _INT_MAX:
            report("json-number", f"the integer {escape(text[:40])} is outside -2**63 ... 2**64 - 1.")
            return 0
        return value

    def float_of(text: str) -> float:
        value = float(text) if len(text) <= _MAX_DIGITS else float("inf")
        if not isfinite(value):
            report("json-number", f"the number {escape(text[:40])} is outside the range of binary64.")
            return 0.0
        return value

    def constant_of(text: str) -> float:
        report("json-number", f"{text} is not JSON.")
        return 0.0

    # A Python call per integer costs seconds on a large header, so only where one could need it.
    careful = _LONG_DIGITS.search(data) is not None or b"-0" in data
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=object_of,
            parse_int=integer_of if careful else None,
            parse_float=float_of,
            parse_constant=constant_of,
        )
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}."
        return None, [Problem(kind="encoding", message=message, file=file, loc=loc, remedy=_REMEDY)]
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        return None, [Problem(kind="json", message=message, file=file, loc=loc, remedy=_REMEDY)]
    except RecursionError:
        return None, [_too_deep(file, loc)]
    if _deeper_than(value, MAX_DEPTH):
        return None, [_too_deep(file, loc)]
    if _SURROGATE_ESCAPE.search(data) is not None:
        for text in _strings(value):
            if any("\ud800" <= char <= "\udfff" for char in text):
                report("encoding", f"the string '{escape(text)}' holds a lone surrogate.")
    return value, trimmed(problems, file)


def json_type(value: Any) -> str:
    """Returns the JSON name of a value's type, with its article, for messages."""
    if value is None:
        return "null"
    for kind, name in ((bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a string")):
        if isinstance(value, kind):
            return name
    return "an object" if isinstance(value, dict) else "an array"


def trimmed(problems: list[Problem], file: str) -> list[Problem]:
    """Returns the first 100 problems, and one more that says that there are others."""
    if len(problems) <= MAX_REPORTED:
        return problems
    more = Problem(
        kind="more-problems",
        message=f"more than {MAX_REPORTED} problems; the rest are not listed.",
        file=file,
        remedy="Mend these first.",
    )
    return [*problems[:MAX_REPORTED], more]


_REMEDY = "Restore the file from its source."


def _size_problems(length: int, file: str, max_bytes: int, loc: str = "") -> list[Problem]:
    if length <= max_bytes:
        return []
    message = f"{length:,} bytes of JSON; the limit is {max_bytes:,}."
    return [Problem(kind="json-size", message=message, file=file, loc=loc, remedy=_REMEDY)]


def _text_problems(data: bytes, file: str, loc: str) -> list[Problem]:
    """Returns what can be said before parsing, so that parsing cannot exhaust memory."""
    kind = message = ""
    remedy = _REMEDY
    if not data:
        kind, message = "json", "the file is empty, expected JSON."
    elif is_lfs_pointer(data):
        kind, message, remedy = "lfs-pointer", "a Git LFS pointer stands in place of the file.", LFS_REMEDY
    elif data.startswith(b"\xef\xbb\xbf"):
        kind, message = "encoding", "the text starts with a byte order mark, which JSON forbids."
        remedy = "Save it as UTF-8 without a byte order mark."
    elif (
        data.count(b"{") + data.count(b"[") > MAX_CONTAINERS
        or data.count(b":") > MAX_CONTAINERS
        or data.count(b",") > MAX_ITEMS
    ):
        kind = "json-size"
        message = f"more than {MAX_CONTAINERS:,} objects, arrays or keys, or {MAX_ITEMS:,} items."
    if not kind:
        return []
    return [Problem(kind=kind, message=message, file=file, loc=loc, remedy=remedy)]


def _too_deep(file: str, loc: str) -> Problem:
    message = f"objects and arrays are nested deeper than {MAX_DEPTH}."
    return Problem(kind="json-depth", message=message, file=file, loc=loc, remedy=_REMEDY)


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        if not level:
            return False
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


def _strings(value: Any) -> list[str]:
    """Returns every string in a value, keys included."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return found
