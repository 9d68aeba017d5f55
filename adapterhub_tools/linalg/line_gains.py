"""One gain for each row or column, rounded to few bits: what takes a scaled weight back, ``w ≈ g·x − delta``.

A value of at most 24 bits times a gain of at most 29 is exact in binary64. So a prediction that starts from
the product is correctly rounded like any sum, the same on every machine, although the gain itself is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from adapterhub_tools.linalg.expression import DeltaTerm, IntArray
    from adapterhub_tools.linalg.formats import F64Array

GAIN_BITS = {"BF16": 24, "F16": 24, "F32": 29}
"""dtype of the base -> the bits of a gain: 24 fit binary32, 29 leave 24 for the other factor of a product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineInverse:
    """How a method's weight is taken back, but for the gains.

    Attributes:
        by_row: True for a gain per row of the stored matrix, False for one per column.
        delta: what is added to g·x; None for nothing.
    """

    by_row: bool
    delta: DeltaTerm | None = None


def rounded_quotients(
    top: F64Array,
    bottom: F64Array,
    error: F64Array,
    bits: int,
    exactly: Callable[[IntArray], list[Fraction]],
) -> F64Array:
    """Returns top/bottom rounded to so many significant bits, decided exactly where binary64 leaves it open.

    Args:
        top: the computed numerators.
        bottom: the computed denominators.
        error: a bound on the relative error of each quotient, its own rounding not counted.
        bits: at most 29.
        exactly: indices -> their quotients, to a relative error far below 2^-53.

    Returns:
        The gains; 0 where there is none: the denominator is 0, or the quotient is beyond 2^±100.
    """
    with np.errstate(all="ignore"):
        quotient = np.asarray(top / bottom, dtype=np.float64)
        slack = error + 2.0**-52
        found = _rounded(quotient, bits)
        open_ = _rounded(quotient * (1 - slack), bits) != _rounded(quotient * (1 + slack), bits)
        open_ |= ~(slack < 2.0**-30)
        size = np.abs(quotient)
        gone = ~((size > 2.0**-100) & (size < 2.0**100)) & ~np.isnan(slack)
    gone |= bottom == 0
    left = np.flatnonzero(open_ & ~gone)
    for index, value in zip(left, exactly(left) if len(left) else (), strict=True):
        found[index] = _rounded_fraction(value, bits)
    found[gone | ~np.isfinite(found)] = 0.0
    return found


def root_of(value: Fraction) -> Fraction:
    """Returns √value to a relative error of about 2^-120; value is positive."""
    shift = 128 + max(0, (value.denominator.bit_length() - value.numerator.bit_length()) // 2 + 1)
    return Fraction(isqrt((value.numerator << (2 * shift)) // value.denominator), 1 << shift)


def _rounded(values: F64Array, bits: int) -> F64Array:
    """Rounds to so many significant bits, to nearest with ties to even; values are not subnormal."""
    drop = 53 - bits
    held = np.ascontiguousarray(values).view(np.int64)
    kept = (held + ((1 << (drop - 1)) - 1) + ((held >> drop) & 1)) & ~np.int64((1 << drop) - 1)
    rounded: F64Array = kept.view(np.float64)
    return rounded


def _rounded_fraction(value: Fraction, bits: int) -> float:
    if value == 0:
        return 0.0
    # Round to odd at 53 bits keeps the second rounding right.
    near = float(value)
    rest = value - Fraction(near)
    held = np.array([near])
    if rest != 0 and not held.view(np.int64)[0] & 1:
        held = np.nextafter(held, np.inf if rest > 0 else -np.inf)
    return float(_rounded(held, bits)[0])
