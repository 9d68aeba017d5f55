"""convert against PEFT: outputs of the converted adapter, and errors against a dense SVD of PEFT's merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

import adapterhub_tools as at
from tests.parity import models
from tests.parity.low_rank import close, deltas, fresh, loaded, refused, same_outputs, saved
from tests.parity.models import outputs_of, perturb_trainable, save_base

TARGETS = ["q_proj", "down_proj"]
FULL_RANK = 48
"""No weight of the tiny models has a higher rank, but for the embeddings and the classifier."""


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})


TO_DORA: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "plain": (models.llama, lora()),
    "rslora": (models.llama, lora(use_rslora=True, rank_pattern={"q_proj": 3})),
    "conv1d": (models.gpt2, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "embedding": (models.llama, lora(target_modules=["embed_tokens", "q_proj"])),
    "convolutions": (models.convolutions, lora(target_modules=["wide", "point", "head"])),
    "full": (models.llama, lora(modules_to_save=["lm_head"])),
}


@pytest.mark.parametrize("feature", TO_DORA)
def test_lora_to_dora_computes_the_same_and_comes_back(feature: str, tmp_path: Path) -> None:
    build, config = TO_DORA[feature]
    base = save_base(fresh(build), tmp_path / "base")
    expected = outputs_of(saved(fresh(build), config, tmp_path / "a"))
    report = at.convert(tmp_path / "a", tmp_path / "dora", to="dora", base=base)
    assert report.config["use_dora"] is True
    assert report.totals.error < 1e-6
    same_outputs(fresh(build), tmp_path / "dora", expected)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "dora"))
    assert all(torch.equal(before[name], after[name]) for name in before)  # the factors are the same bits
    assert all("magnitude" in name for name in set(after) - set(before))
    back = at.convert(tmp_path / "dora", tmp_path / "lora", to="lora", base=base)
    assert back.totals.error < 1e-6
    same_outputs(fresh(build), tmp_path / "lora", expected)
    assert not at.validate(tmp_path / "lora", base=base).problems


def test_magnitudes_are_the_norms_rounded_once(tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    adapted = saved(fresh(models.llama), lora(), tmp_path / "a")
    at.convert(tmp_path / "a", tmp_path / "dora", to="dora", base=base)
    stored = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    for path, delta in deltas(adapted).items():
        weight = adapted.get_base_model().get_submodule(path).base_layer.weight.double()
        wanted = (weight + delta).norm(dim=1)
        found = stored[f"base_model.model.{path}.lora_magnitude_vector"].double()
        assert float(((found - wanted) / wanted).abs().max()) <= 2.0**-24 * (1 + 1e-6)


def test_dora_to_lora_is_lossy_and_as_good_as_can_be(tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    adapted = saved(fresh(models.llama), lora(use_dora=True), tmp_path / "a")
    expected = outputs_of(adapted)
    before = {n: p.detach().double() for n, p in fresh(models.llama).named_parameters()}
    after = dict(adapted.merge_and_unload().named_parameters())
    work = tmp_path / "work"
    work.mkdir()
    refused(at.LossyError, "approximation", work / "x", at.convert, tmp_path / "a", to="lora", base=base)
    for rank, hint in ((4, "--rank auto"), ("auto", "Give a larger --max-error")):
        with pytest.raises(at.LossyError, match=hint):
            at.convert(tmp_path / "a", work / "x", to="lora", base=base, rank=rank)
    report = at.convert(tmp_path / "a", tmp_path / "r4", to="lora", base=base, allow_lossy=True)
    assert all(module.rank == 4 for module in report.modules)
    found = deltas(loaded(fresh(models.llama), tmp_path / "r4"))
    for module in report.modules:
        true = after[f"{module.path}.weight"].detach().double() - before[f"{module.path}.weight"]
        error = float((found[module.path] - true).norm() / true.norm())
        best = float(torch.linalg.svdvals(true)[4:].norm() / true.norm())
        assert best - 1e-6 <= error <= 1.01 * best
        assert module.error == pytest.approx(error, rel=1e-4)
    report = at.convert(tmp_path / "a", tmp_path / "all", to="lora", base=base, rank=FULL_RANK)
    same_outputs(fresh(models.llama), tmp_path / "all", expected)
    auto = at.convert(tmp_path / "a", tmp_path / "auto", to="lora", base=base, rank="auto", max_error=0.4)
    assert all(module.error <= 0.4 for module in auto.modules)


OTHERS: dict[str, tuple[Callable[[], nn.Module], PeftConfig, int | None]] = {
    "loha": (models.llama, LoHaConfig(r=2, alpha=6, target_modules=TARGETS), 4),
    "lokr": (models.llama, LoKrConfig(r=2, alpha=6, target_modules=TARGETS), None),
    "adalora": (models.llama, AdaLoraConfig(init_r=4, target_r=4, total_step=9, target_modules=TARGETS), 4),
    "ia3": (
        models.llama,
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        None,
    ),
    "ia3-bias": (models.opt, IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]), None),
    "norms": (models.bert_classifier, LNTuningConfig(target_modules=["LayerNorm"]), None),
}


@pytest.mark.parametrize("method", OTHERS)
def test_any_mergeable_method_becomes_lora(method: str, tmp_path: Path) -> None:
    build, config, rank = OTHERS[method]
    base = save_base(fresh(build), tmp_path / "base")
    expected = outputs_of(saved(fresh(build), config, tmp_path / "a"))
    options: dict[str, Any] = {"rank": "auto"} if rank is not None else {"rank": FULL_RANK}
    if method == "norms":
        work = tmp_path / "work"
        work.mkdir()
        refused(at.MismatchError, "no-matrix", work / "x", at.convert, tmp_path / "a", to="lora", base=base)
        return
    report = at.convert(tmp_path / "a", tmp_path / "b", to="lora", base=base, **options)
    assert report.config["peft_type"] == "LORA"
    if rank is not None:
        assert {module.rank for module in report.modules} == {rank}
    same_outputs(fresh(build), tmp_path / "b", expected)
    merged = at.merge(base, tmp_path / "b", tmp_path / "merged")
    assert merged.changed > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_altered_bases_become_plain_lora(init: str, tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    adapted = get_peft_model(fresh(models.llama), lora(init_lora_weights=init))
    adapted.peft_config["default"].init_lora_weights = True  # as PEFT asks for the initial adapter
    adapted.save_pretrained(tmp_path / "initial")
    perturb_trainable(adapted, 3)
    expected = outputs_of(adapted.eval())
    adapted.peft_config["default"].init_lora_weights = init
    adapted.save_pretrained(tmp_path / "a")
    ways: list[dict[str, Any]] = [
        {"initial": tmp_path / "initial"},
        {"base": base},
        {"initial": tmp_path / "initial", "rank": "auto"},
    ]
    for number, way in enumerate(ways):
        report = at.convert(tmp_path / "a", tmp_path / f"b{number}", to="lora", **way)
        assert all(module.rank == 8 for module in report.modules)
        assert report.config["init_lora_weights"] is True
        same_outputs(fresh(models.llama), tmp_path / f"b{number}", expected)
    work = tmp_path / "work"
    work.mkdir()
    refused(at.MismatchError, "initial", work / "x", at.convert, tmp_path / "a", to="lora")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for name, error, options in (
        ("corda", at.UnsupportedError, {"base": base}),
        ("pissa_niter_4", at.UnsupportedError, {"base": base}),
        ("loftq", at.LossyError, {"initial": tmp_path / "initial"}),
    ):
        text = json.dumps({**config, "init_lora_weights": name})
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        kind = "loftq" if name == "loftq" else "initial"
        refused(error, kind, work / "x", at.convert, tmp_path / "a", to="lora", **options)


def test_folded_scales_suit_readers_that_ignore_them(tmp_path: Path) -> None:
    config = lora(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5})
    adapted = saved(fresh(models.llama), config, tmp_path / "a")
    expected, before = outputs_of(adapted), deltas(adapted)
    report = at.convert(tmp_path / "a", tmp_path / "b", to="lora", fold_scale=True)
    assert report.totals.error < 1e-7
    same_outputs(fresh(models.llama), tmp_path / "b", expected)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    for path, delta in before.items():
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        assert float((b @ a - delta).norm()) <= 1e-6 * float(delta.norm())
    # A reader with one global alpha / r finds 1.
    assert report.config["lora_alpha"] == report.config["r"]


def test_history_threads_and_dry_run(tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    saved(fresh(models.llama), lora(use_dora=True), tmp_path / "a")
    for threads in (1, 3):
        out = tmp_path / f"b{threads}"
        at.convert(tmp_path / "a", out, to="lora", base=base, allow_lossy=True, threads=threads)
    one, three = ({f.name: f.read_bytes() for f in (tmp_path / f"b{n}").iterdir()} for n in (1, 3))
    assert one == three
    history = at.load_manifest(tmp_path / "b1").history
    assert [(entry.operation, [item.role for item in entry.inputs]) for entry in history] == [
        ("convert", ["adapter", "base-targets"])
    ]
    assert history[0].options["from"] == "dora"
    assert history[0].figures["worst_error"] > 0.01
    report = at.convert(tmp_path / "a", None, to="lora", base=base, allow_lossy=True, dry_run=True)
    assert report.digest is None
    assert report.totals.worst[0] == pytest.approx(history[0].figures["worst_error"])


def test_what_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    out, convert = work / "out", at.convert
    base = save_base(fresh(models.llama), tmp_path / "base")
    saved(fresh(models.llama), lora(), tmp_path / "a")
    refused(at.MismatchError, "same-method", out, convert, tmp_path / "a", to="lora")
    refused(at.MismatchError, "base", out, convert, tmp_path / "a", to="dora")
    refused(at.MismatchError, "rank", out, convert, tmp_path / "a", to="dora", base=base, rank="big")
    saved(fresh(models.llama), LoHaConfig(r=2, alpha=6, target_modules=TARGETS), tmp_path / "loha")
    refused(at.MismatchError, "two-steps", out, convert, tmp_path / "loha", to="dora", base=base)
    other = save_base(fresh(models.gpt2), tmp_path / "gpt2")
    refused(at.MismatchError, "unknown-module", out, convert, tmp_path / "a", to="dora", base=other)
    saved(fresh(models.opt), lora(target_modules=["q_proj"], lora_bias=True), tmp_path / "biased")
    opt = save_base(fresh(models.opt), tmp_path / "opt")
    refused(at.UnsupportedError, "dora", out, convert, tmp_path / "biased", to="dora", base=opt)
    zero = fresh(models.llama)
    zero.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    empty = save_base(zero, tmp_path / "zero")
    adapted = get_peft_model(zero, lora())
    perturb_trainable(adapted, 3)
    for name, parameter in adapted.named_parameters():
        if "layers.0.self_attn.q_proj.lora_B" in name:
            parameter.data[3] = 0
    adapted.save_pretrained(tmp_path / "b")
    refused(at.UnsupportedError, "zero-row", out, convert, tmp_path / "b", to="dora", base=empty)


def test_tolerance_of_close() -> None:
    """The comparison that these tests rest on can fail."""
    with pytest.raises(AssertionError):
        close(torch.ones(3), torch.ones(3) * 1.001)
