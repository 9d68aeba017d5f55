"""The undo file stays near the entropy of what a prediction cannot know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adapterhub_tools as at
from adapterhub_tools.model.undo import UNDO_FILE
from tests.undo.models import make_adapter, make_base

LIMIT = 1.2


@pytest.mark.parametrize(("delta", "bits"), [(0.01, 0.12), (0.05, 0.36), (0.2, 0.83)])
def test_bits_per_weight(tmp_path: Path, delta: float, bits: float) -> None:
    """0.12, 0.36 and 0.83 bit is the measured entropy for bfloat16 deltas of 1, 5 and 20 % of the weights."""
    base = make_base(tmp_path / "base", hidden=1024)
    adapter = make_adapter(tmp_path / "adapter", hidden=1024, rank=16, delta=delta)
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    changed = 2 * (1024 * 1024 + 512 * 1024)
    size = (tmp_path / "merged" / UNDO_FILE).stat().st_size
    print(f"delta {delta:.0%}: {8 * size / changed:.3f} bit a weight")
    assert 8 * size / changed <= LIMIT * bits


def test_the_delta_is_what_it_says(tmp_path: Path) -> None:
    """Guards the sizes above: the adapter's delta really is so large."""
    from safetensors.torch import load_file

    adapter = make_adapter(tmp_path / "adapter", hidden=1024, rank=16, delta=0.2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 16
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    delta = scale * tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
    assert torch.std(delta) / 0.05 == pytest.approx(0.2, rel=0.05)


def test_bits_that_nothing_predicts_are_stored_compressed(tmp_path: Path) -> None:
    """float32 weights behind a bfloat16 output: 16 lost bits, and little more than those are kept."""
    base = make_base(tmp_path / "base", dtype="float32", hidden=512)
    adapter = make_adapter(tmp_path / "adapter", hidden=512)
    at.merge(base, adapter, tmp_path / "merged", undo=True, dtype="bfloat16")
    weights = at.content_digest(base, cache=False).bytes // 4
    size = (tmp_path / "merged" / UNDO_FILE).stat().st_size
    assert 8 * size / weights <= LIMIT * 17
