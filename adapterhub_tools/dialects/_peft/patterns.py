"""Regular expressions from adapter configs, evaluated so that none can hang.

A config may name its target modules, ranks and alphas by regular expressions with the semantics of Python's
``re``. Such a pattern comes from a stranger, and a backtracking matcher can take longer than the universe
lasts on ``(a+)+$``. So a pattern is run here only if a bound on its work, computed from its text, is small;
every other pattern is run in a child process that the kernel stops after ``CPU_SECONDS`` of its time. Nothing
is approximated: the answer is that of ``re``, or there is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from adapterhub_tools.errors import FormatError, Problem, escape

MAX_PATTERN_LENGTH = 10_000
"""Longer patterns are refused unread, in characters."""

CPU_SECONDS = 1.0
"""Processor time that the patterns of one call may take in the child process, all texts together."""

WALL_SECONDS = 10.0
"""Time after which the child process is given up, however busy the machine is."""

_WORK_HERE = 4_000_000
"""Matcher steps per call that are run in this process: about a tenth of a second."""

_MAX_LOOKUPS = 1_000_000
"""Table lookups per call for plain keys: about a second."""

_MAX_DEPTH = 20
"""Groups nested deeper are left to the child, where the parser's recursion cannot hurt."""

_CHILD = """\
import json, re, signal, sys, warnings
limit = float(sys.argv[1])
signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 2, int(limit) + 2))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
warnings.simplefilter("ignore")
task = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, limit)
for pattern, mode, group in task["jobs"]:
    try:
        function = getattr(re.compile(pattern), mode)
        found = [function(text) for text in task["texts"]]
        answer = {"found": [m is not None if group is None else m and m.group(group) for m in found]}
    except (re.error, OverflowError, RecursionError, MemoryError, IndexError) as error:
        answer = {"error": str(error) or type(error).__name__}
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
"""

_LITERAL = re.compile(r"[A-Za-z0-9_.-]*\Z")
_PLAIN_ESCAPES = frozenset("dDwWsSbBAnrtfv")
_REPEAT = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A regular expression and where it stands, for messages.

    Attributes:
        text: the expression as ``re`` reads it.
        mode: ``"match"`` (from the start) or ``"fullmatch"``.
        shown: what the config holds, where that differs from ``text``.
        file: the config file.
        loc: the config field.
    """

    text: str
    mode: str = "match"
    shown: str = ""
    file: str = ""
    loc: str = ""

    def problem(self, what: str, remedy: str) -> Problem:
        """Returns a problem of kind ``"regex"`` about this pattern."""
        message = f'the regular expression "{escape(self.shown or self.text)}" {what}'
        return Problem(kind="regex", message=message, file=self.file, loc=self.loc, remedy=remedy)


def is_literal(pattern: str) -> bool:
    """Tells whether a pattern is only letters, digits, ``_``, ``-`` and dots, and so needs no matcher."""
    return _LITERAL.match(pattern) is not None


def literal_at(pattern: str, text: str, start: int) -> bool:
    """Tells whether a literal pattern matches at ``start``; its dots match anything but a newline."""
    if len(text) - start < len(pattern) or start < 0:
        return False
    window = text[start : start + len(pattern)]
    if window == pattern:
        return True
    return all(p == c or (p == "." and c != "\n") for p, c in zip(pattern, window, strict=True))


def matches(pattern: Pattern, texts: Sequence[str]) -> list[bool]:
    """Returns for each text whether the pattern matches.

    Raises:
        FormatError: the pattern is invalid, too long, or takes more than ``CPU_SECONDS``; kind ``"regex"``.
    """
    return [found is not None for found in _evaluate([(pattern, None)], texts)[0]]


def captures(pattern: Pattern, texts: Sequence[str], group: str) -> list[str | None]:
    """Returns for each text what a named group caught, or None where the pattern does not match.

    Raises:
        FormatError: as ``matches`` does.
    """
    return _evaluate([(pattern, group)], texts)[0]


def key_matches(
    keys: Sequence[str], paths: Sequence[str], *, file: str = "", loc: str = ""
) -> list[list[int]]:
    r"""Returns for each path the indices of the keys that match it as ``(.*\.)?(key)$``, in order.

    This is how PEFT resolves ``rank_pattern`` and ``alpha_pattern``: a key is a regular expression for the
    end of a path, after a dot or from the start, and the first one counts.

    Raises:
        FormatError: as ``matches`` does.
    """
    literal = _LiteralKeys(keys)
    others = [i for i, key in enumerate(keys) if not is_literal(key)]
    jobs = [(Pattern(text=rf"(.*\.)?({keys[i]})$", shown=keys[i], file=file, loc=loc), None) for i in others]
    tables = _evaluate(jobs, paths)
    result: list[list[int]] = []
    for column, path in enumerate(paths):
        found = [i for i, row in zip(others, tables, strict=True) if row[column] is not None]
        result.append(sorted((*found, *literal.find(path))))
        if literal.lookups > _MAX_LOOKUPS:
            what = f"is one of {len(keys)}, too many of them alike to be compared with {len(paths)} modules."
            raise FormatError(Pattern(text=keys[0], file=file, loc=loc).problem(what, "Give fewer patterns."))
    return result


def start_matches(keys: Sequence[str], paths: Sequence[str], *, loc: str = "") -> list[list[int]]:
    r"""Returns for each path the indices of the keys that match its start, in order.

    A key is a regular expression that ends where a part of the path does, ``(?:key)(?:(?<=\.)|(?=\.|$))``.

    Raises:
        FormatError: as ``matches`` does.
    """
    others = [i for i, key in enumerate(keys) if not is_literal(key)]
    ends = r"(?:(?<=\.)|(?=\.|$))"
    jobs = [(Pattern(text=f"(?:{keys[i]}){ends}", shown=keys[i], loc=loc), None) for i in others]
    found = [[i for i, key in enumerate(keys) if is_literal(key) and _starts(key, path)] for path in paths]
    for i, row in zip(others, _evaluate(jobs, paths), strict=True):
        for indices, answer in zip(found, row, strict=True):
            if answer is not None:
                indices.append(i)
    return [sorted(indices) for indices in found]


def _starts(key: str, path: str) -> bool:
    """Tells whether a literal key matches the start of a path and ends where a part of it does."""
    end = len(key)
    return literal_at(key, path, 0) and (path[end : end + 1] in ("", ".") or path[end - 1 : end] == ".")


class _LiteralKeys:
    """Keys without special characters, looked up by hash although their dots stand for any character.

    Keys of one length with dots in the same places differ only in the rest, so the end of a path with those
    places blanked out is looked up in a table. Real configs have a handful of such places for each length.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.lookups = 0
        self._tables: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        for i, key in enumerate(keys):
            if is_literal(key):
                dots = tuple(at for at, char in enumerate(key) if char == ".")
                table = self._tables.setdefault(len(key), {}).setdefault(dots, {})
                table.setdefault(key, []).append(i)

    def find(self, path: str) -> list[int]:
        """Returns the indices of the keys that match the whole path or its end after a dot."""
        found: list[int] = []
        start = 0
        while start >= 0:
            end = path[start:]
            for dots, table in self._tables.get(len(end), {}).items():
                self.lookups += 1
                found.extend(table.get(_blanked(end, dots), ()))
            start = path.find(".", start) + 1 or -1
        return found


def _blanked(text: str, places: tuple[int, ...]) -> str:
    """Puts a dot where a pattern has one; a newline stays, as a dot does not match it."""
    if all(text[at] == "." for at in places):
        return text
    chars = list(text)
    for at in places:
        if chars[at] != "\n":
            chars[at] = "."
    return "".join(chars)


def _evaluate(jobs: Sequence[tuple[Pattern, str | None]], texts: Sequence[str]) -> list[list[str | None]]:
    """Runs every pattern on every text: "" or the group's text for a match, None for none."""
    results: list[list[str | None]] = [[] for _ in jobs]
    away: list[int] = []
    left = _WORK_HERE
    for i, (pattern, group) in enumerate(jobs):
        if len(pattern.text) > MAX_PATTERN_LENGTH:
            what = f"has {len(pattern.text)} characters; {MAX_PATTERN_LENGTH} are allowed."
            raise FormatError(pattern.problem(what, "Write the module names as a list instead."))
        work = _work(pattern.text, texts)
        if work is None or work > left:
            away.append(i)
            continue
        left -= work
        results[i] = _here(pattern, group, texts)
    if away:
        rows = _in_child([jobs[i] for i in away], texts)
        for i, row in zip(away, rows, strict=True):
            results[i] = row
    return results


def _here(pattern: Pattern, group: str | None, texts: Sequence[str]) -> list[str | None]:
    """Runs one cheap pattern in this process."""
    try:
        compiled = re.compile(pattern.text)
    except re.error as error:
        raise FormatError(_invalid(pattern, str(error))) from None
    function = compiled.fullmatch if pattern.mode == "fullmatch" else compiled.match
    found = (function(text) for text in texts)
    return [None if m is None else "" if group is None else m.group(group) for m in found]


def _in_child(jobs: Sequence[tuple[Pattern, str | None]], texts: Sequence[str]) -> list[list[str | None]]:
    """Runs patterns in a child process that cannot outlive its limits."""
    import subprocess  # only here: it costs a tenth of a start-up, and few patterns come this far

    task = {"jobs": [[p.text, p.mode, group] for p, group in jobs], "texts": list(texts)}
    first = jobs[0][0]
    if not sys.executable:
        what = "needs a separate process to be evaluated safely, and the Python interpreter was not found."
        raise FormatError(first.problem(what, "Run the command-line tool, or list the module names."))
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(CPU_SECONDS)]
    try:
        done = subprocess.run(
            command, input=json.dumps(task).encode(), capture_output=True, timeout=WALL_SECONDS, check=False
        )
        output = done.stdout
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
    except OSError as error:
        what = (
            f"needs a separate process to be evaluated safely, which could not be started ({error.strerror})."
        )
        raise FormatError(first.problem(what, "Try again, or list the module names.")) from None
    lines = [line for line in output.split(b"\n")[:-1] if line]
    rows: list[list[str | None]] = []
    for (pattern, group), line in zip(jobs, lines, strict=False):
        answer = json.loads(line)
        if "error" in answer:
            raise FormatError(_invalid(pattern, answer["error"]))
        found = answer["found"]
        rows.append([("" if f else None) for f in found] if group is None else found)
    if len(rows) < len(jobs):
        what = f"takes more than {CPU_SECONDS:g} s on {len(texts)} module names, so it was stopped."
        remedy = "Write it without nested or repeated wildcards, or list the module names instead."
        raise FormatError(jobs[len(rows)][0].problem(what, remedy))
    return rows


def _invalid(pattern: Pattern, reason: str) -> Problem:
    return pattern.problem(
        f"is not valid: {escape(reason)}.", "Correct it, or list the module names instead."
    )


def _work(pattern: str, texts: Sequence[str]) -> int | None:
    """Returns an upper bound on the matcher's steps for all texts, or None where none is computed.

    Every way that a backtracking matcher can take is a choice at each alternative, optional part and repeat,
    so there are at most ``choices × (length + 1) ** repeats`` ways, each at most pattern and text long.
    """
    shape = _shape(pattern)
    if shape is None:
        return None
    choices, repeats = shape
    work = 0
    for text in texts:
        work += (len(pattern) + len(text)) * choices * int((len(text) + 1) ** repeats)
    return work


@lru_cache(maxsize=1024)
def _shape(pattern: str) -> tuple[int, int] | None:
    """Returns the number of choices and of repeats of a pattern of plain parts; None for any other pattern.

    Plain parts are characters, simple escapes and sets, groups without flags, alternatives, optional parts,
    and repeats of a single character. Back references, look-around, flags and repeated groups are left to the
    child.
    """
    choices, repeats, position = 1, 0, 0
    branches = [1]
    atom = ""  # what a quantifier would apply to: "one", "group", or nothing
    while position < len(pattern):
        char = pattern[position]
        if char in "*+?{":
            quantifier = _quantifier(pattern, position)
            if quantifier is None or not atom:
                return None
            kind, position = quantifier
            if kind == "optional":
                choices *= 2
            elif kind == "repeat":
                if atom == "group":
                    return None
                repeats += 1
            elif atom == "group":
                return None
            atom = ""
            continue
        position += 1
        atom = "one"
        if char == "(":
            if pattern.startswith("?:", position):
                position += 2
            elif pattern.startswith("?P<idx>", position):
                position += 7
            elif pattern.startswith("?", position):
                return None
            branches.append(1)
            atom = ""
            if len(branches) > _MAX_DEPTH:
                return None
        elif char == ")":
            if len(branches) == 1:
                return None
            choices *= branches.pop()
            atom = "group"
        elif char == "|":
            branches[-1] += 1
            atom = ""
        elif char in "^$":
            atom = ""
        elif char == "\\":
            escaped = pattern[position : position + 1]
            if not escaped or (escaped.isalnum() and escaped not in _PLAIN_ESCAPES):
                return None
            position += 1
        elif char == "[":
            end = _set_end(pattern, position)
            if end is None:
                return None
            position = end
    if len(branches) != 1:
        return None
    return choices * branches[0], repeats


def _quantifier(pattern: str, position: int) -> tuple[str, int] | None:
    """Returns a quantifier's kind ("optional", "repeat" or "count") and where it ends."""
    char = pattern[position]
    kind, end = ("optional" if char == "?" else "repeat"), position + 1
    if char == "{":
        found = _REPEAT.match(pattern, position)
        if found is None or not (found[1] or found[3]):
            return None
        kind, end = ("repeat" if found[2] else "count"), found.end()
    if pattern.startswith("?", end):
        return kind, end + 1
    return None if pattern[end : end + 1] in ("+", "*", "{") else (kind, end)


def _set_end(pattern: str, position: int) -> int | None:
    """Returns the position after the set that was opened before ``position``, or None for an unusual one."""
    if pattern.startswith("^", position):
        position += 1
    start = position
    while position < len(pattern):
        char = pattern[position]
        if char == "]" and position > start:
            return position + 1
        if char in "[&|~" or pattern.startswith("--", position):
            return None
        position += 2 if char == "\\" else 1
    return None
