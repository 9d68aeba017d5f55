"""A manifest that contradicts the files or the base is reported by validate and refused by merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapterhub_tools as at
from tests.unit.manifests import edit, found


@pytest.fixture
def adapter(adapter: Path, base: Path) -> Path:
    at.init(adapter, base=base)
    return adapter


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["method"].update(name="dora"),
        lambda data: data["method"]["hyperparameters"].update(alpha=5),
        lambda data: data["targets"]["modules"].pop(),
        lambda data: data["targets"].update(ties_embeddings=True),
        lambda data: data["files"][0].update(sha256="0" * 64),
        lambda data: data["files"][1].update(sha256="0" * 64),
        lambda data: data["files"][1].update(size=7),
        lambda data: data["files"].pop(1),
    ],
)
def test_a_merge_refuses_a_manifest_that_contradicts_the_files(
    tmp_path: Path, adapter: Path, base: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(adapter, lambda data: data.pop("digest"))  # the digest alone would tell most of them
    assert at.validate(adapter, base=base).ok
    assert at.merge(base, adapter, tmp_path / "sound").changed == 4
    edit(adapter, change)
    assert {error for error, _ in found(at.validate(adapter, base=base))} == {"IntegrityError"}
    for options in ({}, {"dry_run": True}, {"check_base": "off"}):
        with pytest.raises(at.IntegrityError) as caught:
            at.merge(base, adapter, tmp_path / "out", **options)
        assert all(problem.remedy for problem in caught.value.problems)
    with pytest.raises(at.IntegrityError):
        at.svd_shrink(adapter, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "kind", "merges"),
    [
        (lambda data: data["targets"]["modules"][0].update(base_shape=[9, 9]), "base-shape", False),
        (lambda data: data["targets"]["modules"][0].update(kind="conv1d"), "base-kind", False),
        (lambda data: data["base"].update(architecture="gpt2"), "base-architecture", True),
        (lambda data: data["base"].update(dtype="F64"), "base-dtype", True),
        (lambda data: data["base"].update(parameters=7), "base-parameters", True),
        (lambda data: data["base"].update(config_digest="config-sha256-v1:" + "0" * 64), "", False),
    ],
)
def test_a_record_that_contradicts_the_base(
    tmp_path: Path,
    adapter: Path,
    base: Path,
    change: Callable[[dict[str, Any]], object],
    kind: str,
    merges: bool,
) -> None:
    edit(adapter, change)
    assert found(at.validate(adapter, base=base)) == {("IntegrityError", kind or "base-config-digest")}
    assert at.validate(adapter, base=base, check_base="off").ok
    if not merges:
        with pytest.raises(at.IntegrityError) as caught:
            at.merge(base, adapter, None, dry_run=True)
        assert [problem.kind for problem in caught.value.problems] == [kind or "base-config"]
        with pytest.raises(at.IntegrityError):
            at.merge(base, adapter, tmp_path / "out")
    assert at.merge(base, adapter, tmp_path / "out", check_base="off").changed == 4


def test_both_digests_of_the_base_are_compared(tmp_path: Path, adapter: Path, base: Path) -> None:
    edit(adapter, lambda data: data["base"].update(targets_digest="tensor-tree-blake3-v1:" + "0" * 64))
    report = at.validate(adapter, base=base)
    assert found(report) == {("IntegrityError", "base-targets-digest")}
    with pytest.raises(at.IntegrityError) as caught:
        at.merge(base, adapter, tmp_path / "out")
    for problem in (report.errors[0].problem, caught.value.problems[0]):
        assert "other targets" in problem.remedy
