"""Each row of the table of servers, by an adapter that PEFT saved with that feature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

import adapterhub_tools as at
from adapterhub_tools.ops.server_table import fused_layers, server, server_names
from tests.parity import models
from tests.parity.low_rank import fresh, refused, saved
from tests.parity.models import save_base


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields})


def tied() -> nn.Module:
    return models.llama(tied=True)


# feature -> (model, config); every adapter has that feature, whatever else it has.
FEATURES: dict[str, tuple[Callable[[], nn.Module], PeftConfig]] = {
    "method": (models.llama, LoHaConfig(r=4, alpha=8, target_modules=["q_proj"])),
    "dora": (models.llama, lora(use_dora=True)),
    "rank": (models.llama, lora()),
    "scale": (models.llama, lora()),
    "targets": (models.llama, lora()),
    "rslora": (models.llama, lora(use_rslora=True)),
    "lora_bias": (models.opt, lora(lora_bias=True)),
    "bias": (models.opt, lora(bias="lora_only")),
    "modules_to_save": (models.llama, lora(modules_to_save=["lm_head"])),
    "saved_embedding": (models.llama, lora(target_modules=["embed_tokens"])),
    "alora": (models.llama, lora(alora_invocation_tokens=[1, 2])),
    "embedding": (models.llama, lora(target_modules=["embed_tokens"])),
    "token_rows": (models.llama, lora(trainable_token_indices=[3, 5])),
    "head": (models.llama, lora(target_modules=["lm_head"])),
    "tied_head": (tied, lora(target_modules=["lm_head"])),
    "convolution": (models.convolutions, lora(target_modules=["wide"])),
    "stacked_experts": (
        models.mixtral,
        lora(target_modules=[], target_parameters=["mlp.experts.down_proj"]),
    ),
}
WITH_BASE = {"tied_head", "head"}


def test_every_row_has_an_adapter() -> None:
    for name in server_names():
        assert set(server(name).features) == set(FEATURES)
        for item in server(name).features.values():
            assert item.says
            assert item.source.startswith("https://")
    assert all(item.source.startswith("https://") for item in fused_layers())


@pytest.mark.parametrize("name", server_names())
@pytest.mark.parametrize("feature", FEATURES)
def test_a_row_decides(feature: str, name: str, tmp_path: Path) -> None:
    build, config = FEATURES[feature]
    saved(fresh(build), config, tmp_path / "a")
    base = save_base(fresh(build), tmp_path / "base") if feature in WITH_BASE else None
    report = at.fit(tmp_path / "a", server=name, base=base, check=True)
    (found,) = [item for item in report.findings if item.feature == feature]
    row = server(name).features[feature]
    expected = {True: "accepted", False: "refused", "unknown": "unknown"}.get(row.accepts, "refused")  # type: ignore[arg-type]
    if feature == "rslora" and row.accepts is False:
        expected = "rewritten"  # the scale has another place
    assert found.verdict == expected, found
    assert row.says in found.says
    assert found.source == row.source
    assert bool(found.remedy) == (expected == "refused")
    if expected == "refused":
        assert report.verdict == "refused"
        assert report.exit_code == 1
        options: dict[str, Any] = {"server": name, "base": base}
        refused(at.UnsupportedError, feature, tmp_path / "out", at.fit, tmp_path / "a", **options)
    else:
        assert report.out is None


def test_another_type_that_peft_saved_is_its_own_form(tmp_path: Path) -> None:
    build, config = FEATURES["method"]
    saved(fresh(build), config, tmp_path / "a")
    assert at.fit(tmp_path / "a", server="peft", check=True).exit_code == 0
    refused(at.UnsupportedError, "method", tmp_path / "out", at.fit, tmp_path / "a", server="peft")
    base = save_base(fresh(build), tmp_path / "base")
    call = {"server": "vllm", "base": base, "to_lora": True, "allow_lossy": True}
    at.fit(tmp_path / "a", tmp_path / "lora", **call)
    assert at.fit(tmp_path / "lora", server="vllm", check=True).exit_code == 0


@pytest.mark.parametrize(
    ("targets", "refused_for"),
    [
        (["q_proj", "v_proj"], None),
        (["q_proj", "k_proj", "v_proj", "gate_proj"], None),
        (["o_proj", "down_proj"], None),
        (["q_proj"], "q_proj"),
        (["q_proj", "k_proj"], "q_proj"),
        (["k_proj"], "k_proj"),
        (["v_proj", "o_proj"], "v_proj"),
        (["up_proj"], "up_proj"),
    ],
)
def test_modules_that_sglang_needs_beside_each_other(
    targets: list[str], refused_for: str | None, tmp_path: Path
) -> None:
    saved(fresh(models.llama), lora(target_modules=targets), tmp_path / "a")
    if refused_for is None:
        at.fit(tmp_path / "a", tmp_path / "out", server="sglang")
        return
    with pytest.raises(at.UnsupportedError, match=refused_for) as caught:
        at.fit(tmp_path / "a", tmp_path / "out", server="sglang")
    assert {problem.kind for problem in caught.value.problems} == {"targets"}
    at.fit(tmp_path / "a", tmp_path / "out", server="vllm")


def test_a_pattern_of_targets_becomes_names_for_sglang(tmp_path: Path) -> None:
    config = lora(target_modules=r".*self_attn\.(q_proj|v_proj)")
    saved(fresh(models.llama), config, tmp_path / "a")
    report = at.fit(tmp_path / "a", server="sglang", check=True)
    assert {item.feature: item.verdict for item in report.findings}["targets"] == "rewritten"
    at.fit(tmp_path / "a", tmp_path / "out", server="sglang")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["target_modules"] == ["q_proj", "v_proj"]
    at.fit(tmp_path / "a", tmp_path / "kept", server="vllm")
    kept = json.loads((tmp_path / "kept" / "adapter_config.json").read_text(encoding="utf-8"))
    assert kept["target_modules"] == config.target_modules


def test_a_head_may_be_tied_where_no_base_is_given(tmp_path: Path) -> None:
    build, config = FEATURES["head"]
    saved(fresh(build), config, tmp_path / "a")
    report = at.fit(tmp_path / "a", server="llama.cpp", check=True)
    assert {item.feature: item.verdict for item in report.findings}["tied_head"] == "unknown"


def test_ranks_above_the_limit(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(r=20), tmp_path / "a")
    report = at.fit(tmp_path / "a", server="vllm", check=True)
    assert "--max-lora-rank 32" in next(item.says for item in report.findings if item.feature == "rank")
    call = {"server": "vllm", "max_rank": 16}
    refused(at.UnsupportedError, "rank", tmp_path / "out", at.fit, tmp_path / "a", **call)
    saved(fresh(models.llama), lora(r=513), tmp_path / "b")
    refused(at.UnsupportedError, "rank", tmp_path / "out", at.fit, tmp_path / "b", server="vllm")
    at.fit(tmp_path / "b", tmp_path / "c", server="llama.cpp")


def test_adapters_that_act_on_some_tokens_only_are_refused(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"alora_invocation_tokens": [1, 2]}), encoding="utf-8")
    refused(at.UnsupportedError, "alora", tmp_path / "out", at.fit, tmp_path / "a", server="vllm")
    report = at.fit(tmp_path / "a", tmp_path / "out", server="llama.cpp")
    assert report.config["alora_invocation_tokens"] == [1, 2]
    config.pop("alora_invocation_tokens")
    path.write_text(json.dumps(config | {"arrow_config": {"top_k": 1}}), encoding="utf-8")
    for name in ("vllm", "llama.cpp"):
        refused(at.UnsupportedError, "method", tmp_path / "arrow", at.fit, tmp_path / "a", server=name)


def test_stacked_experts_keep_their_factors_or_are_refused(tmp_path: Path) -> None:
    build, config = FEATURES["stacked_experts"]
    saved(fresh(build), config, tmp_path / "a")
    report = at.fit(tmp_path / "a", tmp_path / "out", server="vllm")
    assert report.modules == ()
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    uneven = lora(target_parameters=["mlp.experts.down_proj"], rank_pattern={"q_proj": 2})
    saved(fresh(build), uneven, tmp_path / "b")
    refused(at.UnsupportedError, "stacked_experts", tmp_path / "c", at.fit, tmp_path / "b", server="vllm")


@pytest.mark.parametrize("kind", ["nan", "lost", "options", "server", "no-out", "absent", "exists"])
def test_bad_input(kind: str, tmp_path: Path) -> None:
    config = lora(alpha_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"])
    saved(fresh(models.llama), config, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    out, source = tmp_path / "out", tmp_path / "a"
    if kind == "nan":
        next(tensors[name] for name in tensors if "v_proj.lora_B" in name)[0, 0] = float("nan")
        save_file(tensors, path)
        refused(at.FormatError, "non-finite", out, at.fit, source, server="vllm")
    elif kind == "lost":
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, path)
        refused(at.FormatError, "missing-pair", out, at.fit, source, server="vllm")
    elif kind == "options":
        refused(at.MismatchError, "rank", out, at.fit, source, server="vllm", max_rank=0)
        refused(at.MismatchError, "max-error", out, at.fit, source, server="vllm", max_error=2.0)
    elif kind == "server":
        with pytest.raises(ValueError, match="ollama"):
            at.fit(source, out, server="ollama")
    elif kind == "no-out":
        with pytest.raises(ValueError, match="out"):
            at.fit(source, server="vllm")
    elif kind == "absent":
        with pytest.raises(at.AdapterError):
            at.fit(tmp_path / "none", out, server="vllm")
    else:
        out.mkdir()
        (out / "x").write_text("x", encoding="utf-8")
        with pytest.raises(at.StoreError):
            at.fit(source, out, server="vllm")
        at.fit(source, out, server="vllm", replace=True)
        assert not (out / "x").exists()
