"""What a caller may give: a local path, or, where something is read, a reference to another machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

from adapterhub_tools.errors import UnsupportedError, escape

_COLLAPSED = re.compile(r"(?:hf|s3|file|https?):/(?!/)")
"""How a URL begins that became a ``Path``, which makes one slash of two."""

Reference = str | PathLike[str]
"""A local path; where something is read, also a reference: ``"hf://owner/name@revision/folder"``."""


def local_path(reference: Reference) -> Path:
    """Returns the path that a reference names.

    Raises:
        UnsupportedError: it names something on another machine.
    """
    text = fspath(reference)
    if "://" in text or _COLLAPSED.match(text):
        raise UnsupportedError.of(
            "remote-reference",
            f"{escape(text)!r} is not a local path.",
            remedy="Pull it first, and give its folder.",
        )
    return Path(text)


def optional_path(reference: Reference | None) -> Path | None:
    """Returns the path that a reference names, or None for None."""
    return None if reference is None else local_path(reference)


def several(given: Reference | Sequence[Reference]) -> list[Reference]:
    """Returns one reference or several as a list."""
    return [given] if isinstance(given, str | PathLike) else list(given)
