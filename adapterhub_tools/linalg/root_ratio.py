"""Rounding ``p + g·a/√q``, a and q being ``u + v·√d``, to a format: what a normalised row needs.

Such a number may be a tie although roots enter: a row with one weight is ±g. So a boundary is compared
algebraically, by squares, where growing precision does not decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

from adapterhub_tools.linalg.formats import FloatFormat, round_fraction

_FIRST_PRECISION = 160
_ALGEBRA_FROM = 320


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """The number ``u + v·√d``, d square-free and above 1, or v zero."""

    u: Fraction
    v: Fraction = Fraction(0)
    d: int = 1

    @classmethod
    def of(cls, parts: list[tuple[Fraction, int]]) -> Quadratic:
        """Makes it of pairs (coefficient, square-free radicand) with at most one radicand above 1."""
        u, v, d = Fraction(0), Fraction(0), 1
        for coefficient, radicand in parts:
            if radicand == 1:
                u += coefficient
            else:
                v, d = v + coefficient, radicand
        return cls(u=u, v=v, d=d if v else 1)

    def squared(self) -> Quadratic:
        """Returns its square."""
        return Quadratic(u=self.u**2 + self.v**2 * self.d, v=2 * self.u * self.v, d=self.d)

    def plus(self, other: Quadratic) -> Quadratic:
        """Returns the sum of two numbers of one field."""
        return Quadratic(u=self.u + other.u, v=self.v + other.v, d=max(self.d, other.d))

    def interval(self, precision: int) -> tuple[Fraction, Fraction]:
        """Returns two bounds whose distance is about |v|·2^-precision."""
        if self.v == 0:
            return self.u, self.u
        root = isqrt(self.d << (2 * precision))
        ends = sorted((self.v * Fraction(root, 1 << precision), self.v * Fraction(root + 1, 1 << precision)))
        return self.u + ends[0], self.u + ends[1]

    @property
    def sign(self) -> int:
        """−1, 0 or 1. As √d is irrational, the number is 0 only if u and v are."""
        u, v = (self.u > 0) - (self.u < 0), (self.v > 0) - (self.v < 0)
        if u * v >= 0:
            return u or v
        return u if self.u**2 > self.v**2 * self.d else v


def round_root_ratio(
    constant: Fraction, gain: Fraction, top: Quadratic, square: Quadratic, to: FloatFormat
) -> tuple[float, int]:
    """Rounds ``constant + gain·top/√square`` to a format, to nearest with ties to even.

    Args:
        constant: p.
        gain: g.
        top: a.
        square: q, positive.
        to: the format.

    Returns:
        The rounded value, and the sign of the exact one (−1, 0 or 1).
    """
    if gain == 0 or top.sign == 0:
        return round_fraction(constant, to), (constant > 0) - (constant < 0)
    precision = _FIRST_PRECISION
    while True:
        low, high = _interval(constant, gain, top, square, precision)
        first, last = round_fraction(low, to), round_fraction(high, to)
        if low * high > 0 and first == last:
            return first, 1 if low > 0 else -1
        if precision >= _ALGEBRA_FROM:
            edge = Fraction(0) if low * high <= 0 else _between(first, last, to)
            if low <= edge <= high and _equals(constant, gain, top, square, edge):
                return round_fraction(edge, to), (edge > 0) - (edge < 0)
        precision *= 2


def _between(first: float, last: float, to: FloatFormat) -> Fraction:
    """Returns the boundary between two neighbours; infinity begins half a step past the largest value."""
    if first - first == 0 and last - last == 0:
        return (Fraction(first) + Fraction(last)) / 2
    edge = Fraction(2) ** to.max_exponent - Fraction(2) ** (to.max_exponent - to.precision - 1)
    return edge if last > 0 else -edge


def _interval(
    constant: Fraction, gain: Fraction, top: Quadratic, square: Quadratic, precision: int
) -> tuple[Fraction, Fraction]:
    q_low, q_high = square.interval(precision)
    while q_low <= 0:  # cancellation between u and v·√d; q itself is positive
        precision *= 2
        q_low, q_high = square.interval(precision)
    roots = (_root_below(q_low, precision), _root_above(q_high, precision))
    ends = [gain * a / root for a in top.interval(precision) for root in roots]
    return constant + min(ends), constant + max(ends)


def _root_below(value: Fraction, precision: int) -> Fraction:
    """Returns a rational just below √value, correct to about ``precision`` bits."""
    shift = precision + max(0, (value.denominator.bit_length() - value.numerator.bit_length()) // 2 + 1)
    root = isqrt((value.numerator << (2 * shift)) // value.denominator)
    return Fraction(root, 1 << shift)


def _root_above(value: Fraction, precision: int) -> Fraction:
    """Returns a rational at or just above √value."""
    shift = precision + max(0, (value.denominator.bit_length() - value.numerator.bit_length()) // 2 + 1)
    scaled = -((-value.numerator << (2 * shift)) // value.denominator)
    root = isqrt(scaled)
    return Fraction(root if root * root == scaled else root + 1, 1 << shift)


def _equals(constant: Fraction, gain: Fraction, top: Quadratic, square: Quadratic, edge: Fraction) -> bool:
    """Says whether p + g·a/√q = edge: of equal signs, and (edge − p)²·q = g²·a²."""
    rest = (edge - constant) / gain
    if rest == 0 or (rest > 0) is not (top.sign > 0):
        return False
    wanted, found = top.squared(), rest**2
    return wanted.u == found * square.u and wanted.v == found * square.v
