"""The table "What works, and what is refused" of the README, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import adapterhub_tools as at
from tests.parity.quantised_bases import NF4_DOUBLE, load, logits, save_plain
from tests.parity.quantised_bases import adapted as adapted_model

README = Path(__file__).resolve().parents[2] / "README.md"
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, config: PeftConfig, out: Path, *, steps: int = 0) -> Path:
    """Saves a PEFT adapter whose parameters are all perturbed, after some steps of LoRA+ if asked."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    if steps:
        optimiser = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
        ids = torch.arange(16)[None]
        for _ in range(steps):
            model(ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.save_pretrained(out)
    return out


def assert_merges(base: Path, adapter: Path, out: Path) -> None:
    """The merged folder has the logits of PEFT's unmerged model."""
    from peft import PeftModel

    report = at.merge(base, adapter, out)
    assert report.changed == report.expected > 0
    ids = torch.arange(16)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        expected = unmerged(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def assert_refused(base: Path, adapter: Path, out: Path, reason: str) -> None:
    """Described and validated, but not merged; nothing is left at the output."""
    assert at.inspect(adapter).to_json()["mergeable"] is False
    with pytest.raises(at.UnsupportedError, match=reason) as caught:
        at.merge(base, adapter, out)
    assert all(problem.remedy for problem in caught.value.problems)
    assert not out.exists()


def test_lora(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "a")
    assert at.validate(adapter, base=base).ok
    assert_merges(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("use_dora", [False, True], ids=["qlora", "qdora"])
def test_qlora_and_qdora_merge_onto_what_they_were_trained_on(tmp_path: Path, *, use_dora: bool) -> None:
    """Onto the dequantised weights, from the 16-bit base and from the stored one; onto either as it is."""
    base = save_plain(tmp_path / "base", torch.float32)
    model = load(base, NF4_DOUBLE)
    model.save_pretrained(tmp_path / "stored")
    config = LoraConfig(r=4, target_modules=TARGETS, use_dora=use_dora)
    expected = logits(adapted_model(model, config, tmp_path / "a"))
    scheme = {"scheme": "bitsandbytes-nf4", "double": True, "compute_dtype": "F32"}
    at.init(tmp_path / "a", base=base, quantisation=scheme)
    manifest = json.loads((tmp_path / "a" / "adapter_manifest.json").read_text())
    assert manifest["base"]["quantisation"] == scheme
    loaded = at.merge(base, tmp_path / "a", tmp_path / "loaded")
    stored = at.merge(tmp_path / "stored", tmp_path / "a", tmp_path / "dequantised", check_base="off")
    assert loaded.digest == stored.digest
    torch.testing.assert_close(logits(load(tmp_path / "loaded")), expected, rtol=1e-5, atol=1e-5)
    original = at.merge(base, tmp_path / "a", tmp_path / "original", onto="original")
    assert original.changed == original.expected
    packed = at.merge(
        tmp_path / "stored", tmp_path / "a", tmp_path / "packed", onto="quantized", check_base="off"
    )
    assert packed.changed == packed.expected
    assert packed.loss is not None


def test_qlora_refuses_a_base_of_packed_four_bit_weights(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = adapted(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "a")
    weights = load_file(base / "model.safetensors")
    for name in [name for name in weights if "q_proj" in name]:
        weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(at.AdapterError, match="quantised"):
        at.merge(base, adapter, tmp_path / "out")


def test_lora_plus(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "a", steps=2)
    at.init(adapter, base=base, training={"lora_plus_ratio": 16})
    manifest = json.loads((adapter / "adapter_manifest.json").read_text())
    assert manifest["training"]["lora_plus_ratio"] == 16
    assert at.validate(adapter, base=base).ok
    assert_merges(base, adapter, tmp_path / "out")


def test_lora_plus_on_a_4_bit_base(tmp_path: Path) -> None:
    base = save_plain(tmp_path / "base", torch.float32)
    model = load(base, NF4_DOUBLE)
    trained = adapted_model(model, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "a", steps=2)
    at.merge(base, tmp_path / "a", tmp_path / "out", quant="nf4,double", compute_dtype="fp32")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(trained), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        AdaLoraConfig(target_modules=TARGETS, total_step=10, init_r=4, target_r=2),
        IA3Config(target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=4, target_modules=TARGETS),
        LoKrConfig(r=4, target_modules=TARGETS),
        HiraConfig(r=4, target_modules=TARGETS),
    ],
    ids=["dora", "adalora", "ia3", "loha", "lokr", "hira"],
)
def test_other_methods(base: Path, tmp_path: Path, config: PeftConfig) -> None:
    adapter = adapted(base, config, tmp_path / "a")
    at.init(adapter, base=base)
    assert at.validate(adapter, base=base).ok
    assert_merges(base, adapter, tmp_path / "out")


def test_galore_can_be_recorded(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "a")
    at.init(adapter, training={"galore": {"rank": 128, "update_gap": 200}})
    manifest = json.loads((adapter / "adapter_manifest.json").read_text())
    assert manifest["training"]["galore"] == {"rank": 128, "update_gap": 200}
    assert at.validate(adapter).ok


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "prefix"),
        (LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), "base"),
        (LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"), "base"),
    ],
    ids=["prefix tuning", "pissa", "olora"],
)
def test_refused_types_are_described(base: Path, tmp_path: Path, config: PeftConfig, reason: str) -> None:
    adapter = adapted(base, config, tmp_path / "a")
    at.init(adapter)
    assert at.validate(adapter).ok
    assert_refused(base, adapter, tmp_path / "out", f"(?i){reason}")


def test_bottleneck_adapters_are_described_and_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bottleneck"
    folder.mkdir()
    config = {"config": {"reduction_factor": 8}, "model_class": "LlamaAdapterModel", "name": "n"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = "model.layers.0.mlp.adapters.n.adapter_down.0.weight"
    save_file({key: torch.ones(4, 32)}, folder / "adapter.safetensors")
    at.init(folder, base=base)
    assert at.validate(folder, base=base).ok
    assert_refused(base, folder, tmp_path / "out", "layers of its own")


def test_pickles_are_never_read(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert at.inspect(adapter).to_json()["method"] == "lora"
    with pytest.raises(at.UnsupportedError, match="pickle"):
        at.merge(base, adapter, tmp_path / "out")


def test_every_row_of_the_table_is_tested() -> None:
    rows = [line.split("|")[1].strip() for line in README.read_text().splitlines() if line.startswith("| ")]
    tested = (
        "LoRA (PEFT 0.3 to 0.21)",
        "QLoRA",
        "LoRA+",
        "GaLore",
        "DoRA, QDoRA",
        "AdaLoRA",
        "(IA)³",
        "LoHa, LoKr, HiRA and others",
        "prefix tuning",
        "bottleneck adapters",
        "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA",
        "pickles (`adapter_model.bin`)",
    )
    assert rows[rows.index("sort") + 1 :] == list(tested)
