"""What is dangerous in a folder before anything loads it."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from typing import TYPE_CHECKING

from adapterhub_tools.api.paths import Reference

if TYPE_CHECKING:
    from adapterhub_tools.ops.validation_report import ValidationReport


def scan(path: Reference, *, ignore: Sequence[str] = (), strict: bool = False) -> ValidationReport:
    """Looks for what can harm whoever loads a folder: code, disguises, secrets, ways out of it.

    Nothing is loaded or unpickled, and no tensor library is needed: of weights only the header and a few
    bytes are read. Large files of a remote folder are read by range. The rules are in docs/scan.md.

    Args:
        path: the folder of an adapter or a base, one file, or a reference.
        ignore: rules that are not applied.
        strict: whether warnings count as errors.

    Returns:
        a report; call ``raise_for_problems()`` on it to raise what was found.

    Raises:
        HubError: a reference cannot be had.
        ValueError: ``ignore`` names no rule.

    Example:
        >>> at.scan("hf://me/my-adapter", ignore=["remote-code"]).raise_for_problems()
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import scan as op

    return op.scan_listing(fspath(path), lambda: resolve.scanned(path), ignore=ignore, strict=strict)
