"""Other methods than LoRA: the base comes back, correct merges pass, and faults are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import adapterhub_tools as at
from tests.parity.models import llama_config, perturb_trainable, randomise
from tests.undo.models import files_of

TARGETS = ["q_proj", "v_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr": LoKrConfig(r=4, alpha=8, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "boft": BOFTConfig(boft_block_size=4, target_modules=TARGETS),
}


def make(folder: Path, method: str, dtype: torch.dtype) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    randomise(model, 1)
    model.to(dtype).save_pretrained(folder / "base")
    tuned = get_peft_model(model, CONFIGS[method])
    perturb_trainable(tuned, 2, 0.05)
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("method", CONFIGS)
def test_undone_and_verified(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, adapter = make(tmp_path, method, dtype)
    report = at.merge(base, adapter, tmp_path / "merged", undo=True)
    assert report.changed > 0
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert files_of(tmp_path / "undone") == files_of(base)
    for sample in ("rows", "full"):
        checked = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", sample=sample)
        assert checked.ok, [str(problem) for problem in checked.problems]
    changed = [tensor for tensor in checked.tensors if tensor.verdict != "identical"]
    assert {tensor.verdict for tensor in changed} <= {"recomputed", "correctly rounded"}
    assert len(changed) == report.changed
    own = {tensor.arithmetic for tensor in changed} == {"own"}
    assert own == (method in ("dora", "ia3", "loha", "lokr")), changed


@pytest.mark.parametrize("method", CONFIGS)
def test_faults_are_found(tmp_path: Path, method: str) -> None:
    base, adapter = make(tmp_path, method, torch.bfloat16)
    at.merge(base, adapter, tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    right, before = load_file(path), load_file(base / "model.safetensors")
    name = next(name for name, tensor in sorted(right.items()) if not torch.equal(tensor, before[name]))
    faults = {
        "not applied": before[name],
        "single": right[name].clone(),
        "twice": (2 * right[name].float() - before[name].float()).to(torch.bfloat16),
    }
    # With a stated tolerance the last bit may differ from machine to machine.
    bit = 1 if method in ("dora", "ia3", "loha", "lokr") else 16
    faults["single"].view(torch.int16)[3, 3] ^= bit
    for fault, tensor in faults.items():
        save_file({**right, name: tensor.contiguous()}, path, {"format": "pt"})
        report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", sample="full")
        assert report.exit_code == 1, fault
        assert [problem.loc for problem in report.problems] == [name], fault
        if fault == "not applied":
            assert "the adapter is not applied" in str(report.problems[0])


def test_an_ignored_magnitude_is_named(tmp_path: Path) -> None:
    """DoRA merged as if it were LoRA."""
    base, adapter = make(tmp_path, "dora", torch.bfloat16)
    at.merge(base, adapter, tmp_path / "merged")
    factors = load_file(adapter / "adapter_model.safetensors")
    path = tmp_path / "merged" / "model.safetensors"
    tensors, before = load_file(path), load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    A, B = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    tensors[f"{name}.weight"] = (before[f"{name}.weight"].double() + 8 / 4 * B @ A).float().bfloat16()
    save_file(tensors, path, {"format": "pt"})
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged")
    assert "the magnitude is ignored" in str(report.problems[0]), report.problems


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["dora", "ia3", "loha", "lokr"])
def test_a_merge_by_peft_passes(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, adapter = make(tmp_path, method, dtype)
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", sample="full")
    print(method, dtype, report.counts, max(tensor.steps for tensor in report.tensors))
    assert report.ok, [str(problem) for problem in report.problems]
