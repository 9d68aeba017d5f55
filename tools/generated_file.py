"""A file that a program of this folder generates: written, or with `--check` compared with what is there."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(name: str, text: Callable[[], str], *, remedy: str) -> int:
    """Writes the file; with `--check`, prints how it differs instead and returns 1 if it does.

    Args:
        name: the file, from the root of the repository.
        text: makes what should be in it.
        remedy: what to do where it differs.
    """
    parser = argparse.ArgumentParser(description=f"Generate {name}.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it is out of date")
    options = parser.parse_args()

    path, expected = ROOT / name, text()
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    if found == expected:
        return 0
    if options.check:
        sys.stdout.writelines(
            difflib.unified_diff(
                found.splitlines(keepends=True),
                expected.splitlines(keepends=True),
                fromfile=name,
                tofile="generated",
            )
        )
        print(f"{name} is out of date: {remedy}", file=sys.stderr)
        return 1
    path.write_text(expected, encoding="utf-8")
    print(f"wrote {name}, {len(expected.splitlines())} lines")
    return 0
