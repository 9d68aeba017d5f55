"""What the tests of manifests share: a change to one, and what is found then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapterhub_tools as at

NAME = "adapter_manifest.json"


def found(report: at.ValidationReport) -> set[tuple[str, str]]:
    """The class and the kind of every error."""
    return {(finding.error.__name__, finding.problem.kind) for finding in report.errors}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of an adapter's folder."""
    path = folder / NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
