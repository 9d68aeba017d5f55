"""Rounds sums of products at points: in binary64 with intervals, and exactly where that leaves open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double

if TYPE_CHECKING:
    from adapterhub_tools.linalg.delta_sum import DeltaSum
    from adapterhub_tools.linalg.expression import IntArray

_FACTOR_VALUES = 1 << 20
"""Factor values gathered at a time: 8 MiB for each factor."""


class PointRounder:
    """Rounds ``w + Σ s·L·R`` at single points.

    Args:
        expression: a sum of products.
        to: the format of the result, of 16 bits.
    """

    def __init__(self, expression: DeltaSum, to: FloatFormat) -> None:
        """Keeps both."""
        self._expression, self._to = expression, to
        self._dtype: torch.dtype = getattr(torch, to.torch_name)

    def round(self, rows: IntArray, columns: IntArray, start: F64Array) -> AnyArray:
        """Returns the bits of the correctly rounded values.

        Args:
            rows: the points' rows.
            columns: their columns.
            start: w there, finite; no result may overflow.
        """
        bits = np.empty(len(rows), dtype=self._to.numpy_bits)
        size = max(1, _FACTOR_VALUES // self._expression.inner)
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            found, left = self.decide(rows[part], columns[part], start[part])
            if len(left):
                at, values = left + first, start[left + first]
                found[left] = self._expression.exact_bits(rows[at], columns[at], values, values, self._to)
            bits[part] = found
        return bits

    def decide(self, rows: IntArray, columns: IntArray, start: F64Array) -> tuple[AnyArray, IntArray]:
        """Returns the bits that binary64 gives, and which of them it leaves open.

        Args:
            rows: the points' rows.
            columns: their columns.
            start: w there, finite.
        """
        computed, errors = self._expression.double_at(rows, columns, start)
        # Half a unit of binary32 more: the ends are rounded to it on the way. And never nothing, so that the
        # ends around a zero differ in sign: which zero it is, only the exact evaluation knows.
        wide = (errors + np.abs(computed) * 2.0**-23) * (1 + 2.0**-20) + 2.0**-148
        ends = torch.from_numpy(np.stack([computed - wide, computed + wide]))
        lower, upper = ends.float().to(self._dtype).view(torch.int16).numpy().view(self._to.numpy_bits)
        left = np.flatnonzero(lower != upper)
        if len(left):
            # Few: their ends are rounded once, so that almost none is left for the exact evaluation.
            computed, errors = computed[left], errors[left]
            close = (errors + np.abs(computed) * 2.0**-52) * (1 + 2.0**-20) + 2.0**-1000
            lower[left] = round_double(computed - close, self._to)
            left = left[lower[left] != round_double(computed + close, self._to)]
        return lower, left
