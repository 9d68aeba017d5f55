"""fit against readers that behave as the servers do, PEFT's outputs, and exact fractions."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import adapterhub_tools as at
from tests.parity import models, server_readers
from tests.parity.low_rank import close, deltas, fresh, loaded, refused, saved
from tests.parity.models import outputs_of, save_base

READERS: dict[str, Callable[[Path], Any]] = {
    "vllm": server_readers.vllm,
    "llama.cpp": server_readers.llama_cpp,
    "sglang": server_readers.sglang,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **fields})


# name -> (config, the servers for which every module stays exact)
CASES: dict[str, tuple[LoraConfig, set[str]]] = {
    "plain": (lora(), {"vllm", "llama.cpp", "sglang"}),
    "odd-alpha": (lora(lora_alpha=7), {"vllm", "llama.cpp", "sglang"}),
    "ranks": (lora(rank_pattern={"q_proj": 2, "v_proj": 8}), {"vllm", "llama.cpp", "sglang"}),
    "alphas": (lora(alpha_pattern={"q_proj": 16, "v_proj": 2}), {"vllm", "llama.cpp", "sglang"}),
    "both": (lora(rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 64}), {"vllm", "llama.cpp", "sglang"}),
    "rslora-square": (lora(use_rslora=True), {"vllm", "llama.cpp", "sglang"}),
    "rslora": (lora(r=8, use_rslora=True), {"vllm"}),
    "rslora-ranks": (lora(use_rslora=True, rank_pattern={"q_proj": 8}), set()),
    "three": (lora(alpha_pattern={"q_proj": 24}), set()),
    "embedding": (
        lora(target_modules=["embed_tokens", "q_proj", "v_proj"], alpha_pattern={"q_proj": 4}),
        {"vllm", "llama.cpp", "sglang"},
    ),
}


@pytest.mark.parametrize("server", READERS)
@pytest.mark.parametrize("case", CASES)
def test_a_server_finds_the_deltas_that_peft_finds(case: str, server: str, tmp_path: Path) -> None:
    config, exact = CASES[case]
    model = saved(fresh(models.llama), config, tmp_path / "a")
    expected, outputs = deltas(model), outputs_of(loaded(fresh(models.llama), tmp_path / "a"))
    # PEFT stores the embedding itself beside its factors; only the base tells that it is the base's own.
    base = save_base(fresh(models.llama), tmp_path / "base") if case == "embedding" else None
    report = at.fit(tmp_path / "a", tmp_path / "out", server=server, base=base)
    found = READERS[server](tmp_path / "out")
    assert set(found) == set(expected)
    for module, (scale, b, a) in found.items():
        got = scale * (b.double() @ a.double())
        wanted = expected[module].T if case == "embedding" and "embed" in module else expected[module]
        bound = 1e-12 if server in exact else 1e-6
        assert float((got - wanted).norm()) <= bound * float(wanted.norm()), module
    # It is a PEFT adapter, and PEFT finds the same.
    close(outputs_of(loaded(fresh(models.llama), tmp_path / "out")), outputs, 1e-5)
    assert all(item.exact for item in report.modules) == (server in exact)
    assert max((item.error for item in report.modules), default=0.0) < 1e-6
    assert report.digest is not None
    at.validate(tmp_path / "out").raise_for_problems()
    manifest = at.load_manifest(tmp_path / "out")
    assert [entry.operation for entry in manifest.history] == ["fit"]
    again = at.fit(tmp_path / "out", server=server, check=True)
    assert again.exit_code == 0


@pytest.mark.parametrize("case", ["ranks", "alphas", "both", "odd-alpha"])
@pytest.mark.parametrize("server", READERS)
def test_what_is_called_exact_is_the_same_fractions(case: str, server: str, tmp_path: Path) -> None:
    config, _ = CASES[case]
    saved(fresh(models.llama), config, tmp_path / "a")
    at.fit(tmp_path / "a", tmp_path / "out", server=server)
    data, tensors = server_readers.opened(tmp_path / "a")
    for module, (_, b, a) in READERS[server](tmp_path / "out").items():
        last = module.rpartition(".")[2]
        rank = data["rank_pattern"].get(last, data["r"])
        alpha = data["alpha_pattern"].get(last, data["lora_alpha"])
        old = [tensors[f"base_model.model.{module}.lora_{role}.weight"] for role in "BA"]
        written = server_readers.opened(tmp_path / "out")[0]
        divisor = b.shape[1] if server == "llama.cpp" else written["r"]
        scale = Fraction(written["lora_alpha"]) / divisor
        got = server_readers.delta(scale, b[:6], a[:, :6])
        wanted = server_readers.delta(Fraction(alpha) / rank, old[0][:6], old[1][:, :6])
        assert got == wanted, module


def test_bfloat16_factors_and_a_wider_dtype(tmp_path: Path) -> None:
    saved(fresh(models.llama), lora(alpha_pattern={"q_proj": 24}), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    narrow = at.fit(tmp_path / "a", tmp_path / "narrow", server="vllm")
    wide = at.fit(tmp_path / "a", tmp_path / "wide", server="vllm", dtype="float32")
    assert 1e-5 < max(item.error for item in narrow.modules) < 4e-3
    assert all(item.exact for item in wide.modules)  # 3·B fits the bits of float32
    refused(
        at.LossyError, "approximation", tmp_path / "c", at.fit, tmp_path / "a", server="vllm", max_error=1e-6
    )
    at.fit(tmp_path / "a", tmp_path / "d", server="vllm", max_error=1e-6, allow_lossy=True)


# --- layouts -------------------------------------------------------------------------------------


def phi3(*, hidden: int = models.HIDDEN) -> Phi3ForCausalLM:
    """A model whose attention and gate are fused."""
    config = Phi3Config(
        vocab_size=models.VOCAB,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rms_norm_eps=1e-6,
    )
    model = Phi3ForCausalLM(config)
    models.randomise(model, seed=7)
    return model.eval()


def apart() -> LlamaForCausalLM:
    """The same model with its layers apart."""
    model = models.llama()
    split: dict[str, torch.Tensor] = {}
    for name, tensor in fresh(phi3).state_dict().items():
        stem, _, leaf = name.rpartition(".weight")[0].rpartition(".")
        if leaf == "qkv_proj":
            sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
        elif leaf == "gate_up_proj":
            sizes = {"gate_proj": 48, "up_proj": 48}
        else:
            split[name] = tensor
            continue
        for part, piece in zip(sizes, tensor.split(list(sizes.values())), strict=True):
            split[f"{stem}.{part}.weight"] = piece.contiguous()
    model.load_state_dict(split)
    return model.eval()


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["q_proj", "v_proj"], ["k_proj"], ["up_proj"]],
)
@pytest.mark.parametrize("server", ["vllm", "llama.cpp", "peft"])
def test_parts_become_a_fused_layer_exactly(targets: list[str], server: str, tmp_path: Path) -> None:
    assert torch.allclose(outputs_of(fresh(phi3)), outputs_of(apart()), atol=1e-5)
    base = save_base(fresh(phi3), tmp_path / "base")
    config = lora(target_modules=targets, alpha_pattern={"k_proj": 4, "up_proj": 16})
    expected = outputs_of(saved(apart(), config, tmp_path / "a"))
    report = at.fit(tmp_path / "a", tmp_path / "out", server=server, base=base)
    assert all(item.exact for item in report.modules)
    assert any(item.feature == "layout" and item.verdict == "rewritten" for item in report.findings)
    close(outputs_of(loaded(fresh(phi3), tmp_path / "out")), expected, 1e-4)
    config_out, tensors = server_readers.opened(tmp_path / "out")
    assert all("qkv_proj" in name or "gate_up_proj" in name for name in tensors)
    if server in READERS:
        READERS[server](tmp_path / "out")
    at.validate(tmp_path / "out", base=base).raise_for_problems()
    assert set(config_out["target_modules"]) <= {"qkv_proj", "gate_up_proj"}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("server", ["vllm", "llama.cpp", "peft"])
def test_a_fused_layer_becomes_parts_exactly(server: str, rslora: bool, tmp_path: Path) -> None:
    base = save_base(apart(), tmp_path / "base")
    config = lora(target_modules=["qkv_proj", "gate_up_proj", "o_proj"], use_rslora=rslora)
    expected = outputs_of(saved(fresh(phi3), config, tmp_path / "a"))
    report = at.fit(tmp_path / "a", tmp_path / "out", server=server, base=base)
    assert all(item.exact for item in report.modules)
    close(outputs_of(loaded(apart(), tmp_path / "out")), expected, 1e-4)
    at.validate(tmp_path / "out", base=base).raise_for_problems()


def test_layouts_that_do_not_fit(tmp_path: Path) -> None:
    base = save_base(fresh(models.gpt2), tmp_path / "gpt2")
    saved(apart(), lora(), tmp_path / "a")
    report = at.fit(tmp_path / "a", server="vllm", base=base, check=True)
    assert report.verdict == "refused"
    refused(
        at.UnsupportedError, "targets", tmp_path / "out", at.fit, tmp_path / "a", server="vllm", base=base
    )
    dora = lora(use_dora=True)
    saved(apart(), dora, tmp_path / "dora")
    phi = save_base(fresh(phi3), tmp_path / "phi")
    refused(
        at.UnsupportedError, "layout", tmp_path / "out", at.fit, tmp_path / "dora", server="peft", base=phi
    )


# --- what is left out ----------------------------------------------------------------------------


def test_a_base_of_another_width_is_refused(tmp_path: Path) -> None:
    """Names alone would fit: the layers of a narrower Llama, and of a narrower Phi-3 that joins them."""
    narrow = models.llama_config()
    narrow.hidden_size = 24
    models.save_base(LlamaForCausalLM(narrow), tmp_path / "llama")
    models.save_base(phi3(hidden=24), tmp_path / "phi")
    saved(fresh(models.llama), lora(), tmp_path / "a")
    saved(fresh(models.llama), lora(target_modules=["gate_proj", "up_proj"]), tmp_path / "b")
    for adapter, base, weight in (("a", "llama", "32×32"), ("b", "phi", "96×32")):
        folder, given = tmp_path / adapter, tmp_path / base
        refused(at.MismatchError, "shape", tmp_path / "out", at.fit, folder, server="vllm", base=given)
        with pytest.raises(at.MismatchError) as caught:
            at.fit(folder, server="vllm", base=given, check=True)
        assert {problem.file for problem in caught.value.problems} == {adapter}
        assert any(weight in str(problem) and "×24" in str(problem) for problem in caught.value.problems)


def test_tensors_that_are_the_bases_own_are_left_out(tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    config = lora(modules_to_save=["lm_head"])
    saved(fresh(models.llama), config, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if "lm_head" in name]
    refused(
        at.UnsupportedError,
        "modules_to_save",
        tmp_path / "x",
        at.fit,
        tmp_path / "a",
        server="vllm",
        base=base,
    )
    tensors[name] = load_file(base / "model.safetensors")["lm_head.weight"]
    save_file(tensors, path)
    refused(at.UnsupportedError, "modules_to_save", tmp_path / "x", at.fit, tmp_path / "a", server="vllm")
    expected = outputs_of(loaded(fresh(models.llama), tmp_path / "a"))
    report = at.fit(tmp_path / "a", tmp_path / "out", server="vllm", base=base)
    assert [item for item, _ in report.left_out] == [name]
    assert set(server_readers.vllm(tmp_path / "out")) == {
        key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors if "lora" in key
    }
    close(outputs_of(loaded(fresh(models.llama), tmp_path / "out")), expected)
    kept = at.fit(tmp_path / "a", tmp_path / "peft", server="peft", base=base)
    assert kept.left_out == ()
    assert name in load_file(tmp_path / "peft" / "adapter_model.safetensors")


def test_dora_becomes_lora_only_when_asked(tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    saved(fresh(models.llama), lora(use_dora=True), tmp_path / "a")
    call: dict[str, Any] = {"server": "llama.cpp"}
    refused(at.UnsupportedError, "dora", tmp_path / "out", at.fit, tmp_path / "a", **call)
    refused(at.MismatchError, "base", tmp_path / "out", at.fit, tmp_path / "a", to_lora=True, **call)
    call |= {"base": base, "to_lora": True}
    refused(at.LossyError, "approximation", tmp_path / "out", at.fit, tmp_path / "a", max_rank=1, **call)
    at.fit(tmp_path / "a", tmp_path / "out", max_error=0.1, **call)
    at.convert(tmp_path / "a", tmp_path / "lora", to="lora", base=base, rank="auto", max_error=0.1)
    expected = outputs_of(loaded(fresh(models.llama), tmp_path / "lora"))
    close(outputs_of(loaded(fresh(models.llama), tmp_path / "out")), expected)
    server_readers.llama_cpp(tmp_path / "out")
    entries = at.load_manifest(tmp_path / "out").history
    assert [entry.operation for entry in entries] == ["convert", "fit"]
    assert not list(tmp_path.glob("**/adaptertool-*"))


def test_peft_keeps_everything(tmp_path: Path) -> None:
    build: Callable[[], nn.Module] = models.llama
    config = lora(use_dora=True, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"])
    expected = outputs_of(saved(fresh(build), config, tmp_path / "a"))
    report = at.fit(tmp_path / "a", tmp_path / "out", server="peft")
    assert report.verdict == "accepted"
    assert report.modules == ()
    close(outputs_of(loaded(fresh(build), tmp_path / "out")), expected)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
