"""Adapters trained on quantised bases merge onto the weights that they were trained on.

The reference is PEFT's unmerged model on a base that transformers and bitsandbytes quantised on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file

import adapterhub_tools as at
from tests.parity.exact import assert_exactly_rounded, factors_of
from tests.parity.oracle import assert_close
from tests.parity.quantised_bases import (
    NF4_DOUBLE,
    SCHEMES,
    adapted,
    dequantised,
    load,
    logits,
    save_plain,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]
FOUR_BIT = [name for name in SCHEMES if name != "int8"]
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": lambda: LoraConfig(r=8, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "base", torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("half") / "base", torch.bfloat16)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_the_merged_model_has_the_logits_of_the_unmerged_one(
    plain: Path, tmp_path: Path, scheme: str, method: str
) -> None:
    """In float32, so that both compute with the same weights: QLoRA, QDoRA and (IA)³."""
    model = load(plain, SCHEMES[scheme])
    before = logits(model)
    peft = adapted(model, CONFIGS[method](), tmp_path / "adapter")
    expected = logits(peft)
    assert float((expected - before).abs().max()) > 1e-3
    report = at.merge(
        plain, tmp_path / "adapter", tmp_path / "out", quant=SCHEMES[scheme].words, compute_dtype="fp32"
    )
    assert report.changed == report.expected == 6
    assert report.receipt is not None
    assert report.receipt.options["onto"] == "dequantized"
    assert_close(logits(load(tmp_path / "out")), expected, "logits", 1e-5)


def test_int8_weights_are_those_that_peft_dequantises(plain: Path, tmp_path: Path) -> None:
    """LLM.int8() quantises its inputs too, so weights are compared, not logits."""
    model = load(plain, SCHEMES["int8"])
    peft = adapted(model, CONFIGS["lora"](), tmp_path / "adapter")
    at.merge(plain, tmp_path / "adapter", tmp_path / "out", quant="int8", compute_dtype="fp32")
    base, merged = dequantised(peft.get_base_model(), torch.float32), weights_of(tmp_path / "out")
    kept = set(merged) - {name.replace(".base_layer", "") for name in base}
    assert kept == {name for name in weights_of(plain) if "norm" in name or "embed" in name or "head" in name}
    for name, weight in base.items():
        plain_name = name.replace(".base_layer", "")
        if plain_name == name:
            assert torch.equal(merged[name], weight), name
        else:
            factors = factors_of(tmp_path / "adapter", plain_name.removesuffix(".weight"))
            assert_exactly_rounded(merged[plain_name], weight, [factors])


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_the_merged_weight_is_correctly_rounded_onto_the_dequantised_one(
    half: Path, tmp_path: Path, scheme: str, compute: str
) -> None:
    """The weights that bitsandbytes dequantises, the exact formula, and one rounding."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    peft = adapted(load(half, SCHEMES[scheme], dtype), CONFIGS["lora"](), tmp_path / "adapter")
    base = {
        name.replace(".base_layer", ""): weight
        for name, weight in dequantised(peft.get_base_model(), dtype).items()
    }
    at.merge(half, tmp_path / "adapter", tmp_path / "out", quant=scheme, compute_dtype=compute)
    merged = weights_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[compute]
    for name, weight in base.items():
        assert merged[name].dtype == dtype
        if any(target in name for target in TARGETS):
            factors = factors_of(tmp_path / "adapter", name.removesuffix(".weight"))
            assert_exactly_rounded(merged[name], weight, [factors])
        else:
            assert torch.equal(merged[name], weight), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stored_base_and_the_base_that_it_was_made_from_merge_to_the_same_bytes(
    half: Path, tmp_path: Path, scheme: str
) -> None:
    model = load(half, SCHEMES[scheme], torch.bfloat16)
    model.save_pretrained(tmp_path / "stored")
    adapted(model, CONFIGS["dora"](), tmp_path / "adapter")
    stored = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "one")
    loaded = at.merge(
        half, tmp_path / "adapter", tmp_path / "two", quant=scheme, compute_dtype="bf16", threads=3
    )
    assert stored.digest == loaded.digest
    assert stored.receipt is not None
    assert stored.receipt.options["onto"] == "dequantized"
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "quantization_config" not in config
    assert any("quantization_config" in note for note in stored.notes)


def test_an_adapter_trained_with_lora_plus_on_a_4_bit_base(plain: Path, tmp_path: Path) -> None:
    peft = adapted(load(plain, NF4_DOUBLE), CONFIGS["lora"](), tmp_path / "adapter", steps=3, size=0.0)
    expected = logits(peft)
    scheme = {"scheme": "bitsandbytes-nf4", "double": True, "compute_dtype": "F32"}
    training = {"optimizer": "AdamW", "lora_plus_ratio": 16}
    at.init(tmp_path / "adapter", base=plain, quantisation=scheme, training=training)
    report = at.merge(plain, tmp_path / "adapter", tmp_path / "out")
    assert report.receipt is not None
    assert report.receipt.options["onto"] == "dequantized"
    assert report.receipt.base.checked == "full"
    assert_close(logits(load(tmp_path / "out")), expected, "logits", 1e-5)


@pytest.mark.parametrize(("double", "where"), [(True, "manifest"), (False, "flags")])
def test_two_adapters_are_summed_on_the_dequantised_base(
    half: Path, tmp_path: Path, double: bool, where: str
) -> None:
    words = "nf4,double" if double else "nf4"
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        adapted(load(half, SCHEMES[words], torch.bfloat16), CONFIGS["lora"](), tmp_path / name)
        if where == "manifest":
            scheme = {"scheme": "bitsandbytes-nf4", "double": double, "compute_dtype": "BF16"}
            at.init(tmp_path / name, base=half, quantisation=scheme)
    flags: dict[str, Any] = {"quant": words, "compute_dtype": "bf16"} if where == "flags" else {}
    adapters = [tmp_path / "one", tmp_path / "two"]
    at.merge(half, adapters, tmp_path / "out", scale=[1.0, -0.5], **flags)
    base = dequantised(load(half, SCHEMES[words], torch.bfloat16), torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    parts = [factors_of(adapters[0], name), factors_of(adapters[1], name, scale=-0.5)]
    merged = weights_of(tmp_path / "out")[f"{name}.weight"]
    assert_exactly_rounded(merged, base[f"{name}.weight"], parts)


def test_conv1d_modules_are_quantised_as_their_transpose(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", NF4_DOUBLE)
    peft = adapted(
        model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tmp_path / "adapter"
    )
    expected = logits(peft)
    at.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quant="nf4,double", compute_dtype="fp32"
    )
    assert_close(logits(load(tmp_path / "out")), expected, "logits", 1e-5)
