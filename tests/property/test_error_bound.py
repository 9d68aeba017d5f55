"""The bound that the scan relies on holds for what torch really computes."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

import numpy as np
import pytest
import torch

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.double_double import dot
from adapterhub_tools.linalg.low_rank import LowRankTerm
from adapterhub_tools.linalg.scaled import scaled
from adapterhub_tools.linalg.surd import Surd
from tests.property.exact_oracle import integers, product

ROWS, COLUMNS = 12, 40


def spread(rng: np.random.Generator, shape, low: int, high: int, bits: int) -> np.ndarray:
    values = rng.choice((-1.0, 1.0), shape) * (1 + np.floor(rng.random(shape) * 2.0**bits) / 2.0**bits)
    return np.ldexp(values, rng.integers(low, high + 1, shape))


def matrices(rng: np.random.Generator, kind: str, rank: int):
    """W, L and R of one kind; all are float64."""
    w = rng.standard_normal((ROWS, COLUMNS))
    left, right = rng.standard_normal((ROWS, rank)), rng.standard_normal((rank, COLUMNS))
    if kind == "float32 factors":
        left, right = left.astype(np.float32).astype(float), right.astype(np.float32).astype(float)
    elif kind == "outliers":
        left, right = spread(rng, left.shape, -30, 30, 52), spread(rng, right.shape, -30, 30, 52)
    elif kind == "cancelling":
        left[:, rank // 2 :], right[rank // 2 :] = -left[:, : rank - rank // 2], right[: rank - rank // 2]
        left *= 2.0**25
    elif kind == "annulled":
        w = -(left @ right)
    elif kind == "same sign":
        w, left, right = np.abs(w), np.abs(left), np.abs(right)
    elif kind == "underflow":
        w = spread(rng, w.shape, -1074, -1000, 52)
        left, right = spread(rng, left.shape, -560, -500, 52), spread(rng, right.shape, -560, -500, 52)
    elif kind == "subnormal left":
        left, right = spread(rng, left.shape, -1074, -1040, 52), spread(rng, right.shape, 990, 1010, 52)
    elif kind == "huge factors":
        # With the scales below the normal numbers of binary64, which lose bits, this is as large as W.
        left, right = spread(rng, left.shape, 500, 505, 52), spread(rng, right.shape, 490, 505, 52)
    return w, left, right


KINDS = (
    "plain",
    "float32 factors",
    "outliers",
    "cancelling",
    "annulled",
    "same sign",
    "underflow",
    "subnormal left",
    "huge factors",
)
SCALES = (
    Surd(coefficient=Fraction(1)),
    Surd(coefficient=Fraction(4, 3)),
    Surd(coefficient=Fraction(0.1) / 7),
    Surd.of(Fraction(16, 8), 8),
    Surd(coefficient=Fraction(5e-324) * 3),
    Surd(coefficient=Fraction(5e-324) / 3),
)


def ratio(kind: str, scale: Surd, rank: int, seed: int) -> tuple[float, int]:
    """The largest error as a share of its bound, and how many elements were compared."""
    rng = np.random.default_rng([seed, rank, KINDS.index(kind), SCALES.index(scale)])
    w, left, right = matrices(rng, kind, rank)
    term = LowRankTerm(
        left=torch.from_numpy(left), right=torch.from_numpy(right), scale=scale, exact_products=False
    )
    expression = DeltaSum([term], ROWS)
    block = torch.from_numpy(w.copy())
    expression.evaluate(block, 0)
    computed = block.numpy()
    sums, exponent = product(left, right)
    sizes, _ = product(np.abs(left), np.abs(right))
    starts, start_exponent = integers(w)
    root = Fraction(isqrt(scale.radicand << 800), 1 << 400)
    factor = scale.coefficient * root * Fraction(2) ** exponent
    slack = 1 + Fraction(1, 2**300)
    unit = Fraction(expression.unit)
    worst = Fraction(0)
    for i in range(ROWS):
        bound = Fraction(float(expression.bounds[i]))
        for j in range(COLUMNS):
            assert abs(factor) * sizes[i][j] <= bound * slack
            x = starts[i][j] * Fraction(2) ** start_exponent + factor * sums[i][j]
            allowed = unit * (abs(Fraction(float(computed[i, j]))) + 2 * bound)
            error = abs(Fraction(float(computed[i, j])) - x)
            assert error <= allowed * slack, (kind, i, j)
            if allowed:
                worst = max(worst, error / allowed)
    return float(worst), ROWS * COLUMNS


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_float64_is_within_the_bound(kind):
    worst, count = 0.0, 0
    for scale in SCALES:
        for rank in (1, 2, 7, 16, 64):
            share, compared = ratio(kind, scale, rank, 0)
            worst, count = max(worst, share), count + compared
    print(f"{kind}: {count} elements, largest error {worst:.3f} of the bound")
    # A bound that is never approached would prove nothing; what covers underflow is ample on purpose.
    assert (0 if kind in ("underflow", "subnormal left") else 0.05) < worst <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_float64_is_within_the_bound_many_times(kind):
    worst, count = 0.0, 0
    for seed in range(1, 20):
        for scale in SCALES:
            for rank in (1, 3, 16, 100):
                share, compared = ratio(kind, scale, rank, seed)
                worst, count = max(worst, share), count + compared
    print(f"{kind}: {count} elements, largest error {worst:.3f} of the bound")


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("scale", SCALES[:4])
def test_exact_evaluation_is_within_what_it_says_is_missing(scale, cancel):
    rng = np.random.default_rng([SCALES.index(scale), cancel])
    points, k = 300, 3
    left, right = spread(rng, (points, k), -3, 3, 52), spread(rng, (points, k), -3, 3, 52)
    if cancel:
        left[:, 1], right[:, 1] = -left[:, 0], right[:, 0]
    total = scaled(dot(left, right, exact_products=False), scale)
    root = Fraction(isqrt(scale.radicand << 2000), 1 << 1000)
    worst = 0.0
    for i in range(points):
        sums = sum((Fraction(a) * Fraction(b) for a, b in zip(left[i], right[i], strict=True)), Fraction(0))
        x = sums * scale.coefficient * root
        error = abs(x - Fraction(total.high[i]) - Fraction(total.low[i]))
        missing = Fraction(total.missing[i])
        assert error <= missing * (1 + Fraction(1, 2**30)) + Fraction(1, 2**990)
        # And what it says is of use: about 2^-100 of the terms, which are below 2^10.
        assert missing <= Fraction(1, 2**90)
        worst = max(worst, float(error / missing) if missing else 0.0)
    print(f"{points} sums, largest error {worst:.3f} of what is said to be missing")


def test_bounds_of_several_terms_add_up_where_they_lie():
    one = torch.ones(2, 1, dtype=torch.float64)
    scale = Surd(coefficient=Fraction(1, 2))

    def term(row: int, left: torch.Tensor, factor: Surd) -> LowRankTerm:
        return LowRankTerm(
            left=left, right=torch.tensor([[-4.0, 3.0]]).double(), scale=factor, exact_products=True, row=row
        )

    expression = DeltaSum([term(0, one, scale), term(1, one, scale), term(3, 0 * one, scale)], rows=6)
    assert expression.bounds[:3] == pytest.approx([2, 4, 2], rel=1e-8)
    assert (expression.bounds[:3] >= [2, 4, 2]).all()
    # Rows without a product keep a bound of exactly zero: their bytes are copied.
    assert expression.bounds[3:].tolist() == [0, 0, 0]
    nothing = DeltaSum([term(0, one, Surd(coefficient=Fraction(0)))], rows=2)
    assert nothing.bounds.tolist() == [0, 0]
