"""Sums of squares of the rows or columns of ``w + delta``: in float64 for all, and to 2^-96 for some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.linalg.double_double import Accumulator, in_safe_range, two_product, two_sum
from adapterhub_tools.linalg.formats import F64Array
from adapterhub_tools.linalg.root_ratio import Quadratic
from adapterhub_tools.linalg.scaled import SLACK

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.delta_sum import DeltaSum
    from adapterhub_tools.linalg.expression import IntArray

CHUNK = 1 << 17
"""Elements worked on at a time."""

_VALUES = 1 << 20
"""Factor values gathered at a time."""

_GROUP = 64
"""Squares added up before the group's sum joins others: two short sums round less than a long one."""

_FEW = 64
"""More columns than this are computed all at once, in one pass over the matrix."""

_LOST = 2.0**-96
"""What the sum of up to 2^24 squares loses, relative to itself: see ``_reduced``."""


def squares_of_rows(block: Tensor) -> Tensor:
    """Returns the sums of squares of the rows of a float64 block.

    The error of a sum is at most ``roundings_of_rows`` times 2^-53 of it.
    """
    columns = int(block.shape[1])
    whole = columns - columns % _GROUP
    rest = block[:, whole:]
    total = (rest * rest).sum(dim=1)
    if whole:
        norms = torch.linalg.vector_norm(block[:, :whole].view(block.shape[0], -1, _GROUP), dim=2)
        total += norms.mul_(norms).sum(dim=1)
    return total


def roundings_of_rows(columns: int) -> int:
    """Returns how many roundings a square meets on its way into the sum, whatever the order of each sum."""
    return _GROUP + columns // _GROUP + 6


class LineSquares:
    """The sums of squares of single rows or columns of ``a = w + delta``, each computed once.

    Args:
        total: the sum w + delta.
        read_rows: (first row, count) -> w in float64, on the CPU.
        rows: the number of rows of the matrix.
        columns: the number of columns.
        by_row: True for rows, False for columns.
    """

    def __init__(
        self,
        total: DeltaSum,
        read_rows: Callable[[int, int], Tensor],
        rows: int,
        columns: int,
        *,
        by_row: bool,
    ) -> None:
        """Allocates a few values for each line."""
        self._total = total
        self._read_rows = read_rows
        self._rows = rows
        self._columns = columns
        self._by_row = by_row
        lines = rows if by_row else columns
        self._known = np.zeros(lines, dtype=np.bool_)
        self._safe = np.ones(lines, dtype=np.bool_)
        self._sums = Accumulator.start(np.zeros(lines))
        self._exact: dict[int, Quadratic] = {}

    def of(self, lines: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the sums of the given lines, and where they are reliable: not 0, no over- or underflow."""
        needed = np.unique(lines[~self._known[lines]])
        if len(needed):
            if self._by_row:
                self._add_rows(needed)
            else:
                if len(needed) > _FEW:
                    needed = np.flatnonzero(~self._known)
                self._add_columns(needed)
            self._known[needed] = True
        sums = self._sums
        size = sums.high[lines]
        fine = self._safe[lines] & (size >= 2.0**-900) & (size <= 2.0**900)
        return Accumulator(size, sums.low[lines], sums.missing[lines]), fine

    def exact(self, line: int) -> Quadratic:
        """Returns the exact sum of a line; the last few are kept."""
        if line not in self._exact:
            if len(self._exact) >= _FEW:
                self._exact.clear()
            self._exact[line] = self._exact_sum(line)
        return self._exact[line]

    def _exact_sum(self, line: int) -> Quadratic:
        found = Quadratic.of([])
        if self._by_row:
            for column, value in enumerate(self._read_rows(line, 1)[0].tolist()):
                found = found.plus(self._exact_square(line, column, value))
            return found
        for first, block in self._blocks():
            for row, value in enumerate(block[:, line].tolist(), first):
                found = found.plus(self._exact_square(row, line, value))
        return found

    def _exact_square(self, row: int, column: int, value: float) -> Quadratic:
        return Quadratic.of(self._total.exact_parts(row, column, value)).squared()

    def _blocks(self) -> Iterator[tuple[int, F64Array]]:
        size = max(1, CHUNK // max(1, self._columns))
        for first in range(0, self._rows, size):
            yield first, self._read_rows(first, min(size, self._rows - first)).numpy()

    def _add_rows(self, lines: IntArray) -> None:
        size = max(1, CHUNK // max(1, self._columns))
        columns = np.arange(self._columns)
        for at in range(0, len(lines), size):
            some = lines[at : at + size]
            start = np.concatenate([self._read_rows(int(row), 1).numpy() for row in some])
            squares, safe = self._squares(some, columns, start)
            self._sums.high[some], self._sums.low[some], self._sums.missing[some] = _reduced(squares, axis=1)
            self._safe[some] = safe.all(axis=1)

    def _add_columns(self, lines: IntArray) -> None:
        total = Accumulator.start(np.zeros(len(lines)))
        safe = np.ones(len(lines), dtype=np.bool_)
        for first, block in self._blocks():
            rows = np.arange(first, first + len(block))
            squares, fine = self._squares(rows, lines, block[:, lines])
            high, low, missing = _reduced(squares, axis=0)
            total.add(high)
            total.add(low)
            total.widen(missing)
            safe &= fine.all(axis=0)
        total.normalise()
        self._sums.high[lines], self._sums.low[lines] = total.high, total.low
        self._sums.missing[lines] = total.missing
        self._safe[lines] = safe

    def _squares(
        self, rows: IntArray, columns: IntArray, start: F64Array
    ) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the squares at every given row and column, as (rows, columns), and where they are good."""
        grid_rows, grid_columns = (part.reshape(-1) for part in np.meshgrid(rows, columns, indexing="ij"))
        flat = start.reshape(-1)
        found = Accumulator.start(np.zeros(flat.shape))
        safe = np.empty(flat.shape, dtype=np.bool_)
        size = max(1, _VALUES // self._total.inner)
        for at in range(0, len(flat), size):
            part = slice(at, at + size)
            value, fine = self._total.delta_at(grid_rows[part], grid_columns[part])
            with np.errstate(all="ignore"):
                value.add(flat[part])
                value.normalise()
                main, rest = two_product(value.high, value.high)
                found.high[part], found.low[part] = main, rest + 2 * value.high * value.low
                found.missing[part] = 2 * np.abs(value.high) * value.missing * SLACK + value.missing**2
            safe[part] = fine & in_safe_range(flat[part])
        shape = (len(rows), len(columns))
        return (
            Accumulator(found.high.reshape(shape), found.low.reshape(shape), found.missing.reshape(shape)),
            safe.reshape(shape),
        )


def _reduced(squares: Accumulator, *, axis: int) -> tuple[F64Array, F64Array, F64Array]:
    """Adds up squares along an axis, halving it: high, low and a bound on what is missing.

    At each of at most 24 levels the high parts are added without error, and what is left joins the low parts,
    which are below 24·2^-53 of the sum and so round by less than 24·25·2^-106 of it.
    """
    high, low = (np.moveaxis(part, axis, 0) for part in (squares.high, squares.low))
    missing = squares.missing.sum(axis=axis) * SLACK
    with np.errstate(all="ignore"):
        while len(high) > 1:
            half = len(high) // 2
            extra_high, extra_low = high[2 * half :], low[2 * half :]
            sums, rest = two_sum(high[:half], high[half : 2 * half])
            high = np.concatenate([sums, extra_high])
            low = np.concatenate([low[:half] + low[half : 2 * half] + rest, extra_low])
        if not len(high):
            nothing: F64Array = np.zeros(missing.shape)
            return nothing, nothing.copy(), missing
        total, rest = two_sum(high[0], low[0])
        return total, rest, missing + total * _LOST
