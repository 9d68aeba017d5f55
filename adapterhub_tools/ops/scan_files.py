"""The files that a scan looks at: every one below a folder, and what is wrong with their names and links."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_tools.errors import FormatError, Problem, StoreError, escape
from adapterhub_tools.model.protocols import Source
from adapterhub_tools.ops import scan_rules as rules
from adapterhub_tools.ops.validation_report import Finding
from adapterhub_tools.store.files import LocalFile, path_reason, resolve_inside, store_error
from adapterhub_tools.store.folder import names_in

MAX_FILES = 10_000
"""The most files of a folder."""
MAX_DEPTH = 16
"""The most folders in one another."""

_BAD_NAME = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\\\]"
)
_EXPECTED_HIDDEN = frozenset({".gitattributes", ".gitignore", ".gitkeep", ".adapter_origin.json", ".git"})
_CACHE_FOLDERS = (".cache/huggingface", ".huggingface")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedFile:
    """A file that can be read.

    Attributes:
        path: relative to the folder, with forward slashes.
        size: bytes.
        open: opens it.
    """

    path: str
    size: int
    open: Callable[[], AbstractContextManager[Source]]


@dataclass(slots=True, kw_only=True)
class Listing:
    """The files of a folder.

    Attributes:
        files: those that can be read, sorted.
        findings: what is wrong with names, links and kinds of files.
        unchecked: what could not be examined.
        skipped: what was left out on purpose -> why.
    """

    files: list[ScannedFile] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[Problem] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def list_files(path: Path) -> Listing:
    """Returns every file below a folder, or the one file that is given.

    Raises:
        StoreError: the path is not there, or cannot be read.
    """
    found = Listing()
    try:
        status = path.stat()
    except OSError as error:
        raise store_error(error, "find it", path) from error
    if stat.S_ISDIR(status.st_mode):
        _walk(path, "", found)
        name_findings([file.path for file in found.files], found)
    else:
        _add(found, path, path.name, status)
    return found


def name_findings(paths: list[str], found: Listing) -> None:
    """Adds what is wrong with the names of files: characters, hidden ones, pairs that differ in case only.

    Args:
        paths: relative to the folder.
        found: where it is added.
    """
    seen: dict[str, str] = {}
    for path in paths:
        if _BAD_NAME.search(path):
            message = "its name holds a control or direction character, a backslash, or is not UTF-8."
            found.findings.append(rules.FILE_NAME.finding(message, file=path))
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            message = f"differs from {escape(other)} in upper and lower case only."
            found.findings.append(rules.FILE_NAME.finding(message, file=path))
        if _is_hidden(path):
            found.findings.append(rules.HIDDEN_FILE.finding("is hidden.", file=path))


def _is_hidden(path: str) -> bool:
    if path.startswith(tuple(f"{folder}/" for folder in _CACHE_FOLDERS)):
        return False
    parts = path.split("/")
    return any(part.startswith(".") and part not in _EXPECTED_HIDDEN for part in parts)


def _walk(root: Path, below: str, found: Listing) -> None:
    """Adds what lies in one folder, and goes down; links are followed to files only."""
    if below.count("/") > MAX_DEPTH:
        message = f"lies deeper than {MAX_DEPTH} folders; it was not looked at."
        found.findings.append(rules.OVERSIZED.finding(message, file=below))
        return
    try:
        names = names_in(root / below if below else root)
    except StoreError as error:
        if not below:
            raise
        found.unchecked.extend(error.problems)
        return
    for name in names:
        relative = below + name
        if len(found.files) >= MAX_FILES:
            if not any(finding.problem.kind == rules.OVERSIZED.id for finding in found.findings):
                message = f"the folder holds more than {MAX_FILES:,} files; the rest were not looked at."
                found.findings.append(rules.OVERSIZED.finding(message, file=relative))
            return
        place = root / relative
        try:
            status = os.lstat(place)
        except OSError as error:
            found.unchecked.extend(store_error(error, "examine it", relative).problems)
            continue
        if name == ".git":
            found.skipped[relative] = "version control; not looked at"
        elif stat.S_ISLNK(status.st_mode):
            _follow(root, relative, found)
        elif stat.S_ISDIR(status.st_mode):
            _walk(root, relative + "/", found)
        else:
            _add(found, place, relative, status)


def _follow(root: Path, relative: str, found: Listing) -> None:
    """Adds what a symbolic link leads to, if that is a file inside the folder or its Hub cache."""
    reason = path_reason(relative)
    try:
        # A name that may not stand in a path is told by name_findings; the link is examined all the same.
        real = Path(os.path.realpath(root / relative)) if reason else resolve_inside(root, relative)
        status = real.stat()
    except FormatError as error:
        found.findings.append(rules.PATH_ESCAPE.finding(error.problems[0].message, file=relative))
        return
    except FileNotFoundError:
        message = "is a symbolic link that leads nowhere."
        found.findings.append(rules.PATH_ESCAPE.finding(message, file=relative))
        return
    except StoreError as error:
        found.unchecked.extend(error.problems)
        return
    except OSError as error:
        found.unchecked.extend(store_error(error, "examine it", relative).problems)
        return
    if reason or Path(os.path.realpath(root)) in real.parents:
        found.findings.append(rules.SYMLINK.finding("is a symbolic link.", file=relative))
    if stat.S_ISREG(status.st_mode) and not reason:
        _add(found, real, relative, status)


def _add(found: Listing, place: Path, relative: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        found.findings.append(rules.SPECIAL_FILE.finding("is no regular file.", file=relative))
        return

    def opened() -> LocalFile:
        return LocalFile(place, name=relative)

    found.files.append(ScannedFile(path=relative, size=status.st_size, open=opened))
