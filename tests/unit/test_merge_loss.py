"""How much of a change the output holds: the report of a merge, against sums over its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from adapterhub_tools.model.loss import Loss

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def write_base(folder: Path, *, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.weight": (0.05 * torch.randn(rows, columns, generator=generator)).to(dtype) for name in NAMES
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_adapter(folder: Path, *, rows: int, columns: int, size: float, seed: int = 1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in NAMES:
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = size * torch.randn(rows, 4, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def reference(base: Path, adapter: Path, folder: Path, dtype: str) -> dict[str, Loss]:
    """The sums over written files, with the exact result as the float64 merge has it."""
    at.merge(base, adapter, folder / "written", dtype=dtype)
    at.merge(base, adapter, folder / "exact", dtype="float64")
    old = load_file(base / "model.safetensors")
    new = load_file(folder / "exact" / "model.safetensors")
    written = load_file(folder / "written" / "model.safetensors")
    losses = {}
    for name, exact in new.items():
        delta, arrived = exact - old[name].double(), written[name].double() - old[name].double()
        losses[name] = Loss(
            values=delta.numel(),
            delta=float((delta**2).sum()),
            kept=float((delta * arrived).sum()),
            error=float(((arrived - delta) ** 2).sum()),
            merged=float((exact**2).sum()),
        )
    return losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_the_full_report_is_the_sum_over_the_written_files(tmp_path: Path, dtype: str, size: float) -> None:
    base = write_base(tmp_path / "base", rows=40, columns=24, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", rows=40, columns=24, size=size)
    report = at.merge(base, adapter, tmp_path / "out", dtype=dtype, loss="full").loss
    assert report is not None
    assert not report.sampled
    for name, expected in reference(base, adapter, tmp_path, dtype).items():
        found = report.tensors[name]
        assert found.values == expected.values
        for field in ("delta", "kept", "error", "merged"):
            assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-9, abs=1e-18), (
                field
            )
    assert report.total == sum(report.tensors.values(), Loss())


def test_a_change_far_below_the_grid_is_lost_and_a_large_one_survives(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rows=64, columns=64, dtype=torch.bfloat16)
    survivals = []
    for number, size in enumerate((1e-7, 1e-4, 1e-2)):
        adapter = write_adapter(tmp_path / f"adapter{number}", rows=64, columns=64, size=size)
        report = at.merge(base, adapter, None, dry_run=True).loss
        assert report is not None
        survivals.append(report.total.survival)
    assert survivals[0] is not None
    assert survivals[0] < 0.05
    assert survivals == sorted(survivals)
    assert survivals[2] == pytest.approx(1, abs=1e-3)
    report = at.merge(base, tmp_path / "adapter0", None, dry_run=True, dtype="float64").loss
    assert report is not None
    assert report.total.survival == pytest.approx(1, abs=1e-9)


def test_a_sample_is_said_to_be_one_and_comes_near(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rows=2048, columns=512, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", rows=2048, columns=512, size=3e-5)
    sampled = at.merge(base, adapter, None, dry_run=True).loss
    full = at.merge(base, adapter, None, dry_run=True, loss="full").loss
    assert sampled is not None
    assert full is not None
    assert sampled.sampled
    assert not full.sampled
    assert full.total.values == 2 * 2048 * 512
    assert sampled.total.values == 2 * 65_536
    assert sampled.total.survival == pytest.approx(full.total.survival, abs=0.02)
    assert sampled.total.sqnr == pytest.approx(full.total.sqnr, abs=0.5)
    assert at.merge(base, adapter, None, dry_run=True, threads=1).loss == sampled
    assert at.merge(base, adapter, tmp_path / "out").loss is None


def test_no_change_has_no_share_that_survives(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rows=8, columns=8, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", rows=8, columns=8, size=0.0)
    report = at.merge(base, adapter, None, dry_run=True)
    assert report.loss is not None
    assert report.loss.total.survival is None
    total = report.to_json()["loss"]["total"]
    assert total == {"values": 128, "survival": None, "relative_error": None, "sqnr_db": None}
    assert "change no value" in report.loss.words


def test_what_stands_against_the_merge_is_found_by_the_dry_run(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rows=8, columns=8, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", rows=8, columns=8, size=1e30)
    with pytest.raises(at.LossyError, match="overflows"):
        at.merge(base, adapter, None, dry_run=True, dtype="float16")
    tensors = load_file(base / "model.safetensors")
    tensors[f"{NAMES[0]}.weight"][2, 3] = float("nan")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(at.FormatError, match="must be finite"):
        at.merge(base, adapter, None, dry_run=True)


def test_the_command_shows_what_loses_most(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rows=32, columns=32, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", rows=32, columns=32, size=1e-4)
    places = [*map(str, (base, adapter, tmp_path / "out"))]
    result = CliRunner().invoke(cli, ["merge", *places, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "survives" in result.output
    assert "all 2,048 values" in result.output
    data = json.loads(CliRunner().invoke(cli, ["merge", *places, "--dry-run", "--json"]).output)
    assert set(data["loss"]["tensors"]) == {f"{name}.weight" for name in NAMES}
    off = CliRunner().invoke(cli, ["merge", *places, "--dry-run", "--loss", "off"])
    assert "survives" not in off.output
    assert not (tmp_path / "out").exists()


LOSSES = st.builds(
    Loss,
    values=st.integers(0, 1000),
    delta=st.floats(0, 1e6),
    kept=st.floats(-1e6, 1e6),
    error=st.floats(0, 1e6),
    merged=st.floats(0, 1e6),
)


@given(one=LOSSES, other=LOSSES)
@settings(max_examples=200, deadline=None)
def test_losses_add_up_and_are_valid_json(one: Loss, other: Loss) -> None:
    both = one + other
    assert both == other + one
    assert both.values == one.values + other.values
    text = json.dumps(both.to_json(), allow_nan=False)
    assert set(json.loads(text)) == {"values", "survival", "relative_error", "sqnr_db"}
    if both.delta and both.error == 0:
        assert both.relative_error == 0
