"""DoRA and (IA)³ are predicted with a gain for each row or column: small files, and never a wrong base."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import adapterhub_tools as at
from adapterhub_tools.engine.undo_predict import pack_gains, unpack_gains
from adapterhub_tools.errors import FormatError
from adapterhub_tools.linalg.line_gains import root_of, rounded_quotients
from adapterhub_tools.model.undo import MERGED, SCALED, UNDO_FILE
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.ops.undo_file import open_undo
from tests.parity.models import perturb_trainable, randomise
from tests.undo.models import files_of, make_adapter, make_base

LIMIT = 1.2
ROUNDED = {"bfloat16": 0.0, "float32": 0.07}
"""What gains of 29 bits cost beside float32's 24: they are off by up to 1/64 of a step of the weights."""


def predictors(merged: Path) -> set[str]:
    with open_undo(merged, load_receipt(merged)) as opened:
        return {tensor.predictor for tensor in opened.undo.tensors.values()} - {"copy"}


def gains_bits(merged: Path) -> int:
    with open_undo(merged, load_receipt(merged)) as opened:
        tensors = opened.undo.tensors.values()
        return 8 * sum(opened.blob(t.gains).spec.nbytes for t in tensors if t.gains is not None)


def make_dora(folder: Path, base: Path, *, hidden: int, delta: float, spread: float) -> Path:
    """A DoRA adapter whose magnitudes are the norms of the base's rows, times 1 ± spread."""
    make_adapter(folder, hidden=hidden, rank=16, delta=delta)
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, weights = load_file(path), load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        stem = name.removesuffix("lora_A.weight")
        weight = weights[stem.removeprefix("base_model.model.") + "weight"].double()
        factor = 1 + spread * torch.randn(len(weight), generator=generator).double()
        tensors[f"{stem}lora_magnitude_vector"] = (weight.norm(dim=1) * factor).float()
    save_file(tensors, path, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    return folder


def make_ia3(folder: Path, *, hidden: int, spread: float, gains: torch.Tensor | None = None) -> Path:
    generator = torch.Generator().manual_seed(6)
    tensors = {}
    for layer in range(2):
        for name, rows in (("q_proj", hidden), ("v_proj", hidden // 2)):
            values = 1 + spread * torch.randn(rows, 1, generator=generator)
            if gains is not None:
                values[: len(gains), 0] = gains
            tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.ia3_l"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": "example/tiny",
        "target_modules": ["q_proj", "v_proj"],
        "feedforward_modules": [],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def entropy(base: Path, merged: Path, ideal: dict[str, torch.Tensor]) -> float:
    """Bits a weight of what remains of the base once the ideal prediction is known, in steps of the dtype."""
    counts: dict[int, int] = {}
    before = load_file(base / "model.safetensors")
    for name, predicted in ideal.items():
        true = before[name]
        kind = {2: torch.int16, 4: torch.int32}[true.element_size()]
        places = [
            torch.where(bits < 0, -(bits & torch.iinfo(kind).max), bits)
            for bits in (t.view(kind).long() for t in (true, predicted.float().to(true.dtype)))
        ]
        for value, count in zip(*torch.unique(places[0] - places[1], return_counts=True), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(count)
    total = sum(counts.values())
    return -sum(count / total * np.log2(count / total) for count in counts.values())


def ideal_dora(base: Path, adapter: Path, merged: Path) -> dict[str, torch.Tensor]:
    factors, before = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    after, found = load_file(merged / "model.safetensors"), {}
    for name in [name for name in factors if name.endswith("lora_A.weight")]:
        stem = name.removesuffix("lora_A.weight")
        target = stem.removeprefix("base_model.model.") + "weight"
        delta = 2.0 * factors[f"{stem}lora_B.weight"].double() @ factors[name].double()
        norms = (before[target].double() + delta).norm(dim=1)
        gains = norms / factors[f"{stem}lora_magnitude_vector"].double()
        found[target] = after[target].double() * gains[:, None] - delta
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
def test_bits_of_dora(tmp_path: Path, delta: float, dtype: str) -> None:
    base = make_base(tmp_path / "base", hidden=512, dtype=dtype)
    adapter = make_dora(tmp_path / "adapter", base, hidden=512, delta=delta, spread=0.02)
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    assert predictors(tmp_path / "merged") == {SCALED}
    weights = 2 * (512 * 512 + 256 * 512)
    needed = entropy(base, tmp_path / "merged", ideal_dora(base, adapter, tmp_path / "merged"))
    bits = 8 * (tmp_path / "merged" / UNDO_FILE).stat().st_size / weights
    gains = gains_bits(tmp_path / "merged") / weights
    print(f"DoRA {dtype} {delta:.0%}: entropy {needed:.3f}, gains {gains:.3f}, file {bits:.3f} bit a weight")
    assert bits <= LIMIT * (needed + gains) + ROUNDED[dtype]
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert files_of(tmp_path / "undone") == files_of(base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_bits_of_ia3(tmp_path: Path, spread: float, dtype: str) -> None:
    base = make_base(tmp_path / "base", hidden=512, dtype=dtype)
    adapter = make_ia3(tmp_path / "adapter", hidden=512, spread=spread)
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    assert predictors(tmp_path / "merged") == {SCALED}
    after, ideal = load_file(tmp_path / "merged" / "model.safetensors"), {}
    for name, gains in load_file(adapter / "adapter_model.safetensors").items():
        target = name.removeprefix("base_model.model.").removesuffix("ia3_l") + "weight"
        ideal[target] = after[target].double() / gains.double()
    weights = 2 * (512 * 512 + 256 * 512)
    needed = entropy(base, tmp_path / "merged", ideal)
    bits = 8 * (tmp_path / "merged" / UNDO_FILE).stat().st_size / weights
    kept = gains_bits(tmp_path / "merged") / weights
    print(f"(IA)³ {dtype} {spread:.0%}: entropy {needed:.3f}, gains {kept:.3f}, file {bits:.3f} bit a weight")
    # 0.02: the description, in a file of 100 kB.
    assert bits <= LIMIT * (needed + kept) + ROUNDED[dtype] + 0.02
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert files_of(tmp_path / "undone") == files_of(base)


def test_gains_of_zero_and_beyond_any_range(tmp_path: Path) -> None:
    """What was multiplied by 0 is stored; tiny and huge gains have no inverse worth keeping."""
    base = make_base(tmp_path / "base", hidden=32, dtype="float32", specials=True)
    gains = torch.tensor([0.0, -1.0, 1e-38, 1e-44, 1e30, -0.0, 2.0**-101])
    adapter = make_ia3(tmp_path / "adapter", hidden=32, spread=0.1, gains=gains)
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert files_of(tmp_path / "undone") == files_of(base)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_part_of_dora_has_no_gains(tmp_path: Path, scale: float) -> None:
    base = make_base(tmp_path / "base", hidden=64, specials=True)
    adapter = make_dora(tmp_path / "adapter", base, hidden=64, delta=0.1, spread=0.1)
    report = at.merge(base, adapter, tmp_path / "merged", undo=True, scale=scale)
    assert predictors(tmp_path / "merged") == {SCALED if scale == 1 else MERGED}
    told = f"undo: 4 tensors predicted ({SCALED if scale == 1 else MERGED})"
    assert any(note.startswith(told) for note in report.notes)
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter, threads=3)
    assert files_of(tmp_path / "undone") == files_of(base)


def test_a_part_of_ia3_has_gains(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=64, specials=True)
    adapter = make_ia3(tmp_path / "adapter", hidden=64, spread=0.1)
    at.merge(base, adapter, tmp_path / "merged", undo=True, scale=-0.7)
    assert predictors(tmp_path / "merged") == {SCALED}
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert files_of(tmp_path / "undone") == files_of(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_columns_of_conv1d(tmp_path: Path, dtype: torch.dtype) -> None:
    """GPT-2 stores (in, out), so that DoRA's norms are those of columns; float64 has no exact products."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    model = GPT2LMHeadModel(config)
    randomise(model, 1)
    model.to(dtype).save_pretrained(tmp_path / "base")
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)
    )
    perturb_trainable(tuned, 2, 0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    at.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", undo=True)
    assert predictors(tmp_path / "merged") == {MERGED if dtype == torch.float64 else SCALED}
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=tmp_path / "adapter")
    assert files_of(tmp_path / "undone") == files_of(tmp_path / "base")


def rational(values: np.ndarray, bits: int) -> list[float]:
    """Each quotient rounded to so many bits, to nearest with ties to even, from rationals."""
    found = []
    for top, bottom in values:
        value = Fraction(float(top)) / Fraction(float(bottom))
        lead = 0
        while abs(value) >= Fraction(2) ** (lead + 1):
            lead += 1
        while abs(value) < Fraction(2) ** lead:
            lead -= 1
        unit = Fraction(2) ** (lead - bits + 1)
        found.append(float(round(value / unit) * unit))
    return found


floats = st.floats(min_value=2.0**-40, max_value=2.0**40).flatmap(lambda x: st.sampled_from([x, -x]))


@given(
    pairs=st.lists(st.tuples(floats, floats), min_size=1, max_size=20),
    bits=st.sampled_from([24, 29]),
    noise=st.integers(-3, 3),
)
def test_quotients_do_not_depend_on_the_last_bits(
    pairs: list[tuple[float, float]], bits: int, noise: int
) -> None:
    """Another machine computes other last bits; what is kept is the same, ties included."""
    values = np.array(pairs)
    values[::3, 0] = np.float64(np.float32(1.5)) * (1 + 2.0**-bits)  # a tie where the denominator is 1
    values[::3, 1] = 1.0

    def exactly(left: np.ndarray) -> list[Fraction]:
        return [Fraction(float(values[i, 0])) / Fraction(float(values[i, 1])) for i in left]

    top = values[:, 0] * (1 + noise * 2.0**-52)
    found = rounded_quotients(top, values[:, 1], np.full(len(values), 2.0**-49), bits, exactly)
    assert found.tolist() == rational(values, bits)


def test_roots_are_close() -> None:
    for value in (Fraction(2), Fraction(1, 3**200), Fraction(10**60), Fraction(1, 7)):
        root = root_of(value)
        assert abs(root * root / value - 1) < Fraction(1, 2**110)


def test_broken_gains() -> None:
    gains = np.array([1.0, 2.5, 0.0])
    held, data = pack_gains(gains, "BF16")
    assert held.tolist() == unpack_gains(data, "BF16", 3, "w").tolist() == gains.tolist()
    for bad, base, lines in ((data, "BF16", 4), (data, "F32", 3), (b"\xff" * 12, "BF16", 3), (b"", "F16", 1)):
        with pytest.raises(FormatError, match="finite gains"):
            unpack_gains(bad, base, lines, "w")
