"""Laws of the low-rank algebra: same rank, same delta; the best of all approximations; there and back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import adapterhub_tools as at
from tests.property.low_rank_folders import config_of, deltas_of, gaussian, write_base, write_lora

SEEDS = st.integers(0, 2**20)
SIDES = st.integers(1, 12)
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(
    rows=SIDES,
    columns=SIDES,
    rank=st.integers(1, 6),
    alpha=st.sampled_from([1, 3, 16, 0.3]),
    rslora=st.booleans(),
    seed=SEEDS,
)
def test_the_same_rank_changes_nothing_but_the_basis(
    rows: int, columns: int, rank: int, alpha: float, rslora: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factors = {"m.q": (gaussian(rows, rank, seed), gaussian(rank, columns, seed + 1))}
        write_lora(folder / "a", factors, lora_alpha=alpha, use_rslora=rslora)
        at.svd_shrink(folder / "a", folder / "b", rank=rank, threads=1)
        before, after = deltas_of(folder / "a")["m.q"], deltas_of(folder / "b")["m.q"]
        assert float((before - after).norm()) <= 1e-12 * float(before.norm())
        if rank <= min(rows, columns):
            assert config_of(folder / "b")["lora_alpha"] == alpha
            assert config_of(folder / "b")["use_rslora"] is rslora


@FEW
@given(rows=SIDES, columns=SIDES, rank=st.integers(2, 6), data=st.data(), seed=SEEDS)
def test_no_approximation_of_the_rank_is_closer(
    rows: int, columns: int, rank: int, data: st.DataObject, seed: int
) -> None:
    """Eckart–Young: the error is that of the dense SVD, and no other product of the rank does better."""
    smaller = data.draw(st.integers(1, rank - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lora(folder / "a", {"m.q": (gaussian(rows, rank, seed), gaussian(rank, columns, seed + 1))})
        report = at.svd_shrink(folder / "a", folder / "b", rank=smaller, threads=1)
        before, after = deltas_of(folder / "a")["m.q"], deltas_of(folder / "b")["m.q"]
    error, norm = float((before - after).norm()), float(before.norm())
    best = float(torch.linalg.svdvals(before)[smaller:].norm())
    assert abs(error - best) <= 1e-12 * norm
    assert report.modules[0].error == pytest.approx(error / norm, rel=1e-9, abs=1e-13)
    other = gaussian(rows, smaller, seed + 2)
    nearest = other @ torch.linalg.lstsq(other, before).solution
    assert error <= float((before - nearest).norm()) + 1e-12 * norm


@FEW
@given(seed=SEEDS, smaller=st.integers(1, 4), alpha=st.sampled_from([8, 5, 0.7]))
def test_shrinking_twice_is_shrinking_once(seed: int, smaller: int, alpha: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factors = {"m.q": (gaussian(9, 6, seed), gaussian(6, 11, seed + 1))}
        write_lora(folder / "a", factors, lora_alpha=alpha)
        at.svd_shrink(folder / "a", folder / "b", rank=5, threads=1)
        at.svd_shrink(folder / "b", folder / "twice", rank=smaller, threads=1)
        at.svd_shrink(folder / "a", folder / "once", rank=smaller, threads=1)
        twice, once = deltas_of(folder / "twice")["m.q"], deltas_of(folder / "once")["m.q"]
    assert float((twice - once).norm()) <= 1e-11 * float(once.norm())


@FEW
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), rank=st.integers(1, 4), seed=SEEDS)
def test_lora_to_dora_and_back_recovers_the_delta(rows: int, columns: int, rank: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", {"m.q.weight": gaussian(rows, columns, seed + 2)})
        write_lora(folder / "a", {"m.q": (gaussian(rows, rank, seed), gaussian(rank, columns, seed + 1))})
        at.convert(folder / "a", folder / "dora", to="dora", base=folder / "base", threads=1)
        at.convert(folder / "dora", folder / "b", to="lora", base=folder / "base", threads=1)
        before, after = deltas_of(folder / "a")["m.q"], deltas_of(folder / "b")["m.q"]
    assert float((before - after).norm()) <= 1e-11 * float(before.norm())


@FEW
@given(rows=st.integers(2, 80), columns=st.integers(2, 80), rank=st.integers(1, 4), size=SEEDS, seed=SEEDS)
def test_extracting_a_merge_recovers_the_delta(
    rows: int, columns: int, rank: int, size: int, seed: int
) -> None:
    """To the rounding of the merged weights, which is that of float64 here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scale = 10.0 ** (-(size % 4))
        write_base(folder / "base", {"m.q.weight": gaussian(rows, columns, seed + 2)})
        factors = {"m.q": (scale * gaussian(rows, rank, seed), gaussian(rank, columns, seed + 1))}
        write_lora(folder / "a", factors)
        at.merge(folder / "base", folder / "a", folder / "tuned", threads=1)
        kept = min(rank, rows, columns)
        at.extract(folder / "base", folder / "tuned", folder / "b", rank=kept, dtype="float64", threads=1)
        before, after = deltas_of(folder / "a")["m.q"], deltas_of(folder / "b")["m.q"]
    # One rounding of W + ΔW, 2^-53 of about 1, in each of at most 80 × 80 places; then those of the factors.
    assert float((before - after).norm()) <= 4 * 2.0**-53 * 80 + 1e-14 * float(before.norm())


@FEW
@given(seed=SEEDS, alpha=st.sampled_from([1, 3, 24, 0.7]), rslora=st.booleans(), rank=st.integers(1, 5))
def test_folding_moves_every_scale_into_the_factors(seed: int, alpha: float, rslora: bool, rank: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factors = {"m.q": (gaussian(7, rank, seed), gaussian(rank, 9, seed + 1))}
        write_lora(folder / "a", factors, lora_alpha=alpha, use_rslora=rslora)
        at.convert(folder / "a", folder / "b", to="lora", fold_scale=True, threads=1)
        config, tensors = config_of(folder / "b"), load_file(folder / "b" / "adapter_model.safetensors")
        before = deltas_of(folder / "a")["m.q"]
    assert config["lora_alpha"] == config["r"] == rank
    assert config["use_rslora"] is False
    b, a = (tensors[f"base_model.model.m.q.lora_{x}.weight"] for x in "BA")
    assert torch.equal(a, factors["m.q"][1])
    assert float((before - b @ a).norm()) <= 1e-15 * float(before.norm()) * 4
