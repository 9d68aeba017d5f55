"""Sums ``x = w + Σ delta``: evaluated in float64 block by block, and rounded exactly at single points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.double_double import Accumulator, in_safe_range, two_sum
from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double, to_odd_double
from adapterhub_tools.linalg.low_rank import LowRankTerm, PointProduct
from adapterhub_tools.linalg.scaled import SLACK
from adapterhub_tools.linalg.single import SingleSum, single_sum
from adapterhub_tools.linalg.surd import round_surd_sum

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import DeltaTerm, IntArray


class DeltaSum:
    """The expression ``w + Σ delta``, rounded once however many terms there are.

    Args:
        terms: the deltas; none makes x = w.
        rows: the number of rows of the whole matrix.
    """

    exact = True

    def __init__(self, terms: Sequence[DeltaTerm], rows: int) -> None:
        """Computes the bounds on the deltas, one per row."""
        bounds: F64Array = np.zeros(rows)
        kept = []
        for term in terms:
            own = term.bounds()
            if own.any():
                kept.append(term)
                bounds[term.row : term.row_end] += own
        self.terms: tuple[DeltaTerm, ...] = tuple(kept)
        self.bounds: F64Array = bounds
        # The last two roundings are those of adding to w and of the bound itself.
        self.unit: float = (sum(term.roundings for term in kept) + 2) * 2.0**-53 * SLACK
        self.inner: int = max(1, sum(term.inner for term in kept))

    @property
    def identity(self) -> bool:
        """True without terms."""
        return not self.terms

    @cached_property
    def single(self) -> SingleSum | None:
        """The same sum in binary32 with its bounds, where every term is a product of two factors."""
        return single_sum(self.terms, self.bounds)

    def negated(self) -> DeltaSum:
        """Returns ``w − Σ delta`` for a sum of products; the scales are exact, so that the values are too."""
        terms = [
            replace(term, scale=replace(term.scale, coefficient=-term.scale.coefficient))
            for term in self._product_terms
        ]
        negated = DeltaSum((), 0)
        negated.terms, negated.bounds = tuple(terms), self.bounds
        negated.unit, negated.inner = self.unit, self.inner
        return negated

    @cached_property
    def _product_terms(self) -> list[LowRankTerm]:
        terms = [term for term in self.terms if isinstance(term, LowRankTerm)]
        if len(terms) != len(self.terms):
            raise TypeError("only sums of products are evaluated at points and negated")
        return terms

    @cached_property
    def _products(self) -> list[PointProduct]:
        """The terms for evaluation at points."""
        return [PointProduct.of(term) for term in self._product_terms]

    def double_at(self, rows: IntArray, columns: IntArray, start: F64Array) -> tuple[F64Array, F64Array]:
        """Returns sums of products at points in binary64, and how far the exact values may lie from them."""
        total = start.copy()
        for term, product in zip(self.terms, self._products, strict=True):
            inside = self._inside(term, rows, columns)
            if len(inside) == len(rows):
                total += product.at(rows - term.row, columns - term.column)
            else:
                total[inside] += product.at(rows[inside] - term.row, columns[inside] - term.column)
        return total, (np.abs(total) + 2 * self.bounds[rows]) * (self.unit * SLACK)

    def evaluate(self, block: Tensor, row: int) -> None:
        """Adds the deltas to a block in place; see Expression."""
        end = row + int(block.shape[0])
        for term in self.terms:
            first, last = max(row, term.row), min(end, term.row_end)
            if first < last:
                part = block[first - row : last - row, term.column : term.column_end]
                term.add_to(part, first - term.row)

    def exact_bits(
        self,
        rows: IntArray,
        columns: IntArray,
        start: F64Array,
        computed: F64Array,  # noqa: ARG002 - an error-free sum needs no first guess
        to: FloatFormat,
    ) -> AnyArray:
        """Returns the bits of the correctly rounded values at single points; see Expression.

        An exactly zero delta keeps the sign of a zero w; any other exact zero is +0.
        """
        delta, safe = self.delta_at(rows, columns)
        safe &= in_safe_range(start)
        with np.errstate(all="ignore"):
            # Terms that cancel leave a high and a low part that do.
            delta.normalise()
            untouched = (delta.high == 0) & (delta.low == 0) & (delta.missing == 0)
            delta.add(start)
        bits, undecided = round_sums(delta, to)
        undecided |= ~safe
        for point in np.flatnonzero(undecided):
            bits[point] = self._exact_point(int(rows[point]), int(columns[point]), float(start[point]), to)
        minus = bits.dtype.type(1 << (to.bits - 1))
        bits[untouched & safe & (start == 0) & np.signbit(start)] = minus
        return bits

    def delta_at(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the sum of the deltas at points, and where that can be relied on."""
        total = Accumulator.start(np.zeros(len(rows)))
        safe = np.ones(len(rows), dtype=np.bool_)
        for term in self.terms:
            inside = self._inside(term, rows, columns)
            if not len(inside):
                continue
            own, fine = term.at_points(rows[inside] - term.row, columns[inside] - term.column)
            safe[inside] &= fine
            with np.errstate(all="ignore"):
                part = Accumulator(total.high[inside], total.low[inside], total.missing[inside])
                part.add(own.high)
                part.add(own.low)
                part.widen(own.missing)
            total.high[inside], total.low[inside], total.missing[inside] = part.high, part.low, part.missing
        return total, safe

    @staticmethod
    def _inside(term: DeltaTerm, rows: IntArray, columns: IntArray) -> IntArray:
        """Returns which points a term covers."""
        return np.flatnonzero(
            (rows >= term.row)
            & (rows < term.row_end)
            & (columns >= term.column)
            & (columns < term.column_end)
        )

    def exact_parts(self, row: int, column: int, start: float) -> list[tuple[Fraction, int]]:
        """Returns the exact value at a point as Σ c·√d: pairs (c, square-free d)."""
        parts = [(Fraction(start), 1)]
        for term in self.terms:
            if term.row <= row < term.row_end and term.column <= column < term.column_end:
                parts += term.exact_parts(row - term.row, column - term.column)
        return parts

    def _exact_point(self, row: int, column: int, start: float, to: FloatFormat) -> int:
        value, sign = round_surd_sum(self.exact_parts(row, column, start), to)
        if value == 0 and sign == 0 and str(start) == "-0.0":
            # w is -0, so x is the delta: exactly zero, which keeps w.
            sign = -1
        if value == 0 and sign < 0:
            return 1 << (to.bits - 1)
        return int(round_double(np.array([value]), to)[0])


def round_sums(sums: Accumulator, to: FloatFormat) -> tuple[AnyArray, npt.NDArray[np.bool_]]:
    """Rounds error-free sums, and says which of them what is missing leaves undecided.

    Args:
        sums: the sums; normalised by this call.
        to: the format.
    """
    with np.errstate(all="ignore"):
        sums.normalise()
        bits = _round(sums.high, sums.low, to)
    undecided = ~np.isfinite(sums.high)
    doubtful = np.flatnonzero((sums.missing != 0) & ~undecided)
    if len(doubtful):
        high, low = sums.high[doubtful], sums.low[doubtful]
        missing = sums.missing[doubtful] * SLACK
        # One step outwards: next to a much larger low, the rounded difference would lose what is missing.
        lower = _round(*two_sum(high, np.nextafter(low - missing, -np.inf)), to)
        upper = _round(*two_sum(high, np.nextafter(low + missing, np.inf)), to)
        undecided[doubtful] = (lower != bits[doubtful]) | (upper != bits[doubtful])
    return bits, undecided


def _round(high: F64Array, low: F64Array, to: FloatFormat) -> AnyArray:
    return round_double(high if to.name == "F64" else to_odd_double(high, low), to)
