"""Several adapters in one merge, and the caller's factor on a delta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    LlamaForCausalLM,
)

from tests.parity import models
from tests.parity.exact import assert_exactly_rounded, factors_of
from tests.parity.models import outputs_of
from tests.parity.oracle import (
    Case,
    adapt,
    assert_close,
    assert_same_outputs,
    assert_same_weights,
    assert_untouched_bits,
    load_exactly,
    lora,
    ours,
    saved_with,
    stored,
)


def two_adapters(folder: Path) -> tuple[Path, Path, Path]:
    """A base and two adapters of different targets, rank, scaling and factor dtype."""
    models.llama().save_pretrained(folder / "base")
    for name, config, seed in (
        ("first", lora(target_modules=["q_proj", "v_proj"]), 3),
        ("second", lora(target_modules=["q_proj", "o_proj"], r=7, lora_alpha=5, use_rslora=True), 4),
    ):
        saved_with(LlamaForCausalLM.from_pretrained(folder / "base"), config, folder / name, seed)
    return folder / "base", folder / "first", folder / "second"


def test_two_adapters_are_summed_exactly_and_rounded_once(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    ours(base, [first, second], tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn"
        both = [factors_of(adapter, f"{module}.q_proj") for adapter in (first, second)]
        name = f"{module}.q_proj.weight"
        assert_exactly_rounded(after[name], before[name], both, count=1024)
        for part, adapter in (("v_proj", first), ("o_proj", second)):
            name = f"{module}.{part}.weight"
            assert_exactly_rounded(after[name], before[name], [factors_of(adapter, f"{module}.{part}")])


def test_the_order_of_two_adapters_does_not_matter(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    one = ours(base, [first, second], tmp_path / "one")
    other = ours(base, [second, first], tmp_path / "other")
    assert one.digest == other.digest


def test_two_adapters_give_the_outputs_of_both_at_once(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    together = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), first, adapter_name="first")
    together.load_adapter(second, adapter_name="second")
    together.base_model.set_adapter(["first", "second"])
    ours(base, [first, second], tmp_path / "out")
    merged = load_exactly(LlamaForCausalLM, tmp_path / "out")
    assert_close(outputs_of(merged), outputs_of(together), "outputs", 1e-5)


@pytest.mark.parametrize("scale", [0.3, 2.0, -1.0, 1e-3])
def test_a_scale_multiplies_the_delta_exactly(scale: float, tmp_path: Path) -> None:
    adapted = adapt(Case(build=models.llama, config=lora), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out", scale=scale)
    name = "model.layers.1.mlp.down_proj"
    assert_exactly_rounded(
        stored(tmp_path / "out")[f"{name}.weight"],
        stored(adapted.base)[f"{name}.weight"],
        [factors_of(adapted.adapter, name, scale=scale)],
    )


def test_a_scale_is_peft_s_set_scale(tmp_path: Path) -> None:
    adapted = adapt(
        Case(build=models.opt, config=lambda: lora(lora_bias=True, target_modules=["fc1"])), tmp_path
    )
    for module in adapted.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    adapted.outputs = outputs_of(adapted.model)
    ours(adapted.base, adapted.adapter, tmp_path / "out", scale=0.25)
    merged = adapted.loader(tmp_path / "out")
    assert_same_outputs(merged, adapted)
    assert_same_weights(merged, adapted.model.merge_and_unload())


def test_scale_zero_keeps_the_base_bits(tmp_path: Path) -> None:
    adapted = adapt(Case(build=models.llama, config=lora), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out", scale=0.0)
    assert_untouched_bits(tmp_path / "out", adapted.base, set())


def test_scales_of_two_adapters(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    ours(base, [first, second], tmp_path / "out", scale=(0.5, -0.7))
    name = "model.layers.0.self_attn.q_proj"
    parts = [factors_of(first, name, scale=0.5), factors_of(second, name, scale=-0.7)]
    assert_exactly_rounded(stored(tmp_path / "out")[f"{name}.weight"], stored(base)[f"{name}.weight"], parts)


def test_the_scale_does_not_reach_what_is_trained_whole(tmp_path: Path) -> None:
    adapted = adapt(Case(build=models.llama, config=lambda: lora(modules_to_save=["lm_head"])), tmp_path)
    report = ours(adapted.base, adapted.adapter, tmp_path / "out", scale=0.5)
    trained = load_file(adapted.adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(stored(tmp_path / "out")["lm_head.weight"], trained)
    assert any("does not apply to the 1 full tensors" in note for note in report.notes)
