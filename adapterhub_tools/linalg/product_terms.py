"""Deltas that are elementwise or Kronecker products of two matrices: LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.linalg.double_double import Accumulator
from adapterhub_tools.linalg.formats import F64Array
from adapterhub_tools.linalg.products import Product, times
from adapterhub_tools.linalg.scaled import SLACK, UNDERFLOW, is_safe_scale, scaled
from adapterhub_tools.linalg.surd import Surd

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTerm:
    """A delta ``s·P[i(r), j(c)]·Q[k(r), l(c)]`` of two products, rows and columns taken by index.

    With every index the identity it is the elementwise product; with i = r // m, k = r mod m and the same
    for columns it is the Kronecker product.

    Attributes:
        first: P.
        second: Q.
        first_rows: i, one entry for each row of the delta.
        second_rows: k.
        first_columns: j, one entry for each column, or None for the identity.
        second_columns: l, likewise.
        repeated: True if the columns are those of a Kronecker product, in its order.
        scale: s, exactly.
        row: the first row of the tensor that the delta covers.
        column: the first column.
    """

    first: Product
    second: Product
    first_rows: Tensor
    second_rows: Tensor
    first_columns: Tensor | None = None
    second_columns: Tensor | None = None
    repeated: bool = False
    scale: Surd
    row: int = 0
    column: int = 0

    @property
    def row_end(self) -> int:
        """One past the last row covered."""
        return self.row + len(self.first_rows)

    @property
    def column_end(self) -> int:
        """One past the last column covered."""
        return self.column + (self.first.width if self.first_columns is None else len(self.first_columns))

    @property
    def inner(self) -> int:
        """The values of both products."""
        return self.first.inner + self.second.inner

    @property
    def roundings(self) -> int:
        """Those of the two products, their product, s (2) and s times it."""
        return self.first.roundings + self.second.roundings + 4

    def bounds(self) -> F64Array:
        """Returns for each row |s| times the bounds of both products; 0 only where every term is 0."""
        if self.scale.coefficient == 0:
            return np.zeros(len(self.first_rows))
        left = self.first.bounds()[self.first_rows.numpy()]
        right = self.second.bounds()[self.second_rows.numpy()]
        size = abs(float(self.scale)) + UNDERFLOW
        with np.errstate(all="ignore"):
            bound = left * right * size * SLACK + UNDERFLOW * (1 + left + right)
        return np.where((left != 0) & (right != 0), np.where(np.isnan(bound), np.inf, bound), 0.0)

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of the delta to a float64 block, in place; see DeltaTerm."""
        count = int(part.shape[0])
        left = self.first.rows(self.first_rows[first : first + count])
        right = self.second.rows(self.second_rows[first : first + count])
        left.mul_(float(self.scale))
        left, right = left.to(part.device), right.to(part.device)
        if self.repeated:
            grid = part.view(count, self.first.width, self.second.width)
            grid.addcmul_(left[:, :, None], right[:, None, :])
            return
        if self.first_columns is not None and self.second_columns is not None:
            left = left[:, self.first_columns.to(part.device)]
            right = right[:, self.second_columns.to(part.device)]
        part.addcmul_(left, right)

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the delta at points, and where no over- or underflow can spoil it; see DeltaTerm."""
        if not is_safe_scale(self.scale):
            return Accumulator.start(np.zeros(len(rows))), np.zeros(len(rows), dtype=np.bool_)
        left, left_fine = self.first.at_points(self.first_rows.numpy()[rows], self._first_column(columns))
        right, right_fine = self.second.at_points(
            self.second_rows.numpy()[rows], self._second_column(columns)
        )
        with np.errstate(all="ignore"):
            product = times(left, right)
            fine = left_fine & right_fine & _in_middle(left) & _in_middle(right)
            return scaled(product, self.scale), fine

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns the exact delta at a point; see DeltaTerm."""
        at = np.array([column])
        product = self.first.exact(int(self.first_rows[row]), int(self._first_column(at)[0]))
        if product != 0:
            product *= self.second.exact(int(self.second_rows[row]), int(self._second_column(at)[0]))
        return [(product * self.scale.coefficient, self.scale.radicand)]

    def _first_column(self, columns: IntArray) -> IntArray:
        found: IntArray = columns if self.first_columns is None else self.first_columns.numpy()[columns]
        return found

    def _second_column(self, columns: IntArray) -> IntArray:
        found: IntArray = columns if self.second_columns is None else self.second_columns.numpy()[columns]
        return found


def _in_middle(sums: Accumulator) -> npt.NDArray[np.bool_]:
    """Says where sums are zero or so sized that products of two of them keep all their bits."""
    size = np.abs(sums.high)
    smallest = np.where(sums.low != 0, np.abs(sums.low), size)
    fine: npt.NDArray[np.bool_] = (size == 0) | ((smallest >= 2.0**-220) & (size <= 2.0**220))
    return fine


def hadamard(first: Product, second: Product, scale: Surd, *, row: int = 0, column: int = 0) -> PairTerm:
    """Returns the delta ``s·P⊙Q``.

    Args:
        first: P.
        second: Q, of the same shape.
        scale: s.
        row: the first row of the tensor that the delta covers.
        column: the first column.
    """
    every = torch.arange(first.height)
    return PairTerm(
        first=first,
        second=second,
        first_rows=every,
        second_rows=every,
        scale=scale,
        row=row,
        column=column,
    )


def kronecker(first: Product, second: Product, scale: Surd, *, row: int = 0, column: int = 0) -> PairTerm:
    """Returns the delta ``s·P⊗Q``: row a·m + b and column c·n + d hold P[a, c]·Q[b, d].

    Args:
        first: P.
        second: Q, shape (m, n).
        scale: s.
        row: the first row of the tensor that the delta covers.
        column: the first column.
    """
    rows = torch.arange(first.height * second.height)
    columns = torch.arange(first.width * second.width)
    return PairTerm(
        first=first,
        second=second,
        first_rows=rows // second.height,
        second_rows=rows % second.height,
        first_columns=columns // second.width,
        second_columns=columns % second.width,
        repeated=True,
        scale=scale,
        row=row,
        column=column,
    )


def shifted_kronecker(
    first: Product, second: Product, shape: Sequence[int], scale: Surd, *, row: int = 0, column: int = 0
) -> PairTerm:
    """Returns the delta of a two-axis P and a three-axis Q as ``torch.kron`` aligns them: at the last axes.

    Row b·A + a and column d·(C·K) + c·K + κ of the weight hold P[a, c]·Q[b, (d, κ)], for P of shape (A, C)
    and Q of shape (B, D, K).

    Args:
        first: P.
        second: Q, its last two axes flattened.
        shape: B, D and K.
        scale: s.
        row: the first row of the tensor that the delta covers.
        column: the first column.
    """
    _, depth, kernel = shape
    rows = torch.arange(first.height * second.height)
    columns = torch.arange(first.width * depth * kernel)
    inside = columns % (first.width * kernel)
    return PairTerm(
        first=first,
        second=second,
        first_rows=rows % first.height,
        second_rows=rows // first.height,
        first_columns=inside // kernel,
        second_columns=columns // (first.width * kernel) * kernel + inside % kernel,
        scale=scale,
        row=row,
        column=column,
    )
