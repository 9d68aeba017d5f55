"""svd-shrink against PEFT: the outputs load and compute what the dense SVD says they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.parity import models
from tests.parity.low_rank import deltas, fresh, loaded, refused, same_outputs, saved, truncated
from tests.parity.models import outputs_of

TARGETS = ["q_proj", "down_proj"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 20, "target_modules": TARGETS, **fields})


FEATURES: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "plain": (models.llama, lora()),
    "patterns": (models.llama, lora(rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 3})),
    "rslora": (models.llama, lora(use_rslora=True)),
    "dora": (models.llama, lora(use_dora=True)),
    "embedding": (models.llama, lora(target_modules=["embed_tokens", "q_proj"])),
    "biases": (models.opt, lora(target_modules=["q_proj", "fc1"], bias="all", lora_bias=True)),
    "conv1d": (models.gpt2, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "convolutions": (models.convolutions, lora(target_modules=["along", "wide", "point", "deep", "head"])),
    "full": (models.llama, lora(modules_to_save=["lm_head", "model.norm"])),
    "tokens": (models.llama, lora(trainable_token_indices={"embed_tokens": [3, 5, 8]})),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_same_rank_computes_the_same(feature: str, tmp_path: Path) -> None:
    build, config = FEATURES[feature]
    expected = outputs_of(saved(fresh(build), config, tmp_path / "a"))
    report = at.svd_shrink(tmp_path / "a", tmp_path / "b", rank=8)
    assert all(m.rank == min(m.rank_before or 0, len(m.singular_values)) for m in report.modules)
    assert report.totals.error < 1e-6
    same_outputs(fresh(build), tmp_path / "b", expected)
    assert not at.validate(tmp_path / "b").problems


@pytest.mark.parametrize("feature", FEATURES)
def test_a_lower_rank_is_the_dense_truncation(feature: str, tmp_path: Path) -> None:
    build, config = FEATURES[feature]
    before = deltas(saved(fresh(build), config, tmp_path / "a"))
    report = at.svd_shrink(tmp_path / "a", tmp_path / "b", rank=3)
    after = deltas(loaded(fresh(build), tmp_path / "b"))
    assert set(after) == set(before) == {module.path for module in report.modules}
    for module in report.modules:
        delta = before[module.path]
        wanted = truncated(delta, 3)
        assert float((after[module.path] - wanted).norm()) <= 1e-6 * float(delta.norm())
        error = float((after[module.path] - delta).norm() / delta.norm())
        assert module.error == pytest.approx(error, rel=1e-4, abs=2e-7)
        assert module.energy == pytest.approx(1 - error**2, abs=1e-6)
    assert {m.rank for m in report.modules} <= {2, 3}  # an uneven kernel may have fewer values


@pytest.mark.parametrize(
    "policy",
    [
        {"energy": 0.9},
        {"max_error": 0.3},
        {"budget": "50%"},
        {"budget": "2k"},
        {"budget": "9KiB"},
        {"sv_ratio": 2},
        {"sv_cumulative": 0.8},
        {"sv_fro": 0.9},
        {"rank": [4, "q_proj=2"]},
    ],
    ids=lambda policy: "-".join(map(str, policy)),
)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_policy_gives_an_adapter_that_peft_loads(
    policy: dict[str, Any], rslora: bool, tmp_path: Path
) -> None:
    before = deltas(saved(fresh(models.llama), lora(use_rslora=rslora), tmp_path / "a"))
    report = at.svd_shrink(tmp_path / "a", tmp_path / "b", **policy)
    after = deltas(loaded(fresh(models.llama), tmp_path / "b"))
    for module in report.modules:
        wanted = truncated(before[module.path], module.rank)
        assert float((after[module.path] - wanted).norm()) <= 1e-6 * float(before[module.path].norm())
        if "energy" in policy:
            assert module.energy >= 0.9
        if "max_error" in policy:
            assert module.error <= 0.3
    size = {"50%": report.parameters_before // 2, "2k": 2000, "9KiB": 9 * 1024 // 4}  # type: ignore[operator]
    if "budget" in policy:
        assert report.parameters <= size[policy["budget"]]
        assert report.parameters >= 0.9 * size[policy["budget"]]  # it is used, too


def test_an_adaptive_budget_beats_an_even_one(tmp_path: Path) -> None:
    adapted = saved(fresh(models.llama), lora(), tmp_path / "a")
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_A" in name:  # some modules matter more, and with steeper spectra
            parameter.data *= torch.arange(1, 9)[:, None] ** -float(index % 3) * (1 + index % 5)
    adapted.save_pretrained(tmp_path / "a")
    even = at.svd_shrink(tmp_path / "a", tmp_path / "even", rank=4)
    adaptive = at.svd_shrink(tmp_path / "a", tmp_path / "adaptive", budget=str(even.parameters))
    assert adaptive.parameters <= even.parameters
    assert adaptive.totals.error < 0.9 * even.totals.error


def test_dora_keeps_its_magnitudes_and_refit_comes_closer(tmp_path: Path) -> None:
    base = models.save_base(fresh(models.llama), tmp_path / "base")
    adapted = saved(fresh(models.llama), lora(use_dora=True), tmp_path / "a", size=0.3)
    kept = at.svd_shrink(tmp_path / "a", tmp_path / "kept", rank=2)
    assert kept.config["use_dora"] is True
    fitted = at.svd_shrink(tmp_path / "a", tmp_path / "refit", rank=2, refit=base)
    before, after, refit = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "kept", "refit")
    )
    magnitudes = [name for name in before if "magnitude" in name]
    assert magnitudes
    assert all(torch.equal(before[name], after[name]) for name in magnitudes)
    assert not any(torch.equal(before[name], refit[name]) for name in magnitudes)
    true = {n: p for n, p in adapted.merge_and_unload().named_parameters() if "q_proj" in n or "down" in n}
    start = dict(fresh(models.llama).named_parameters())
    change = sum(float((start[n] - p).detach().norm()) ** 2 for n, p in true.items())
    errors = {}
    for name in ("kept", "refit"):
        merged = dict(loaded(fresh(models.llama), tmp_path / name).merge_and_unload().named_parameters())
        errors[name] = sum(float((merged[n] - p).detach().norm()) ** 2 for n, p in true.items())
    assert errors["refit"] < errors["kept"]
    assert kept.refit is None
    assert fitted.refit is not None
    assert fitted.refit.error == pytest.approx((errors["refit"] / change) ** 0.5, rel=1e-4)
    assert fitted.refit.error_kept == pytest.approx((errors["kept"] / change) ** 0.5, rel=1e-4)
    assert "with the magnitudes kept" in fitted.summary


def test_experts_and_groups_keep_their_bytes(tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    expected = outputs_of(saved(fresh(models.mixtral), config, tmp_path / "a"))
    report = at.svd_shrink(tmp_path / "a", tmp_path / "b", rank=8)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b"))
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert {name for name, _ in report.kept} == {
        name.split(".base_layer")[0].split(".lora_")[0].removeprefix("base_model.model.") for name in experts
    }
    same_outputs(fresh(models.mixtral), tmp_path / "b", expected)
    saved(fresh(models.convolutions), lora(target_modules=["wide", "grouped"]), tmp_path / "c")
    report = at.svd_shrink(tmp_path / "c", tmp_path / "d", rank=2)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("c", "d"))
    assert [name for name, _ in report.kept] == ["grouped"]
    assert all(torch.equal(before[n], after[n]) for n in before if "grouped" in n)
    assert after["base_model.model.wide.lora_A.weight"].shape == (2, 3, 3, 3)


def test_files_history_and_threads(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    at.init(tmp_path / "a", licence="apache-2.0", tag=["x"])
    for threads in (1, 3):
        at.svd_shrink(tmp_path / "a", tmp_path / f"b{threads}", energy=0.9, threads=threads, dtype="bfloat16")
    one, three = ({f.name: f.read_bytes() for f in (tmp_path / f"b{n}").iterdir()} for n in (1, 3))
    assert one == three
    assert set(one) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_manifest.json",
        "tokenizer.json",
    }
    at.svd_shrink(tmp_path / "b1", tmp_path / "c", rank=2)
    manifest = at.load_manifest(tmp_path / "c")
    assert [entry.operation for entry in manifest.history] == ["svd-shrink", "svd-shrink"]
    assert manifest.history[1].inputs[0].digest == at.load_manifest(tmp_path / "b1").digest
    assert (manifest.licence, manifest.tags) == ("apache-2.0", ("x",))
    dtypes = {t.dtype for t in load_file(tmp_path / "c" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    assert not at.validate(tmp_path / "c").problems


def test_the_command_prints_a_report(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(), tmp_path / "a")
    words = ["svd-shrink", str(tmp_path / "a"), str(tmp_path / "b"), "--energy", "0.9"]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["report"] == "svd-shrink-1.0"
    assert all(1 <= module["rank"] < 8 == module["rank_before"] for module in report["modules"])
    text = CliRunner().invoke(cli, [*words, "--replace"]).stdout
    assert "energy kept" in text
    assert text.splitlines()[-1].startswith("svd-shrink: 4 modules")


def test_pictures_of_the_spectra(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(), tmp_path / "a")
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        plots = [tmp_path / f"{name}.{ending}" for name in ("one", "two")]
        for plot in plots:
            at.svd_shrink(tmp_path / "a", None, rank=2, dry_run=True, plot=plot)
        assert plots[0].read_bytes().startswith(start)
        assert plots[0].read_bytes() == plots[1].read_bytes()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(), tmp_path / "a")
    report = at.svd_shrink(tmp_path / "a", None, rank=2, dry_run=True)
    assert report.totals.error > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def altered(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def test_what_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    out, shrink = work / "out", at.svd_shrink
    saved(fresh(models.llama), lora(), tmp_path / "a")
    refused(at.MismatchError, "policy", out, shrink, tmp_path / "a")
    refused(at.MismatchError, "policy", out, shrink, tmp_path / "a", rank=2, energy=0.5)
    refused(at.MismatchError, "rank", out, shrink, tmp_path / "a", rank=9)
    refused(at.MismatchError, "rank-pattern", out, shrink, tmp_path / "a", rank="k_proj=2")
    refused(at.MismatchError, "budget", out, shrink, tmp_path / "a", budget="10")
    refused(at.MismatchError, "refit", out, shrink, tmp_path / "a", rank=2, refit=tmp_path / "a")
    refused(at.MismatchError, "plot", out, shrink, tmp_path / "a", rank=2, plot=tmp_path / "x.pdf")
    refused(at.StoreError, "not-found", out, shrink, tmp_path / "a", rank=2, plot=tmp_path / "no" / "x.png")
    (tmp_path / "folder.png").mkdir()
    refused(at.MismatchError, "plot", out, shrink, tmp_path / "a", rank=2, plot=tmp_path / "folder.png")
    saved(fresh(models.llama), lora(), tmp_path / "zero")
    refused(at.MismatchError, "zero-delta", out, shrink, altered(tmp_path / "zero", _zero), rank=2)
    saved(fresh(models.llama), lora(), tmp_path / "nan")
    refused(at.FormatError, "non-finite", out, shrink, altered(tmp_path / "nan", _nan), rank=2)
    saved(fresh(models.llama), IA3Config(target_modules=TARGETS, feedforward_modules=[]), tmp_path / "ia3")
    refused(at.UnsupportedError, "method", out, shrink, tmp_path / "ia3", rank=2)
    saved(fresh(models.llama), lora(init_lora_weights="pissa"), tmp_path / "pissa")
    refused(at.UnsupportedError, "altered-base", out, shrink, tmp_path / "pissa", rank=2)
    at.init(tmp_path / "a")
    refused(
        at.IntegrityError,
        "file-size",
        out,
        shrink,
        altered(tmp_path / "a", lambda t: next(iter(t.values())).mul_(2)),
        rank=2,
    )
    out.mkdir()
    (out / "mine").touch()
    refused(at.StoreError, "exists", out, shrink, tmp_path / "nan", rank=2)
