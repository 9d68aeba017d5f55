"""Deltas in panels: blocks of rows on a fixed grid, so that a value is computed in one way only.

The last bits of a matrix product depend on how many rows are multiplied at a time. What is compared with a
threshold, or averaged where signs agree, must not: so every user of a delta takes it in the same panels,
whose height is decided by the number of columns alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.low_rank import LowRankTerm

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import DeltaTerm, Expression

PANEL_ELEMENTS = 1 << 18
"""Values of a panel: 2 MiB in float64."""

_WHOLE_ROWS = 256
"""Rows computed for a sample where single values cannot be."""


def rows_of_panel(columns: int) -> int:
    """Returns the number of rows of a panel of a matrix with so many columns."""
    return max(1, PANEL_ELEMENTS // max(1, columns))


def panel_range(number: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns (first row, one past the last) of a panel."""
    height = rows_of_panel(shape[1])
    return number * height, min(shape[0], (number + 1) * height)


def panels_of(shape: tuple[int, int]) -> int:
    """Returns how many panels a matrix has."""
    return -(-shape[0] // rows_of_panel(shape[1]))


class Panels(Protocol):
    """A matrix of float64 values that is computed panel by panel, any number of times, in any order."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def panel(self, number: int) -> Tensor:
        """Returns a panel, float64 on the CPU; the caller may overwrite it, and the next call does.

        Args:
            number: counted from 0, see ``panel_range``.
        """
        ...

    def points(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns a sample of values: in each group, those where its rows and its columns cross.

        Their last bits may differ from those of the panels.

        Shapes: (groups, m) and (groups, n) give (groups, at most m, n); rows that are left out are the last.

        Args:
            rows: row indices.
            columns: column indices.
        """
        ...

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, panel) in order; RowBlocks of linalg/randomized_svd.py."""
        ...


class _Blocks(ABC):
    """A matrix in panels whose rows, any of them, are computed into a buffer."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape: tuple[int, int] = shape
        self._buffer: Tensor | None = None

    @abstractmethod
    def _fill(self, block: Tensor, first: int) -> None:
        """Computes as many rows as the block has, from row ``first``."""

    def panel(self, number: int) -> Tensor:
        """Returns a panel; see Panels."""
        if self._buffer is None:
            self._buffer = torch.empty(rows_of_panel(self.shape[1]), self.shape[1], dtype=torch.float64)
        first, last = panel_range(number, self.shape)
        block = self._buffer[: last - first]
        self._fill(block, first)
        return block

    def points(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns values for a sample; see Panels."""
        return _by_rows(self._fill, rows, columns, self.shape[1])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, panel) in order; see Panels."""
        for number in range(panels_of(self.shape)):
            yield panel_range(number, self.shape)[0], self.panel(number)


class TermPanels(_Blocks):
    """A sum of deltas that do not depend on the weight.

    Args:
        terms: the deltas.
        shape: (rows, columns) of the weight.
    """

    def __init__(self, terms: Sequence[DeltaTerm], shape: tuple[int, int]) -> None:
        """Drops terms that are zero."""
        super().__init__(shape)
        self._sum = DeltaSum(terms, shape[0])
        only = self._sum.terms[0] if len(self._sum.terms) == 1 else None
        self._product: LowRankTerm | None = None
        if isinstance(only, LowRankTerm) and (only.row, only.column) == (0, 0):
            self._product = only if (only.row_end, only.column_end) == shape else None

    def points(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns values for a sample; see Panels."""
        if self._product is not None:
            left = self._product.left[rows] * float(self._product.scale)
            return torch.bmm(left, self._product.right[:, columns].transpose(0, 1))
        return super().points(rows, columns)

    def _fill(self, block: Tensor, first: int) -> None:
        if self._product is not None:
            left = self._product.left[first : first + block.shape[0]] * float(self._product.scale)
            torch.mm(left, self._product.right, out=block)
            return
        block.zero_()
        self._sum.evaluate(block, first)


class ExpressionPanels(_Blocks):
    """What a method changes in a weight, f(W) − W.

    Args:
        expression: x as a function of w.
        read_rows: (first row, count) -> w in float64, shape (count, columns), in memory of its own.
        shape: (rows, columns) of the weight.
        weight: a factor on the change.
    """

    def __init__(
        self,
        expression: Expression,
        read_rows: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        weight: float = 1.0,
    ) -> None:
        """Keeps them."""
        super().__init__(shape)
        self._expression, self._read, self._weight = expression, read_rows, weight

    def _fill(self, block: Tensor, first: int) -> None:
        weight = self._read(first, int(block.shape[0]))
        block.copy_(weight)
        self._expression.evaluate(block, first)
        block.sub_(weight)
        if self._weight != 1.0:
            block.mul_(self._weight)


def _by_rows(fill: Callable[[Tensor, int], None], rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Computes whole rows, of each group as many as make _WHOLE_ROWS together, and keeps some columns."""
    kept = min(int(rows.shape[1]), max(1, _WHOLE_ROWS // len(rows)))
    found = torch.empty(len(rows), kept, int(columns.shape[1]), dtype=torch.float64)
    row = torch.empty(1, width, dtype=torch.float64)
    for group in range(len(rows)):
        for place in range(kept):
            fill(row, int(rows[group, place]))
            found[group, place] = row[0, columns[group]]
    return found
