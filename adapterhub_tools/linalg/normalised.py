"""Lines of a sum brought to given norms: ``x = w + c·(m·a/‖a‖ − w)``, ``a = w + delta``, by row or column.

``a`` and ‖a‖ are evaluated in float64. With n weights in a line, the computed ã obeys
|ã − a| <= u·(|ã| + 2·M) (linalg/delta_sum.py), so ‖ã‖ is off by u·(‖ã‖ + 2·M·√n) and its rounding, and x̃ by

    |m|/‖ã‖ · u·(|ã| + 2·M)  +  |x̃| · (u + u·2·M·√n/‖ã‖ + roundings of the norm),   |x̃| <= |m|,

which is ``bounds``. What that leaves open is decided with norms of about 2^-96 relative error, and what is
left after that (ties, mostly) algebraically by linalg/root_ratio.py.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.errors import LossyError
from adapterhub_tools.linalg.computed import Computed
from adapterhub_tools.linalg.delta_sum import DeltaSum, round_sums
from adapterhub_tools.linalg.double_double import Accumulator, in_safe_range, two_product, two_sum
from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double
from adapterhub_tools.linalg.line_gains import root_of, rounded_quotients
from adapterhub_tools.linalg.line_squares import CHUNK, LineSquares, roundings_of_rows, squares_of_rows
from adapterhub_tools.linalg.root_ratio import Quadratic, round_root_ratio
from adapterhub_tools.linalg.scaled import SLACK, UNDERFLOW
from adapterhub_tools.linalg.surd import Surd

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from adapterhub_tools.linalg.expression import DeltaTerm, IntArray

_DOUBT = 2.0**-30
"""A relative error of a norm above this leaves the whole line to exact arithmetic."""


class Normalised:
    """The expression ``w + c·(m·a/‖a‖ − w)``, correctly rounded.

    Rows are complete in every block, so their norms come from the block; the norms of columns need a first
    pass over the weight. The bounds of a row are final once it was evaluated.

    Attributes:
        norms: ‖a‖ of each line in float64; of rows, NaN until evaluated.

    Args:
        term: the delta, over the whole matrix.
        magnitudes: m, one for each line, float64 on the CPU.
        read_rows: (first row, count) -> w in float64, on the CPU.
        rows: the number of rows of the matrix.
        columns: the number of columns.
        by_row: True for rows, False for columns.
        multiplier: c.
    """

    exact = True
    identity = False

    def __init__(
        self,
        term: DeltaTerm,
        magnitudes: Tensor,
        read_rows: Callable[[int, int], Tensor],
        *,
        rows: int,
        columns: int,
        by_row: bool,
        multiplier: float = 1.0,
    ) -> None:
        """Computes the norms of columns."""
        self._sum = DeltaSum((term,), rows)
        self._magnitudes = magnitudes
        self._read_rows = read_rows
        self._by_row = by_row
        self._factor = multiplier
        self._length = columns if by_row else rows
        self._squares = LineSquares(self._sum, read_rows, rows, columns, by_row=by_row)
        self._rows_at_once = max(1, CHUNK // max(1, columns))
        chunks = -(-rows // self._rows_at_once)
        roundings = roundings_of_rows(columns) if by_row else self._rows_at_once + chunks + 2
        self._norm_error = (roundings / 2 + 2) * 2.0**-53 * SLACK
        # Of the norm, its square counts half; then the root, m/‖a‖, c times it, two products, two sums.
        self.unit: float = (2 * self._sum.unit + (roundings / 2 + 8) * 2.0**-53) * SLACK
        self.inner: int = self._sum.inner
        # Those of c·m·a/‖a‖, to which (1 − c)·w adds its own.
        self._normal: F64Array = np.full(rows, np.inf)
        self.bounds: F64Array = self._normal if multiplier == 1 else self._normal.copy()
        self.norms: F64Array = np.full(rows if by_row else columns, np.nan)
        if not by_row:
            self._measure_columns(rows, columns)

    def _measure_columns(self, rows: int, columns: int) -> None:
        total = torch.zeros(columns, dtype=torch.float64)
        size = self._rows_at_once
        for first in range(0, rows, size):
            block = self._read_rows(first, min(size, rows - first))
            self._sum.evaluate(block, first)
            total += (block * block).sum(dim=0)
        norms = total.sqrt().numpy()
        self.norms[:] = norms
        # Of all rows together, and of the largest ratio: good enough, as the unit is far below a format's.
        with np.errstate(over="ignore"):
            reach = float(np.sqrt(np.square(self._sum.bounds).sum())) * SLACK
        self._reach = reach
        ratios = self._ratios(norms, self._magnitudes)
        worst = float(ratios.max(initial=0.0))
        least = float(norms.min(initial=np.inf))
        if least > 0 and self._sum.unit * (1 + 2 * reach / least) <= _DOUBT:
            self._normal[:] = self._bound(worst, self._sum.bounds, reach)

    def gains_back(self, first: int, count: int, bits: int) -> F64Array:
        """Returns ‖a‖/m of lines, rounded to so many bits: ``w ≈ g·x − delta`` where c is 1, see LineInverse.

        Args:
            first: the first line; of rows, one that was evaluated.
            count: how many.
            bits: see linalg/line_gains.py.
        """
        part = slice(first, first + count)
        norms, magnitudes = self.norms[part], self._magnitudes.numpy()[part]
        with np.errstate(all="ignore"):
            if self._by_row:
                reach = self._sum.bounds[part] * float(np.sqrt(self._length)) * SLACK
            else:
                reach = np.full(count, self._reach)
            error = self._sum.unit * (1 + 2 * reach / norms) + self._norm_error

        def exactly(left: IntArray) -> list[Fraction]:
            square, _ = self._squares.of(left + first)
            values = [Fraction(h) + Fraction(low) for h, low in zip(square.high, square.low, strict=True)]
            wanted = magnitudes[left].tolist()
            return [root_of(q) / Fraction(m) if q > 0 else q for q, m in zip(values, wanted, strict=True)]

        return rounded_quotients(norms, magnitudes, error, bits, exactly)

    def _ratios(self, norms: F64Array, magnitudes: Tensor) -> F64Array:
        with np.errstate(all="ignore"):
            ratios: F64Array = np.abs(magnitudes.numpy()) / norms * abs(self._factor)
        return np.where(np.isnan(ratios), np.inf, ratios)

    def _bound(self, ratios: F64Array | float, own: F64Array, reach: F64Array | float) -> F64Array:
        """Returns the bounds of rows for ratios c·m/‖a‖, the delta's bounds, and M·√n."""
        with np.errstate(all="ignore"):
            bound: F64Array = ratios * (own + reach) * (self._sum.unit / self.unit) * SLACK + UNDERFLOW
        return np.where(np.isnan(bound), np.inf, bound)

    def evaluate(self, block: Tensor, row: int) -> None:
        """Turns w into x in place, and completes the bounds; see Expression."""
        count = int(block.shape[0])
        start = block.clone() if self._factor != 1 else None
        self._sum.evaluate(block, row)
        if self._by_row:
            norms = squares_of_rows(block).sqrt_()
            found = norms.cpu().numpy()
            magnitudes = self._magnitudes[row : row + count]
            self.norms[row : row + count] = found
            self._bound_rows(row, found, magnitudes)
            block.mul_((magnitudes.to(block.device) / norms).mul_(self._factor)[:, None])
        else:
            ratio = self._magnitudes / torch.from_numpy(self.norms) * self._factor
            block.mul_(ratio.to(block.device)[None, :])
        if start is not None:
            block.add_(start, alpha=1 - self._factor)
            peaks = start.abs().amax(dim=1).cpu().numpy() if block.shape[1] else np.zeros(count)
            with np.errstate(over="ignore"):
                own = self._normal[row : row + count] + abs(1 - self._factor) * peaks * SLACK
            self.bounds[row : row + count] = own

    def _bound_rows(self, row: int, norms: F64Array, magnitudes: Tensor) -> None:
        own = self._sum.bounds[row : row + len(norms)]
        with np.errstate(all="ignore"):
            reach = own * float(np.sqrt(self._length)) * SLACK
            bound = self._bound(self._ratios(norms, magnitudes), own, reach)
            doubtful = ~(self._sum.unit * (1 + 2 * reach / norms) <= _DOUBT)
            doubtful |= ~((norms >= 2.0**-500) & (norms <= 2.0**500))
        bound[doubtful] = np.inf
        self._normal[row : row + len(norms)] = bound

    def exact_bits(
        self, rows: IntArray, columns: IntArray, start: F64Array, computed: F64Array, to: FloatFormat
    ) -> AnyArray:
        """Returns the bits of the correctly rounded values at single points; see Expression.

        An exact zero is +0, except that a zero w that stays zero keeps its sign.

        Raises:
            LossyError: a line of the sum is all zero, so it has no direction.
        """
        if to.name == "F64":
            return self._precise(rows, columns, start, to)
        with np.errstate(all="ignore"):
            error = self._errors(rows, columns, computed)
            bits = round_double(computed, to)
            lower, upper = round_double(computed - error, to), round_double(computed + error, to)
            good = (lower == upper) & np.isfinite(computed) & (np.abs(computed) > error)
        left = np.flatnonzero(~good)
        if len(left):
            bits[left] = self._precise(rows[left], columns[left], start[left], to)
        return bits

    def _errors(self, rows: IntArray, columns: IntArray, computed: F64Array) -> F64Array:
        """Returns bounds of the errors at points; with |x̃| itself in place of |m| they are closer."""
        lines = rows if self._by_row else columns
        norms, own = self.norms[lines], self._sum.bounds[rows]
        with np.errstate(all="ignore"):
            reach = own * float(np.sqrt(self._length)) if self._by_row else np.full(own.shape, self._reach)
            if self._factor == 1:
                share = self._sum.unit * 2 * reach / norms
                gain = np.abs(self._magnitudes.numpy()[lines]) / norms
                error: F64Array = np.abs(computed) * (self.unit + share) + 2 * self._sum.unit * own * gain
            else:
                # Where (1 − c)·w is added, only the bound of the whole row is known.
                error = self.unit * (np.abs(computed) + 2 * self.bounds[rows])
        error = error * (1 + 2.0**-20) + UNDERFLOW
        return np.where(np.isfinite(self.bounds[rows]) & ~np.isnan(error), error, np.inf)

    def _precise(self, rows: IntArray, columns: IntArray, start: F64Array, to: FloatFormat) -> AnyArray:
        lines = rows if self._by_row else columns
        top, safe = self._sum.delta_at(rows, columns)
        safe &= in_safe_range(start)
        square, fine = self._squares.of(lines)
        with np.errstate(all="ignore"):
            top.add(start)
            top.normalise()
            nothing = (top.high == 0) & (top.low == 0) & (top.missing == 0)
            tiny = (np.abs(top.high) < 2.0**-300) & ~nothing
            total, usable = self._ratio(top, square, self._magnitudes.numpy()[lines])
            if self._factor != 1:
                usable &= self._add_start(total, start)
        bits, undecided = round_sums(total, to)
        undecided |= ~safe | ~fine | tiny | ~usable
        for point in np.flatnonzero(undecided):
            bits[point] = self._exact_point(int(rows[point]), int(columns[point]), float(start[point]), to)
        zero = ~undecided & (total.high == 0) & (total.low == 0) & (total.missing == 0)
        minus = bits.dtype.type(1 << (to.bits - 1))
        bits[zero] = np.where((start[zero] == 0) & np.signbit(start[zero]), minus, minus ^ minus)
        return bits

    def _ratio(
        self, top: Accumulator, square: Accumulator, magnitudes: F64Array
    ) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns c·m·a/√q with a bound on its error, and where the gain c·m is neither huge nor tiny."""
        gain, rest = two_product(magnitudes, np.full_like(magnitudes, self._factor))
        root = np.sqrt(square.high)
        main, lost = two_product(root, root)
        root, root_low = two_sum(root, ((square.high - main) - lost + square.low) / (2 * root))
        main, lost = two_product(gain, top.high)
        upper, lower = two_sum(main, lost + gain * top.low + rest * top.high)
        first = upper / root
        main, lost = two_product(first, root)
        second = (((upper - main) - lost) + lower - first * root_low) / root
        size = np.abs(first)
        total = Accumulator.start(first)
        total.add(second)
        # 2^-100 covers some twenty roundings of the second half; then what a and q are uncertain by.
        relative = 2.0**-100 + square.missing / square.high
        missing = size * relative * SLACK + np.abs(gain) / root * top.missing * SLACK
        exact_zero = (top.high == 0) & (top.missing == 0)
        total.widen(np.where(exact_zero | (gain == 0), 0.0, missing))
        usable = (gain == 0) | ((np.abs(gain) >= 2.0**-300) & (np.abs(gain) <= 2.0**300))
        usable &= exact_zero | (gain == 0) | ((size >= 2.0**-700) & (size <= 2.0**700))
        return total, usable

    def _add_start(self, total: Accumulator, start: F64Array) -> npt.NDArray[np.bool_]:
        """Adds (1 − c)·w to the values, and says where that is safe from over- and underflow."""
        share = 1 - Fraction(self._factor)
        high, low, bound = Surd(coefficient=share).as_double_double()
        for factor in (high, low):
            main, rest = two_product(start, np.full_like(start, factor))
            total.add(main)
            total.add(rest)
        total.widen(np.abs(start) * bound * SLACK)
        fine = 2.0**-200 <= abs(share) <= 2.0**200 and (low == 0 or abs(low) >= 2.0**-400)
        return np.full(start.shape, fine, dtype=np.bool_)

    def _exact_point(self, row: int, column: int, start: float, to: FloatFormat) -> int:
        line = row if self._by_row else column
        square = self._squares.exact(line)
        if square.sign == 0:
            name = "row" if self._by_row else "column"
            raise LossyError.of(
                "zero-norm",
                f"{name} {line} of W + s·B·A is all zero, so its norm, by which it is divided, is 0.",
                remedy="The training run left nothing of this line: use another checkpoint of the adapter.",
            )
        top = Quadratic.of(self._sum.exact_parts(row, column, start))
        gain = Fraction(self._factor) * Fraction(float(self._magnitudes[line]))
        share = (1 - Fraction(self._factor)) * Fraction(start)
        value, sign = round_root_ratio(share, gain, top, square, to)
        if value == 0 and (sign < 0 or (sign == 0 and str(start) == "-0.0")):
            return 1 << (to.bits - 1)
        return int(round_double(np.array([value]), to)[0])


def denormalised(
    term: DeltaTerm, magnitudes: Tensor, norms: Tensor, rows: int, *, by_row: bool, multiplier: float = 1.0
) -> Computed:
    """Returns what takes ``Normalised`` back, in float64: ``w = (x·n/m − c·delta) / (c + (1 − c)·n/m)``.

    Args:
        term: the delta.
        magnitudes: m, one for each line.
        norms: n = ‖w + delta‖ of each line.
        rows: the number of rows of the matrix.
        by_row: True for rows, False for columns.
        multiplier: c.
    """
    total = DeltaSum((term,), rows)
    ratio = norms / magnitudes
    divisor = multiplier + (1 - multiplier) * ratio
    parts: dict[str, Any] = {"ratio": ratio / divisor, "share": -multiplier / divisor}

    def compute(block: Tensor, row: int) -> Tensor:
        delta = torch.zeros_like(block)
        total.evaluate(delta, row)
        lines = slice(row, row + int(block.shape[0]))
        shape = (-1, 1) if by_row else (1, -1)
        own = {name: (values[lines] if by_row else values).view(shape) for name, values in parts.items()}
        return block.mul_(own["ratio"]).add_(delta.mul_(own["share"]))

    return Computed(rows, compute)
