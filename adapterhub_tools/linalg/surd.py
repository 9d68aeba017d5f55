"""Numbers of the form c·√d: the scaling of an adapter, exactly.

alpha / rank is rational, alpha / √rank (rsLoRA, arXiv:2312.03732) need not be. Both are c·√d with a
rational c and a square-free d, and sums of them can be compared and rounded exactly: square roots of
different square-free numbers are linearly independent over the rationals (Besicovitch 1940), so such a sum
is zero only if each part is.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import inf, isqrt, nextafter, sqrt

from adapterhub_tools.linalg.formats import FloatFormat, round_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Surd:
    """The number ``coefficient · √radicand``, the radicand square-free."""

    coefficient: Fraction
    radicand: int = 1

    @classmethod
    def of(cls, coefficient: Fraction, radicand: int) -> Surd:
        """Makes the surd of any positive radicand; its square factors move to the coefficient."""
        outside, inside, factor = 1, radicand, 2
        while factor * factor <= inside:
            while inside % (factor * factor) == 0:
                inside //= factor * factor
                outside *= factor
            factor += 1
        return cls(coefficient=coefficient * outside, radicand=inside)

    def as_double_double(self) -> tuple[float, float, float]:
        """Returns (high, low, bound) with |value − (high + low)| <= bound, 0 where exact.

        A ``low`` below 2^-300 is counted to the bound, so that its products keep all their bits.

        Raises:
            OverflowError: the value is beyond binary64.
        """
        if self.radicand == 1:
            exact = self.coefficient
        else:
            # 2^-200 of the square root is far below the 2^-106 that two doubles can hold.
            exact = self.coefficient * Fraction(isqrt(self.radicand << 400), 1 << 200)
        high = float(exact)
        low = float(exact - Fraction(high))
        if abs(low) < 2.0**-300:
            low = 0.0
        rest = abs(exact - Fraction(high) - Fraction(low))
        if self.radicand != 1:
            rest += abs(self.coefficient) * Fraction(1, 1 << 199)
        bound = 0.0 if rest == 0 else nextafter(float(rest), inf)
        return high, low, bound

    def __float__(self) -> float:
        """The value in binary64, after at most two roundings; ±inf where it overflows."""
        value = self.coefficient
        if self.radicand != 1:
            value *= Fraction(sqrt(self.radicand))
        try:
            return float(value)
        except OverflowError:
            return inf if value > 0 else -inf


def scaling_of(alpha: float, rank: int, rule: str, multiplier: float = 1.0) -> Surd:
    """Returns the exact scaling of a low-rank adapter.

    Args:
        alpha: the JSON number as binary64.
        rank: the rank r, positive.
        rule: ``"alpha/rank"`` (arXiv:2106.09685, §4.1), ``"alpha/sqrt(rank)"`` (rsLoRA) or ``"alpha"``.
        multiplier: the caller's factor on the whole delta.
    """
    top = Fraction(alpha) * Fraction(multiplier)
    if rule == "alpha/rank":
        return Surd(coefficient=top / rank)
    if rule == "alpha/sqrt(rank)":
        return Surd.of(top / rank, rank)
    if rule == "alpha":
        return Surd(coefficient=top)
    raise ValueError(f"unknown scaling rule: {rule}")


def round_surd_sum(parts: list[tuple[Fraction, int]], to: FloatFormat) -> tuple[float, int]:
    """Rounds Σ c·√d to a format, to nearest with ties to even.

    Args:
        parts: pairs (coefficient, square-free radicand).
        to: the format.

    Returns:
        The rounded value, and the sign of the exact one (−1, 0 or 1).
    """
    grouped: dict[int, Fraction] = {}
    for coefficient, radicand in parts:
        grouped[radicand] = grouped.get(radicand, Fraction(0)) + coefficient
    grouped = {d: c for d, c in grouped.items() if c != 0}
    if not grouped:
        return 0.0, 0
    if set(grouped) == {1}:
        value = grouped[1]
        return round_fraction(value, to), 1 if value > 0 else -1
    # An irrational sum is never a tie, so some precision separates it from every boundary.
    precision = 128
    while True:
        low = high = Fraction(0)
        for radicand, coefficient in grouped.items():
            if radicand == 1:
                low, high = low + coefficient, high + coefficient
                continue
            root = isqrt(radicand << (2 * precision))
            ends = sorted(
                (coefficient * root / (1 << precision), coefficient * (root + 1) / (1 << precision))
            )
            low, high = low + ends[0], high + ends[1]
        if low * high > 0 and round_fraction(low, to) == round_fraction(high, to):
            return round_fraction(low, to), 1 if low > 0 else -1
        precision *= 2
