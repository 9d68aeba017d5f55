"""Results that are whatever binary64 arithmetic makes of the weight: the expression of tolerance methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray


class Computed:
    """The expression whose value x is what a function gives for some rows; it is rounded once.

    The function works on the CPU wherever the block lies, so that the device does not change the result.

    Args:
        rows: the number of rows of the whole matrix.
        compute: (block of w in float64 on the CPU, shape (n, columns), its first row) -> x, the same shape.
            It may change the block.
        multiplier: m, of the whole change: w + m·(x − w) where it is not 1.
    """

    exact = False
    identity = False
    unit: float = 0.0
    inner: int = 1

    def __init__(self, rows: int, compute: Callable[[Tensor, int], Tensor], multiplier: float = 1.0) -> None:
        """Keeps the function."""
        # Not 0, which would say that x = w; as the unit is 0, their size does not matter.
        self.bounds: F64Array = np.ones(rows)
        self._compute = compute
        self._multiplier = multiplier

    def evaluate(self, block: Tensor, row: int) -> None:
        """Turns w into x in place; see Expression."""
        start = block if block.is_cpu else block.cpu()
        if self._multiplier == 1:
            result = self._compute(start, row)
        else:
            result = start + self._multiplier * (self._compute(start.clone(), row) - start)
        if result is not block:
            block.copy_(result)

    def exact_bits(
        self,
        rows: IntArray,  # noqa: ARG002 - the points are known by their values
        columns: IntArray,  # noqa: ARG002 - likewise
        start: F64Array,  # noqa: ARG002 - x is what was computed from it
        computed: F64Array,
        to: FloatFormat,
    ) -> AnyArray:
        """Returns the bits of the computed values, rounded once; see Expression."""
        return round_double(computed, to)
