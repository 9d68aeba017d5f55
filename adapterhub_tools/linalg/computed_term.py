"""Deltas that are whatever binary64 arithmetic gives, row by row; their sum with w is rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.linalg.double_double import Accumulator, in_safe_range
from adapterhub_tools.linalg.formats import F64Array
from adapterhub_tools.linalg.scaled import SLACK

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray

PANEL_ROWS = 256
"""Rows of a panel of PanelCache."""

_ROWS_AT_ONCE = 64
"""Rows computed again at a time for single points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedTerm:
    """A delta D of which any rows can be computed; a DeltaTerm.

    D is taken as the float64 value that ``rows`` gives, so the guarantee of a method that uses it is a
    tolerance: how far that value may be from the formula.

    Attributes:
        rows: row indices (int64, on the CPU) -> these rows of D, float64, shape (n, width).
        height: the number of rows.
        width: the number of columns.
        largest: at least |D| at every column, one for each row; 0 only where the row of D is 0.
        row: the first row of the tensor that D covers.
        column: the first column.
    """

    rows: Callable[[Tensor], Tensor]
    height: int
    width: int
    largest: F64Array
    row: int = 0
    column: int = 0

    @property
    def row_end(self) -> int:
        """One past the last row covered."""
        return self.row + self.height

    @property
    def column_end(self) -> int:
        """One past the last column covered."""
        return self.column + self.width

    @property
    def inner(self) -> int:
        """1: a point gathers one value."""
        return 1

    @property
    def roundings(self) -> int:
        """Those between two computations of one value in differently cut blocks, generously."""
        return 64

    def bounds(self) -> F64Array:
        """Returns the bound on |D| of each row; see DeltaTerm."""
        bounds: F64Array = self.largest * SLACK
        return bounds

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of D to a float64 block, in place; see DeltaTerm."""
        found = self.rows(torch.arange(first, first + part.shape[0]))
        part.add_(found if part.is_cpu else found.to(part.device))

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns D at points; see DeltaTerm."""
        values = np.empty(len(rows))
        order, where = np.unique(rows, return_inverse=True)
        for begin in range(0, len(order), _ROWS_AT_ONCE):
            some = self.rows(torch.from_numpy(order[begin : begin + _ROWS_AT_ONCE])).numpy()
            inside = np.flatnonzero((where >= begin) & (where < begin + _ROWS_AT_ONCE))
            values[inside] = some[where[inside] - begin, columns[inside]]
        return Accumulator.start(values), in_safe_range(values)

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns D at a point; see DeltaTerm."""
        return [(Fraction(float(self.rows(torch.tensor([row]))[0, column])), 1)]


class PanelCache:
    """Rows of a delta that is cheaper to compute in panels than row by row; for ComputedTerm.

    The rows asked for one after the other lie in one panel, so the last one is kept.

    Args:
        panel: (first row, one past the last) -> these rows of D, float64; in memory that the next call may
            overwrite.
        height: the number of rows of D.
    """

    def __init__(self, panel: Callable[[int, int], Tensor], height: int) -> None:
        """Computes nothing yet."""
        self._panel, self._height = panel, height
        self._kept: tuple[int, Tensor] | None = None

    def __call__(self, index: Tensor) -> Tensor:
        """Returns rows of D, shape (n, width).

        Args:
            index: ascending row indices, shape (n,), n at least 1.
        """
        panels = index // PANEL_ROWS
        parts = [self._rows(number, index[panels == number]) for number in sorted(set(panels.tolist()))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, number: int, index: Tensor) -> Tensor:
        first = number * PANEL_ROWS
        if self._kept is None or self._kept[0] != number:
            self._kept = None
            self._kept = (number, self._panel(first, min(self._height, first + PANEL_ROWS)))
        return self._kept[1][index - first]
