"""Quantised checkpoints that are damaged, incomplete or of another scheme: refused, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from adapterhub_tools.errors import AdapterError, FormatError, Problem, UnsupportedError
from adapterhub_tools.ops.quantised_base import quantised_weights, read_quantised
from adapterhub_tools.store.checkpoint import open_checkpoint

WEIGHT = "model.layers.1.mlp.down_proj.weight"
MODULE = WEIGHT.removesuffix("weight")
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, Tensor]


def damaged(source: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def state(**changes: Any) -> Callable[[Tensors], None]:
    """Changes fields of a weight's state; None removes one."""

    def change(tensors: Tensors) -> None:
        data = json.loads(bytes(tensors[STATE].numpy())) | changes
        text = json.dumps({key: value for key, value in data.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def drop(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, value: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def text_state(text: bytes) -> Callable[[Tensors], object]:
    return put(STATE, torch.tensor(list(text), dtype=torch.uint8))


def refusal(folder: Path, error: type[AdapterError]) -> Problem:
    """Checks that reading raises exactly this error, that it collects the same, and returns one problem."""
    with pytest.raises(AdapterError) as raised:
        quantised_weights(open_checkpoint(folder))
    assert type(raised.value) is error
    collected: list[Problem] = []
    weights = read_quantised(open_checkpoint(folder), collected)
    assert tuple(collected) == raised.value.problems
    assert WEIGHT not in weights
    assert len(weights) == 13
    assert all(p.file == "model.safetensors" and p.loc and p.message and p.remedy for p in collected)
    return collected[0]


FOUR_BIT_CASES: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "no scales": (drop(f"{WEIGHT}.absmax"), f"{WEIGHT}.absmax", "it is missing"),
    "no nested scales": (drop(f"{WEIGHT}.nested_absmax"), f"{WEIGHT}.nested_absmax", "it is missing"),
    "no nested code book": (
        drop(f"{WEIGHT}.nested_quant_map"),
        f"{WEIGHT}.nested_quant_map",
        "it is missing",
    ),
    "no code book": (drop(f"{WEIGHT}.quant_map"), f"{WEIGHT}.quant_map", "it is missing"),
    "no state": (drop(STATE), WEIGHT, "no quant_state"),
    "no state and no scales": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(f"{WEIGHT}.")],
        WEIGHT,
        "scales (absmax) and quant_state are missing",
    ),
    "no weight": (drop(WEIGHT), STATE, "that it describes is missing"),
    "a block size that is none": (state(blocksize=63), STATE, "block size is 63"),
    "a block size that does not fit the scales": (
        state(blocksize=128),
        f"{WEIGHT}.absmax",
        "expected 80 of U8 (10,240 weights in blocks of 128)",
    ),
    "a block size of zero": (state(blocksize=0), STATE, "blocksize: is 0"),
    "a nested block size that does not fit": (
        state(nested_blocksize=64),
        f"{WEIGHT}.nested_absmax",
        "expected 3 of F32",
    ),
    "another shape": (state(shape=[64, 159]), WEIGHT, "it has 5,120 bytes, expected 5,088"),
    "no shape": (state(shape=None), STATE, "'shape' is missing"),
    "a negative shape": (state(shape=[-64, -160]), STATE, "shape: is an array"),
    "another format inside": (state(quant_type="fp4"), STATE, "quant_type: is 'fp4', expected 'nf4'"),
    "an unknown dtype": (state(dtype="float8"), STATE, "dtype: is 'float8'"),
    "an unknown field": (state(extra=1), STATE, "'extra' is not known"),
    "an offset missing": (state(nested_offset=None), STATE, "'nested_offset' is missing"),
    "an offset that is text": (state(nested_offset="0.1"), STATE, "nested_offset: is the string"),
    "nested scales in another dtype": (state(nested_dtype="float16"), STATE, "nested_dtype"),
    "no JSON": (text_state(b"\x00\x01"), STATE, ""),
    "an offset that is NaN": (
        text_state(
            b'{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[64,160],'
            b'"nested_blocksize":256,"nested_dtype":"float32","nested_offset":NaN}'
        ),
        STATE,
        "NaN",
    ),
    "no object": (text_state(b"[1]"), STATE, "is an array"),
    "a state of another dtype": (put(STATE, torch.zeros(4)), STATE, "expected JSON text in U8"),
    "scales of another dtype": (
        put(f"{WEIGHT}.absmax", torch.zeros(160)),
        f"{WEIGHT}.absmax",
        "it is F32 of shape [160], expected 160 of U8",
    ),
    "too few scales": (
        put(f"{WEIGHT}.absmax", torch.zeros(159, dtype=torch.uint8)),
        f"{WEIGHT}.absmax",
        "expected 160 of U8",
    ),
    "a short code book": (put(f"{WEIGHT}.quant_map", torch.zeros(15)), f"{WEIGHT}.quant_map", "16 of F32"),
}


@pytest.mark.parametrize("name", FOUR_BIT_CASES)
def test_four_bit_weights(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    change, loc, text = FOUR_BIT_CASES[name]
    problem = refusal(damaged(saved["nf4-double"], tmp_path / "base", change), FormatError)
    assert problem.loc == loc
    assert text in problem.message


INT8_CASES: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "no scales": (drop(f"{MODULE}SCB"), WEIGHT, "scales (SCB) are missing"),
    "no weight": (drop(WEIGHT), f"{MODULE}SCB", "that it scales is missing"),
    "too few scales": (put(f"{MODULE}SCB", torch.zeros(63)), f"{MODULE}SCB", "expected 64 of F32"),
    "a weight that is not int8": (put(WEIGHT, torch.zeros(64, 160)), WEIGHT, "expected I8"),
    "a layout of tiles": (
        put(f"{MODULE}weight_format", torch.tensor(2, dtype=torch.uint8)),
        f"{MODULE}weight_format",
        "number 2, expected 0",
    ),
    "a layout that is text": (
        put(f"{MODULE}weight_format", torch.zeros(3, dtype=torch.uint8)),
        f"{MODULE}weight_format",
        "expected 1 of U8",
    ),
}


@pytest.mark.parametrize("name", INT8_CASES)
def test_int8_weights(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    change, loc, text = INT8_CASES[name]
    problem = refusal(damaged(saved["int8"], tmp_path / "base", change), FormatError)
    assert problem.loc == loc
    assert text in problem.message


def test_int8_without_the_record_of_its_layout_is_read(saved: dict[str, Path], tmp_path: Path) -> None:
    """Older releases did not write one."""
    folder = damaged(saved["int8"], tmp_path / "base", drop(f"{MODULE}weight_format"))
    assert len(quantised_weights(open_checkpoint(folder))) == 14


def test_a_format_of_the_library_that_is_not_known(saved: dict[str, Path], tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        tensors[STATE.replace("nf4", "af4")] = tensors.pop(STATE)

    problem = refusal(damaged(saved["nf4-double"], tmp_path / "base", rename), UnsupportedError)
    assert problem.kind == "unknown-scheme"
    assert "'af4', expected one of nf4, fp4" in problem.message


def test_a_weight_with_two_schemes(saved: dict[str, Path], tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        text = bytes(tensors[STATE].numpy()).replace(b"nf4", b"fp4")
        tensors[STATE.replace("nf4", "fp4")] = torch.tensor(list(text), dtype=torch.uint8)

    folder = damaged(saved["nf4-double"], tmp_path / "base", twice)
    with pytest.raises(FormatError, match="second scheme"):
        quantised_weights(open_checkpoint(folder))


def test_every_problem_is_told(saved: dict[str, Path], tmp_path: Path) -> None:
    other = WEIGHT.replace("layers.1", "layers.0")
    folder = damaged(
        saved["nf4-double"], tmp_path / "base", drop(f"{WEIGHT}.absmax", f"{other}.nested_absmax")
    )
    with pytest.raises(FormatError) as raised:
        quantised_weights(open_checkpoint(folder))
    assert {p.loc for p in raised.value.problems} == {f"{WEIGHT}.absmax", f"{other}.nested_absmax"}


def test_inspect_says_what_is_wrong(saved: dict[str, Path], tmp_path: Path) -> None:
    report = at.inspect(damaged(saved["nf4-double"], tmp_path / "base", drop(f"{WEIGHT}.absmax")))
    assert [problem.loc for problem in report.problems] == [f"{WEIGHT}.absmax"]
    assert report.quantised_weights == 13


def test_validate_and_init_refuse(saved: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    folder = damaged(saved["nf4-double"], tmp_path / "base", drop(f"{WEIGHT}.absmax"))
    report = at.validate(adapter, base=folder)
    (finding,) = report.errors
    assert finding.error is FormatError
    assert finding.problem.loc == f"{WEIGHT}.absmax"
    assert "base" in report.skipped
    with pytest.raises(FormatError, match="absmax"):
        at.init(adapter, base=folder)
    assert not (adapter / "adapter_manifest.json").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_another_library_is_named_instead_of_missing_modules(
    method: str, plain_base: Path, lora: Path, tmp_path: Path
) -> None:
    def pack(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            shape = tensors.pop(name).shape
            stem = name.removesuffix("weight")
            tensors[f"{stem}qweight"] = torch.zeros(shape[1] // 8, shape[0], dtype=torch.int32)
            tensors[f"{stem}scales"] = torch.zeros(1, shape[0], dtype=torch.float16)

    folder = damaged(plain_base, tmp_path / "base", pack)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedError) as raised:
        at.merge(folder, lora, tmp_path / "out")
    (problem,) = raised.value.problems
    assert problem.kind == "unknown-scheme"
    assert repr(method) in problem.message
    assert problem.file == "config.json"
    assert not (tmp_path / "out").exists()
    (finding,) = at.validate(lora, base=folder).errors
    assert (finding.error, finding.problem) == (UnsupportedError, problem)
