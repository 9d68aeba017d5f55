"""The four floating-point formats that a merge writes, and the rounding of exact values to them.

A format with precision p and smallest exponent e_min holds the numbers m·2^e with |m| < 2^p and e >= e_min
(IEEE 754-2019, §3.3); bfloat16 has the exponents of binary32 and 8 bits of precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

F64Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        name: the safetensors name.
        bits: the storage width.
        precision: significant bits, the hidden one included.
        min_exponent: the exponent of the smallest subnormal number.
        max_exponent: the largest value is below 2^max_exponent.
        numpy_bits: the numpy integer type that holds its bits.
        torch_name: the torch dtype's name.
    """

    name: str
    bits: int
    precision: int
    min_exponent: int
    max_exponent: int
    numpy_bits: str
    torch_name: str

    @property
    def infinity(self) -> int:
        """The bits of +infinity, the smallest magnitude that is not finite."""
        stored = self.precision - 1
        return ((1 << (self.bits - 1 - stored)) - 1) << stored


FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat(
            name="F64",
            bits=64,
            precision=53,
            min_exponent=-1074,
            max_exponent=1024,
            numpy_bits="u8",
            torch_name="float64",
        ),
        FloatFormat(
            name="F32",
            bits=32,
            precision=24,
            min_exponent=-149,
            max_exponent=128,
            numpy_bits="u4",
            torch_name="float32",
        ),
        FloatFormat(
            name="BF16",
            bits=16,
            precision=8,
            min_exponent=-133,
            max_exponent=128,
            numpy_bits="u2",
            torch_name="bfloat16",
        ),
        FloatFormat(
            name="F16",
            bits=16,
            precision=11,
            min_exponent=-24,
            max_exponent=16,
            numpy_bits="u2",
            torch_name="float16",
        ),
    )
}


def round_fraction(value: Fraction, to: FloatFormat) -> float:
    """Rounds an exact value to a format, to nearest with ties to even.

    Returns:
        The result as a Python float, which holds every format exactly; ±inf where the value overflows.
    """
    if value == 0:
        return 0.0
    sign = -1 if value < 0 else 1
    n, d = abs(value.numerator), value.denominator
    # 2^(exponent) <= |value| < 2^(exponent + 1)
    exponent = n.bit_length() - d.bit_length()
    if (n << max(0, -exponent)) < (d << max(0, exponent)):
        exponent -= 1
    unit = max(exponent - to.precision + 1, to.min_exponent)
    scaled_n, scaled_d = (n << -unit, d) if unit < 0 else (n, d << unit)
    quotient, rest = divmod(scaled_n, scaled_d)
    if 2 * rest > scaled_d or (2 * rest == scaled_d and quotient & 1):
        quotient += 1
    if quotient.bit_length() + unit > to.max_exponent:
        return sign * float("inf")
    return sign * float(Fraction(quotient) * Fraction(2) ** unit)


def to_odd_double(high: F64Array, low: F64Array) -> F64Array:
    """Rounds the sums ``high + low`` to odd in binary64.

    A value rounded to odd with at least two bits to spare can be rounded again to nearest without error
    (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem 3).

    Args:
        high: finite, with ``|low| <= ulp(high)/2``; a zero ``high`` has a zero ``low``.
        low: the rest.
    """
    bits = high.view(np.int64).copy()
    inexact = low != 0
    bits[inexact & (np.signbit(low) != np.signbit(high))] -= 1
    bits[inexact] |= 1
    return bits.view(np.float64)


def round_double(value: F64Array, to: FloatFormat) -> AnyArray:
    """Rounds binary64 values once, to nearest even, and returns the bits in the format.

    Values below binary64 go through binary32 rounded to odd, so that the second rounding is the only one.
    """
    if to.name == "F64":
        return value.view(np.uint64).copy()
    with np.errstate(over="ignore", under="ignore"):
        single = value.astype(np.float32)
    if to.name == "F32":
        return single.view(np.uint32).copy()
    bits = single.view(np.int32).copy()
    back = single.astype(np.float64)
    inexact = back != value
    bits[inexact & (np.abs(back) > np.abs(value))] -= 1
    bits[inexact] |= 1
    if to.name == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return bits.view(np.float32).astype(np.float16).view(np.uint16)
    wide = bits.view(np.uint32).astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
