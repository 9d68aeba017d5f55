"""Checkpoints that transformers saved: every weight is found, described, and has the library's values."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import adapterhub_tools as at
from adapterhub_tools import registry
from adapterhub_tools.errors import MismatchError
from adapterhub_tools.model.quant_scheme import QuantizedTensor
from adapterhub_tools.ops.quantised_base import plain_tensors, quantised_weights, stored_scheme
from adapterhub_tools.store.checkpoint import open_checkpoint
from tests.quant import reference
from tests.quant.conftest import CONFIGS
from tests.quant.reference import DTYPES, same_bits

FORMATS = pytest.mark.parametrize("name", CONFIGS)


def dequantized(folder: Path, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    fmt = registry.load("quant", weight.scheme.format).IMPLEMENTATION
    stored = load_file(folder / "model.safetensors")
    parts = {role: stored[part.spec.name].reshape(-1) for role, part in weight.parts.items()}
    scales = fmt.scales(weight, parts)
    data = parts["data"].contiguous().view(torch.uint8)
    rows = weight.spec.shape[0]
    begin, size = fmt.data_range(weight, 0, rows)
    return fmt.dequantize(weight, data[begin : begin + size], scales, 0, rows, dtype)


@FORMATS
def test_weights_have_the_values_that_the_library_loads(name: str, saved: dict[str, Path]) -> None:
    weights = quantised_weights(open_checkpoint(saved[name]))
    model = LlamaForCausalLM.from_pretrained(saved[name])
    assert len(weights) == 14
    for key, weight in weights.items():
        assert QuantizedTensor.from_json(json.loads(json.dumps(weight.to_json()))).parts == weight.parts
        module = model.get_submodule(key.removesuffix(".weight"))
        for dtype in DTYPES.values():
            if name == "int8":
                expected = reference.functional.int8_vectorwise_dequant(
                    module.weight.data, module.weight.SCB
                ).to(dtype)
            else:
                state = module.weight.quant_state
                expected = reference.dequantize(module.weight.data.view(torch.uint8), state, dtype)
            assert same_bits(dequantized(saved[name], weight, dtype), expected), key


@FORMATS
def test_a_base_seen_as_plain_tensors(name: str, saved: dict[str, Path], plain_base: Path) -> None:
    checkpoint = open_checkpoint(saved[name])
    weights = quantised_weights(checkpoint)
    plain = {key: stored.spec for key, stored in open_checkpoint(plain_base).tensors.items()}
    assert plain_tensors(checkpoint, weights) == plain
    scheme = stored_scheme(weights)
    assert scheme is not None
    assert scheme.format == name.partition("-")[0]
    assert scheme.double == name.endswith("double")
    assert scheme.storage_dtype == {"nf4-in-bf16": "BF16", "int8": "I8"}.get(name, "U8")
    said = CONFIGS[name].bnb_4bit_compute_dtype
    assert scheme.compute_dtype == (None if name == "int8" else reference.NAMES[said])


@FORMATS
def test_a_base_that_is_quantised_while_it_is_loaded(
    name: str, saved: dict[str, Path], plain_base: Path
) -> None:
    """The loader's quantise-then-dequantise, from the 16-bit base."""
    weights = quantised_weights(open_checkpoint(saved[name]))
    plain = load_file(plain_base / "model.safetensors")
    for key, weight in weights.items():
        loader = registry.load("quant", weight.scheme.format).IMPLEMENTATION.loader(
            weight.scheme, weight.spec.shape, torch.bfloat16
        )
        if loader.needs_pass:
            loader.observe(plain[key])
            loader.close()
        seen = loader.dequantized(plain[key], 0, torch.bfloat16)
        assert torch.equal(seen, dequantized(saved[name], weight, torch.bfloat16)), key


def test_the_cpu_kernel_of_the_library_takes_other_scales_where_blocks_cross_rows() -> None:
    """Why the reference looks at weights flat: GPU kernels and the generic code follow the flat order."""
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    how = reference.scheme("nf4")
    packed, state = reference.quantize(weight, how)
    flat = reference.dequantize(packed, state, torch.bfloat16)
    error = float((flat - weight).norm() / weight.norm())
    assert error < 0.12
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        theirs = reference.functional.dequantize_4bit(packed, state)
        assert float((theirs - weight).norm() / weight.norm()) > error


@FORMATS
def test_inspect(name: str, saved: dict[str, Path], plain_base: Path) -> None:
    report, plain = at.inspect(saved[name]), at.inspect(plain_base)
    assert report.parameters == plain.parameters
    assert report.quantised_weights == 14
    assert report.problems == ()
    assert report.quantisation is not None
    assert report.quantisation.startswith("14 weights: ")
    assert report.dtypes[name.partition("-")[0]] == 86016
    assert report.dtypes["BF16"] == plain.parameters - 86016


def test_inspecting_needs_no_tensor_library(saved: dict[str, Path]) -> None:
    code = (
        "import sys, adapterhub_tools as at; from pathlib import Path\n"
        f"assert at.inspect(Path({str(saved['nf4-double'])!r})).quantised_weights == 14\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@FORMATS
def test_the_digest_does_not_depend_on_shards(
    name: str, saved: dict[str, Path], plain_base: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(plain_base, quantization_config=CONFIGS[name])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert at.content_digest(tmp_path / "shards").digest == at.content_digest(saved[name]).digest


@FORMATS
def test_init_records_the_scheme_and_validate_passes(
    name: str, saved: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    report = at.init(adapter, base=saved[name])
    scheme = stored_scheme(quantised_weights(open_checkpoint(saved[name])))
    assert scheme is not None
    assert report.manifest.base.quantisation == scheme.to_json()
    assert any("stored quantised" in note for note in report.notes)
    checked = at.validate(adapter, base=saved[name])
    assert checked.findings == ()
    assert checked.skipped == {}
    assert at.validate(adapter, base=saved[name], check_base="targets").findings == ()


def test_init_keeps_what_is_said_beyond_the_scheme(
    saved: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    said = {"scheme": "bitsandbytes-nf4", "double": True, "version": "0.50.2", "compute_dtype": "F16"}
    report = at.init(adapter, base=saved["nf4-double"], quantisation=said)
    recorded = report.manifest.base.quantisation
    assert recorded is not None
    assert recorded.items() >= said.items()
    assert recorded["block_size"] == 64


def test_init_refuses_a_scheme_that_is_not_the_bases(
    saved: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    with pytest.raises(MismatchError) as raised:
        at.init(adapter, base=saved["nf4"], quantisation={"scheme": "bitsandbytes-fp4"})
    assert [problem.kind for problem in raised.value.problems] == ["quant-scheme"]
    assert not (adapter / "adapter_manifest.json").exists()


def errors(report: at.ValidationReport) -> set[tuple[str, str, str]]:
    return {(e.error.__name__, e.problem.kind, e.problem.loc) for e in report.errors}


@FORMATS
def test_a_quantised_base_where_the_manifest_says_16_bits(
    name: str, saved: dict[str, Path], plain_base: Path, lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    at.init(adapter, base=plain_base)
    found = errors(at.validate(adapter, base=saved[name]))
    assert ("IntegrityError", "base-quantisation", "/base/dtype") in found
    assert ("IntegrityError", "base-digest", "/base/digest") in found


def test_a_base_of_another_scheme(saved: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    at.init(adapter, base=saved["nf4"])
    found = errors(at.validate(adapter, base=saved["nf4-double"]))
    assert ("IntegrityError", "base-quantisation", "/base/quantisation") in found
    assert errors(at.validate(adapter, base=saved["nf4-double"], check_base="off")) == set()


def test_a_16_bit_base_that_was_quantised_while_training(
    plain_base: Path, lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    at.init(adapter, base=plain_base, quantisation={"scheme": "bitsandbytes-nf4", "compute_dtype": "BF16"})
    assert at.validate(adapter, base=plain_base).findings == ()


def test_init_tells_signs_of_a_quantised_base_where_nothing_says_how(
    plain_base: Path, lora: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "someone/model-bnb-4bit"
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    notes = at.init(adapter, base=plain_base).notes
    assert any(
        "may have been trained on a quantised base" in note and "--quantisation" in note for note in notes
    )
    said = {"scheme": "bitsandbytes-nf4"}
    notes = at.init(adapter, base=plain_base, quantisation=said, replace=True).notes
    assert not any("may have been trained" in note for note in notes)


def test_the_commands(saved: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")

    def run(*arguments: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).with_name("adaptertool")), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    code, out = run("inspect", str(saved["nf4-double"]))
    assert code == 0
    assert "14 weights: NF4 in blocks of 64, scales quantised (bitsandbytes)" in " ".join(out.split())
    assert run("init", str(adapter), "--base", str(saved["nf4-double"]))[0] == 0
    code, out = run("inspect", str(adapter))
    assert "bitsandbytes-nf4, double" in out
    assert run("validate", str(adapter), "--base", str(saved["nf4-double"]))[0] == 0
    code, out = run("validate", str(adapter), "--base", str(saved["fp4"]), "--json")
    assert code == 1
    assert "base-quantisation" in out
    code, out = run("hash", str(saved["int8"]))
    assert code == 0
    assert out.strip() == at.content_digest(saved["int8"]).digest
