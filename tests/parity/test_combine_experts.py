"""Stacked experts (PEFT's target_parameters) added up: PEFT merges the sum as the sum of its merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import adapterhub_tools as at
from tests.parity import models
from tests.parity.low_rank import fresh, refused, saved

if TYPE_CHECKING:
    from torch import Tensor

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": BOTH, **fields})


def merged(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of PEFT's merge, in float64."""
    model: Any = PeftModel.from_pretrained(fresh(models.mixtral).double(), folder)
    return {n: p.detach().double() for n, p in model.double().merge_and_unload().named_parameters()}


CASES: dict[str, tuple[LoraConfig, LoraConfig]] = {
    "two stacks": (lora(), lora(r=3, lora_alpha=5)),
    "one stack": (lora(target_parameters=BOTH[:1]), lora(target_parameters=BOTH[:1], lora_alpha=3)),
    "rsLoRA": (lora(use_rslora=True), lora(r=4, use_rslora=True)),
    "other modules": (lora(target_modules=["q_proj"]), lora(r=3, target_modules=["q_proj", "v_proj"])),
    "other ranks": (
        lora(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 9}),
        lora(target_modules=["q_proj"]),
    ),
    "experts in one": (
        lora(target_modules=["q_proj"]),
        lora(target_modules=["q_proj"], target_parameters=None, r=5),
    ),
}


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("name", CASES)
def test_peft_merges_the_sum(name: str, method: str, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, config) in enumerate(zip(folders, CASES[name], strict=True)):
        saved(fresh(models.mixtral), config, folder, seed=seed)
    weights = (0.7, -0.4)
    report = at.combine_adapters(folders, out=tmp_path / "o", weights=weights, method=method)
    assert report.totals.error < 1e-6
    found = at.validate(tmp_path / "o")
    assert [(p.kind, p.severity) for p in found.problems] == [("experts", "warning")]
    start = {n: p.detach().double() for n, p in fresh(models.mixtral).named_parameters()}
    parts, whole = [merged(folder) for folder in folders], merged(tmp_path / "o")
    changed = 0
    for tensor, before in start.items():
        expected = before + sum(w * (p[tensor] - before) for w, p in zip(weights, parts, strict=True))
        assert float((whole[tensor] - expected).norm()) <= 1e-6 * float(expected.norm()), tensor
        changed += bool((expected != before).any())
    assert changed == len({module.path for module in report.modules})
    norms = sum(float((whole[n] - start[n]).norm()) ** 2 for n in start) ** 0.5
    assert sum(module.norm**2 for module in report.modules) ** 0.5 == pytest.approx(norms, rel=1e-5)
    other = at.combine_adapters(folders[::-1], out=tmp_path / "p", weights=weights[::-1], method=method)
    assert other.digest == report.digest


def test_equal_scales_stay_bit_for_bit(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        saved(fresh(models.mixtral), lora(), tmp_path / name, seed=seed)
    report = at.combine_adapters([tmp_path / "a", tmp_path / "b"], out=tmp_path / "o", weights=(1, 1))
    assert report.totals.error == 0
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "o"))
    for name, tensor in before.items():
        width = tensor.shape[1] if name.endswith("lora_A.weight") else tensor.shape[0]
        values = set(tensor.reshape(-1).tolist())
        assert values <= set(after[name].reshape(-1).tolist())
        assert width in after[name].shape


def test_what_cannot_be_added_up_is_refused(tmp_path: Path) -> None:
    for name, config in (
        ("a", lora()),
        ("b", lora(r=3)),
        ("one", lora(target_parameters=BOTH[:1])),
        ("pattern", lora(rank_pattern={"experts.gate_up_proj": 4})),
        ("plain", lora(target_parameters=None, target_modules=["q_proj"])),
    ):
        saved(fresh(models.mixtral), config, tmp_path / name)
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "o"

    def combine(*names: str, **options: Any) -> Any:
        folders = [tmp_path / name for name in names]
        return lambda o: at.combine_adapters(folders, out=o, weights=[1.0] * len(names), **options)

    for options in ({"method": "svd"}, {"method": "ties"}, {"method": "slerp"}, {"rank": 2}, {"energy": 0.9}):
        refused(at.UnsupportedError, "stacked", out, combine("a", "b", **options))
    refused(at.UnsupportedError, "stacked", out, combine("a", "b", method="linear", space="factors"))
    refused(at.MismatchError, "stacked", out, combine("a", "one"))
    refused(at.UnsupportedError, "stacked", out, combine("a", "pattern"))
    refused(at.MismatchError, "no-common-targets", out, combine("a", "plain"))
    file = tmp_path / "b" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 5}))
    refused(at.FormatError, "rank", out, combine("a", "b"))
    wrong = tmp_path / "one" / "adapter_model.safetensors"
    tensors = {n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in load_file(wrong).items()}
    save_file(tensors, wrong)
    saved(fresh(models.mixtral), lora(target_parameters=BOTH[:1]), tmp_path / "c")
    refused(at.MismatchError, "shape", out, combine("one", "c"))
