"""New magnitudes after a shrink bring DoRA's merged weights closer, never further, and as far as reported.

The oracle is DoRA's formula on dense float64 matrices, m · (W + s·B·A) / ‖W + s·B·A‖ for each output.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from tests.property.low_rank_folders import PREFIX, config_of, deltas_of, gaussian, write_base, write_lora

CORPUS = Path(os.environ.get("ADAPTERTOOL_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
CORPUS_DORA = CORPUS / "adapters" / "BufferFis__Split_Learning_PEFT_Methods" / "server_model"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def write_dora(folder: Path, b: Tensor, a: Tensor, magnitude: Tensor) -> Path:
    write_lora(folder, {"m.q": (b, a)}, lora_alpha=12, use_dora=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, f"{PREFIX}m.q.lora_magnitude_vector": magnitude}, file)
    return folder


def merged(folder: Path, weight: Tensor, path: str, *, transposed: bool = False) -> Tensor:
    """Returns DoRA's weight as (out, in)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    if transposed:
        weight = weight.t()
    d = weight.double() + deltas_of(folder)[path]
    magnitude = tensors[f"{PREFIX}{path}.lora_magnitude_vector"].double()
    return magnitude[:, None] * d / d.norm(dim=1, keepdim=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 10),
    columns=st.integers(2, 10),
    rank=st.integers(2, 5),
    smaller=st.integers(1, 5),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 30.0]),
    stretch=st.sampled_from([0.0, 1e-3, 0.5]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**20),
)
def test_new_magnitudes_are_never_worse(
    rows: int, columns: int, rank: int, smaller: int, size: float, stretch: float, dtype: str, seed: int
) -> None:
    weight = gaussian(rows, columns, seed)
    b, a = size * gaussian(rows, rank, seed + 1), gaussian(rank, columns, seed + 2)
    norms = (weight + 12 / rank * b @ a).norm(dim=1)
    magnitude = norms * (1 + stretch * gaussian(rows, 1, seed + 3)[:, 0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", {"m.q.weight": weight})
        stored = [tensor.to(DTYPES[dtype]) for tensor in (b, a, magnitude)]
        write_dora(folder / "a", *stored)
        at.svd_shrink(folder / "a", folder / "kept", rank=min(smaller, rank), threads=1)
        report = at.svd_shrink(
            folder / "a", folder / "refit", rank=min(smaller, rank), refit=folder / "base", threads=1
        )
        before, kept, refit = (merged(folder / n, weight, "m.q") for n in ("a", "kept", "refit"))
        history = at.load_manifest(folder / "refit").history[-1].figures
    change = float((before - weight).norm())
    found = report.modules[0].refit
    assert found is not None
    assert report.refit == pytest.approx(found)
    # The oracle and the report both carry roundings of the dense weights.
    noise = 1e-14 * float(weight.norm() + before.norm())
    assert found.norm == pytest.approx(change, rel=1e-9, abs=noise)
    assert found.error * found.norm == pytest.approx(float((refit - before).norm()), rel=1e-6, abs=noise)
    assert found.error_kept * found.norm == pytest.approx(float((kept - before).norm()), rel=1e-6, abs=noise)
    assert found.error * found.norm <= found.error_kept * found.norm + noise
    assert history["merged_error"] == found.error
    assert history["merged_error_kept"] == found.error_kept


@pytest.mark.skipif(not CORPUS_DORA.is_dir(), reason="the corpus of real adapters is not here")
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_trained_gpt2_dora_comes_closer(rank: int, tmp_path: Path) -> None:
    """Every module of it, on a base of GPT-2's shapes whose rows have the magnitudes' size."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(CORPUS_DORA / "adapter_model.safetensors")
    base = {}
    for name, magnitude in tensors.items():
        if name.endswith("lora_magnitude_vector") and ".h.4." in name:
            path = name.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector")
            columns = tensors[f"{PREFIX}{path}.lora_A.weight"].shape[1]
            noise = torch.randn(columns, len(magnitude), generator=generator)
            base[f"{path}.weight"] = noise * magnitude / columns**0.5
    assert len(base) == 3
    one = tmp_path / "one"
    one.mkdir()
    kept_names = {name for name in tensors if ".h.4." in name}
    save_file({name: tensors[name] for name in kept_names}, one / "adapter_model.safetensors")
    config = {**config_of(CORPUS_DORA), "target_modules": [name.removesuffix(".weight") for name in base]}
    (one / "adapter_config.json").write_text(json.dumps(config))
    write_base(tmp_path / "base", base, model_type="gpt2")
    report = at.svd_shrink(one, tmp_path / "out", rank=rank, refit=tmp_path / "base")
    for module in report.modules:
        weight = base[f"{module.path}.weight"]
        before, after = (merged(f, weight, module.path, transposed=True) for f in (one, tmp_path / "out"))
        assert module.refit is not None
        error = float((after - before).norm() / (before - weight.t().double()).norm())
        assert module.refit.error == pytest.approx(error, rel=1e-6, abs=1e-9)
        assert module.refit.error <= module.refit.error_kept * (1 + 1e-12)
