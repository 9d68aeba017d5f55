"""combine --into on models of PEFT: the deltas that PEFT has, and everything else as merge does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import nn

import adapterhub_tools as at
from tests.parity import models, quantised_bases
from tests.parity.low_rank import deltas, fresh, loaded, saved
from tests.property import combine_formulas as dense


def lora(targets: list[str], **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **fields})


def tied_llama() -> nn.Module:
    return models.llama(tied=True)


Case = tuple[Callable[[], nn.Module], PeftConfig, PeftConfig]
ADDITIVE: dict[str, Case] = {
    "tied embedding": (tied_llama, lora(["embed_tokens", "q_proj"]), lora(["q_proj", "o_proj"], r=2)),
    "resized head": (
        models.llama,
        lora(["q_proj"], modules_to_save=["lm_head", "norm"]),
        lora(["q_proj", "up_proj"], use_rslora=True),
    ),
    "trained tokens": (
        models.llama,
        lora(["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]}),
        lora(["q_proj"], r=2),
    ),
    "conv1d": (
        models.gpt2,
        lora(["c_attn", "c_proj"], fan_in_fan_out=True),
        lora(["c_attn"], r=3, fan_in_fan_out=True),
    ),
    "convolutions": (models.convolutions, lora(["along", "wide", "point"]), lora(["wide", "point"], r=2)),
    "biases": (models.opt, lora(["q_proj", "fc1"], lora_bias=True), lora(["q_proj"], r=2, lora_bias=True)),
    "loha": (models.llama, LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]), lora(["q_proj", "k_proj"])),
}
OTHERS: dict[str, Case] = {
    "dora": (models.llama, lora(["q_proj", "v_proj"], use_dora=True), lora(["q_proj"])),
    "doras": (models.gpt2, *(lora(["c_attn"], r=r, use_dora=True, fan_in_fan_out=True) for r in (2, 4))),
}


def scene(case: Case, folder: Path) -> tuple[Path, list[Path]]:
    build, *configs = case
    base = models.save_base(fresh(build), folder / "base")
    for place, config in enumerate(configs):
        saved(fresh(build), config, folder / f"a{place}", seed=3 + place)
    return base, [folder / "a0", folder / "a1"]


def into(
    base: Path, adapters: list[Path], out: Path, method: str, weights: tuple[float, ...], **more: Any
) -> Any:
    return at.combine_adapters(adapters, out=out, weights=weights, method=method, into=base, **more)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ADDITIVE)
def test_linear_is_merge_with_scales(name: str, tmp_path: Path) -> None:
    base, adapters = scene(ADDITIVE[name], tmp_path)
    report = into(base, adapters, tmp_path / "out", "linear", (0.7, -0.4))
    merged = at.merge(base, adapters, tmp_path / "merged", scale=[0.7, -0.4])
    assert report.digest == merged.digest
    assert report.expected == merged.expected


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties", "della"])
@pytest.mark.parametrize("name", [*ADDITIVE, *OTHERS])
def test_a_weight_of_zero_leaves_the_merge_of_the_other(name: str, method: str, tmp_path: Path) -> None:
    """With a density of 1 nothing is trimmed or dropped: ties, tensors in full and all names are merge's."""
    base, adapters = scene({**ADDITIVE, **OTHERS}[name], tmp_path)
    more = {"epsilon": 0.0} if method == "della" else {}
    report = into(base, adapters, tmp_path / "out", method, (0.75, 0.0), density=1.0, **more)
    if name in OTHERS:
        at.merge(base, adapters[0], tmp_path / "merged", scale=0.75)
    else:
        at.merge(base, adapters, tmp_path / "merged", scale=[0.75, 0.0])
    found, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        # A delta in float64 and its sum rounded once: the exact rounding, short of a tie at the 53rd bit.
        assert torch.equal(found[key], tensor), key
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "merged" / "config.json"
    ).read_bytes()
    assert at.verify(base=base, adapter=adapters, merged=tmp_path / "out").ok
    assert report.receipt.guarantee == "tolerance"


@pytest.mark.parametrize("name", ["tied embedding", "conv1d", "convolutions"])
def test_ties_of_the_deltas_that_peft_has(name: str, tmp_path: Path) -> None:
    base, adapters = scene(ADDITIVE[name], tmp_path)
    build, weights = ADDITIVE[name][0], (0.7, -0.4)
    parts = [deltas(loaded(fresh(build), folder)) for folder in adapters]
    into(base, adapters, tmp_path / "out", "ties", weights, density=0.3)
    before, after = weights_of(base), weights_of(tmp_path / "out")
    for path in {path for part in parts for path in part}:
        own = [
            w * part[path].double().numpy() for w, part in zip(weights, parts, strict=True) if path in part
        ]
        own = [delta.reshape(len(delta), -1) for delta in own]
        delta = dense.elected_mean([dense.kept_largest(d, 0.3) for d in own])
        key = next(key for key in before if key.endswith(f"{path.removeprefix('transformer.')}.weight"))
        found = (after[key].double() - before[key].double()).numpy().reshape(before[key].shape[0], -1)
        far = np.abs(found - delta) > 1e-6
        # PEFT's float32 deltas may place an element on the other side of the limit.
        assert far.mean() <= 2 / far.size, path


def test_two_adapters_that_replace_one_tensor(tmp_path: Path) -> None:
    config = lora(["q_proj"], modules_to_save=["lm_head"])
    base, adapters = scene((models.llama, config, config), tmp_path)
    with pytest.raises(at.MismatchError) as caught:
        into(base, adapters, tmp_path / "out", "ties", (1.0, 1.0))
    assert caught.value.problems[0].kind == "replaced-twice"
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_stored_quantised(tmp_path: Path) -> None:
    """QLoRA adapters: the deltas meet the weights that they were trained on, dequantised."""
    model = quantised_bases.load(
        quantised_bases.save_plain(tmp_path / "half", torch.bfloat16),
        quantised_bases.SCHEMES["nf4"],
        torch.bfloat16,
    )
    model.save_pretrained(tmp_path / "base")
    for place in range(2):
        loaded_again = quantised_bases.load(tmp_path / "base")
        config = lora(["q_proj", "down_proj"], r=2 + place)
        quantised_bases.adapted(loaded_again, config, tmp_path / f"a{place}", size=0.05 * (place + 1))
    adapters = [tmp_path / "a0", tmp_path / "a1"]
    report = into(tmp_path / "base", adapters, tmp_path / "out", "ties", (0.75, 0.0), density=1.0)
    at.merge(tmp_path / "base", adapters, tmp_path / "merged", scale=[0.75, 0.0])
    found, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert report.receipt.options["onto"] == "dequantized"
    both = into(tmp_path / "base", adapters, tmp_path / "both", "ties", (1.0, 0.5), density=0.5)
    again = at.merge(tmp_path / "base", adapters, tmp_path / "again", replay=tmp_path / "both")
    assert again.digest == both.digest != report.digest
