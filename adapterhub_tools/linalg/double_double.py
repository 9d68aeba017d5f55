"""Sums and products without rounding error, vectorised: x = high + low, and a bound on what is still missing.

Each function is exact by Knuth's two-sum and Dekker's two-product (Ogita, Rump and Oishi 2005, "Accurate
sum and dot product", algorithms 3.1 and 3.3), as long as nothing over- or underflows; ``in_safe_range``
says when that holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.formats import F64Array

_SPLIT = float(2**27 + 1)
SAFE_EXPONENT = 300
"""Inputs whose non-zero magnitudes lie in [2^-300, 2^300] cannot over- or underflow in a product of three."""


def two_sum(a: F64Array, b: F64Array) -> tuple[F64Array, F64Array]:
    """Returns (s, e) with s = fl(a + b) and s + e = a + b exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: F64Array, b: F64Array) -> tuple[F64Array, F64Array]:
    """Returns (p, e) with p = fl(a · b) and p + e = a · b exactly."""
    p = a * b
    ca, cb = _SPLIT * a, _SPLIT * b
    ah, bh = ca - (ca - a), cb - (cb - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def in_safe_range(*values: F64Array) -> npt.NDArray[np.bool_]:
    """Says for each row of the given arrays whether every non-zero magnitude is in [2^-300, 2^300]."""
    low, high = 2.0**-SAFE_EXPONENT, 2.0**SAFE_EXPONENT
    good: npt.NDArray[np.bool_] | None = None
    for array in values:
        magnitude = np.abs(array)
        fine = (magnitude == 0) | ((magnitude >= low) & (magnitude <= high))
        row = fine if fine.ndim == 1 else fine.all(axis=1)
        good = row if good is None else good & row
    if good is None:
        raise ValueError("no arrays given")
    return good


@dataclass(slots=True)
class Accumulator:
    """Running sums, one per point: the exact value is ``high + low`` within ``missing``.

    ``missing`` is zero exactly when nothing was discarded, so that a tie can be told from a near tie.
    """

    high: F64Array
    low: F64Array
    missing: F64Array

    @classmethod
    def start(cls, values: F64Array) -> Accumulator:
        """Begins with the given values."""
        return cls(values.copy(), np.zeros_like(values), np.zeros_like(values))

    def add(self, values: F64Array) -> None:
        """Adds one value to each sum."""
        self.high, rest = two_sum(self.high, values)
        self.low, lost = two_sum(self.low, rest)
        self.missing = self.missing + np.abs(lost)

    def widen(self, amount: F64Array) -> None:
        """Adds to the bound: each exact value may lie ``amount`` further away."""
        self.missing = self.missing + amount

    def normalise(self) -> None:
        """Makes ``high`` the nearest binary64 to ``high + low``; changes no value."""
        self.high, self.low = two_sum(self.high, self.low)


def dot(left: F64Array, right: F64Array, *, exact_products: bool) -> Accumulator:
    """Returns the sums over k of ``left[i, k] · right[i, k]``.

    Args:
        left: shape (points, k).
        right: shape (points, k).
        exact_products: True where every product fits 53 bits (factors of 24 bits or fewer), which saves the
            second half of the work.
    """
    total = Accumulator.start(np.zeros(left.shape[0]))
    if exact_products:
        products = left * right
        for k in range(left.shape[1]):
            total.add(products[:, k])
        return total
    products, rests = two_product(left, right)
    for k in range(left.shape[1]):
        total.add(products[:, k])
        total.add(rests[:, k])
    return total
