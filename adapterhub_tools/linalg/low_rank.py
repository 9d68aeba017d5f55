"""Sums ``W + Σ s·L·R``: evaluated in binary64 block by block, and exactly at single points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.double_double import Accumulator, dot, in_safe_range, two_product, two_sum
from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double, to_odd_double
from adapterhub_tools.linalg.surd import Surd, round_surd_sum

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]
_SLACK = 1 + 2.0**-30
"""Covers the roundings in the computation of a bound: 2^-53 for each of fewer than 2^22 operations."""
_UNDERFLOW = 2.0**-1000
"""Times 2^-52, far more than the 2^-1075 that one result below the normal numbers can lose."""
_SCALE_EXPONENT = 200
"""Scales in [2^-200, 2^200] take factors of ``in_safe_range`` to values without over- or underflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankTerm:
    """One product ``s·L·R`` and where it lies in the tensor.

    Attributes:
        left: L, shape (rows, k), float64 on the CPU.
        right: R, shape (k, columns), float64, contiguous, on the CPU.
        scale: s, exactly.
        exact_products: True where L and R hold at most 24 significant bits, so that a product fits binary64.
        row: the first row of the tensor that the product covers.
        column: the first column.
    """

    left: Tensor
    right: Tensor
    scale: Surd
    exact_products: bool
    row: int = 0
    column: int = 0

    @property
    def row_end(self) -> int:
        """One past the last row covered."""
        return self.row + int(self.left.shape[0])

    @property
    def column_end(self) -> int:
        """One past the last column covered."""
        return self.column + int(self.right.shape[1])


class LowRankSum:
    """The exact value ``x = w + Σ s·(L·R)`` of every element of a matrix, at two precisions.

    Args:
        terms: the products; none makes x = w.
        rows: the number of rows of the whole matrix.
        device: where blocks are evaluated.
    """

    def __init__(self, terms: Sequence[LowRankTerm], rows: int, device: str = "cpu") -> None:
        """Computes the bounds on the products, one per row."""
        self.terms: tuple[LowRankTerm, ...] = tuple(term for term in terms if term.scale.coefficient != 0)
        self.device = device
        self._rights = [term.right.to(device) for term in self.terms]
        bounds = np.zeros(rows)
        for term in self.terms:
            peaks = (
                term.right.abs().amax(dim=1)
                if term.right.shape[1]
                else term.right.new_zeros(term.right.shape[0])
            )
            # A matrix-vector product: no copy of the left factor beyond its absolute value. What may
            # underflow (s, s·L, a product) is off by an absolute amount, which the second half covers.
            reach = (term.left.abs() @ peaks).numpy()
            with np.errstate(all="ignore"):
                bound = reach * (abs(float(term.scale)) + _UNDERFLOW)
                bound += _UNDERFLOW * (float(peaks.sum()) + peaks.shape[0])
                bound = np.where(np.isnan(bound), np.inf, bound * _SLACK)
            touched = (term.left != 0).any(dim=1).numpy() & bool(peaks.any())
            bounds[term.row : term.row_end] += np.where(touched, bound, 0.0)
        self.bounds: F64Array = bounds
        """For each row, at least Σ |s|·Σ_k |L|·|R| at every column; 0 only where every product is 0."""
        inner = sum(int(term.left.shape[1]) for term in self.terms)
        # Roundings of one element: s (2), s·L (1), the products and sums (k + 1 per term), whatever their
        # order.
        roundings = inner + 4 * len(self.terms) + 2
        self.unit: float = roundings * 2.0**-53 * _SLACK
        """Relative error of an evaluation: |computed − x| <= unit · (|computed| + 2·bound)."""

    def evaluate(self, block: Tensor, row: int) -> None:
        """Adds the products to a block in place.

        Args:
            block: float64, shape (n, columns), holding w; its first row is row ``row`` of the matrix.
            row: see above.
        """
        end = row + int(block.shape[0])
        for term, right in zip(self.terms, self._rights, strict=True):
            first, last = max(row, term.row), min(end, term.row_end)
            if first >= last:
                continue
            scaled = (term.left[first - term.row : last - term.row] * float(term.scale)).to(self.device)
            part = block[first - row : last - row, term.column : term.column_end]
            part.addmm_(scaled, right)

    def exact_bits(self, rows: IntArray, columns: IntArray, start: F64Array, to: FloatFormat) -> AnyArray:
        """Returns the bits of the correctly rounded values at single points.

        An exactly zero delta keeps the sign of a zero w; any other exact zero is +0.

        Args:
            rows: row of each point.
            columns: column of each point.
            start: w at each point, finite.
            to: the format.
        """
        delta = Accumulator.start(np.zeros(len(rows)))
        safe = in_safe_range(start)
        for term in self.terms:
            inside = np.flatnonzero(
                (rows >= term.row)
                & (rows < term.row_end)
                & (columns >= term.column)
                & (columns < term.column_end)
            )
            if not len(inside):
                continue
            if not 2.0**-_SCALE_EXPONENT <= abs(float(term.scale)) <= 2.0**_SCALE_EXPONENT:
                safe[inside] = False
                continue
            left = term.left.numpy()[rows[inside] - term.row]
            right = term.right.numpy()[:, columns[inside] - term.column].T
            safe[inside] &= in_safe_range(left, right)
            with np.errstate(all="ignore"):
                _add_scaled(delta, inside, dot(left, right, exact_products=term.exact_products), term.scale)
        untouched = (delta.high == 0) & (delta.low == 0) & (delta.missing == 0)
        with np.errstate(all="ignore"):
            delta.add(start)
            delta.normalise()
            bits = _round(delta.high, delta.low, to)
        undecided = ~safe | ~np.isfinite(delta.high)
        doubtful = np.flatnonzero((delta.missing != 0) & ~undecided)
        if len(doubtful):
            high, low = delta.high[doubtful], delta.low[doubtful]
            missing = delta.missing[doubtful] * _SLACK
            # One step outwards: next to a much larger low, the rounded difference would lose what is missing.
            lower = _round(*two_sum(high, np.nextafter(low - missing, -np.inf)), to)
            upper = _round(*two_sum(high, np.nextafter(low + missing, np.inf)), to)
            undecided[doubtful] = (lower != bits[doubtful]) | (upper != bits[doubtful])
        for point in np.flatnonzero(undecided):
            bits[point] = self._exact_point(int(rows[point]), int(columns[point]), float(start[point]), to)
        minus = bits.dtype.type(1 << (to.bits - 1))
        bits[untouched & safe & (start == 0) & np.signbit(start)] = minus
        return bits

    def _exact_point(self, row: int, column: int, start: float, to: FloatFormat) -> int:
        parts = [(Fraction(start), 1)]
        for term in self.terms:
            if not (term.row <= row < term.row_end and term.column <= column < term.column_end):
                continue
            left = term.left[row - term.row].tolist()
            right = term.right[:, column - term.column].tolist()
            product = sum((Fraction(a) * Fraction(b) for a, b in zip(left, right, strict=True)), Fraction(0))
            parts.append((product * term.scale.coefficient, term.scale.radicand))
        value, sign = round_surd_sum(parts, to)
        if value == 0 and sign == 0 and str(start) == "-0.0":
            # w is -0, so x is the delta: exactly zero, which keeps w.
            sign = -1
        if value == 0 and sign < 0:
            return 1 << (to.bits - 1)
        return int(round_double(np.array([value]), to)[0])


def _add_scaled(total: Accumulator, where: IntArray, product: Accumulator, scale: Surd) -> None:
    """Adds ``scale · product`` to the sums at ``where``."""
    product.normalise()
    high, low, bound = scale.as_double_double()
    part = Accumulator(total.high[where], total.low[where], total.missing[where])
    for factor in (product.high, product.low):
        main, rest = two_product(factor, np.full_like(factor, high))
        part.add(main)
        part.add(rest)
    size = np.abs(product.high) + np.abs(product.low)
    if low != 0:
        main, rest = two_product(product.high, np.full_like(product.high, low))
        part.add(main)
        part.add(rest)
        part.widen(_at_least(np.abs(product.low), abs(low)))
    part.widen(_at_least(size, bound))
    part.widen(_at_least(product.missing, abs(high)))
    total.high[where], total.low[where], total.missing[where] = part.high, part.low, part.missing


def _at_least(values: F64Array, factor: float) -> F64Array:
    """Returns an upper bound of ``values · factor`` (neither negative), 0 only where that is 0."""
    product: F64Array = values * (factor * _SLACK)
    return np.where((values != 0) & (factor != 0), product + 2.0**-1070, 0.0)


def _round(high: F64Array, low: F64Array, to: FloatFormat) -> AnyArray:
    return round_double(high if to.name == "F64" else to_odd_double(high, low), to)
