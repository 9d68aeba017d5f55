"""The verbs of low-rank algebra that read a base, on one that is stored quantised: PEFT on the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file

import adapterhub_tools as at
from tests.parity.oracle import assert_close
from tests.parity.quantised_bases import SCHEMES, adapted, dequantised, load, logits, save_plain

TARGETS = ["q_proj", "down_proj"]


def stored(folder: Path, scheme: str) -> Any:
    """Saves a base in a format of bitsandbytes, computed with in float32; returns it loaded again."""
    save_plain(folder / "plain", torch.float32)
    load(folder / "plain", SCHEMES[scheme]).save_pretrained(folder / "stored")
    return load(folder / "stored")


def outputs(folder: Path, adapter: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(folder / "stored"), folder / adapter).eval())


@pytest.mark.parametrize("scheme", ["nf4,double", "fp4", "int8"])
def test_lora_to_dora_has_the_norms_of_the_dequantised_weights(tmp_path: Path, scheme: str) -> None:
    model = stored(tmp_path, scheme)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    peft = adapted(model, config, tmp_path / "lora")
    report = at.convert(tmp_path / "lora", tmp_path / "dora", to="dora", base=tmp_path / "stored")
    assert any("dequantised" in note for note in report.notes)
    made = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    weights = dequantised(peft.get_base_model(), torch.float32)
    for name, layer in peft.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            delta = layer.get_delta_weight("default").double()
            norms = (weights[f"{name}.base_layer.weight"].double() + delta).norm(dim=1)
            found = made[f"base_model.model.{name}.lora_magnitude_vector"]
            assert torch.equal(found, norms.float()) or torch.allclose(found.double(), norms, rtol=1e-7)
    if scheme != "int8":  # LLM.int8() rounds its inputs too: more than the difference
        assert_close(outputs(tmp_path, "dora"), outputs(tmp_path, "lora"), "logits", 1e-5)
    merged = at.merge(tmp_path / "stored", tmp_path / "dora", tmp_path / "one", dtype="float32")
    other = at.merge(tmp_path / "stored", tmp_path / "lora", tmp_path / "two", dtype="float32")
    assert merged.changed == other.changed == 4
    for name, weight in load_file(tmp_path / "two" / "model.safetensors").items():
        again = load_file(tmp_path / "one" / "model.safetensors")[name]
        assert_close(again, weight, name, 1e-6)


def test_another_method_becomes_lora_on_the_dequantised_weights(tmp_path: Path) -> None:
    config = IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])
    adapted(stored(tmp_path, "nf4"), config, tmp_path / "ia3")
    at.convert(tmp_path / "ia3", tmp_path / "lora", to="lora", base=tmp_path / "stored", rank=64)
    assert_close(outputs(tmp_path, "lora"), outputs(tmp_path, "ia3"), "logits", 1e-4)


def test_adapters_that_depend_on_the_base_are_combined_on_it(tmp_path: Path) -> None:
    """DoRA's change depends on the base: the sum of two is compared with the merges of each."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True)
    stored(tmp_path, "nf4")
    for name, size in (("one", 0.05), ("two", 0.1)):
        adapted(load(tmp_path / "stored"), config, tmp_path / name, size=size)
        at.init(tmp_path / name, base=tmp_path / "stored")
        at.merge(tmp_path / "stored", tmp_path / name, tmp_path / f"{name}-merged", dtype="float64")
    both = [tmp_path / "one", tmp_path / "two"]
    options: dict[str, Any] = {"weights": [0.5, 0.25], "method": "svd", "rank": 64}
    at.combine_adapters(both, out=tmp_path / "sum", base=tmp_path / "stored", **options)
    at.merge(tmp_path / "stored", tmp_path / "sum", tmp_path / "sum-merged", dtype="float64")
    names = ("sum", "one", "two")
    summed, one, two = (load_file(tmp_path / f"{name}-merged" / "model.safetensors") for name in names)
    for name, stored_weight in dequantised(load(tmp_path / "stored"), torch.float32).items():
        if any(target in name for target in TARGETS):
            weight = stored_weight.double()
            expected = weight + 0.5 * (one[name] - weight) + 0.25 * (two[name] - weight)
            assert_close(summed[name], expected, name, 1e-6)


def test_a_recorded_scheme_is_named_where_the_base_is_not_quantised(tmp_path: Path) -> None:
    save_plain(tmp_path / "plain", torch.float32)
    adapted(load(tmp_path / "plain"), LoraConfig(r=4, target_modules=TARGETS), tmp_path / "lora")
    scheme = {"scheme": "bitsandbytes-nf4", "compute_dtype": "F32"}
    at.init(tmp_path / "lora", base=tmp_path / "plain", quantisation=scheme)
    report = at.convert(tmp_path / "lora", tmp_path / "dora", to="dora", base=tmp_path / "plain")
    assert any("as stored, though the manifest records bitsandbytes-nf4" in note for note in report.notes)


def test_a_base_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapted(stored(tmp_path, "nf4"), LoraConfig(r=4, target_modules=TARGETS), tmp_path / "lora")
    file = tmp_path / "stored" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight.absmax"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(at.FormatError, match="absmax"):
        at.convert(tmp_path / "lora", tmp_path / "dora", to="dora", base=tmp_path / "stored")
    assert not (tmp_path / "dora").exists()
