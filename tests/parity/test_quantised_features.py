"""What else an adapter on a quantised base may carry: heads, ties, trained tokens, modules saved whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import adapterhub_tools as at
from tests.parity.oracle import assert_close
from tests.parity.quantised_bases import NF4_DOUBLE, adapted, load, logits, save_plain

CONFIGS: dict[str, Callable[[], LoraConfig]] = {
    "a head": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "an embedding": lambda: LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "a head saved whole": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[2, 5, 7]),
    "all linear": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "ranks by pattern": lambda: LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"q_proj": 3},
    ),
}


# What a tie means for a change of the head is in tests/parity/test_embeddings.py.
PAIRS = [(name, tied) for name in CONFIGS for tied in (False, True) if not (tied and "head" in name)]


@pytest.mark.parametrize(("name", "tied"), PAIRS)
def test_the_logits_are_those_of_the_unmerged_model(tmp_path: Path, name: str, *, tied: bool) -> None:
    base = save_plain(tmp_path / "base", torch.float32, tie_word_embeddings=tied)
    expected = logits(adapted(load(base, NF4_DOUBLE), CONFIGS[name](), tmp_path / "adapter"))
    options: dict[str, Any] = {"quant": "nf4,double", "compute_dtype": "fp32"}
    report = at.merge(base, tmp_path / "adapter", tmp_path / "out", **options)
    assert report.changed == report.expected > 0
    assert_close(logits(load(tmp_path / "out")), expected, "logits", 1e-5)


def test_a_linear_layer_saved_whole_is_quantised_with_the_rest(tmp_path: Path) -> None:
    """PEFT saves a dequantised copy; in the base's own format it is quantised as any merged weight."""
    base = save_plain(tmp_path / "base", torch.bfloat16)
    load(base, NF4_DOUBLE, torch.bfloat16).save_pretrained(tmp_path / "stored")
    plain = load(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    adapted(plain, config, tmp_path / "adapter")
    report = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "out", onto="quantized")
    assert report.receipt is not None
    actions = {tensor.name: tensor.action for tensor in report.receipt.tensors}
    name = "model.layers.0.mlp.down_proj.weight"
    assert actions[name] == actions[f"{name}.absmax"] == "replace"
    assert actions["model.layers.0.mlp.up_proj.weight"] == "copy"
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    given = saved["base_model.model.model.layers.0.mlp.down_proj.weight"]
    from bitsandbytes.functional import quantize_4bit

    packed, _ = quantize_4bit(given.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], packed)


def test_a_combination_is_merged_onto_dequantised_weights(tmp_path: Path) -> None:
    base = save_plain(tmp_path / "base", torch.bfloat16)
    load(base, NF4_DOUBLE, torch.bfloat16).save_pretrained(tmp_path / "stored")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    adapted(load(base, NF4_DOUBLE, torch.bfloat16), config, tmp_path / "adapter")
    one = at.merge(tmp_path / "stored", [tmp_path / "adapter"] * 2, tmp_path / "one", scale=0.5)
    two = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "two")
    assert one.digest == two.digest
