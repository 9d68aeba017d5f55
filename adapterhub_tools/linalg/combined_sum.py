"""The expression ``w + D`` for a delta D that is computed in panels: D in float64, the sum rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.linalg.delta_sum import round_sums
from adapterhub_tools.linalg.double_double import Accumulator
from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat
from adapterhub_tools.linalg.panels import PANEL_ELEMENTS, panel_range, rows_of_panel

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import CombinedRows
    from adapterhub_tools.linalg.expression import IntArray

KEPT_ELEMENTS = 18 * PANEL_ELEMENTS
"""Values of D that are kept, 36 MiB: a chunk of the engine, whose suspects are decided at its end."""

_TOUCHED = 2.0**-1000
"""A bound of every row: D is known as it stands, so that only its addition to w rounds."""


class CombinedSum:
    """An Expression whose delta is whatever float64 arithmetic makes of several others.

    Args:
        rows: D.
    """

    exact = True
    identity = False
    unit: float = 2.0**-52
    inner = 1

    def __init__(self, rows: CombinedRows) -> None:
        """Computes nothing yet."""
        self._rows = rows
        self.bounds: F64Array = np.full(rows.shape[0], _TOUCHED)
        self._height = rows_of_panel(rows.shape[1])
        self._most = max(2, KEPT_ELEMENTS // max(1, self._height * rows.shape[1]))
        self._kept: dict[int, Tensor] = {}

    def evaluate(self, block: Tensor, row: int) -> None:
        """Adds D to a block in place; see Expression."""
        end = row + int(block.shape[0])
        while row < end:
            number = row // self._height
            first, last = panel_range(number, self._rows.shape)
            stop = min(end, last)
            part = self._panel(number)[row - first : stop - first]
            target = block[row - end :] if stop == end else block[row - end : stop - end]
            target.add_(part if block.is_cpu else part.to(block.device))
            row = stop

    def exact_bits(
        self,
        rows: IntArray,
        columns: IntArray,
        start: F64Array,
        computed: F64Array,  # noqa: ARG002 - an error-free sum needs no first guess
        to: FloatFormat,
    ) -> AnyArray:
        """Returns the bits of w + D, correctly rounded, at single points; see Expression.

        A delta of zero keeps the sign of a zero w; any other exact zero is +0.
        """
        delta = np.empty(len(rows))
        numbers = rows // self._height
        for number in np.unique(numbers).tolist():
            inside = np.flatnonzero(numbers == number)
            panel = self._panel(number).numpy()
            delta[inside] = panel[rows[inside] - number * self._height, columns[inside]]
        total = Accumulator.start(delta)
        with np.errstate(all="ignore"):
            total.add(start)
        # Of two numbers nothing is ever missing; where they overflow, so does the result.
        bits, _ = round_sums(total, to)
        minus = bits.dtype.type(1 << (to.bits - 1))
        bits[(delta == 0) & (start == 0) & np.signbit(start)] = minus
        return bits

    def _panel(self, number: int) -> Tensor:
        """Returns a panel of D, from those that are kept if it is there."""
        found = self._kept.get(number)
        if found is None:
            made = self._rows.panel(number)
            room = self._kept.pop(next(iter(self._kept))) if len(self._kept) >= self._most else None
            if room is None or room.shape != made.shape:
                room = torch.empty(made.shape, dtype=torch.float64)
            found = self._kept[number] = room.copy_(made)
        return found
