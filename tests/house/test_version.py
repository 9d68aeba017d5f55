"""The version is written in two places; they agree."""

from __future__ import annotations

import re
from pathlib import Path

import adapterhub_tools as at

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_and_its_metadata_have_one_version() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    assert found[1] == at.__version__
