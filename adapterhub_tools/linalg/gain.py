"""Weights times a gain: ``x = w·(t + D)``, the gain being a constant and a delta."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.errors import LossyError
from adapterhub_tools.linalg.computed import Computed
from adapterhub_tools.linalg.delta_sum import round_sums
from adapterhub_tools.linalg.double_double import Accumulator, in_safe_range, two_product
from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double
from adapterhub_tools.linalg.line_gains import rounded_quotients
from adapterhub_tools.linalg.products import times
from adapterhub_tools.linalg.scaled import SLACK, UNDERFLOW
from adapterhub_tools.linalg.surd import Surd, round_surd_sum

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import DeltaTerm, IntArray


class Gain:
    """The expression ``w·(t + D)``, correctly rounded.

    The error of a row depends on its largest weight, so ``bounds`` are final once a row was evaluated.

    Args:
        term: D, over the whole matrix.
        constant: t.
        rows: the number of rows of the matrix.
        by_row: whether D is the same along a row, and not along a column; only ``gains_back`` asks.
    """

    exact = True

    def __init__(self, term: DeltaTerm, constant: Fraction, rows: int, *, by_row: bool = True) -> None:
        """Computes the part of the bounds that does not depend on w."""
        self._term = term
        self._constant = constant
        self._by_row = by_row
        delta = term.bounds()
        # Where the delta is 0 the gain is the constant: 1 leaves w as it is, 0 does not.
        unchanged = (delta == 0) & (constant == 1)
        self._size: F64Array = np.where(unchanged, 0.0, delta + abs(float(constant)) * SLACK + UNDERFLOW)
        self.identity: bool = not self._size.any()
        self.bounds: F64Array = np.where(self._size != 0, np.inf, 0.0)
        self.inner: int = term.inner
        # Beyond the delta's: t, t + D, the product with w and the bound itself.
        self.unit: float = (term.roundings + 4) * 2.0**-53 * SLACK
        self._buffer: Tensor | None = None
        if rows != len(self._size):
            raise ValueError(f"the gain has {len(self._size)} rows, the weight {rows}")

    def evaluate(self, block: Tensor, row: int) -> None:
        """Multiplies a block by its gains in place, and completes the bounds; see Expression."""
        count = int(block.shape[0])
        gain = self._buffer_like(block)
        torch.abs(block, out=gain)
        peaks = gain.amax(dim=1).cpu().numpy() if block.shape[1] else np.zeros(count)
        self._term.add_to(gain.fill_(float(self._constant)), row)
        size = self._size[row : row + count]
        with np.errstate(all="ignore"):
            bound = size * peaks * SLACK + UNDERFLOW * (1 + size + peaks)
        self.bounds[row : row + count] = np.where(size != 0, np.where(np.isnan(bound), np.inf, bound), 0.0)
        block.mul_(gain)

    def _buffer_like(self, block: Tensor) -> Tensor:
        """Returns a buffer of the block's shape; one is kept, as a new one for each block splits the heap."""
        if self._buffer is None or self._buffer.shape[0] < block.shape[0]:
            self._buffer = torch.empty_like(block)
        return self._buffer[: block.shape[0]]

    def gains_back(self, first: int, count: int, bits: int) -> F64Array:
        """Returns 1/(t + D) of lines along which D is the same, rounded to so many bits: ``w ≈ g·x``.

        Args:
            first: the first line.
            count: how many.
            bits: see linalg/line_gains.py.
        """
        lines = np.arange(first, first + count)
        rows, columns = (lines, np.zeros_like(lines)) if self._by_row else (np.zeros_like(lines), lines)
        delta, _ = self._term.at_points(rows, columns)
        gains = delta.high + float(self._constant)
        # Binary64 tells the gain well but for cancellation, and this bound is far from the truth there.
        with np.errstate(all="ignore"):
            error = (np.abs(delta.high) + abs(float(self._constant))) / np.abs(gains) * 2.0**-51

        def exactly(left: IntArray) -> list[Fraction]:
            found = []
            for row, column in zip(rows[left].tolist(), columns[left].tolist(), strict=True):
                # The gains of (IA)³ are rational.
                gain = self._constant + sum((c for c, _ in self._term.exact_parts(row, column)), Fraction(0))
                found.append(1 / gain if gain else Fraction(0))
            return found

        return rounded_quotients(np.ones(count), gains, error, bits, exactly)

    def exact_bits(
        self,
        rows: IntArray,
        columns: IntArray,
        start: F64Array,
        computed: F64Array,  # noqa: ARG002 - an error-free product needs no first guess
        to: FloatFormat,
    ) -> AnyArray:
        """Returns the bits of the correctly rounded values at single points; see Expression.

        A zero w keeps its sign; any other exact zero is +0.
        """
        delta, safe = self._term.at_points(rows, columns)
        safe &= in_safe_range(start)
        bits = round_double(start, to)
        left = start != 0
        if self._constant == 0 and not delta.low.any() and not delta.missing.any():
            with np.errstate(all="ignore"):
                main, rest = two_product(start, delta.high)
            simple = left & safe & (rest == 0)
            # Adding +0 makes a zero product +0.
            bits[simple] = round_double(main[simple] + 0.0, to)
            left &= ~simple
        at = np.flatnonzero(left)
        if len(at):
            part = Accumulator(delta.high[at], delta.low[at], delta.missing[at])
            bits[at] = self._rounded(part, safe[at], rows[at], columns[at], start[at], to)
        return bits

    def _rounded(
        self,
        delta: Accumulator,
        safe: AnyArray,
        rows: IntArray,
        columns: IntArray,
        start: F64Array,
        to: FloatFormat,
    ) -> AnyArray:
        high, low, bound = Surd(coefficient=self._constant).as_double_double()
        with np.errstate(all="ignore"):
            delta.add(np.full_like(start, high))
            delta.add(np.full_like(start, low))
            delta.widen(np.full_like(start, bound))
            product = times(delta, Accumulator.start(start))
            size, rest = np.abs(delta.high), np.abs(delta.low)
            fine = (size == 0) | (
                (size >= 2.0**-300) & (size <= 2.0**300) & ((rest == 0) | (rest >= 2.0**-600))
            )
        bits, undecided = round_sums(product, to)
        undecided |= ~safe | ~fine
        for point in np.flatnonzero(undecided):
            bits[point] = self._exact_point(int(rows[point]), int(columns[point]), float(start[point]), to)
        return bits

    def _exact_point(self, row: int, column: int, start: float, to: FloatFormat) -> int:
        weight = Fraction(start)
        parts = [(self._constant * weight, 1)]
        parts += [(c * weight, d) for c, d in self._term.exact_parts(row, column)]
        value, sign = round_surd_sum(parts, to)
        if value == 0 and sign < 0:
            return 1 << (to.bits - 1)
        return int(round_double(np.array([value]), to)[0])


def quotient(term: DeltaTerm, constant: Fraction, rows: int) -> Computed:
    """Returns ``w / (t + D)``, which takes ``Gain`` back, in float64.

    Args:
        term: D, over the whole matrix.
        constant: t.
        rows: the number of rows of the matrix.

    Raises:
        LossyError: while it is evaluated, where a gain is 0: what was multiplied by it is gone.
    """

    def compute(block: Tensor, row: int) -> Tensor:
        gain = block.new_full(block.shape, float(constant))
        term.add_to(gain, row)
        if bool((gain == 0).any()):
            at = torch.nonzero(gain == 0)[0].tolist()
            raise LossyError.of(
                "zero-gain",
                f"the gain at row {row + at[0]}, column {at[1]} is 0, so the weight cannot be computed back.",
                remedy="Use the base itself.",
            )
        return block.div_(gain)

    return Computed(rows, compute)
