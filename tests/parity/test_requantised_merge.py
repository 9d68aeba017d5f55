"""``--onto quantized``: a merged weight is quantised as bitsandbytes quantises the correctly rounded one."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import adapterhub_tools as at
from tests.parity.oracle import refused
from tests.parity.quantised_bases import SCHEMES, adapted, load, logits, save_plain

TARGETS = ["q_proj", "v_proj", "down_proj"]
STATE = ".quant_state.bitsandbytes__"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("half") / "base", torch.bfloat16)


def made(
    half: Path, folder: Path, scheme: str, *, size: float = 0.05, dora: bool = False
) -> tuple[Path, Path]:
    """Saves the base as transformers quantises it, and an adapter trained on it."""
    model = load(half, SCHEMES[scheme], torch.bfloat16)
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=dora)
    adapted(model, config, folder / "adapter", size=size)
    return folder / "base", folder / "adapter"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compares bytes; the JSON of a state may have spaces at its end."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if STATE in name:
            assert json.loads(bytes(found[name].tolist())) == json.loads(bytes(tensor.tolist())), name
        else:
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_what_a_loader_makes_of_the_merged_weights(
    half: Path, tmp_path: Path, scheme: str, dora: bool
) -> None:
    """transformers quantises the merged bfloat16 model, and saves the same bytes."""
    base, adapter = made(half, tmp_path, scheme, dora=dora)
    report = at.merge(base, adapter, tmp_path / "quantised", onto="quantized", threads=2)
    at.merge(base, adapter, tmp_path / "plain", dtype="bfloat16")
    again = load(tmp_path / "plain", SCHEMES[scheme], torch.bfloat16)
    again.save_pretrained(tmp_path / "again")
    found, expected = tensors_of(tmp_path / "quantised"), tensors_of(tmp_path / "again")
    before = tensors_of(base)
    changed = {name for name in found if any(target in name for target in TARGETS)}
    assert changed
    assert_same_tensors({n: found[n] for n in changed}, {n: expected[n] for n in changed})
    for name in found.keys() - changed:
        assert torch.equal(found[name], before[name]), f"{name} was not to change"
    assert report.receipt is not None
    assert report.receipt.options["onto"] == "quantized"
    assert {t.name for t in report.receipt.tensors} == set(found)
    assert report.changed == report.expected == 6
    assert at.verify(merged=tmp_path / "quantised", receipt=True).ok


@pytest.mark.parametrize("scheme", ["nf4", "nf4,double"])
def test_it_is_bitsandbytes_of_the_exactly_rounded_weight(half: Path, tmp_path: Path, scheme: str) -> None:
    """bitsandbytes sees bfloat16, the dtype that the weight had before it was quantised."""
    base, adapter = made(half, tmp_path, scheme)
    at.merge(base, adapter, tmp_path / "quantised", onto="quantized")
    at.merge(base, adapter, tmp_path / "plain")
    found, plain = tensors_of(tmp_path / "quantised"), tensors_of(tmp_path / "plain")
    name = "model.layers.0.mlp.down_proj.weight"
    assert plain[name].dtype == torch.bfloat16
    packed, state = bnb.functional.quantize_4bit(
        plain[name], quant_type="nf4", compress_statistics="double" in scheme
    )
    assert torch.equal(found[name], packed)
    for part, tensor in state.as_dict(packed=True).items():
        if "quant_state" not in part:
            assert torch.equal(found[f"{name}.{part}"], tensor), part


@pytest.mark.parametrize("scheme", ["nf4,double", "int8"])
def test_transformers_loads_it(half: Path, tmp_path: Path, scheme: str) -> None:
    base, adapter = made(half, tmp_path, scheme, size=0.2)
    at.merge(base, adapter, tmp_path / "quantised", onto="quantized")
    at.merge(base, adapter, tmp_path / "plain")
    before, merged, plain = (logits(load(tmp_path / n)) for n in ("base", "quantised", "plain"))
    moved = float((plain - before).norm())
    assert float((merged - plain).norm()) < 0.5 * moved


def test_sharded_parts_and_threads_give_the_same_tensors(half: Path, tmp_path: Path) -> None:
    """The parts of one weight may lie in two shards."""
    base, adapter = made(half, tmp_path, "nf4,double")
    whole = at.merge(base, adapter, tmp_path / "one", onto="quantized", threads=1)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        part = {name: t for index, (name, t) in enumerate(sorted(tensors.items())) if index % 3 == number}
        save_file(part, base / file)
        weight_map |= dict.fromkeys(part, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded = at.merge(base, adapter, tmp_path / "three", onto="quantized", threads=3)
    assert sharded.digest == whole.digest
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "three").values())


def test_a_change_that_4_bits_cannot_hold_is_refused_unless_it_is_allowed(half: Path, tmp_path: Path) -> None:
    base, adapter = made(half, tmp_path, "nf4", size=0.001)
    problem = refused(at.LossyError, "change-lost", base, adapter, tmp_path / "out", onto="quantized")
    assert "--allow-loss" in problem.remedy
    report = at.merge(base, adapter, tmp_path / "out", onto="quantized", allow_loss=True)
    assert report.loss is not None
    survival = report.loss.total.survival
    assert survival is not None
    assert survival < 0.5
    planned = at.merge(base, adapter, None, onto="quantized", allow_loss=True, dry_run=True)
    assert planned.loss == report.loss
    refused(at.LossyError, "change-lost", base, adapter, tmp_path / "off", onto="quantized", loss="off")
    off = at.merge(base, adapter, tmp_path / "off", onto="quantized", allow_loss=True, loss="off")
    assert off.loss is None
    assert off.digest == report.digest


@pytest.mark.parametrize("scheme", ["nf4", "nf4,double", "int8"])
@pytest.mark.parametrize("size", [0.002, 0.005, 0.02])
def test_the_survival_is_that_of_the_written_weights(
    half: Path, tmp_path: Path, scheme: str, size: float
) -> None:
    """From the files: <dW_q, dW> / ||dW||² of every target, all in the dtype that a model computes with."""
    base, adapter = made(half, tmp_path, scheme, size=size)
    report = at.merge(base, adapter, tmp_path / "out", onto="quantized", allow_loss=True, loss="full")
    assert report.loss is not None
    at.merge(base, adapter, tmp_path / "exact", dtype="float64")
    at.merge(base, adapter, tmp_path / "zero", scale=0.0, dtype="float64")
    exact, start = tensors_of(tmp_path / "exact"), tensors_of(tmp_path / "zero")
    at.merge(tmp_path / "out", adapter, tmp_path / "written", scale=0.0, dtype="float64")
    written = tensors_of(tmp_path / "written")
    kept = size2 = 0.0
    for name, loss in report.loss.tensors.items():
        delta, arrived = exact[name] - start[name], written[name] - start[name]
        expected = float((delta * arrived).sum() / (delta * delta).sum())
        assert loss.survival == pytest.approx(expected, rel=1e-6, abs=1e-9)
        kept, size2 = kept + float((delta * arrived).sum()), size2 + float((delta * delta).sum())
    total = report.loss.total.survival
    assert total == pytest.approx(kept / size2, rel=1e-6)
    assert total is not None
    if total < 0.5:
        refused(at.LossyError, "change-lost", base, adapter, tmp_path / "no", onto="quantized")
    else:
        assert at.merge(base, adapter, tmp_path / "yes", onto="quantized").digest == report.digest
