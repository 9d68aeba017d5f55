"""What the tests of output folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterhub_tools.errors import StoreError
from adapterhub_tools.store.directory import stage

LAST = ("receipt.json", b"{}\n")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def refused(kind: str, out: Path, *, inputs: tuple[Path, ...] = (), **options: bool) -> StoreError:
    """Checks that neither the check nor staging accepts the output, and that nothing is left behind."""
    parent = Path(os.path.realpath(out.parent))
    before = sorted(parent.iterdir()) if parent.is_dir() else []
    with pytest.raises(StoreError) as caught, stage(out, inputs=inputs, **options) as staged:
        staged.commit(LAST)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert all(problem.file and problem.remedy for problem in caught.value.problems)
    assert (sorted(parent.iterdir()) if parent.is_dir() else []) == before
    return caught.value
