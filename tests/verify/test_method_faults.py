"""Every fault in a merge of DoRA, (IA)³, LoHa or LoKr is found and explained, in each dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import adapterhub_tools as at
from tests.verify.method_faults import CONFIGS, FAULTS, Scene

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FAIR = ("one weight off by one ulp",)
"""What a merge by another tool may have: it is not told as correctly rounded."""
BELOW_ROUNDING = {("ia3", "bfloat16", "one per cent more on one tensor")}
"""What without a receipt is within the rounding errors: 1 % of gains of 1 ± 5 %, against steps of 0.4 %."""


@pytest.mark.parametrize("own", [True, False], ids=["ours", "of another tool"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", CONFIGS)
def test_found_and_explained(tmp_path: Path, method: str, dtype: str, own: bool) -> None:
    scene = Scene(tmp_path, method, DTYPES[dtype])

    def verify(sample: str) -> at.VerifyReport:
        merged = scene.save(receipt=own)
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        return at.verify(base=base, adapter=adapter, merged=merged, sample=sample, seed=2)

    for sample in ("rows", "full"):
        assert verify(sample).ok
    for fault, (put, explanation, methods) in FAULTS.items():
        if method not in methods:
            continue
        scene.now = dict(scene.right)
        put(scene)
        fair = not own and (fault in FAIR or (method, dtype, fault) in BELOW_ROUNDING)
        # Of products, a sample sees what the probes see: anything but single low bits.
        single = method in ("loha", "lokr") and ("one weight" in fault or "one bit" in fault)
        report = verify("full" if own or single else "rows")
        text = " | ".join(str(problem) for problem in report.problems)
        assert report.exit_code == (0 if fair else 1), (fault, text)
        if fair:
            assert {"within k ulp", "delta rounded first"} & set(report.counts), (fault, report.counts)
        else:
            assert explanation in text, (fault, text)
        shutil.rmtree(tmp_path / "merged")
