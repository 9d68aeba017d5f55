"""Methods that work element by element, as adapters: what they approximate, and how the error is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from adapterhub_tools import registry
from tests.property import combine_formulas as dense
from tests.property.low_rank_folders import config_of, deltas_of, gaussian, write_base, write_lora
from tests.property.test_combine_laws import adapter

PATHS = {"m.q": (40, 30), "m.v": (24, 30)}
METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.6, "seed": 5},
    "dare_ties": {"density": 0.6, "majority_sign": "frequency"},
    "magnitude_prune": {"density": 0.3},
    "della": {"density": 0.5, "epsilon": 0.3, "seed": 2},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
}
WEIGHTS = [0.7, -0.4, 1.5]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    write_base(tmp_path / "base", {f"{path}.weight": gaussian(*shape, 8) for path, shape in PATHS.items()})
    made = [adapter(tmp_path / f"a{i}", 90 * i, PATHS, 2 + i, lora_alpha=3) for i in range(2)]
    return [*made, adapter(tmp_path / "a2", 500, {"m.q": PATHS["m.q"]}, 4, use_rslora=True)]


def test_every_method_that_is_not_factored_is_here() -> None:
    found = {
        name
        for name in registry.names("combine")
        if registry.load("combine", name).IMPLEMENTATION.kind == "elementwise"
    }
    assert found == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_the_adapter_is_what_goes_into_a_base(
    method: str, folders: list[Path], tmp_path: Path
) -> None:
    """The same deltas by two ways: a full-rank adapter, and a merge; in float64 both."""
    options = {"weights": WEIGHTS, "method": method, "dtype": "float64", **METHODS[method]}
    report = at.combine_adapters(folders, out=tmp_path / "o", rank=30, **options)
    assert all(module.error < 1e-13 for module in report.modules)
    at.combine_adapters(folders, out=tmp_path / "merged", into=tmp_path / "base", **options)
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for path, delta in deltas_of(tmp_path / "o").items():
        difference = merged[f"{path}.weight"] - base[f"{path}.weight"]
        assert float((difference - delta).abs().max()) < 1e-13 * 50


def test_ties_is_the_dense_formula(folders: list[Path], tmp_path: Path) -> None:
    at.combine_adapters(
        folders, out=tmp_path / "o", weights=WEIGHTS, method="ties", density=0.5, rank=30, dtype="float64"
    )
    for path, found in deltas_of(tmp_path / "o").items():
        parts = [
            (w * deltas_of(folder)[path]).numpy()
            for folder, w in zip(folders, WEIGHTS, strict=True)
            if path in deltas_of(folder)
        ]
        expected = torch.from_numpy(dense.elected_mean([dense.kept_largest(part, 0.5) for part in parts]))
        assert float((found - expected).norm()) < 1e-13 * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_rank_is_the_best_approximation(method: str, folders: list[Path], tmp_path: Path) -> None:
    options = {"weights": WEIGHTS, "method": method, "dtype": "float64", **METHODS[method]}
    at.combine_adapters(folders, out=tmp_path / "full", rank=30, **options)
    report = at.combine_adapters(folders, out=tmp_path / "o", **options)
    whole, found = deltas_of(tmp_path / "full"), deltas_of(tmp_path / "o")
    assert {module.path: module.rank for module in report.modules} == {"m.q": 4, "m.v": 3}
    for module in report.modules:
        error = relative(found[module.path], whole[module.path])
        values = torch.linalg.svdvals(whole[module.path])
        assert error == pytest.approx(float(values[module.rank :].norm() / values.norm()), rel=0.01)
        assert module.error == pytest.approx(error, rel=1e-9)
    assert any("--into BASE loses no rank" in note for note in report.notes)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_order_and_threads_change_no_byte_and_the_seed_does(
    method: str, folders: list[Path], tmp_path: Path
) -> None:
    options = {"method": method, "rank": 5, **METHODS[method]}
    order = [2, 0, 1]
    at.combine_adapters(folders, out=tmp_path / "one", weights=WEIGHTS, threads=1, **options)
    at.combine_adapters(
        [folders[i] for i in order],
        out=tmp_path / "two",
        weights=[WEIGHTS[i] for i in order],
        threads=2,
        **options,
    )
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    if "seed" in METHODS[method]:
        other = at.combine_adapters(
            folders, out=tmp_path / "other", weights=WEIGHTS, **{**options, "seed": 99}
        )
        assert other.digest != at.adapter_digest(tmp_path / "one")


@pytest.mark.parametrize(
    "policy", [{"budget": "30%"}, {"energy": 0.7}, {"max_error": 0.5}, {"rank": ["q=2", 3]}]
)
def test_policies_hold_for_deltas_without_factors(
    policy: dict[str, Any], folders: list[Path], tmp_path: Path
) -> None:
    options = {"weights": WEIGHTS, "method": "magnitude_prune", "density": 0.4}
    report = at.combine_adapters(folders, out=tmp_path / "o", **options, **policy)
    (name, value), *_ = policy.items()
    if name == "energy":
        assert all(module.energy >= value - 1e-12 for module in report.modules)
    elif name == "max_error":
        assert all(module.error <= value * 1.01 for module in report.modules)
    elif name == "rank":
        assert {module.path: module.rank for module in report.modules} == {"m.q": 2, "m.v": 3}
    else:
        assert report.parameters <= 0.3 * (report.parameters_before or 0)
    assert not at.validate(tmp_path / "o").problems


@pytest.mark.parametrize("kind", ["conv1d", "embedding"])
def test_transposed_weights_are_combined_in_their_stored_layout(kind: str, tmp_path: Path) -> None:
    """The same factors as (in, out): the elements are the same, so what is trimmed and elected is too."""
    folders = []
    for i in range(2):
        b, a = gaussian(9, 3, 40 + i), gaussian(3, 7, 50 + i)
        plain = write_lora(tmp_path / f"plain{i}", {"m.q": (b, a)})
        other = write_lora(tmp_path / f"other{i}", {"m.q": (b, a)}, fan_in_fan_out=kind == "conv1d")
        if kind == "embedding":
            names = ("lora_embedding_A", "lora_embedding_B")
            tensors = dict(zip((f"base_model.model.m.q.{n}" for n in names), (a, b), strict=True))
            save_file(tensors, other / "adapter_model.safetensors")
        folders.append((plain, other))
    options = {"weights": [1, 0.5], "method": "ties", "density": 0.6, "rank": 7, "dtype": "float64"}
    at.combine_adapters([plain for plain, _ in folders], out=tmp_path / "plain", **options)
    at.combine_adapters([other for _, other in folders], out=tmp_path / "other", **options)
    stored = load_file(tmp_path / "other" / "adapter_model.safetensors")
    b, a = (next(t for n, t in stored.items() if f"_{x}" in n) for x in "BA")
    assert relative(b @ a, deltas_of(tmp_path / "plain")["m.q"]) < 1e-13
    assert config_of(tmp_path / "other")["fan_in_fan_out"] is (kind == "conv1d")
