"""Scanning the corpus of real files finds its pickles and broken files, and nothing where there is nothing.

The corpus is a folder of files from public repositories, beside this repository or at $ADAPTERTOOL_CORPUS. It
is not part of the project, so these tests are skipped where it is absent.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.ops.scan_config import config_findings

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(os.environ.get("ADAPTERTOOL_CORPUS", ROOT.parent / "shared" / "corpus"))

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real adapters is not here")

# Known from reading them: a file of 2 bytes, and one that ends in the middle of a tensor.
BROKEN = {"lora_weights/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"}


def test_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    kinds: Counter[str] = Counter()
    folders = [path for path in sorted((CORPUS / "adapters").iterdir()) if path.is_dir()]
    for folder in folders:
        report = at.scan(folder)
        assert report.unchecked == ()
        pickles = {str(path.relative_to(folder)) for path in folder.rglob("*.bin")}
        assert {p.file for p in report.problems if p.kind == "pickle"} == pickles
        assert {p.file for p in report.problems if p.kind == "broken-safetensors"} <= BROKEN
        kinds.update(problem.kind for problem in report.problems)
    with capsys.disabled():
        print(f"\ncorpus scan: {len(folders)} folders, {dict(sorted(kinds.items()))}")
    assert len(folders) >= 30
    # No other rule finds anything: none of these adapters holds anything of that sort.
    assert set(kinds) == {"pickle", "broken-safetensors"}
    assert kinds["pickle"] >= 5


def test_configs(capsys: pytest.CaptureFixture[str]) -> None:
    kinds: Counter[str] = Counter()
    files = sorted([*(CORPUS / "configs").glob("*.json"), *(CORPUS / "configs_from_results").glob("*.json")])
    for file in files:
        data = file.read_bytes()
        if data.startswith(b"version https://git-lfs"):
            continue
        for finding in config_findings("adapter_config.json", data):
            kinds[finding.problem.kind] += 1
            path = finding.problem.message
            assert any(mark in path for mark in ("(/", "(./", "(../")), (file.name, path)
    with capsys.disabled():
        print(f"\ncorpus configs: {len(files)}, {dict(kinds)}")
    assert len(files) >= 300
    assert set(kinds) == {"local-base"}
