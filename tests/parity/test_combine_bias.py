"""Adapters with lora_bias combined with others: PEFT can merge the result, and gets the sum of its merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import adapterhub_tools as at
from tests.parity import models
from tests.parity.low_rank import fresh, loaded, refused, saved

WEIGHTS = (0.7, -0.4)


def biased_attention() -> nn.Module:
    """A Llama whose attention has biases, and whose MLP has none."""
    config = models.llama_config()
    config.attention_bias = True
    model = LlamaForCausalLM(config)
    models.randomise(model, 1)
    return model


def lora(targets: list[str], **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **fields})


def merged(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of PEFT's merge, in float64."""
    model: Any = PeftModel.from_pretrained(fresh(biased_attention), folder)
    return {n: p.detach().double() for n, p in model.merge_and_unload().named_parameters()}


def is_the_sum(out: Path, folders: list[Path], bound: float = 1e-6) -> dict[str, Any]:
    """Checks PEFT's merge of a combination against the sum of its merges of the parts; returns the config."""
    start = {n: p.detach().double() for n, p in fresh(biased_attention).named_parameters()}
    parts, found = [merged(folder) for folder in folders], merged(out)
    assert found.keys() == start.keys()
    for name, before in start.items():
        expected = before + sum(w * (p[name] - before) for w, p in zip(WEIGHTS, parts, strict=True))
        assert float((found[name] - expected).abs().max()) < bound, name
    config: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return config


ATTENTION = lora(["q_proj", "o_proj"], lora_bias=True)
OTHERS = {
    "mlp": (lora(["q_proj", "down_proj"]), "lora_only"),
    "mlp of rsLoRA": (lora(["down_proj", "q_proj"], r=2, use_rslora=True), "lora_only"),
    "trained biases": (lora(["q_proj", "down_proj"], bias="lora_only"), "lora_only"),
    "all biases": (lora(["q_proj", "down_proj"], bias="all"), "all"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_without_a_bias_beside_lora_bias(name: str, tmp_path: Path) -> None:
    base = models.save_base(fresh(biased_attention), tmp_path / "base")
    saved(fresh(biased_attention), ATTENTION, tmp_path / "a")
    saved(fresh(biased_attention), OTHERS[name][0], tmp_path / "b", seed=4)
    folders, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    refused(at.MismatchError, "base", out, lambda o: at.combine_adapters(folders, out=o, weights=WEIGHTS))
    report = at.combine_adapters(folders, out=out, weights=WEIGHTS, base=base)
    config = is_the_sum(out, folders)
    assert config["lora_bias"] is False
    assert config["bias"] == OTHERS[name][1]
    assert any("lora_bias, carried in full" in reason for _, reason in report.kept)
    assert not at.validate(out).problems
    at.merge(base, out, tmp_path / "merged", dtype="float64")
    other = at.combine_adapters(folders[::-1], out=tmp_path / "other", weights=WEIGHTS[::-1], base=base)
    assert other.digest == report.digest


def test_where_every_layer_has_a_bias_lora_bias_stays(tmp_path: Path) -> None:
    base = models.save_base(fresh(biased_attention), tmp_path / "base")
    saved(fresh(biased_attention), ATTENTION, tmp_path / "a")
    saved(fresh(biased_attention), lora(["q_proj", "v_proj"]), tmp_path / "b", seed=4)
    folders = [tmp_path / "a", tmp_path / "b"]
    at.combine_adapters(folders, out=tmp_path / "out", weights=WEIGHTS, base=base)
    config = is_the_sum(tmp_path / "out", folders)
    assert (config["lora_bias"], config["bias"]) == (True, "none")
    saved(fresh(biased_attention), lora(["q_proj", "o_proj"]), tmp_path / "c", seed=5)
    folders = [tmp_path / "a", tmp_path / "c"]
    at.combine_adapters(folders, out=tmp_path / "alone", weights=WEIGHTS)  # no base is needed here
    assert is_the_sum(tmp_path / "alone", folders)["lora_bias"] is True


def test_a_weight_of_zero_and_dropped_biases(tmp_path: Path) -> None:
    """A bias is a delta, which counts by its weight under any method; --full drop leaves tensors out."""
    base = models.save_base(fresh(biased_attention), tmp_path / "base")
    saved(fresh(biased_attention), ATTENTION, tmp_path / "a")
    saved(fresh(biased_attention), lora(["q_proj", "down_proj"], bias="all"), tmp_path / "b", seed=4)
    folders = [tmp_path / "a", tmp_path / "b"]
    at.combine_adapters(folders, out=tmp_path / "out", weights=(0.5, 1), base=base, full="drop")
    start = dict(fresh(biased_attention).named_parameters())
    own, found = merged(tmp_path / "a"), merged(tmp_path / "out")
    for name in (n for n in start if n.endswith("bias")):
        expected = (start[name] + 0.5 * (own[name] - start[name])).detach()
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-6), name
    at.combine_adapters(folders, out=tmp_path / "none", weights=(0, 1), base=base, full="drop")
    loaded(fresh(biased_attention), tmp_path / "none")
    assert all(torch.equal(p, start[n].double()) for n, p in merged(tmp_path / "none").items() if "bias" in n)
