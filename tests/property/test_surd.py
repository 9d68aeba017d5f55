"""Scalings are exact, also where they are irrational, and their sums round once."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from math import isqrt

import numpy as np
import pytest

from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.formats import round_double
from adapterhub_tools.linalg.surd import Surd, round_surd_sum, scaling_of
from tests.property.exact_oracle import FORMATS, Part, combine, enclose, merged


def bounds(surd: Surd, bits: int = 2000) -> tuple[Fraction, Fraction]:
    return enclose([Part(coefficient=surd.coefficient, root=surd.radicand)], bits)


def coefficient(r: random.Random) -> Fraction:
    top = Fraction(r.choice((1.0, 16.0, 0.1, 1 / 3, r.random(), 1e-300, 5e-324, 1e300)))
    return top * Fraction(r.choice((1.0, 0.3, -2.5, r.random()))) / r.randrange(1, 200)


@pytest.mark.parametrize("radicand", [1, 2, 3, 8, 12, 16, 18, 64, 97, 128, 4096, 6 * 35 * 35])
def test_square_factors_move_out(radicand):
    surd = Surd.of(Fraction(3, 7), radicand)
    assert surd.coefficient**2 * surd.radicand == Fraction(9, 49) * radicand
    assert all(surd.radicand % (n * n) for n in range(2, radicand + 1))


def test_double_double_is_within_its_bound():
    r, count, exact = random.Random(4), 0, 0
    for _ in range(3000):
        surd = Surd.of(coefficient(r), r.choice((1, 1, 2, 3, 8, 15, 16, 97, 1009)))
        high, low, bound = surd.as_double_double()
        below, above = bounds(surd)
        found = Fraction(high) + Fraction(low)
        assert max(abs(above - found), abs(below - found)) <= Fraction(bound) + (above - below)
        if bound == 0:
            assert found == below == above
            exact += 1
        if abs(high) > 1e-250:
            assert bound <= abs(high) * 2.0**-105
        assert low == 0 or abs(low) >= 2.0**-300
        count += 1
    print(f"{count} surds, {exact} exact")
    assert exact > 0


def test_float_is_within_two_roundings():
    r = random.Random(5)
    for _ in range(2000):
        surd = Surd.of(coefficient(r), r.choice((1, 2, 3, 8, 15, 97)))
        below, _ = bounds(surd)
        assert abs(Fraction(float(surd)) - below) <= abs(below) / 2**52 + Fraction(1, 2**1074)


def test_scalings_beyond_binary64_are_infinite():
    huge = Fraction(10) ** 400
    assert float(Surd(coefficient=huge)) == math.inf
    assert float(Surd(coefficient=-huge, radicand=2)) == -math.inf
    with pytest.raises(OverflowError):
        Surd(coefficient=huge).as_double_double()


def test_scaling_rules():
    assert scaling_of(16, 12, "alpha/rank") == Surd(coefficient=Fraction(4, 3))
    assert scaling_of(16, 12, "alpha/sqrt(rank)") == Surd(coefficient=Fraction(8, 3), radicand=3)
    assert scaling_of(16, 16, "alpha/sqrt(rank)") == Surd(coefficient=Fraction(4))
    assert scaling_of(0.1, 1, "alpha", 0.5) == Surd(coefficient=Fraction(0.1) / 2)
    for rank in range(1, 300):
        surd = scaling_of(5.7, rank, "alpha/sqrt(rank)", -1.0)
        assert surd.coefficient < 0
        assert surd.coefficient**2 * surd.radicand * rank == Fraction(5.7) ** 2
    with pytest.raises(ValueError, match="unknown"):
        scaling_of(1, 1, "alpha*rank")


def convergents(d: int, count: int) -> list[tuple[int, int]]:
    """Best approximations p/q of √d, from its continued fraction: \\|p − q√d\\| < 1/q."""
    root, m, e = isqrt(d), 0, 1
    a = root
    out, before = [(a, 1)], (1, 0)
    for _ in range(count):
        m = e * a - m
        e = (d - m * m) // e
        a = (root + m) // e
        latest = out[-1]
        out.append((a * latest[0] + before[0], a * latest[1] + before[1]))
        before = latest
    return out


def check(parts: list[tuple[Fraction, int]], name: str) -> None:
    to = FORMATS[name]
    expected, x = merged(0, to, [Part(coefficient=c, root=d) for c, d in parts], to)
    value, sign = round_surd_sum(parts, PACKAGE_FORMATS[name])
    assert int(round_double(np.array([value]), PACKAGE_FORMATS[name])[0]) == expected
    assert sign == (x > 0) - (x < 0)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_sums_that_nearly_cancel(name):
    count = 0
    for d in (2, 3, 7, 13, 61):
        for p, q in convergents(d, 120)[::4]:
            for power in (0, 40, -120):
                unit = Fraction(2) ** power
                check([(p * unit, 1), (-q * unit, d)], name)
                check([(q * unit, d), (-(p - 1) * unit, 1), (-unit, 1)], name)
                count += 2
    print(f"{name}: {count} sums")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_sums_beside_midpoints(name):
    r, to, count = random.Random(8), FORMATS[name], 0
    for _ in range(150):
        size = r.randrange(to.infinity)
        middle = (to.magnitude(size) + to.magnitude(size + 1)) / 2
        parts = [(coefficient(r), 2), (coefficient(r), 3), (coefficient(r), 15)]
        near, _ = enclose(combine([Part(coefficient=c, root=d) for c, d in parts]), 1400)
        # Up to 2^-1400 absolute, or far less than any format's last place.
        digits = r.choice((60, 200, 900))
        rest = Fraction(round((middle - near) * 2**digits), 2**digits)
        check([*parts, (rest, 1)], name)
        count += 1
    print(f"{name}: {count} sums")


def test_sums_that_cancel_exactly():
    third = Fraction(1, 3)
    for name in FORMATS:
        to = PACKAGE_FORMATS[name]
        assert round_surd_sum([], to) == (0.0, 0)
        assert round_surd_sum([(third, 2), (-third, 2)], to) == (0.0, 0)
        assert round_surd_sum([(third, 2), (-third, 2), (Fraction(1), 1)], to) == (1.0, 1)
        assert round_surd_sum([(third, 3), (-third, 3), (Fraction(-1, 2**2000), 1)], to) == (-0.0, -1)
