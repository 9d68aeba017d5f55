"""Products of stored factors: rows of them in float64, and single values without rounding error."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.double_double import Accumulator, dot, in_safe_range, two_product
from adapterhub_tools.linalg.formats import F64Array
from adapterhub_tools.linalg.scaled import SLACK, UNDERFLOW

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray

Values = tuple[Accumulator, npt.NDArray[np.bool_]]
"""Sums at points, and where no over- or underflow can spoil them."""


class Product(Protocol):
    """A matrix that a few factors give.

    Attributes:
        height: the number of rows.
        width: the number of columns.
        inner: how many values a point needs, at least 1.
        roundings: of one element relative to its bound, in units of 2^-53.
    """

    @property
    def height(self) -> int:
        """See the class."""
        ...

    @property
    def width(self) -> int:
        """See the class."""
        ...

    @property
    def inner(self) -> int:
        """See the class."""
        ...

    @property
    def roundings(self) -> int:
        """See the class."""
        ...

    def bounds(self) -> F64Array:
        """Returns for each row at least Σ|terms| at every column; 0 only where every term is 0."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of the matrix in float64, shape (len(index), width)."""
        ...

    def at_points(self, rows: IntArray, columns: IntArray) -> Values:
        """Returns the matrix at points."""
        ...

    def exact(self, row: int, column: int) -> Fraction:
        """Returns the exact value at a point."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """A matrix that is stored as it is.

    Attributes:
        values: float64 on the CPU, shape (height, width).
    """

    values: Tensor

    @property
    def height(self) -> int:
        """The number of rows."""
        return int(self.values.shape[0])

    @property
    def width(self) -> int:
        """The number of columns."""
        return int(self.values.shape[1])

    @property
    def inner(self) -> int:
        """1."""
        return 1

    @property
    def roundings(self) -> int:
        """None: the values are exact."""
        return 0

    def bounds(self) -> F64Array:
        """Returns the largest magnitude of each row."""
        if not self.values.shape[1]:
            return np.zeros(self.height)
        peaks: F64Array = self.values.abs().amax(dim=1).numpy()
        return peaks

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of the matrix; see Product."""
        return self.values[index]

    def at_points(self, rows: IntArray, columns: IntArray) -> Values:
        """Returns the values at points; see Product."""
        values = self.values.numpy()[rows, columns]
        return Accumulator.start(values), in_safe_range(values)

    def exact(self, row: int, column: int) -> Fraction:
        """Returns the value at a point; see Product."""
        return Fraction(float(self.values[row, column]))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixProduct:
    """The product of two stored matrices.

    Attributes:
        left: L, shape (height, k), float64 on the CPU.
        right: R, shape (k, width), likewise.
        exact_products: True where L and R hold at most 24 significant bits, so that a product fits binary64.
    """

    left: Tensor
    right: Tensor
    exact_products: bool

    @property
    def height(self) -> int:
        """The number of rows."""
        return int(self.left.shape[0])

    @property
    def width(self) -> int:
        """The number of columns."""
        return int(self.right.shape[1])

    @property
    def inner(self) -> int:
        """k, at least 1."""
        return max(1, int(self.left.shape[1]))

    @property
    def roundings(self) -> int:
        """Those of the products and sums, in whatever order."""
        return int(self.left.shape[1]) + 1

    def bounds(self) -> F64Array:
        """Returns for each row Σ_k |L|·max|R|; see Product."""
        right = self.right
        peaks = right.abs().amax(dim=1) if right.shape[1] else right.new_zeros(right.shape[0])
        with np.errstate(all="ignore"):
            reach = (self.left.abs() @ peaks).numpy() * SLACK + UNDERFLOW
        touched = ((self.left != 0) & (peaks != 0)).any(dim=1).numpy()
        return np.where(touched, np.where(np.isnan(reach), np.inf, reach), 0.0)

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of the product; see Product."""
        return self.left[index] @ self.right

    def at_points(self, rows: IntArray, columns: IntArray) -> Values:
        """Returns the product at points; see Product."""
        left = self.left.numpy()[rows]
        right = self.right.numpy()[:, columns].T
        with np.errstate(all="ignore"):
            return dot(left, right, exact_products=self.exact_products), in_safe_range(left, right)

    def exact(self, row: int, column: int) -> Fraction:
        """Returns the exact product at a point; see Product."""
        pairs = zip(self.left[row].tolist(), self.right[:, column].tolist(), strict=True)
        return sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class TuckerProduct:
    """The Tucker form of a convolution's weight: ``P[p, (q, κ)] = Σ_ij a[i, p]·t[i, j, κ]·b[j, q]``.

    Attributes:
        core: t, shape (i, j, kernel), float64 on the CPU.
        outer: a, shape (i, height), likewise.
        inward: b, shape (j, channels), likewise.
    """

    core: Tensor
    outer: Tensor
    inward: Tensor

    @property
    def height(self) -> int:
        """The number of rows."""
        return int(self.outer.shape[1])

    @property
    def width(self) -> int:
        """The number of columns: channels times kernel size."""
        return int(self.inward.shape[1] * self.core.shape[2])

    @property
    def inner(self) -> int:
        """I·j, at least 1."""
        return max(1, int(self.core.shape[0] * self.core.shape[1]))

    @property
    def roundings(self) -> int:
        """Those of the two sums of products."""
        return int(self.core.shape[0] + self.core.shape[1]) + 2

    def bounds(self) -> F64Array:
        """Returns for each row Σ_ij |a|·|t|·|b|, largest over the columns; see Product."""
        if not self.width:
            return np.zeros(self.height)
        peaks = self._middle(absolute=True).amax(dim=1)
        with np.errstate(all="ignore"):
            reach = (self.outer.abs().t() @ peaks).numpy() * SLACK + UNDERFLOW
        return np.where(np.isnan(reach), np.inf, reach) if bool(peaks.any()) else np.zeros(self.height)

    def _middle(self, *, absolute: bool = False) -> Tensor:
        """Returns Σ_j t[i, j, κ]·b[j, q] as (i, q·κ)."""
        core, inward = (self.core.abs(), self.inward.abs()) if absolute else (self.core, self.inward)
        first = core.transpose(1, 2) @ inward  # (i, κ, q)
        return first.transpose(1, 2).reshape(core.shape[0], -1)

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of the product; see Product."""
        return self.outer[:, index].t() @ self._middle()

    def at_points(self, rows: IntArray, columns: IntArray) -> Values:
        """Returns the product at points; see Product."""
        channels, kernel = np.divmod(columns, int(self.core.shape[2]))
        core = np.moveaxis(self.core.numpy()[:, :, kernel], 2, 0)  # (points, i, j)
        inward = self.inward.numpy()[:, channels].T
        outer = self.outer.numpy()[:, rows].T
        count = len(rows)
        with np.errstate(all="ignore"):
            main, rest = two_product(core, np.broadcast_to(inward[:, None, :], core.shape))
            left = np.repeat(outer, core.shape[2], axis=1)
            total = dot(left, main.reshape(count, -1), exact_products=False)
            if rest.any():
                more = dot(left, rest.reshape(count, -1), exact_products=False)
                total.add(more.high)
                total.add(more.low)
                total.widen(more.missing)
            return total, in_safe_range(left, core.reshape(count, -1), inward)

    def exact(self, row: int, column: int) -> Fraction:
        """Returns the exact product at a point; see Product."""
        channel, kernel = divmod(column, int(self.core.shape[2]))
        inward = [Fraction(b) for b in self.inward[:, channel].tolist()]
        total = Fraction(0)
        for a, line in zip(self.outer[:, row].tolist(), self.core[:, :, kernel].tolist(), strict=True):
            total += Fraction(a) * sum(
                (Fraction(t) * b for t, b in zip(line, inward, strict=True)), Fraction(0)
            )
        return total


def times(first: Accumulator, second: Accumulator) -> Accumulator:
    """Returns the products of error-free sums, with what is missing from either carried along."""
    with np.errstate(all="ignore"):
        first.normalise()
        second.normalise()
        total = Accumulator.start(np.zeros_like(first.high))
        for left, right in (
            (first.high, second.high),
            (first.high, second.low),
            (first.low, second.high),
            (first.low, second.low),
        ):
            main, rest = two_product(left, right)
            total.add(main)
            total.add(rest)
        total.widen(_bound(first.missing, np.abs(second.high) + np.abs(second.low) + second.missing))
        total.widen(_bound(second.missing, np.abs(first.high) + np.abs(first.low)))
    return total


def _bound(error: F64Array, size: F64Array) -> F64Array:
    """Returns an upper bound of the products (neither negative), 0 only where one is 0."""
    return np.where((error != 0) & (size != 0), error * size * SLACK + 2.0**-1070, 0.0)


def product_of(first: Tensor, second: Tensor, core: Tensor | None = None) -> MatrixProduct | TuckerProduct:
    """Returns the product of stored factors, in float64.

    Args:
        first: (height, rank), or (rank, height) of the Tucker form.
        second: (rank, width), or (rank, channels) of the Tucker form.
        core: (rank, rank, kernel…) of the Tucker form.
    """
    if core is not None:
        return TuckerProduct(
            core=core.double().flatten(2).contiguous(),
            outer=first.double().contiguous(),
            inward=second.double().contiguous(),
        )
    return MatrixProduct(
        left=first.double().contiguous(),
        right=second.double().contiguous(),
        exact_products=max(first.element_size(), second.element_size()) <= 4,
    )
