"""Deltas of stored values times an exact scale: tiled over a matrix, or at single places of it."""

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
from adapterhub_tools.linalg.scaled import SLACK, UNDERFLOW, is_safe_scale, scaled
from adapterhub_tools.linalg.surd import Surd

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray

ONE = Surd(coefficient=Fraction(1))
"""The scale of a delta that is stored as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledTerm:
    """A delta ``s·F[place(i, j)]`` of stored values F; a DeltaTerm.

    Attributes:
        values: F, flat, float64 on the CPU.
        block: (first row, count) -> those rows of F[place(·, ·)], float64, shape (count, width).
        place: (rows, columns) -> indices into F; all of the same length.
        height: the number of rows.
        width: the number of columns.
        scale: s, exactly.
        row: the first row of the tensor that the delta covers.
        column: the first column.
    """

    values: Tensor
    block: Callable[[int, int], Tensor]
    place: Callable[[IntArray, IntArray], IntArray]
    height: int
    width: int
    scale: Surd = ONE
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
        """1: a point is one value."""
        return 1

    @property
    def roundings(self) -> int:
        """Those of s (2) and of the product (1)."""
        return 3

    def bounds(self) -> F64Array:
        """Returns for every row |s|·max|F|; 0 only where that is 0."""
        peak = float(self.values.abs().max()) if self.values.numel() else 0.0
        if peak == 0 or self.scale.coefficient == 0:
            return np.zeros(self.height)
        return np.full(self.height, peak * (abs(float(self.scale)) + UNDERFLOW) * SLACK + UNDERFLOW)

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of the delta to a float64 block, in place; see DeltaTerm."""
        found = self.block(first, int(part.shape[0]))
        part.add_(found if part.is_cpu else found.to(part.device), alpha=float(self.scale))

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the delta at points, and where no over- or underflow can spoil it; see DeltaTerm."""
        values = self.values.numpy()[self.place(rows, columns)]
        if not is_safe_scale(self.scale):
            return Accumulator.start(np.zeros(len(rows))), np.zeros(len(rows), dtype=np.bool_)
        with np.errstate(all="ignore"):
            return scaled(Accumulator.start(values), self.scale), in_safe_range(values)

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns the exact delta at a point; see DeltaTerm."""
        at = int(self.place(np.array([row]), np.array([column]))[0])
        return [(Fraction(float(self.values[at])) * self.scale.coefficient, self.scale.radicand)]


class SparseTerm:
    """A delta that is ``s·v`` at some places and 0 elsewhere; values at one place are added. A DeltaTerm.

    Args:
        values: v, float64, shape (n,), on the CPU.
        places: row · width + column of each, int64, shape (n,).
        height: the number of rows.
        width: the number of columns.
        scale: s, exactly.
        row: the first row of the tensor that the delta covers.
        column: the first column.
    """

    def __init__(
        self,
        values: Tensor,
        places: Tensor,
        *,
        height: int,
        width: int,
        scale: Surd = ONE,
        row: int = 0,
        column: int = 0,
    ) -> None:
        """Sorts the values by place."""
        sorted_places, order = torch.sort(places, stable=True)
        self._places: IntArray = sorted_places.numpy()
        self._values: F64Array = values[order].numpy()
        self._scale = scale
        self.row: int = row
        self.row_end: int = row + height
        self.column: int = column
        self.column_end: int = column + width
        self._height, self._width = height, width
        _, counts = np.unique(self._places, return_counts=True)
        self.inner: int = int(counts.max(initial=1))

    @property
    def roundings(self) -> int:
        """Those of s (2), the products (1) and the sums."""
        return 3 + self.inner

    def bounds(self) -> F64Array:
        """Returns for each row |s|·Σ|v|; 0 only where that is 0."""
        if self._scale.coefficient == 0:
            return np.zeros(self._height)
        sums = np.bincount(
            self._places // self._width, weights=np.abs(self._values), minlength=self._height
        ).astype(np.float64)
        bound: F64Array = sums * (abs(float(self._scale)) + UNDERFLOW) * SLACK + UNDERFLOW
        return np.where(sums != 0, bound, 0.0)

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of the delta to a float64 block, in place; see DeltaTerm."""
        ends = [first * self._width, (first + int(part.shape[0])) * self._width]
        low, high = np.searchsorted(self._places, ends)
        if low == high:
            return
        rows, columns = np.divmod(self._places[low:high], self._width)
        values = torch.from_numpy(self._values[low:high] * float(self._scale))
        where = (torch.from_numpy(rows - first), torch.from_numpy(columns))
        if not part.is_cpu:
            values = values.to(part.device)
            where = (where[0].to(part.device), where[1].to(part.device))
        part.index_put_(where, values, accumulate=True)

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the delta at points, and where no over- or underflow can spoil it; see DeltaTerm."""
        total = Accumulator.start(np.zeros(len(rows)))
        safe = np.full(len(rows), is_safe_scale(self._scale))
        if not len(self._places):
            return total, safe
        wanted = rows * self._width + columns
        low = np.searchsorted(self._places, wanted, side="left")
        high = np.searchsorted(self._places, wanted, side="right")
        for i in range(int((high - low).max(initial=0))):
            there = low + i < high
            found = np.where(there, self._values[np.where(there, low + i, 0)], 0.0)
            safe &= in_safe_range(found)
            total.add(found)
        if not is_safe_scale(self._scale):
            return total, safe
        with np.errstate(all="ignore"):
            return scaled(total, self._scale), safe

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns the exact delta at a point; see DeltaTerm."""
        at = row * self._width + column
        low, high = np.searchsorted(self._places, [at, at + 1])
        value = sum((Fraction(float(v)) for v in self._values[low:high]), Fraction(0))
        return [(value * self._scale.coefficient, self._scale.radicand)]
