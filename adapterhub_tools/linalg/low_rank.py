"""A delta ``s·L·R``: added to blocks in float64, and known exactly at single points."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.double_double import Accumulator, dot, in_safe_range
from adapterhub_tools.linalg.formats import F64Array
from adapterhub_tools.linalg.scaled import SLACK, UNDERFLOW, is_safe_scale, scaled
from adapterhub_tools.linalg.surd import Surd

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankTerm:
    """One product ``s·L·R`` and where it lies in the tensor.

    Attributes:
        left: L, shape (rows, k), float64 on the CPU.
        right: R, shape (k, columns), float64, contiguous, on the CPU.
        scale: s, exactly.
        exact_products: True where L and R hold at most 24 significant bits, so that a product fits binary64.
        row: the first row of the tensor that the product covers.
        column: the first column.
    """

    left: Tensor
    right: Tensor
    scale: Surd
    exact_products: bool
    row: int = 0
    column: int = 0

    @property
    def row_end(self) -> int:
        """One past the last row covered."""
        return self.row + int(self.left.shape[0])

    @property
    def column_end(self) -> int:
        """One past the last column covered."""
        return self.column + int(self.right.shape[1])

    @property
    def inner(self) -> int:
        """k, at least 1."""
        return max(1, int(self.left.shape[1]))

    @property
    def roundings(self) -> int:
        """Those of s (2), s·L (1), the products and sums (k + 1), in whatever order."""
        return int(self.left.shape[1]) + 4

    def bounds(self) -> F64Array:
        """Returns for each row at least |s|·Σ_k |L|·|R| at every column; 0 only where every product is 0.

        The smaller of two bounds: each |R| replaced by the largest of its row, and Cauchy and Schwarz's.
        """
        if self.scale.coefficient == 0:
            return np.zeros(int(self.left.shape[0]))
        right = self.right
        peaks = right.abs().amax(dim=1) if right.shape[1] else right.new_zeros(right.shape[0])
        # A matrix-vector product: no copy of the left factor beyond its absolute value. What may underflow
        # (s, s·L, a product) is off by an absolute amount, which the second half covers.
        reach = (self.left.abs() @ peaks).numpy()
        with np.errstate(all="ignore"):
            if self.left.numel() and right.numel():
                # fmin: an unknown length times zero is NaN, which leaves the first bound.
                reach = np.fmin(reach, _row_lengths(self.left) * float(_row_lengths(right.T).max()))
            bound = reach * (abs(float(self.scale)) + UNDERFLOW)
            bound += UNDERFLOW * (float(peaks.sum()) + peaks.shape[0])
            bound = np.where(np.isnan(bound), np.inf, bound * SLACK)
        touched = (self.left != 0).any(dim=1).numpy() & bool(peaks.any())
        return np.where(touched, bound, 0.0)

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of the product to a float64 block, in place; see DeltaTerm."""
        left = self.left[first : first + part.shape[0]] * float(self.scale)
        if part.is_cpu:
            part.addmm_(left, self.right)
        else:
            part.addmm_(left.to(part.device), self.right.to(part.device))

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the product at points, and where no over- or underflow can spoil it; see DeltaTerm."""
        if not is_safe_scale(self.scale):
            return Accumulator.start(np.zeros(len(rows))), np.zeros(len(rows), dtype=np.bool_)
        left = self.left.numpy()[rows]
        right = self.right.numpy()[:, columns].T
        with np.errstate(all="ignore"):
            product = dot(left, right, exact_products=self.exact_products)
            return scaled(product, self.scale), in_safe_range(left, right)

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns the exact product at a point; see DeltaTerm."""
        left, right = self.left[row].tolist(), self.right[:, column].tolist()
        product = sum((Fraction(a) * Fraction(b) for a, b in zip(left, right, strict=True)), Fraction(0))
        return [(product * self.scale.coefficient, self.scale.radicand)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointProduct:
    """A product as it is evaluated at single points: what a point needs of each factor lies together.

    Attributes:
        left: L, shape (rows, k), float64.
        right: the transpose of R, shape (columns, k), float64, contiguous.
        scale: s, rounded.
    """

    left: F64Array
    right: F64Array
    scale: float

    @classmethod
    def of(cls, term: LowRankTerm) -> PointProduct:
        """Copies the right factor of a term."""
        return cls(
            left=term.left.numpy(),
            right=np.ascontiguousarray(term.right.numpy().T),
            scale=float(term.scale),
        )

    def at(self, rows: IntArray, columns: IntArray) -> F64Array:
        """Returns the product at points in binary64, within the term's ``roundings`` of its bound.

        Args:
            rows: the points' rows of L.
            columns: their columns of R.
        """
        left, right = self.left.take(rows, axis=0), self.right.take(columns, axis=0)
        values: F64Array = np.einsum("pk,pk->p", left, right)
        values *= self.scale
        return values


def _row_lengths(matrix: Tensor) -> F64Array:
    """Returns the Euclidean norms of the rows, infinite where squares might underflow."""
    largest = float(matrix.abs().max())
    if largest == 0.0:
        return np.zeros(int(matrix.shape[0]))
    squares: F64Array = (matrix / largest).square().sum(dim=1).numpy()
    with np.errstate(all="ignore"):
        lengths = np.sqrt(squares) * largest
    return np.where((squares > 2.0**-400) & (lengths > 2.0**-900), lengths, np.inf)
