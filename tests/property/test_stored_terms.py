"""Deltas of stored values (tiles, circulants, single places) against exact rationals, with zero tolerance."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS, round_fraction
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.linalg.stored_term import SparseTerm
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods.c3a import C3A
from adapterhub_tools.methods.gralora import GraLoRA
from adapterhub_tools.methods.miss import MiSS
from adapterhub_tools.methods.waveft import WaveFT

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def rounded(expression, start, to):
    """Runs an expression over a whole matrix, in the bits of the format."""
    out = torch.empty(start.shape, dtype=DTYPES[to])
    names = {dtype: name for name, dtype in DTYPES.items()}
    rounder = BlockRounder(
        expression, columns=start.shape[1], start=FORMATS[names[start.dtype]], to=FORMATS[to]
    )
    half = start.shape[0] // 2
    for rows in (slice(0, half), slice(half, None)):
        assert rounder.round_rows(start[rows], out[rows], rows.start) is None
    return out


def exactly(start, delta, to):
    """Rounds w + delta for every element; an exactly zero delta keeps w."""
    values = [
        [
            float(w) if d == 0 else round_fraction(Fraction(float(w)) + d, FORMATS[to])
            for w, d in zip(ws, ds, strict=True)
        ]
        for ws, ds in zip(start.tolist(), delta, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).to(DTYPES[to])


def numbers(shape, seed, dtype=torch.float32, bits=24):
    """Numbers of some bits over a few binades, so that sums meet ties."""
    generator = np.random.default_rng(seed)
    mantissas = generator.integers(-(2**bits), 2**bits, size=shape)
    exponents = generator.integers(-3, 3, size=shape)
    return torch.from_numpy(np.ldexp(mantissas.astype(np.float64), exponents - bits)).to(dtype)


SEEDS = st.integers(0, 2**32)
FORMAT = st.sampled_from(["BF16", "F16", "F32", "F64"])
SCALE = st.sampled_from([1.0, 0.5, 0.1, -3.0, 1 / 3])
BITS = st.sampled_from([3, 8, 9, 24])


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, to=FORMAT, scale=SCALE, bits=BITS)
def test_circulants(seed, to, scale, bits):
    kernel, start = numbers((2, 3, 4), seed, bits=bits), numbers((8, 12), seed + 1, torch.bfloat16, 8)
    term = C3A(multiplier=scale).delta({"kernel": kernel}, Weight(kind="linear", shape=(8, 12)))
    delta = [
        [
            Fraction(float(kernel[i // 4, j // 4, (j % 4 - i % 4) % 4])) * Fraction(scale) / 12
            for j in range(12)
        ]
        for i in range(8)
    ]
    assert torch.equal(rounded(DeltaSum((term,), 8), start, to), exactly(start, delta, to))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, to=FORMAT, scale=SCALE, bits=BITS, mini=st.booleans(), rank=st.integers(1, 7))
def test_tiles(seed, to, scale, bits, mini, rank):
    block = numbers((rank, 3 if mini else 6), seed, bits=bits)
    start = numbers((6, 7), seed + 1, torch.bfloat16, 8)
    method = MiSS(variant="mini" if mini else True, multiplier=scale)
    made = method.expression({"block": block}, Weight(kind="linear", shape=(6, 7)))
    delta = [
        [Fraction(float(block[j % rank, i % block.shape[1]])) * Fraction(scale) for j in range(7)]
        for i in range(6)
    ]
    assert torch.equal(rounded(made, start, to), exactly(start, delta, to))


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, to=FORMAT, scale=SCALE, bits=BITS, count=st.integers(0, 40))
def test_single_places_even_where_values_meet(seed, to, scale, bits, count):
    values, start = numbers((count,), seed, bits=bits), numbers((6, 5), seed + 1, torch.float16, 8)
    places = torch.from_numpy(np.random.default_rng(seed + 2).integers(0, 30, size=count))
    term = SparseTerm(values.double(), places, height=6, width=5, scale=Surd(coefficient=Fraction(scale)))
    delta = [[Fraction(0)] * 5 for _ in range(6)]
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        delta[place // 5][place % 5] += Fraction(value) * Fraction(scale)
    assert torch.equal(rounded(DeltaSum((term,), 6), start, to), exactly(start, delta, to))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, to=FORMAT, bits=BITS, hybrid=st.integers(0, 2))
def test_granular_products(seed, to, bits, hybrid):
    a, b = numbers((2, 3, 4), seed, bits=bits), numbers((2, 4, 2), seed + 1, bits=bits)
    start = numbers((4, 6), seed + 2, torch.bfloat16, 8)
    factors = {"A": a, "B": b}
    if hybrid:
        factors["A_general"] = numbers((hybrid, 6), seed + 3, bits=bits)
        factors["B_general"] = numbers((4, hybrid), seed + 4, bits=bits)
    method = GraLoRA(rank=4, hybrid_rank=hybrid, alpha=3.0)
    term = method.delta(factors, Weight(kind="linear", shape=(4, 6)))
    delta = [[Fraction(0)] * 6 for _ in range(4)]
    for o in range(4):
        for i in range(6):
            p, n = o // 2, i // 3
            total = sum(
                Fraction(float(b[p, 2 * n + s, o % 2])) * Fraction(float(a[n, i % 3, 2 * p + s]))
                for s in range(2)
            )
            for h in range(hybrid):
                total += Fraction(float(factors["B_general"][o, h])) * Fraction(
                    float(factors["A_general"][h, i])
                )
            delta[o][i] = total * 3 / (4 + hybrid)
    assert torch.equal(rounded(DeltaSum((term,), 4), start, to), exactly(start, delta, to))


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    to=FORMAT,
    bits=BITS,
    kind=st.sampled_from(["linear", "conv1d"]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_haar_patches(seed, to, bits, kind, sizes):
    out, inner = sizes
    count = (out * inner + 1) // 2
    spectrum = numbers((count,), seed, bits=bits)
    shape = (out, inner) if kind == "linear" else (inner, out)
    start = numbers(shape, seed + 1, torch.bfloat16, 8)
    method = WaveFT(scale=0.3, seed=seed, transformed=True)
    term = method.delta({"spectrum": spectrum}, Weight(kind=kind, shape=shape))
    flat = torch.randperm(out * inner, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    high, wide = (out + 1) // 2, (inner + 1) // 2
    delta = [[Fraction(0)] * shape[1] for _ in range(shape[0])]
    for value, place in zip(spectrum.tolist(), flat, strict=True):
        row, column = divmod(place, inner)
        for down in (0, 1):
            for right in (0, 1):
                sign = (-1) ** (down * (column >= wide) + right * (row >= high))
                at = (2 * (row % high) + down, 2 * (column % wide) + right)
                if at[0] < out and at[1] < inner:
                    at = at if kind == "linear" else at[::-1]
                    delta[at[0]][at[1]] += sign * Fraction(value) * Fraction(0.3) / 2
    assert torch.equal(rounded(DeltaSum((term,), shape[0]), start, to), exactly(start, delta, to))


@pytest.mark.parametrize("to", ["F32", "BF16"])
def test_scales_that_overflow_a_product_are_decided_exactly(to):
    values, start = numbers((2, 2, 2), 5), numbers((4, 4), 6, torch.bfloat16, 8)
    term = C3A(multiplier=2.0**-260).delta({"kernel": values}, Weight(kind="linear", shape=(4, 4)))
    found = rounded(DeltaSum((term,), 4), start, to)
    assert torch.equal(found, start.to(DTYPES[to]))
