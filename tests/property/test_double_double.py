"""Error-free sums and products are error-free, and what a running sum discards is bounded."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from adapterhub_tools.linalg.double_double import Accumulator, dot, in_safe_range, two_product, two_sum


def fractions(values: np.ndarray) -> list[Fraction]:
    return [Fraction(v) for v in values.tolist()]


def wide(rng: np.random.Generator, shape, low: int, high: int) -> np.ndarray:
    """Values with random significands of 1 to 53 bits and exponents in [low, high)."""
    bits = rng.integers(1, 54, shape)
    significand = np.floor(rng.random(shape) * 2.0**bits) + 1
    return np.ldexp(significand * rng.choice((-1.0, 1.0), shape), rng.integers(low, high, shape) - bits)


@pytest.mark.parametrize(("low", "high"), [(-40, 40), (-1074, -1000), (-1074, 1000), (-2, 2)])
def test_two_sum_is_exact(low, high):
    rng = np.random.default_rng(1)
    a, b = wide(rng, 5000, low, high), wide(rng, 5000, low, high)
    b[:500] = -a[:500]
    b[500:1000] = -np.nextafter(a[500:1000], 0)
    s, e = two_sum(a, b)
    assert (s == a + b).all()
    for x, y, p, q in zip(*map(fractions, (a, b, s, e)), strict=True):
        assert x + y == p + q


@pytest.mark.parametrize(("low", "high"), [(-40, 40), (-300, 300), (-2, 2)])
def test_two_product_is_exact(low, high):
    rng = np.random.default_rng(2)
    a, b = wide(rng, 5000, low, high), wide(rng, 5000, low, high)
    p, e = two_product(a, b)
    assert (p == a * b).all()
    for x, y, q, r in zip(*map(fractions, (a, b, p, e)), strict=True):
        assert x * y == q + r


@pytest.mark.parametrize("exact_products", [True, False])
@pytest.mark.parametrize("spread", [0, 10, 60, 200])
def test_dot_is_within_what_it_says_is_missing(exact_products, spread):
    rng = np.random.default_rng(spread)
    points, k = 400, 12
    low, high = -spread // 2 - 1, spread // 2 + 1
    left, right = wide(rng, (points, k), low, high), wide(rng, (points, k), low, high)
    if exact_products:
        left, right = left.astype(np.float32).astype(np.float64), right.astype(np.float32).astype(np.float64)
    # Half of the sums cancel but for one small product.
    left[::2, 1:6], right[::2, 1:6] = -left[::2, 6:11], right[::2, 6:11]
    total = dot(left, right, exact_products=exact_products)
    total.add(wide(rng, points, low, high))
    start = dot(left, right, exact_products=exact_products)
    start.normalise()
    exact_count = 0
    for i in range(points):
        x = sum((Fraction(a) * Fraction(b) for a, b in zip(left[i], right[i], strict=True)), Fraction(0))
        found = Fraction(start.high[i]) + Fraction(start.low[i])
        assert abs(x - found) <= Fraction(start.missing[i]) * (1 + Fraction(1, 2**30))
        assert abs(Fraction(start.missing[i])) <= Fraction(1, 2**90) * sum(
            abs(Fraction(a) * Fraction(b)) for a, b in zip(left[i], right[i], strict=True)
        )
        exact_count += start.missing[i] == 0
        assert float(found) == start.high[i]
    print(f"spread {spread}: {exact_count} of {points} exact")
    assert exact_count > 0 or spread == 200
    assert np.isfinite(total.high).all()


def test_widen_and_add_keep_the_bound():
    rng = np.random.default_rng(9)
    values = wide(rng, (30, 300), -80, 80)
    total = Accumulator.start(values[0])
    for row in values[1:]:
        total.add(row)
    total.widen(np.full(300, 2.0**-900))
    for i in range(300):
        x = sum(map(Fraction, values[:, i].tolist()), Fraction(0))
        found = Fraction(total.high[i]) + Fraction(total.low[i])
        assert abs(x - found) <= Fraction(total.missing[i]) * (1 + Fraction(1, 2**30))


def test_safe_range_looks_at_every_value():
    edge = 2.0**300
    rows = np.array([[0.0, 1.0], [edge, 1 / edge], [edge * 2, 1.0], [1.0, -0.5 / edge], [5e-324, 0.0]])
    assert in_safe_range(rows).tolist() == [True, True, False, False, False]
    assert in_safe_range(rows[:, 0], rows[:, 1]).tolist() == [True, True, False, False, False]
    assert in_safe_range(np.array([np.inf, np.nan, -1.0])).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="no arrays"):
        in_safe_range()
