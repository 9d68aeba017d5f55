"""Sums ``w + Σ s·L·R`` in binary32, with intervals that hold the exact values.

Of the results that bfloat16 and float16 keep, binary32 decides all but about one in a thousand, and its
products and passes cost half of those in binary64. What it leaves open, linalg/rounding.py decides in
binary64 and then exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_tools.linalg.formats import F64Array, FloatFormat
from adapterhub_tools.linalg.low_rank import LowRankTerm
from adapterhub_tools.linalg.scaled import SLACK

if TYPE_CHECKING:
    from torch import Tensor

_UNIT = 2.0**-24
_SMALLEST = 2.0**-126
"""The smallest normal number: below it a kernel may flush an input or a product to zero."""
_LARGEST = 2.0**100
"""Factors and bounds up to here cannot overflow in a product or in a sum of products."""


class SingleSum:
    """The deltas of a sum in binary32: for each row |computed − Σ s·L·R| <= errors.

    Args:
        terms: the products.
        bounds: for each row of the matrix at least Σ|terms|.
    """

    def __init__(self, terms: Sequence[LowRankTerm], bounds: F64Array) -> None:
        """Rounds the factors to binary32, the scale in L, and bounds what that and the sums can lose."""
        self._products = [
            (term, (term.left * float(term.scale)).float(), term.right.float()) for term in terms
        ]
        peaks = [float(factor.abs().max()) for _, *both in self._products for factor in both]
        # Beside those of the products and sums: both factors, and each product added to the others.
        unit = sum(term.roundings + 3 for term in terms) * _UNIT * SLACK
        lost = sum(term.inner for term in terms) * 4 * _SMALLEST * (1 + max(peaks))
        self.errors: F64Array = bounds * unit + lost
        self.reach: F64Array = bounds
        self.usable: bool = max(peaks) < _LARGEST and bool(bounds.max() < _LARGEST)

    def delta(self, block: Tensor, row: int) -> None:
        """Writes rows of the sum of the products into a block.

        Args:
            block: binary32, shape (n, columns), on the CPU; overwritten.
            row: the row of the matrix that its first row is.
        """
        end = row + int(block.shape[0])
        written = False
        for term, left, right in self._products:
            whole = term.row <= row and end <= term.row_end and right.shape[1] == block.shape[1]
            if whole and not written:
                _product(block, left[row - term.row : end - term.row], right)
                written = True
                continue
            if not written:
                block.zero_()
                written = True
            first, last = max(row, term.row), min(end, term.row_end)
            if first < last:
                part = block[first - row : last - row, term.column : term.column_end]
                part.addmm_(left[first - term.row : last - term.row], right)

    def product_error(self, row: int, count: int) -> float:
        """Returns how far the deltas of some rows may lie from the exact ones, with four roundings of them.

        Args:
            row: the first row.
            count: the number of rows.
        """
        rows = slice(row, row + count)
        most = float(self.errors[rows].max()) + 4 * _UNIT * float(self.reach[rows].max())
        return most * (1 + 2.0**-6) + 4 * _SMALLEST

    def interval(self, row: int, count: int, peak: float, to: FloatFormat) -> F64Array | None:
        """Returns for each row how far the exact w + delta may lie from the binary32 sum, or None.

        Two more roundings count: that of the sum, and that of the end of the interval.

        Args:
            row: the first row.
            count: the number of rows.
            peak: at least |w| in all of them; NaN where one is.
            to: the format of the result; None is returned if one might overflow it.
        """
        reach = float(self.reach[row : row + count].max())
        top = peak + 2 * reach
        if not top < 2.0 ** (to.max_exponent - 2):
            return None
        # Half a unit in the last place of binary32 is 2^-24 of the power of two at or below a value.
        half_unit = _UNIT * 2.0 ** math.floor(math.log2(top * (1 + 2.0**-20))) if top else 0.0
        return (self.errors[row : row + count] + 2 * half_unit) * (1 + 2.0**-20) + _SMALLEST


def _product(block: Tensor, left: Tensor, right: Tensor) -> None:
    import torch

    torch.mm(left, right, out=block)


def _full_products() -> bool:
    """Says whether binary32 products are that: a program may allow torch fewer bits, on the CPU too."""
    from torch import backends

    chosen = getattr(backends.mkldnn, "matmul", None), backends.mkldnn, backends
    return all(getattr(part, "fp32_precision", "none") in ("none", "ieee") for part in chosen)


def single_sum(terms: Sequence[object], bounds: F64Array) -> SingleSum | None:
    """Returns the sum in binary32, or None where a term is no product or its values do not fit.

    Args:
        terms: the deltas.
        bounds: for each row of the matrix at least Σ|terms|.
    """
    products = [term for term in terms if isinstance(term, LowRankTerm) and term.right.shape[1]]
    if not products or len(products) != len(terms) or not np.isfinite(bounds).all():
        return None
    if not _full_products():
        return None
    found = SingleSum(products, bounds)
    return found if found.usable else None
