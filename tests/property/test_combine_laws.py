"""Laws of combining: sums of true deltas against float64 and exact rationals, whatever order and scales."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from math import acos, sin
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from tests.property.low_rank_folders import config_of, deltas_of, gaussian, write_base, write_lora

SEEDS = st.integers(0, 2**20)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WEIGHTS = st.sampled_from([1.0, -1.0, 0.7, -0.3, 2.5, 0.125])
PREFIX = "base_model.model."


def adapter(folder: Path, seed: int, paths: dict[str, tuple[int, int]], rank: int, **config: Any) -> Path:
    factors = {
        path: (gaussian(rows, rank, seed + 7 * i), gaussian(rank, columns, seed + 7 * i + 3))
        for i, (path, (rows, columns)) in enumerate(sorted(paths.items()))
    }
    return write_lora(folder, factors, **config)


def summed(folders: list[Path], weights: list[float], path: str) -> Tensor:
    found = [w * deltas_of(f)[path] for f, w in zip(folders, weights, strict=True) if path in deltas_of(f)]
    return torch.stack(found).sum(dim=0)


def close(found: Tensor, expected: Tensor, parts: float, bound: float = 1e-13) -> None:
    """Compares relative to the size of what was added up, since terms may cancel."""
    assert float((found - expected).norm()) <= bound * parts


@FEW
@given(
    method=st.sampled_from(["linear", "cat"]),
    weights=st.lists(WEIGHTS, min_size=3, max_size=3),
    rslora=st.booleans(),
    alpha=st.sampled_from([1, 16, 0.3]),
    seed=SEEDS,
)
def test_sums_are_those_of_the_true_deltas(
    method: str, weights: list[float], rslora: bool, alpha: float, seed: int
) -> None:
    """Different ranks, scales, rules, patterns and targets; ranks add up, nothing is lost."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        adapter(root / "a", seed, {"m.q": (9, 11), "m.v": (4, 11)}, 2, lora_alpha=alpha, use_rslora=rslora)
        adapter(root / "b", seed + 100, {"m.q": (9, 11)}, 3, lora_alpha=4)
        adapter(
            root / "c", seed + 200, {"m.q": (9, 11), "m.k": (5, 11)}, 1, lora_alpha=8, alpha_pattern={"q": 3}
        )
        folders = [root / "a", root / "b", root / "c"]
        report = at.combine_adapters(folders, out=root / "out", weights=weights, method=method, threads=1)
        after = deltas_of(root / "out")
        assert {m.path: m.rank for m in report.modules} == {"m.q": 6, "m.v": 2, "m.k": 1}
        for path, found in after.items():
            parts = sum(float(deltas_of(f)[path].norm()) for f in folders if path in deltas_of(f))
            close(found, summed(folders, weights, path), 3 * parts)
        assert not at.validate(root / "out").problems
        assert [item.weight for item in report.inputs] == weights


@FEW
@given(
    exponents=st.lists(st.integers(-3, 3), min_size=2, max_size=2),
    signs=st.lists(st.sampled_from([1, -1]), min_size=2, max_size=2),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    method=st.sampled_from(["linear", "cat"]),
    alpha=st.sampled_from([3, 5.5, 16]),
    seed=SEEDS,
)
def test_powers_of_two_round_nothing(
    exponents: list[int], signs: list[int], dtype: torch.dtype, method: str, alpha: float, seed: int
) -> None:
    """In exact rationals: the factors of 8 or 24 bits come through bit for bit, and the scale is exact."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = []
        for place in range(2):
            b, a = gaussian(3, 2, seed + place).to(dtype), gaussian(2, 4, seed + place + 9).to(dtype)
            folders.append(write_lora(root / f"a{place}", {"m.q": (b, a)}, lora_alpha=alpha))
        weights = [sign * 2.0**e for sign, e in zip(signs, exponents, strict=True)]
        report = at.combine_adapters(folders, out=root / "out", weights=weights, method=method, threads=1)
        assert report.modules[0].error == 0.0
        found = exact_delta(root / "out")
        parts = [exact_delta(folder) for folder in folders]
        for i in range(3):
            for j in range(4):
                expected = sum(Fraction(w) * part[i][j] for w, part in zip(weights, parts, strict=True))
                assert found[i][j] == expected


def exact_delta(folder: Path) -> list[list[Fraction]]:
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    a = tensors[f"{PREFIX}m.q.lora_A.weight"].double().tolist()
    b = tensors[f"{PREFIX}m.q.lora_B.weight"].double().tolist()
    scale = Fraction(config["lora_alpha"]) / len(a)
    columns = range(len(a[0]))
    return [
        [
            scale * sum((Fraction(x) * Fraction(a[k][j]) for k, x in enumerate(row)), Fraction(0))
            for j in columns
        ]
        for row in b
    ]


@FEW
@given(method=st.sampled_from(["linear", "cat", "svd", "slerp"]), rank=st.sampled_from([None, 2]), seed=SEEDS)
def test_the_order_of_adapters_does_not_matter(method: str, rank: int | None, seed: int) -> None:
    """Not one byte of the weights differs."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [adapter(root / f"a{i}", seed + 50 * i, {"m.q": (6, 7)}, 2) for i in range(2)]
        weights = [0.7, 0.4]
        for out, order in (("one", [0, 1]), ("two", [1, 0])):
            at.combine_adapters(
                [folders[i] for i in order],
                out=root / out,
                weights=[weights[i] for i in order],
                method=method,
                rank=rank,
                threads=1,
            )
        one, two = ((root / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two"))
        assert one == two
        assert config_of(root / "one") == config_of(root / "two")


@FEW
@given(
    policy=st.sampled_from([{"rank": 2}, {"energy": 0.8}, {"max_error": 0.3}, {"sv_ratio": 3.0}]), seed=SEEDS
)
def test_a_policy_cuts_the_sum_optimally(policy: dict[str, float], seed: int) -> None:
    """Eckart–Young on the dense sum: the same error, rank and singular values."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [adapter(root / f"a{i}", seed + 50 * i, {"m.q": (8, 9)}, 3) for i in range(2)]
        report = at.combine_adapters(folders, out=root / "o", weights=[1, -0.5], threads=1, **policy)
        dense, found = summed(folders, [1, -0.5], "m.q"), deltas_of(root / "o")["m.q"]
    values = torch.linalg.svdvals(dense)
    (module,) = report.modules
    best = float(values[module.rank :].norm())
    assert abs(float((found - dense).norm()) - best) <= 1e-12 * float(values.norm())
    assert module.error == pytest.approx(best / float(values.norm()), rel=1e-9, abs=1e-13)
    assert torch.allclose(
        torch.tensor(module.singular_values, dtype=torch.float64), values[:6], rtol=1e-11, atol=1e-12
    )


@FEW
@given(seed=SEEDS)
def test_svd_takes_the_largest_rank(seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [adapter(root / f"a{i}", seed + 50 * i, {"m.q": (8, 9)}, 2 + i) for i in range(2)]
        report = at.combine_adapters(folders, out=root / "o", weights=[1, 1], method="svd", threads=1)
        dense, found = summed(folders, [1, 1], "m.q"), deltas_of(root / "o")["m.q"]
    assert report.modules[0].rank == 3
    best = float(torch.linalg.svdvals(dense)[3:].norm())
    assert abs(float((found - dense).norm()) - best) <= 1e-12 * float(dense.norm())


@FEW
@given(first=st.sampled_from([0.0, 0.3, 1.0]), second=st.sampled_from([0.25, 2.0]), seed=SEEDS)
def test_slerp_is_the_arc_between_flattened_deltas(first: float, second: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = [{"m.q": (5, 6), "m.v": (5, 6)}, {"m.q": (5, 6)}]
        folders = [adapter(root / f"a{i}", seed + 50 * i, paths[i], 2) for i in range(2)]
        at.combine_adapters(folders, out=root / "o", weights=[first, second], method="slerp", threads=1)
        x, y = (deltas_of(folder)["m.q"] for folder in folders)
        alone, found = deltas_of(folders[0])["m.v"], deltas_of(root / "o")
    t = second / (first + second)
    angle = acos(float((x * y).sum() / (x.norm() * y.norm())))
    expected = (sin((1 - t) * angle) * x + sin(t * angle) * y) / sin(angle)
    close(found["m.q"], expected, float(x.norm() + y.norm()), 1e-11)
    if first:  # what only one adapter changes is interpolated with nothing
        close(found["m.v"], (1 - t) * alone, float(alone.norm()), 1e-12)
    else:
        assert "m.v" not in found


@FEW
@given(seed=SEEDS, weights=st.lists(WEIGHTS, min_size=2, max_size=2))
def test_a_shared_factor_is_stored_once(seed: int, weights: list[float]) -> None:
    """LoRA-FA keeps A: the sum of two such adapters has the same rank under linear, twice under cat."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        a = gaussian(2, 9, seed)
        folders = [write_lora(root / f"a{i}", {"m.q": (gaussian(8, 2, seed + i + 1), a)}) for i in range(2)]
        for method, rank in (("linear", 2), ("cat", 4)):
            report = at.combine_adapters(
                folders, out=root / method, weights=weights, method=method, threads=1
            )
            assert report.modules[0].rank == rank
            parts = sum(float(deltas_of(folder)["m.q"].norm()) for folder in folders)
            close(deltas_of(root / method)["m.q"], summed(folders, weights, "m.q"), 3 * parts)


def test_patterns_weigh_layers_apart(tmp_path: Path) -> None:
    paths = {f"model.layers.{i}.self_attn.q_proj": (5, 6) for i in range(12)}
    folders = [adapter(tmp_path / f"a{i}", 60 * i, paths, 2) for i in range(2)]
    weights = ["0.5,0.5", r"layers\.[0-3]\..*=1,0", r"layers\.1[01]\.self_attn\.q_proj=-1,2"]
    report = at.combine_adapters(folders, out=tmp_path / "o", weights=weights)
    for i, path in enumerate(paths):
        w = [1.0, 0.0] if i < 4 else [-1.0, 2.0] if i > 9 else [0.5, 0.5]
        close(deltas_of(tmp_path / "o")[path], summed(folders, w, path), 100.0)
        assert next(m.rank for m in report.modules if m.path == path) == (2 if i < 4 else 4)
    assert report.weights["*"] == [0.5, 0.5]
    history = at.load_manifest(tmp_path / "o").history[-1]
    assert history.operation == "combine"
    assert [item.digest for item in history.inputs] == [at.adapter_digest(f) for f in folders]
    assert history.options["weights"] == report.weights


def test_factors_of_linear_mode_are_not_the_deltas(tmp_path: Path) -> None:
    """The number that docs/combine.md gives: the average of factors is no average of unrelated deltas."""
    folders = [adapter(tmp_path / f"a{i}", 60 * i, {"m.q": (64, 64)}, 8) for i in range(2)]
    for space in ("deltas", "factors"):
        at.combine_adapters(folders, out=tmp_path / space, weights=[0.5, 0.5], space=space)
    dense = summed(folders, [0.5, 0.5], "m.q")
    errors = {
        space: float((deltas_of(tmp_path / space)["m.q"] - dense).norm() / dense.norm())
        for space in ("deltas", "factors")
    }
    assert errors["deltas"] < 1e-15
    assert 0.9 < errors["factors"] < 1.1


def test_biases_of_lora_are_added_up_with_their_scales(tmp_path: Path) -> None:
    folders = []
    for i, (rank, alpha) in enumerate([(2, 3), (4, 10)]):
        folder = adapter(tmp_path / f"a{i}", 60 * i, {"m.q": (5, 6)}, rank, lora_alpha=alpha, lora_bias=True)
        file = folder / "adapter_model.safetensors"
        bias = gaussian(5, 1, 900 + i)[:, 0].contiguous()
        save_file({**load_file(file), f"{PREFIX}m.q.lora_B.bias": bias}, file)
        folders.append(folder)
    for method in ("linear", "svd"):
        at.combine_adapters(folders, out=tmp_path / method, weights=[0.5, -2], method=method)
        config = config_of(tmp_path / method)
        stored = load_file(tmp_path / method / "adapter_model.safetensors")[f"{PREFIX}m.q.lora_B.bias"]
        found = stored * config["lora_alpha"] / config["r"]
        one, two = (gaussian(5, 1, 900 + i)[:, 0] for i in range(2))
        close(found, 0.5 * 1.5 * one - 2 * 2.5 * two, 10.0)


@pytest.mark.parametrize("rule", ["delta", "average", "drop"])
@pytest.mark.parametrize("weights", [[0.25, 0.75], [1.0, -0.5]])
def test_tensors_in_full_follow_their_rule(rule: str, weights: list[float], tmp_path: Path) -> None:
    base = {"m.q.weight": gaussian(5, 6, 1), "m.norm.weight": gaussian(6, 1, 2)[:, 0]}
    write_base(tmp_path / "base", base)
    folders, saved = [], []
    for i in range(2):
        folder = adapter(tmp_path / f"a{i}", 60 * i, {"m.q": (5, 6)}, 2, modules_to_save=["norm"])
        file = folder / "adapter_model.safetensors"
        saved.append(gaussian(6, 1, 70 + i)[:, 0].contiguous())
        save_file({**load_file(file), f"{PREFIX}m.norm.weight": saved[i]}, file)
        folders.append(folder)
    options = {"weights": weights, "full": rule, "base": tmp_path / "base"}
    report = at.combine_adapters(folders, out=tmp_path / "o", **options)
    stored = load_file(tmp_path / "o" / "adapter_model.safetensors")
    (kept,) = report.kept
    assert kept[0] == "m.norm.weight"
    if rule == "drop":
        assert set(stored) == {f"{PREFIX}m.q.lora_{x}.weight" for x in "AB"}
        assert config_of(tmp_path / "o")["modules_to_save"] is None
        return
    w, total = base["m.norm.weight"], sum(weights)
    expected = sum(x * c for x, c in zip(saved, weights, strict=True))
    expected = expected / total if rule == "average" else expected + (1 - total) * w
    close(stored[f"{PREFIX}m.norm.weight"], expected, 10.0)
    if rule == "average" or total == 1:  # then the base is not needed, and gives the same
        again = at.combine_adapters(folders, out=tmp_path / "again", weights=weights, full=rule)
        assert again.digest == report.digest
    else:
        with pytest.raises(at.MismatchError, match=r"add up to 0\.5"):
            at.combine_adapters(folders, out=tmp_path / "again", weights=weights, full=rule)
