"""Combinations written straight into a base: rounded once from the dense formula, with a merge's promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from adapterhub_tools.errors import FormatError, IntegrityError, LossyError, MismatchError
from adapterhub_tools.linalg.formats import FORMATS, round_double
from adapterhub_tools.model.combination import Combination, CombinedInput
from adapterhub_tools.model.plan import ByteRange, Step
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.combine_into import combine_into
from adapterhub_tools.ops.combine_weights import Weights
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.store.schemas import check
from tests.property import combine_formulas as dense
from tests.property.low_rank_folders import deltas_of, gaussian, write_base, write_lora

SHAPES = {"m.q": (40, 30), "m.v": (24, 30), "m.big": (700, 601)}


def values(rows: int, columns: int, seed: int) -> Tensor:
    """Values of few bits, so that a product of two factors has no rounding whatever its order."""
    return (gaussian(rows, columns, seed) * 16).round() / 16


def make_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    tensors = {f"{n}.weight": gaussian(*shape, seed=len(n)).to(dtype) for n, shape in SHAPES.items()}
    return write_base(folder, {**tensors, "other.weight": gaussian(3, 3, 1).to(dtype)})


def make_adapters(folder: Path, count: int = 3) -> list[Path]:
    found = []
    for i in range(count):
        rank = 2 + i
        factors = {
            path: (values(rows, rank, 10 * i + 1).float(), values(rank, columns, 10 * i + 2).float())
            for path, (rows, columns) in SHAPES.items()
            if not (i == 1 and path == "m.v")  # not every adapter changes every module
        }
        found.append(write_lora(folder / f"a{i}", factors, lora_alpha=rank / 4))
    return found


def into(
    base: Path, adapters: list[Path], out: Path | None, method: str, *weights: float, **more: Any
) -> Any:
    hparams = {
        name: more.pop(name) for name in ("density", "gamma", "epsilon", "majority_sign") if name in more
    }
    names = ("patterns", "seed", "allow_disjoint")
    own = {name: more.pop(name) for name in names if name in more}
    given = Weights(default=weights or (1.0,) * len(adapters), patterns=own.pop("patterns", {}))
    return combine_into(
        base,
        adapters,
        out,
        method=method,
        weights=given,
        hparams=hparams,
        options=MergeOptions(**more),
        **own,
    )


def rounded(exact: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}[dtype]
    return round_double(np.ascontiguousarray(exact), FORMATS[name])


def bits(tensor: Tensor) -> np.ndarray:
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(signed).numpy().view(f"u{tensor.element_size()}")


def dense_result(
    method: str, deltas: list[np.ndarray], keys: list[str], path: str, options: dict
) -> np.ndarray:
    density = options.get("density", 0.5)
    if method == "ties":
        return dense.elected_mean([dense.kept_largest(d, density) for d in deltas])
    if method == "magnitude_prune":
        return np.sum([dense.kept_largest(d, density) for d in deltas], axis=0)
    if method == "breadcrumbs":
        return np.sum([dense.kept_middle(d, density, options["gamma"]) for d in deltas], axis=0)
    if method == "linear":
        return np.sum(deltas, axis=0)
    numbers = [
        dense.uniform_bits(options.get("seed", 0), key.encode(), path, d.size)
        for key, d in zip(keys, deltas, strict=True)
    ]
    if method == "della":
        pruned = [
            dense.magnitude_dropped(d, density, options["epsilon"], b)
            for d, b in zip(deltas, numbers, strict=True)
        ]
        return dense.elected_mean(pruned)
    pruned = [dense.dropped(d, density, b) for d, b in zip(deltas, numbers, strict=True)]
    return dense.elected_mean(pruned) if method == "dare_ties" else np.sum(pruned, axis=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.25}),
        ("magnitude_prune", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.05}),
        ("dare_linear", {"density": 0.5, "seed": 11}),
        ("dare_ties", {"density": 0.5, "seed": 12}),
        ("della", {"density": 0.5, "epsilon": 0.25, "seed": 13}),
    ],
)
def test_every_weight_is_the_rounded_formula(
    tmp_path: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base, adapters = make_base(tmp_path / "base", dtype), make_adapters(tmp_path)
    weights = (1.0, 0.5, -0.75)
    report = into(base, adapters, tmp_path / "out", method, *weights, **options)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    keys = [item.digest for item in report.receipt.adapters]
    paths = [
        path for path in SHAPES if path != "m.big" or method not in ("dare_linear", "dare_ties", "della")
    ]
    for path in paths:
        found = [deltas_of(folder) for folder in adapters]
        own = [(w * d[path].numpy(), k) for d, w, k in zip(found, weights, keys, strict=True) if path in d]
        delta = dense_result(method, [d for d, _ in own], [k for _, k in own], path, options)
        exact = before[f"{path}.weight"].double().numpy() + delta
        if dtype == torch.float64 and method != "linear":
            # A mean of three, and a division by a probability, round in float64, in one order or another.
            np.testing.assert_allclose(after[f"{path}.weight"].numpy(), exact, rtol=1e-14, atol=1e-15)
        else:
            np.testing.assert_array_equal(bits(after[f"{path}.weight"]), rounded(exact, dtype), path)
    assert torch.equal(after["other.weight"], before["other.weight"])
    assert report.changed == report.expected == 3
    data = json.loads((tmp_path / "out" / "merge_receipt.json").read_text())
    assert not check(data, "merge-receipt-1.0", "merge_receipt.json")
    assert data["options"]["combination"]["method"] == method
    assert [item["scale"] for item in data["adapters"]] == list(weights)
    assert data["guarantee"] == ("exact" if method == "linear" else "tolerance")


def folders_equal(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "slerp"])
def test_threads_order_and_shards_change_no_bit(tmp_path: Path, method: str) -> None:
    adapters = make_adapters(tmp_path, 2 if method == "slerp" else 3)
    base = make_base(tmp_path / "base")
    weights = tuple(0.5 + i for i in range(len(adapters)))
    one = into(base, adapters, tmp_path / "one", method, *weights, threads=1)
    into(base, adapters, tmp_path / "two", method, *weights, threads=2)
    assert folders_equal(tmp_path / "one", tmp_path / "two")
    turned = into(base, adapters[::-1], tmp_path / "turned", method, *weights[::-1])
    assert turned.digest == one.digest
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, sharded / file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "config.json").write_text((base / "config.json").read_text())
    assert into(sharded, adapters, tmp_path / "three", method, *weights).digest == one.digest


def test_linear_is_the_merge_of_several_with_scales(tmp_path: Path) -> None:
    base, adapters = make_base(tmp_path / "base"), make_adapters(tmp_path)
    combined = into(base, adapters, tmp_path / "combined", "linear", 1.0, 0.5, -0.75)
    merged = at.merge(base, adapters, tmp_path / "merged", scale=[1.0, 0.5, -0.75])
    assert combined.digest == merged.digest
    assert combined.receipt.guarantee == merged.receipt.guarantee == "exact"


def test_weights_by_pattern(tmp_path: Path) -> None:
    base, adapters = make_base(tmp_path / "base", torch.float32), make_adapters(tmp_path)
    into(base, adapters, tmp_path / "out", "linear", 1.0, 1.0, 1.0, patterns={"q": (0.0, 2.0, 0.0)})
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    found = [deltas_of(folder) for folder in adapters]
    q = before["m.q.weight"].double() + 2 * found[1]["m.q"]
    v = before["m.v.weight"].double() + found[0]["m.v"] + found[2]["m.v"]
    assert torch.equal(after["m.q.weight"], q.float())
    assert torch.equal(after["m.v.weight"], v.float())
    again = at.merge(base, adapters, tmp_path / "again", replay=tmp_path / "out")
    assert folders_equal(tmp_path / "out", tmp_path / "again")
    assert again.receipt.combination.weights == {"q": (0.0, 2.0, 0.0)}


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp", "linear"])
def test_replay_verify_and_undo(tmp_path: Path, method: str) -> None:
    base, adapters = make_base(tmp_path / "base"), make_adapters(tmp_path, 2)
    weights = (0.75, 0.5)
    report = into(base, adapters, tmp_path / "out", method, *weights, undo=True)
    again = at.merge(base, adapters, tmp_path / "again", replay=tmp_path / "out")
    assert again.digest == report.digest
    assert again.receipt.combination == report.receipt.combination
    checked = at.verify(merged=tmp_path / "out", base=base, adapter=adapters)
    assert checked.ok, checked.problems
    at.unmerge(tmp_path / "out", tmp_path / "restored", adapter=adapters)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "restored" / file).read_bytes() == (base / file).read_bytes()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["m.q.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert not at.verify(merged=tmp_path / "out", base=base, adapter=adapters).ok


def test_dora_counts_by_its_true_effect(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    weight = load_file(base / "model.safetensors")["m.q.weight"].double()
    deltas = []
    for i in range(2):
        b, a = values(40, 3, i + 1), values(3, 30, i + 5)
        folder = write_lora(tmp_path / f"d{i}", {"m.q": (b.float(), a.float())}, use_dora=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        magnitude = (gaussian(40, 1, 7 + i).abs()[:, 0] + 0.5).float()
        tensors["base_model.model.m.q.lora_magnitude_vector"] = magnitude
        save_file(tensors, folder / "adapter_model.safetensors")
        direction = weight + b @ a
        deltas.append(magnitude.double()[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight)
    adapters = [tmp_path / "d0", tmp_path / "d1"]
    own = [0.75 * deltas[0].numpy(), -0.5 * deltas[1].numpy()]
    trimmed = [dense.kept_largest(delta, 0.3) for delta in own]
    for method, wanted in (("linear", own[0] + own[1]), ("ties", dense.elected_mean(trimmed))):
        more = {"density": 0.3} if method == "ties" else {}
        report = into(base, adapters, tmp_path / method, method, 0.75, -0.5, **more)
        found = load_file(tmp_path / method / "model.safetensors")["m.q.weight"]
        np.testing.assert_allclose(found.double().numpy(), weight.numpy() + wanted, rtol=1e-7, atol=1e-9)
        assert report.receipt.guarantee == "tolerance"
        assert at.verify(merged=tmp_path / method, base=base, adapter=adapters).ok


@pytest.mark.parametrize(
    ("method", "weights", "more", "kind"),
    [
        ("ties", (1.0, 1.0), {"density": 0.0}, "option"),
        ("ties", (1.0, 1.0), {"gamma": 0.1}, "option"),
        ("ties", (1.0, 1.0, 1.0), {}, "weights"),
        ("ties", (0.0, 0.0), {}, "zero-delta"),
        ("slerp", (1.0, -1.0), {}, "weights"),
        ("svd", (1.0, 1.0), {}, "option"),
        ("ties", (1.0, 1.0), {"patterns": {"nothing": (1.0, 0.0)}}, "weight-pattern"),
    ],
)
def test_options_that_do_not_fit_are_mismatches(
    tmp_path: Path, method: str, weights: tuple[float, ...], more: dict[str, Any], kind: str
) -> None:
    base, adapters = make_base(tmp_path / "base"), make_adapters(tmp_path, 2)
    with pytest.raises(MismatchError) as caught:
        into(base, adapters, tmp_path / "out", method, *weights, **more)
    assert caught.value.problems[0].kind == kind
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_belong_together(tmp_path: Path) -> None:
    base, adapters = make_base(tmp_path / "base"), make_adapters(tmp_path, 2)
    zero = write_lora(tmp_path / "zero", {"m.q": (torch.zeros(40, 2), torch.ones(2, 30))})
    apart = write_lora(tmp_path / "apart", {"other": (torch.ones(3, 1), torch.ones(1, 3))})
    nan = write_lora(tmp_path / "nan", {"m.q": (torch.full((40, 1), float("nan")), torch.ones(1, 30))})
    other = write_lora(tmp_path / "other", {"m.q": (torch.ones(41, 1), torch.ones(1, 30))})
    cases = [
        ([adapters[0]], MismatchError, "adapters"),
        ([adapters[0], adapters[0]], MismatchError, "duplicate"),
        ([adapters[0], zero], MismatchError, "zero-delta"),
        ([adapters[0], apart], MismatchError, "no-common-targets"),
        ([adapters[0], nan], FormatError, "non-finite"),
        ([adapters[0], other], MismatchError, "shape"),
    ]
    for given, error, kind in cases:
        with pytest.raises(error) as caught:
            into(base, given, tmp_path / "out", "ties")
        assert caught.value.problems[0].kind == kind, kind
        assert not (tmp_path / "out").exists()
    report = into(base, [adapters[0], apart], tmp_path / "out", "ties", allow_disjoint=True)
    assert report.changed == 4


def test_another_base_is_found_and_nothing_written(tmp_path: Path) -> None:
    base, adapters = make_base(tmp_path / "base"), make_adapters(tmp_path, 2)
    at.init(adapters[1], base=base)
    changed = load_file(base / "model.safetensors")
    changed["m.q.weight"][0, 0] += 1
    save_file(changed, base / "model.safetensors")
    with pytest.raises(IntegrityError):
        into(base, adapters, tmp_path / "out", "ties")
    assert not (tmp_path / "out").exists()


def test_overflow_and_bad_base_values_are_found(tmp_path: Path) -> None:
    base, adapters = make_base(tmp_path / "base", torch.float16), make_adapters(tmp_path, 2)
    with pytest.raises(LossyError):
        into(base, adapters, tmp_path / "out", "ties", 1e6, 1e6)
    tensors = load_file(base / "model.safetensors")
    tensors["m.v.weight"][2, 3] = float("inf")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(FormatError):
        into(base, adapters, tmp_path / "out", "ties")
    assert not (tmp_path / "out").exists()


def test_a_step_with_a_combination_is_plain_json() -> None:
    whole = Combination(
        method="della",
        hparams={"density": 0.5, "seed": 2**64 - 1},
        name="m.q",
        inputs=(CombinedInput(terms=1, key="a"), CombinedInput(terms=0, key="b", weight=0.5)),
    )
    item = ByteRange(uri="x", offset=0, spec=TensorSpec(name="m.q.weight", dtype="BF16", shape=(2, 2)))
    step = Step(action="merge", start=item, output=item.spec, file="f", offset=0, combination=whole)
    assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step
