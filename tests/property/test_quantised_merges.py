"""Merges onto quantised bases of any shape and block size: exact, and refused where the change is lost.

The bases are packed by bitsandbytes itself, from a flat view: blocks cross rows, and the last may be short.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from tests.parity.exact import assert_exactly_rounded, factors_of
from tests.quant import reference

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
LIMIT = 0.5


@dataclass(frozen=True, kw_only=True)
class Made:
    """A quantised base of one linear layer, an adapter, and what bitsandbytes dequantises."""

    base: Path
    adapter: Path
    start: Tensor


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    return {
        "format_": draw(st.sampled_from(["nf4", "fp4"])),
        "double": draw(st.booleans()),
        "block_size": draw(st.sampled_from([32, 64, 128])),
        "shape": (draw(st.integers(1, 40)), draw(st.integers(1, 90))),
        "size": draw(st.sampled_from([0.001, 0.003, 0.01, 0.03, 0.3])),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def make(
    folder: Path,
    *,
    format_: str,
    double: bool,
    block_size: int,
    shape: tuple[int, int],
    size: float,
    seed: int,
) -> Made:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    how = reference.scheme(format_, double=double, block_size=block_size)
    packed, state = reference.quantize(weight, how)
    start = reference.dequantize(packed, state, torch.bfloat16)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    tensors = {f"{WEIGHT}.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file({WEIGHT: packed, **tensors}, base / "model.safetensors", {"format": "pt"})
    said = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": format_,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    config = {"model_type": "llama", "quantization_config": said}
    (base / "config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(2, shape[1], generator=generator),
        f"base_model.model.{MODULE}.lora_B.weight": size * torch.randn(shape[0], 2, generator=generator),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    lora = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "use_rslora": False,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    return Made(base=base, adapter=adapter, start=start)


def survival(made: Made, written: Tensor) -> Fraction | None:
    """<dW_q, dW> / ||dW||² in rational arithmetic."""
    factors = factors_of(made.adapter, MODULE)
    rows, columns = made.start.shape
    top = bottom = Fraction(0)
    for row in range(rows):
        for column in range(columns):
            delta = factors.delta(row, column)
            old = Fraction(made.start[row, column].item())
            top += delta * (Fraction(written[row, column].item()) - old)
            bottom += delta * delta
    return None if bottom == 0 else top / bottom


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_a_merge_onto_dequantised_weights_is_correctly_rounded(case: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as name:
        made = make(Path(name), **case)  # type: ignore[arg-type]
        at.merge(made.base, made.adapter, Path(name) / "out")
        merged = load_file(Path(name) / "out" / "model.safetensors")
        assert set(merged) == {WEIGHT}
        assert_exactly_rounded(merged[WEIGHT], made.start, [factors_of(made.adapter, MODULE)], count=60)


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_less_than_half_of_the_change_is_refused_and_more_is_what_the_library_packs(
    case: dict[str, object],
) -> None:
    """The library packs the merged bfloat16 weight; what it dequantises decides."""
    how = reference.scheme(
        str(case["format_"]),
        double=bool(case["double"]),
        block_size=int(case["block_size"]),  # type: ignore[call-overload]
    )
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        made = make(folder, **case)  # type: ignore[arg-type]
        at.merge(made.base, made.adapter, folder / "plain")
        packed, state = reference.quantize(load_file(folder / "plain" / "model.safetensors")[WEIGHT], how)
        share = survival(made, reference.dequantize(packed, state, torch.bfloat16))
        forced = at.merge(made.base, made.adapter, folder / "forced", onto="quantized", allow_loss=True)
        found = load_file(folder / "forced" / "model.safetensors")
        assert torch.equal(found[WEIGHT], packed)
        for part, value in state.as_dict(packed=True).items():
            if "quant_state" not in part:
                assert torch.equal(found[f"{WEIGHT}.{part}"], value), part
        assert forced.loss is not None
        told = forced.loss.total.survival
        if share is None:
            assert told is None
        else:
            assert told == pytest.approx(float(share), rel=1e-6, abs=1e-6)
        if share is not None and share < LIMIT:
            with pytest.raises(at.LossyError, match="would survive"):
                at.merge(made.base, made.adapter, folder / "out", onto="quantized")
            assert not (folder / "out").exists()
        else:
            report = at.merge(made.base, made.adapter, folder / "out", onto="quantized")
            assert report.digest == forced.digest
