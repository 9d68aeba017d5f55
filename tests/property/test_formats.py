"""Rounding to a format agrees with the encoded numbers: every 16-bit pattern, and between all neighbours."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.formats import round_double, round_fraction, to_odd_double
from tests.property.exact_oracle import FORMATS, nearest_by_quotient, nearest_by_search

_NARROW = ("BF16", "F16", "F32")


def some_patterns(name: str, count: int = 20_000) -> np.ndarray:
    """All finite magnitudes of a 16-bit format; of binary32 the edges and a random part."""
    of = FORMATS[name]
    if of.width == 16:
        return np.arange(of.infinity)
    rng = np.random.default_rng(5)
    edges = [0, 1, 2, (1 << of.fraction_bits) - 1, 1 << of.fraction_bits, of.infinity - 2, of.infinity - 1]
    return np.unique(np.concatenate([edges, rng.integers(0, of.infinity, count)]))


def values(patterns: np.ndarray, name: str) -> np.ndarray:
    """Magnitudes in float64, decoded here; the pattern of infinity as the number that would follow."""
    of = FORMATS[name]
    exponents, fractions = patterns >> of.fraction_bits, patterns & ((1 << of.fraction_bits) - 1)
    whole = np.where(exponents > 0, fractions + (1 << of.fraction_bits), fractions).astype(np.float64)
    return np.ldexp(whole, np.maximum(exponents, 1) - 1 + of.quantum)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_table_is_ieee_754(name):
    ours, package = FORMATS[name], PACKAGE_FORMATS[name]
    assert package.bits == ours.width
    assert package.infinity == ours.infinity
    assert package.precision == ours.fraction_bits + 1
    assert package.min_exponent == ours.quantum
    assert package.max_exponent == ours.bias + 1


@pytest.mark.parametrize("name", _NARROW)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stored_values_come_back(name, sign):
    of, patterns = FORMATS[name], some_patterns(name)
    found = round_double(sign * values(patterns, name), PACKAGE_FORMATS[name])
    assert (found == (patterns | (of.sign if sign < 0 else 0))).all()
    print(f"{name}: {len(patterns)} patterns")


@pytest.mark.parametrize("name", _NARROW)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_midpoints_of_all_neighbours(name, sign):
    of, patterns = FORMATS[name], some_patterns(name)
    middle = (values(patterns, name) + values(patterns + 1, name)) / 2
    even = patterns + (patterns & 1)
    minus = of.sign if sign < 0 else 0
    for point, expected in (
        (middle, even),
        (np.nextafter(middle, 0), patterns),
        (np.nextafter(middle, np.inf), patterns + 1),
    ):
        found = round_double(sign * point, PACKAGE_FORMATS[name])
        assert (found == (expected | minus)).all()
    print(f"{name}: {3 * len(patterns)} points")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_infinities_pass_and_huge_values_overflow(name):
    of, infinite = FORMATS[name], np.array([np.inf, -np.inf])
    assert round_double(infinite, PACKAGE_FORMATS[name]).tolist() == [of.infinity, of.infinity | of.sign]
    if name != "F64":
        huge = round_double(np.array([1.7e308, -1.7e308]), PACKAGE_FORMATS[name])
        assert huge.tolist() == [of.infinity, of.infinity | of.sign]


def test_two_oracles_agree():
    r = random.Random(11)
    count = 0
    for of in FORMATS.values():
        for _ in range(1500):
            size = r.randrange(of.infinity)
            middle = (of.magnitude(size) + of.magnitude(size + 1)) / 2
            x = middle + r.choice((0, 0, 1, -1)) * middle / 2 ** r.randrange(1, 200)
            x *= r.choice((1, -1, Fraction(1, 3)))
            assert nearest_by_search(x, of) == nearest_by_quotient(x.numerator, x.denominator, of)
            count += 1
    print(f"{count} values")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_fractions_round_to_nearest_even(name):
    of, r = FORMATS[name], random.Random(3)
    for _ in range(2000):
        size = r.choice((r.randrange(of.infinity), r.randrange(1 << of.fraction_bits), of.infinity - 1))
        middle = (of.magnitude(size) + of.magnitude(size + 1)) / 2
        x = middle + r.choice((0, 0, 1, -1)) * middle / r.randrange(1, 3 ** r.randrange(1, 60))
        x *= r.choice((1, -1))
        found = np.array([round_fraction(x, PACKAGE_FORMATS[name])])
        assert int(round_double(found, PACKAGE_FORMATS[name])[0]) == nearest_by_search(x, of), (name, x)


@pytest.mark.parametrize("name", _NARROW)
def test_odd_rounding_makes_the_second_rounding_the_only_one(name):
    of, rng = FORMATS[name], np.random.default_rng(17)
    count = 40_000
    size = rng.integers(0, of.infinity, count)
    middle = (values(size, name) + values(size + 1, name)) / 2
    high = np.where(rng.random(count) < 0.5, middle, middle * (1 + rng.integers(-4, 5, count) * 2.0**-52))
    high[: count // 8] = np.ldexp(1.0, rng.integers(of.quantum - 3, of.bias + 1, count // 8))
    high *= rng.choice((-1.0, 1.0), count)
    # |low| is at most half the distance to the nearer neighbour of high, as two_sum leaves it.
    room = np.abs(high - np.nextafter(high, 0)) / 2
    low = rng.choice((-1.0, 0.0, 1.0), count) * room * np.ldexp(1.0, -rng.integers(0, 300, count))
    low[room == 0] = 0
    found = round_double(to_odd_double(high, low), PACKAGE_FORMATS[name])
    once = round_double(high, PACKAGE_FORMATS[name])
    step = range(0, count, 4)
    for i in step:
        x = Fraction(float(high[i])) + Fraction(float(low[i]))
        expected = nearest_by_quotient(x.numerator, x.denominator, of)
        assert int(found[i]) == expected or x == 0, (name, high[i], low[i])
    differ = int((found != once).sum())
    print(f"{name}: {len(step)} sums checked; rounding high alone would be wrong for {differ} of {count}")
    assert differ > 0
