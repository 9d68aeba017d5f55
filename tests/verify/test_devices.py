"""A GPU gives the bytes and the verdicts of the CPU: merge, its undo file, unmerge and verify.

The same comparisons run with the CPU in the place of the GPU too, so that they are known to be sound where
there is no GPU.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterhub_tools as at
from tests.undo.models import files_of, make_adapter, make_base
from tests.verify.method_faults import CONFIGS, FAULTS, Scene

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def both_ways(folder: Path, base: Path, adapter: Path, device: str) -> None:
    """Merges and unmerges on both devices, and compares every file."""
    for place in ("cpu", device):
        merged, undone = folder / f"merged on {place}", folder / f"undone on {place}"
        at.merge(base, adapter, merged, undo=True, device=place, replace=True)
        at.unmerge(merged, undone, adapter=adapter, device=place, replace=True)
        assert files_of(undone) == files_of(base)
    assert files_of(folder / f"merged on {device}") == files_of(folder / "merged on cpu")


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora(tmp_path: Path, dtype: str, factors: str, device: str) -> None:
    """Factors of 16 bits tie often; zeros, subnormal and large values are there too."""
    base = make_base(tmp_path / "base", dtype=dtype, hidden=256, specials=True)
    adapter = make_adapter(tmp_path / "adapter", hidden=256, rank=16, delta=0.1, dtype=factors, head=True)
    both_ways(tmp_path, base, adapter, device)


@pytest.mark.parametrize("out", ["bfloat16", "float32", "float64"])
def test_other_dtypes_of_the_output(tmp_path: Path, out: str, device: str) -> None:
    base = make_base(tmp_path / "base", dtype="float16", hidden=128)
    adapter = make_adapter(tmp_path / "adapter", hidden=128, delta=0.1)
    for place in ("cpu", device):
        at.merge(base, adapter, tmp_path / place, dtype=out, device=place, replace=True)
    right = load_file(tmp_path / "cpu" / "model.safetensors")
    found = load_file(tmp_path / device / "model.safetensors")
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", CONFIGS)
def test_methods(tmp_path: Path, method: str, dtype: str, device: str) -> None:
    scene = Scene(tmp_path, method, DTYPES[dtype])
    both_ways(tmp_path, tmp_path / "base", tmp_path / "adapter", device)
    cases = [None, *(fault for fault, (_, _, methods) in FAULTS.items() if method in methods)]
    for fault in cases if device != "cpu" else cases[:3]:
        scene.now = dict(scene.right)
        if fault is not None:
            FAULTS[fault][0](scene)
        merged = scene.save(receipt=True)
        reports = [
            at.verify(
                base=tmp_path / "base",
                adapter=tmp_path / "adapter",
                merged=merged,
                sample="full",
                seed=3,
                device=place,
            )
            for place in ("cpu", device)
        ]
        for ours, theirs in zip(*(report.tensors for report in reports), strict=True):
            assert (ours.name, ours.verdict, ours.cause) == (theirs.name, theirs.verdict, theirs.cause)
        assert reports[1].ok == (fault is None)
        assert reports[1].device == ("cpu" if device == "cpu" else torch.cuda.get_device_name())
        shutil.rmtree(merged)


def test_float32_is_not_multiplied_with_fewer_bits(tmp_path: Path, device: str) -> None:
    """What a process allows its own products (TF32) changes no verdict."""
    base = make_base(tmp_path / "base", hidden=256)
    adapter = make_adapter(tmp_path / "adapter", hidden=256, delta=0.2)
    at.merge(base, adapter, tmp_path / "merged")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for seed in range(5):
            report = at.verify(
                base=base, adapter=adapter, merged=tmp_path / "merged", seed=seed, device=device
            )
            assert report.ok
            assert all(tensor.rows_checked <= 3 for tensor in report.tensors if tensor.arithmetic == "own")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
