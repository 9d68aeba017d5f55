"""Every precision of base, factors and output: the exact formula, rounded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaForCausalLM,
)

from tests.parity import models
from tests.parity.exact import Factors, assert_exactly_rounded, factors_of, nearest
from tests.parity.models import VOCAB, perturb_trainable
from tests.parity.oracle import (
    assert_close,
    assert_untouched_bits,
    load_exactly,
    lora,
    ours,
    saved_with,
    stored,
)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def in_precision(
    folder: Path, base: torch.dtype, factors: torch.dtype, config: LoraConfig
) -> tuple[Path, Path]:
    """Saves a base and an adapter in given precisions; the values are those of the precision."""
    models.llama().to(base).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=base)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    perturb_trainable(adapted, 3)
    adapted.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({n: t.to(factors) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("root", [False, True], ids=["alpha/r", "alpha/√r"])
@pytest.mark.parametrize("factors", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("base", ["bfloat16", "float16", "float32", "float64"])
def test_every_precision_is_the_exact_formula_rounded_once(
    base: str, factors: str, root: bool, tmp_path: Path
) -> None:
    """PEFT adds in the base's own precision and rounds at each step; the result here is the nearest value."""
    config = lora(target_modules=["q_proj", "down_proj"], r=8, lora_alpha=3, use_rslora=root)
    folders = in_precision(tmp_path, DTYPES[base], DTYPES[factors], config)
    ours(*folders, tmp_path / "out")
    before, after = stored(folders[0]), stored(tmp_path / "out")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        name = f"{module}.weight"
        assert after[name].dtype == DTYPES[base]
        assert_exactly_rounded(after[name], before[name], [factors_of(folders[1], module)])
    assert_untouched_bits(
        tmp_path / "out", folders[0], {n for n in before if "q_proj" in n or "down_proj" in n}
    )


def test_peft_s_own_bfloat16_merge_is_not_the_nearest_value(tmp_path: Path) -> None:
    """The premise of the test above: a good part of PEFT's weights are another bfloat16 value."""
    base, adapter = in_precision(tmp_path, torch.bfloat16, torch.bfloat16, lora())
    ours(base, adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter, autocast_adapter_dtype=False
    )
    reference = model.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    found = stored(tmp_path / "out")[name]
    assert not torch.equal(found, reference[name])
    assert_close(found, reference[name], name, 2.0**-7)


def test_an_adapter_that_peft_kept_in_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    models.llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    saved_with(model, lora(modules_to_save=["lm_head"]), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for n, t in saved.items() if "lora_" in n} == {torch.float32}
    ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.v_proj"
    assert_exactly_rounded(
        after[f"{name}.weight"], before[f"{name}.weight"], [factors_of(tmp_path / "adapter", name)], count=512
    )
    assert torch.equal(after["lm_head.weight"], saved["base_model.model.lm_head.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_the_dtype_flag_rounds_the_exact_value_once(base: str, to: str, tmp_path: Path) -> None:
    folders = in_precision(tmp_path, DTYPES[base], torch.float32, lora(target_modules=["q_proj"]))
    ours(*folders, tmp_path / "out", dtype=to)
    before, after = stored(folders[0]), stored(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {DTYPES[to]}
    name = "model.layers.0.self_attn.q_proj"
    assert_exactly_rounded(after[f"{name}.weight"], before[f"{name}.weight"], [factors_of(folders[1], name)])
    for other in before.keys() - {n for n in before if "q_proj" in n}:
        assert torch.equal(after[other], before[other].to(DTYPES[to])), other
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == to
    load_exactly(LlamaForCausalLM, tmp_path / "out", dtype=DTYPES[to])


def test_bfloat16_convolution_embedding_and_bias(tmp_path: Path) -> None:
    """The other layouts in bfloat16: each element against the formula of its kind."""
    made = models.convolutions().to(torch.bfloat16)
    base = models.save_base(made, tmp_path / "base")
    adapted = get_peft_model(
        made, lora(target_modules=["wide"], lora_bias=True), autocast_adapter_dtype=False
    )
    perturb_trainable(adapted, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    ours(base, tmp_path / "adapter", tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    part = factors_of(tmp_path / "adapter", "wide")
    assert_exactly_rounded(after["wide.weight"].flatten(1), before["wide.weight"].flatten(1), [part])
    bias = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.wide.lora_B.bias"]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    whole = Factors(a=one, b=bias[:, None], alpha=part.alpha, rank=part.rank)
    assert_exactly_rounded(after["wide.bias"][:, None], before["wide.bias"][:, None], [whole])


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_embedding(tied: bool, tmp_path: Path) -> None:
    models.llama(tied=tied).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapted = get_peft_model(
        model, lora(target_modules=["embed_tokens"], use_rslora=True), autocast_adapter_dtype=False
    )
    perturb_trainable(adapted, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    part = Factors(a=tensors[f"{prefix}B"].t(), b=tensors[f"{prefix}A"].t(), alpha=6, rank=4, root=True)
    name = "model.embed_tokens.weight"
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    assert_exactly_rounded(after[name], before[name], [part])
    assert before[name].shape == (VOCAB, models.HIDDEN)
    if tied:
        assert torch.equal(after["lm_head.weight"], before[name])


def test_the_yardstick_itself() -> None:
    """``nearest`` agrees with torch where torch rounds once, and ties go to even."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(1)
    values = torch.randn(500, generator=generator) * torch.logspace(-44, 4, 500, base=10.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = values.to(dtype)
        for value, expected in zip(values.tolist(), rounded.tolist(), strict=True):
            assert nearest(Fraction(value), dtype) == Fraction(expected)
    assert nearest(Fraction(257), torch.bfloat16) == 256
    assert nearest(Fraction(259), torch.bfloat16) == 260


@pytest.mark.slow
@pytest.mark.parametrize("root", [False, True], ids=["alpha/r", "alpha/√r"])
def test_a_layer_of_real_width(root: bool, tmp_path: Path) -> None:
    """A bfloat16 matrix of 2048 × 1024 at rank 64: two thousand elements against the exact formula."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1024, 2048, bias=False)).to(torch.bfloat16)
    base = models.save_base(layer, tmp_path / "base")
    adapted = get_peft_model(
        layer,
        lora(target_modules=["0"], r=64, lora_alpha=16, use_rslora=root),
        autocast_adapter_dtype=False,
    )
    perturb_trainable(adapted, 3, 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    ours(base, tmp_path / "adapter", tmp_path / "out")
    assert_exactly_rounded(
        stored(tmp_path / "out")["0.weight"],
        stored(base)["0.weight"],
        [factors_of(tmp_path / "adapter", "0")],
        count=2000,
    )
