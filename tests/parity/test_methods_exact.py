"""DoRA, (IA)³, AdaLoRA, LoHa, LoKr, HiRA and PEFT 0.2's MergedLinear: merged by PEFT and by us.

Weights agree to 1e-6 of the largest of their tensor, outputs to 1e-5. PEFT 0.2 is not at hand, so the last
one is compared with its formula.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import adapterhub_tools as at
from adapterhub_tools.errors import FormatError, LossyError, MismatchError, UnsupportedError
from tests.parity import models
from tests.parity.models import Builder
from tests.parity.oracle import (
    Case,
    adapt,
    assert_same_outputs,
    check_parity,
    ours,
    perturb_trainable,
    refused,
    stored,
)

LINEAR = ["q_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
KINDS = ["wide", "point", "uneven"]


def case(config: str, build: Builder = models.llama, targets: Any = LINEAR, **fields: Any) -> Case:
    return Case(build=build, config=lambda: getattr(peft, config)(target_modules=targets, **fields))


def dora(build: Builder = models.llama, targets: Any = LINEAR, **fields: Any) -> Case:
    return case("LoraConfig", build, targets, **{"use_dora": True, "r": 4, "lora_alpha": 6, **fields})


def ia3(build: Builder, targets: Any, feedforward: Any) -> Case:
    return case("IA3Config", build, targets, feedforward_modules=feedforward)


def adalora(build: Builder = models.llama, targets: Any = LINEAR, **fields: Any) -> Case:
    return case("AdaLoraConfig", build, targets, **{"total_step": 9, "init_r": 5, "target_r": 3, **fields})


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"^model\.layers\.1\..*": 3.5}}

CASES = {
    "DoRA": dora(),
    "DoRA, rsLoRA": dora(use_rslora=True, r=8),
    "DoRA, patterns": dora(**PATTERNS),
    "DoRA, dropout": dora(lora_dropout=0.2),
    "DoRA, biases": dora(models.opt, ["q_proj", "fc1"], bias="lora_only"),
    "DoRA, Conv1D": dora(models.gpt2, CONV1D, fan_in_fan_out=True),
    "DoRA, embedding": dora(targets=["embed_tokens", "q_proj"]),
    "DoRA, convolutions": dora(models.convolutions, ["wide", "point", "uneven", "along", "deep", "head"]),
    "DoRA, head, modules to save": dora(targets=["q_proj"], modules_to_save=["lm_head"]),
    "(IA)³": ia3(models.llama, ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "(IA)³, outputs with biases": ia3(models.opt, ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "(IA)³, feedforward by an expression": ia3(models.llama, ["v_proj", "up_proj"], r".*\.mlp\..*"),
    "(IA)³, Conv1D": ia3(models.gpt2, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "(IA)³, convolutions": ia3(models.convolutions, [*KINDS, "grouped", "deep", "head"], ["point", "head"]),
    "(IA)³, convolution in groups, inputs": ia3(
        models.convolutions, ["grouped", "deep"], ["grouped", "deep"]
    ),
    "(IA)³, encoder and decoder": ia3(models.t5, ["k", "v", "wo"], ["wo"]),
    "AdaLoRA": adalora(),
    "AdaLoRA, alpha and dropout": adalora(lora_alpha=3.5, lora_dropout=0.1),
    "AdaLoRA, Conv1D": adalora(models.gpt2, CONV1D),
    "AdaLoRA, convolutions": adalora(models.convolutions, [*KINDS, "head"]),
    "LoHa": case("LoHaConfig", r=3, alpha=2),
    "LoHa, patterns": case("LoHaConfig", r=3, alpha=2, **PATTERNS),
    "LoHa, convolutions": case("LoHaConfig", models.convolutions, [*KINDS, "along", "head"], r=3),
    "LoHa, convolutions, Tucker": case(
        "LoHaConfig", models.convolutions, [*KINDS, "along"], r=3, use_effective_conv2d=True
    ),
    "LoKr": case("LoKrConfig", r=2, alpha=5),
    "LoKr, both decomposed": case("LoKrConfig", r=1, alpha=5, decompose_both=True),
    "LoKr, whole factors": case("LoKrConfig", r=32, alpha=5),
    "LoKr, factor 4, patterns": case("LoKrConfig", r=2, decompose_factor=4, **PATTERNS),
    "LoKr, convolutions": case("LoKrConfig", models.convolutions, [*KINDS, "head"], r=1),
    "LoKr, convolutions, whole": case("LoKrConfig", models.convolutions, [*KINDS, "along"], r=16),
    "LoKr, convolutions, Tucker": case(
        "LoKrConfig", models.convolutions, KINDS, r=1, use_effective_conv2d=True
    ),
    "HiRA": case("HiraConfig", r=4),
    "HiRA, rank pattern, which PEFT leaves aside": case("HiraConfig", r=4, rank_pattern={"q_proj": 2}),
    "HiRA, Conv1D": case("HiraConfig", models.gpt2, CONV1D),
    "HiRA, embedding": case("HiraConfig", targets=["embed_tokens", "q_proj"], r=3),
    "HiRA, convolutions": case("HiraConfig", models.convolutions, [*KINDS, "along", "deep", "head"], r=3),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_are_pefts(name: str, tmp_path: Path) -> None:
    report, out = check_parity(CASES[name], tmp_path)
    assert report.receipt is not None
    assert report.receipt.guarantee == "exact"
    assert [adapter.guarantee for adapter in report.receipt.adapters] == ["exact"]
    at.validate(tmp_path / "adapter", base=tmp_path / "base").raise_for_problems()
    assert json.loads((out / "merge_receipt.json").read_text())["adapters"][0]["guarantee"] == "exact"


def test_biases_are_scaled_with_the_outputs_only(tmp_path: Path) -> None:
    adapted = adapt(ia3(models.opt, ["v_proj", "fc2"], ["fc2"]), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    before, after = stored(adapted.base), stored(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [f"model.decoder.layers.{i}." for i in range(2)]
    assert changed == {
        layer + name
        for layer in layers
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias", "fc2.weight")
    }


def trained_adalora(folder: Path) -> tuple[Path, Path, PeftModel]:
    """Trains AdaLoRA for some steps, so that ranks are pruned, and saves it with its rank pattern."""
    base = models.llama()
    base.save_pretrained(folder / "base")
    config = peft.AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], init_r=6, target_r=1, tinit=1, tfinal=2, total_step=8, deltaT=1
    )
    model = get_peft_model(base, config)
    perturb_trainable(model, 5)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(32)[None]
    for step in range(8):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    model.eval().save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", model


def test_adalora_with_pruned_ranks(tmp_path: Path) -> None:
    base, adapter, model = trained_adalora(tmp_path)
    pattern = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    ranks = [sum(kept) for kept in pattern.values()]
    assert min(ranks) < 6
    report = ours(base, adapter, tmp_path / "out")
    # What was pruned to rank 0 is a target that does not change.
    assert (report.changed, report.expected) == (sum(rank > 0 for rank in ranks), len(ranks))
    loaded = PeftModel.from_pretrained(models.LlamaForCausalLM.from_pretrained(base), adapter).eval()
    merged = models.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(models.outputs_of(merged), models.outputs_of(loaded), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(models.outputs_of(merged), models.outputs_of(model), rtol=1e-5, atol=1e-5)


def merged_linear_files(
    folder: Path, modules: dict[str, tuple[int, int]], enabled: list[bool], rank: int, alpha: float
) -> Path:
    """An adapter as PEFT 0.2 saved it: A stacked, B a grouped convolution, ``enable_lora`` in the config."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for path, (out, inner) in modules.items():
        count = sum(enabled)
        key = f"base_model.model.{path}."
        tensors[f"{key}lora_A.weight"] = torch.randn(rank * count, inner, generator=generator) * 0.1
        tensors[f"{key}lora_B.weight"] = (
            torch.randn(out // len(enabled) * count, rank, 1, generator=generator) * 0.1
        )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}),
        "enable_lora": enabled,
        "fan_in_fan_out": False,
        "merge_weights": False,
        "inference_mode": True,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def bloom() -> BloomForCausalLM:
    model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))
    models.randomise(model, seed=7)
    return model.eval()


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True], [True]])
def test_merged_linear_of_old_peft(tmp_path: Path, enabled: list[bool]) -> None:
    """The shapes of a published BLOOM adapter: A (r·n, in), B (out·n/len, r, 1), scaled by alpha / r."""
    bloom().save_pretrained(tmp_path / "base")
    width = 96 // len(enabled) * len(enabled)
    modules = {f"transformer.h.{i}.self_attention.query_key_value": (width, 32) for i in range(2)}
    adapter = merged_linear_files(tmp_path / "adapter", modules, enabled, rank=4, alpha=6)
    assert at.inspect(adapter).to_json()["method"] == "lora_merged_linear"
    report = ours(tmp_path / "base", adapter, tmp_path / "out")
    assert report.changed == report.expected == 2
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    for path in modules:
        a = factors[f"base_model.model.{path}.lora_A.weight"]
        b = factors[f"base_model.model.{path}.lora_B.weight"]
        # As PEFT 0.2 computes it: a convolution in groups over A, its rows spread over the enabled slices.
        delta = nn.functional.conv1d(a[None], b, groups=sum(enabled))[0] * 6 / 4
        spread = torch.zeros(width, 32).view(len(enabled), -1, 32)
        spread[torch.tensor(enabled)] = delta.view(sum(enabled), -1, 32)
        name = next(name for name in before if name.endswith(f"{path.partition('.')[2]}.weight"))
        expected = before[name] + spread.view(width, 32)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)
        for number, on in enumerate(enabled):
            rows = slice(number * width // len(enabled), (number + 1) * width // len(enabled))
            assert torch.equal(after[name][rows], before[name][rows]) is not on


def test_merged_linear_of_conv1d(tmp_path: Path) -> None:
    models.gpt2(tied=False).save_pretrained(tmp_path / "base")
    modules = {f"transformer.h.{i}.attn.c_attn": (96, 32) for i in range(2)}
    adapter = merged_linear_files(tmp_path / "adapter", modules, [True, False, True], rank=3, alpha=3)
    ours(tmp_path / "base", adapter, tmp_path / "out")
    name = "transformer.h.1.attn.c_attn.weight"
    before, after = stored(tmp_path / "base")[name], stored(tmp_path / "out")[name]
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.transformer.h.1.attn.c_attn.lora_{s}.weight"] for s in "AB")
    third = (b[32:, :, 0] @ a[3:]).t()
    torch.testing.assert_close(after[:, 64:], before[:, 64:] + third, rtol=1e-6, atol=1e-7)
    assert torch.equal(after[:, 32:64], before[:, 32:64])


def test_merged_linear_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    bloom().save_pretrained(tmp_path / "base")
    modules = {f"transformer.h.{i}.self_attention.query_key_value": (48, 32) for i in range(2)}
    adapter = merged_linear_files(tmp_path / "adapter", modules, [True, False, True], rank=4, alpha=6)
    refused(MismatchError, "shape", tmp_path / "base", adapter, tmp_path / "out")


ONE_TENSOR = {
    "DoRA and LoRA": (dora(), case("LoraConfig", r=4)),
    "two (IA)³": (ia3(models.llama, ["v_proj"], []), ia3(models.llama, ["v_proj"], [])),
    "HiRA and LoHa": (case("HiraConfig", r=4), case("LoHaConfig", r=4)),
}


@pytest.mark.parametrize("name", ONE_TENSOR)
def test_what_does_not_add_up_is_merged_one_after_the_other(name: str, tmp_path: Path) -> None:
    first, second = ONE_TENSOR[name]
    one = adapt(first, tmp_path, "one")
    two = adapt(second, tmp_path, "two")
    found = [one.adapter, two.adapter]
    problem = refused(UnsupportedError, "not-additive", one.base, found, tmp_path / "out")
    assert "one after the other" in problem.remedy
    ours(one.base, one.adapter, tmp_path / "halfway")
    ours(tmp_path / "halfway", two.adapter, tmp_path / "out")
    loader = two.loader
    model = PeftModel.from_pretrained(loader(tmp_path / "halfway"), two.adapter)
    two.outputs = models.outputs_of(model)
    assert_same_outputs(loader(tmp_path / "out"), two)


def test_additive_methods_are_summed_and_others_apart_go_together(tmp_path: Path) -> None:
    """LoHa, LoKr and AdaLoRA on one tensor, DoRA on another: one merge, the deltas as PEFT's own sum."""
    cases = [
        case("LoHaConfig", targets=["q_proj"], r=3),
        case("LoKrConfig", targets=["q_proj"], r=2),
        adalora(targets=["q_proj"]),
        dora(targets=["v_proj"]),
    ]
    made = [adapt(c, tmp_path, f"a{i}") for i, c in enumerate(cases)]
    report = ours(made[0].base, [m.adapter for m in made], tmp_path / "out")
    assert report.changed == report.expected == 4
    before, after = stored(made[0].base), stored(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    total = before[name].double()
    for one in made[:3]:
        total = (
            total
            + one.model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default").double()
        )
    assert (after[name].double() - total).abs().max() <= 1e-6 * total.abs().max()


@pytest.mark.parametrize("config", ["LoHaConfig", "LoKrConfig"])
def test_another_rank_than_the_configs_is_refused(config: str, tmp_path: Path) -> None:
    """The scale is alpha / rank, so the config's rank has to be right."""
    adapted = adapt(case(config, r=2), tmp_path)
    file = adapted.adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "r": 3}))
    refused(MismatchError, "shape", adapted.base, adapted.adapter, tmp_path / "out")


def test_scale_is_that_of_the_whole_change(tmp_path: Path) -> None:
    """With half the scale, what DoRA and (IA)³ change is half of it; with none, nothing is."""
    for number, one in enumerate((dora(), ia3(models.llama, ["v_proj"], []), case("HiraConfig", r=3))):
        adapted = adapt(one, tmp_path, f"adapter{number}")
        whole, half, none = (tmp_path / f"{number}-{scale}" for scale in (1.0, 0.5, 0.0))
        for out in (whole, half, none):
            ours(adapted.base, adapted.adapter, out, scale=(float(out.name.partition("-")[2]),))
        base, full, middle, same = (stored(folder) for folder in (adapted.base, whole, half, none))
        for name, weight in base.items():
            change = full[name].double() - weight.double()
            torch.testing.assert_close(
                middle[name].double(), weight.double() + change / 2, rtol=2e-7, atol=1e-8
            )
            assert torch.equal(same[name], weight), name


def test_one_dora_convention_is_not_taken_for_the_other(tmp_path: Path) -> None:
    """LyCORIS' scale of one value per input fits a square layer by number, not by shape: it is refused."""
    adapted = adapt(dora(targets=["q_proj"]), tmp_path)
    file = adapted.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "magnitude" in name)
    tensors[key] = tensors[key].reshape(1, -1)
    save_file(tensors, file, metadata={"format": "pt"})
    refused(FormatError, "shape", adapted.base, adapted.adapter, tmp_path / "out")


def test_magnitudes_are_never_dropped(tmp_path: Path) -> None:
    """The merged weight has rows of the trained norms; PEFT's conversion to LoRA forgets them."""
    adapted = adapt(dora(targets=["q_proj"]), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    tensors = load_file(adapted.adapter / "adapter_model.safetensors")
    after = stored(tmp_path / "out")
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"
        norms = after[f"model.layers.{layer}.self_attn.q_proj.weight"].double().norm(dim=1)
        torch.testing.assert_close(norms, tensors[key].double().abs(), rtol=1e-6, atol=1e-7)


def test_a_line_that_is_all_zero_has_no_direction(tmp_path: Path) -> None:
    base = models.llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path / "adapter")
    refused(LossyError, "zero-norm", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("one", [dora(), adalora()], ids=["dora", "adalora"])
def test_replicated_layers_are_refused(one: Case, tmp_path: Path) -> None:
    """Layers that are repeated share their weights in PEFT, so a merge would change all copies at once."""
    adapted = adapt(one, tmp_path)
    file = adapted.adapter / "adapter_config.json"
    fields = {**json.loads(file.read_text()), "layer_replication": [[0, 2], [0, 2]]}
    file.write_text(json.dumps(fields))
    refused(UnsupportedError, "layer-replication", adapted.base, adapted.adapter, tmp_path / "out")
