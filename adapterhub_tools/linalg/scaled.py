"""Multiplying an error-free sum by an exact scale."""

from __future__ import annotations

import numpy as np

from adapterhub_tools.linalg.double_double import Accumulator, two_product
from adapterhub_tools.linalg.formats import F64Array
from adapterhub_tools.linalg.surd import Surd

SLACK = 1 + 2.0**-30
"""Covers the roundings in the computation of a bound: 2^-53 for each of fewer than 2^22 operations."""
UNDERFLOW = 2.0**-1000
"""Times 2^-52, far more than the 2^-1075 that one result below the normal numbers can lose."""
_SCALE_EXPONENT = 200
"""Scales in [2^-200, 2^200] take factors of ``in_safe_range`` to values without over- or underflow."""


def is_safe_scale(scale: Surd) -> bool:
    """Says whether a scale is zero, or within the range in which ``scaled`` is right."""
    size = abs(float(scale))
    return scale.coefficient == 0 or 2.0**-_SCALE_EXPONENT <= size <= 2.0**_SCALE_EXPONENT


def scaled(product: Accumulator, scale: Surd) -> Accumulator:
    """Returns ``scale · product``; ``product`` is normalised.

    Args:
        product: sums.
        scale: see ``is_safe_scale``.
    """
    product.normalise()
    high, low, bound = scale.as_double_double()
    if high == 1.0 and low == 0.0 and bound == 0.0:
        return product
    part = Accumulator.start(np.zeros_like(product.high))
    for factor in (product.high, product.low):
        main, rest = two_product(factor, np.full_like(factor, high))
        part.add(main)
        part.add(rest)
    size = np.abs(product.high) + np.abs(product.low)
    if low != 0:
        main, rest = two_product(product.high, np.full_like(product.high, low))
        part.add(main)
        part.add(rest)
        part.widen(at_least(np.abs(product.low), abs(low)))
    part.widen(at_least(size, bound))
    part.widen(at_least(product.missing, abs(high)))
    return part


def at_least(values: F64Array, factor: float) -> F64Array:
    """Returns an upper bound of ``values · factor`` (neither negative), 0 only where that is 0."""
    product: F64Array = values * (factor * SLACK)
    return np.where((values != 0) & (factor != 0), product + 2.0**-1070, 0.0)
