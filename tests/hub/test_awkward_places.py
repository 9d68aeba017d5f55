"""Folders that cannot be written, and devices that are full: what push and pull do, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapterhub_tools as at
from tests.hub.small_adapter import weights, write_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
NO_MOUNTS = 77

# Mounts that only this process sees, then the program.
PROGRAM = """
import json, sys
from tests.faults.namespaces import enter_own_mounts, mount
try:
    enter_own_mounts()
except PermissionError:
    raise SystemExit(77)
mount(**json.loads(sys.argv[1]))
from adapterhub_tools.cli.main import main
sys.argv = ["adaptertool", *sys.argv[2:]]
main()
"""


def run(mounted: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command where something is mounted; skips where this user may not."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, mounted, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "ADAPTERTOOL_REGISTRY": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == NO_MOUNTS:
        pytest.skip("neither root nor user namespaces: no mounts for one process")
    assert "Traceback" not in ran.stderr
    return ran


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_an_adapter_in_a_folder_that_cannot_be_written_is_pushed(adapter: Path, tmp_path: Path) -> None:
    url = f"{(tmp_path / 'registry').as_uri()}/team/a"
    read_only = f'{{"at": "{adapter}", "source": "{adapter}", "read_only": true}}'
    first = run(read_only, "push", adapter, url)
    assert first.returncode == 0, first.stderr
    assert "not written into the folder" in first.stdout
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    pulled = at.pull(url, tmp_path / "out")
    assert pulled.verified_by_manifest
    assert at.validate(tmp_path / "out").ok
    # The manifest made the second time is the same, here and where it can be written.
    assert run(read_only, "push", adapter, url).stdout.splitlines()[-1].startswith("unchanged")
    assert not at.push(adapter, url).created_commit


def test_a_device_that_is_full_leaves_nothing_of_a_pull(adapter: Path, tmp_path: Path) -> None:
    url = f"{(tmp_path / 'registry').as_uri()}/team/a"
    at.push(adapter, url)
    place = tmp_path / "small"
    place.mkdir()
    listing = f'{{"at": "{place}", "options": "size={len(weights(1)) // 2}"}}'
    ran = run(listing, "pull", url, place / "out")
    assert ran.returncode == 8, ran.stdout
    assert str(place) in ran.stderr
    assert "Free" in ran.stderr
