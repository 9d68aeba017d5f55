"""Without an undo file: close to the base, with a true account of how close, and never called the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterhub_tools as at
from adapterhub_tools.errors import LossyError, MismatchError
from tests.undo.models import VOCAB, make_adapter, make_base


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("delta", [0.01, 0.2])
def test_the_expected_error_is_the_true_one(tmp_path: Path, dtype: str, delta: float) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, hidden=256)
    adapter = make_adapter(tmp_path / "adapter", hidden=256, delta=delta)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
    assert not report.exact
    assert report.expected_wrong is not None
    assert report.largest_error is not None
    true, near = load_file(base / "model.safetensors"), load_file(tmp_path / "near" / "model.safetensors")
    wrong = sum(int((true[name] != near[name]).sum()) for name in true)
    print(f"{dtype} {delta:.0%}: {wrong} wrong, {report.expected_wrong} expected")
    assert wrong > 0
    assert abs(wrong - report.expected_wrong) <= 6 * wrong**0.5 + 0.05 * wrong
    receipt = json.loads((tmp_path / "near" / "merge_receipt.json").read_text())
    merged = json.loads((tmp_path / "merged" / "merge_receipt.json").read_text())
    assert receipt["options"]["approximates_base_of"] == merged["output"]["digest"]
    assert report.digest != at.content_digest(base, cache=False).digest
    assert "approximated" in report.summary
    again = at.merge(
        tmp_path / "merged", adapter, tmp_path / "again", replay=tmp_path / "near" / "merge_receipt.json"
    )
    assert again.receipt.options["approximates_base_of"] == merged["output"]["digest"]


def test_the_largest_error_bounds_every_weight(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=256)
    adapter = make_adapter(tmp_path / "adapter", hidden=256, delta=0.5)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
    true, near = load_file(base / "model.safetensors"), load_file(tmp_path / "near" / "model.safetensors")
    assert report.largest_error is not None
    for name, values in true.items():
        ulp = torch.exp2(torch.frexp(near[name].double())[1].double() - 8)
        error = float(((values.double() - near[name].double()).abs() / ulp).max())
        assert error <= report.largest_error


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "merged")
    other = make_adapter(tmp_path / "other", seed=7)
    with pytest.raises(MismatchError):
        at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=other, approximate=True)


def test_replaced_tensors_are_gone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", saved={"lm_head": torch.zeros(VOCAB, 32)})
    at.merge(base, adapter, tmp_path / "merged")
    with pytest.raises(LossyError, match="replaced 1"):
        at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
