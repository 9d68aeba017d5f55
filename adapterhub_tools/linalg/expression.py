"""What the engine asks of the formula of a merged tensor."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.double_double import Accumulator
from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]


class Expression(Protocol):
    """The value x of every element of a matrix, as a function of its start value w.

    Attributes:
        exact: True if ``exact_bits`` rounds the exact x; False if x is whatever ``evaluate`` gives in
            float64.
        identity: True if x = w everywhere (a cast).
        bounds: M, one for each row: |computed − x| <= unit · (|computed| + 2·M); 0 only where x = w. An
            expression may learn M of a row from w itself: the array then holds it once the row was evaluated,
            and infinity before.
        unit: see ``bounds``; 0 where a computed value counts as x.
        inner: how many values ``exact_bits`` gathers for a point; at least 1.
    """

    @property
    def exact(self) -> bool:
        """See the class."""
        ...

    @property
    def identity(self) -> bool:
        """See the class."""
        ...

    @property
    def bounds(self) -> F64Array:
        """See the class."""
        ...

    @property
    def unit(self) -> float:
        """See the class."""
        ...

    @property
    def inner(self) -> int:
        """See the class."""
        ...

    def evaluate(self, block: Tensor, row: int) -> None:
        """Turns w into x in place.

        Args:
            block: float64, shape (n, columns), on any device; its first row is row ``row`` of the matrix.
            row: see above.
        """
        ...

    def exact_bits(
        self, rows: IntArray, columns: IntArray, start: F64Array, computed: F64Array, to: FloatFormat
    ) -> AnyArray:
        """Returns the bits of x, correctly rounded, at single points.

        Args:
            rows: row of each point.
            columns: column of each point.
            start: w at each point, finite.
            computed: what ``evaluate`` gave there; w itself where the output is float64.
            to: the format.
        """
        ...


class DeltaTerm(Protocol):
    """A delta that does not depend on w, over some rows and columns of a matrix.

    Attributes:
        row: the first row that it covers.
        row_end: one past the last.
        column: the first column.
        column_end: one past the last.
        roundings: of one element relative to its bound, in units of 2^-53.
        inner: how many values a point needs.
    """

    @property
    def row(self) -> int:
        """See the class."""
        ...

    @property
    def row_end(self) -> int:
        """See the class."""
        ...

    @property
    def column(self) -> int:
        """See the class."""
        ...

    @property
    def column_end(self) -> int:
        """See the class."""
        ...

    @property
    def roundings(self) -> int:
        """See the class."""
        ...

    @property
    def inner(self) -> int:
        """See the class."""
        ...

    def bounds(self) -> F64Array:
        """Returns for each covered row at least Σ|terms| at every column; 0 only where the delta is 0."""
        ...

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of the delta to a float64 block, in place.

        Args:
            part: shape (n, column_end − column).
            first: which covered row, counted from ``row``, is the block's first.
        """
        ...

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the delta at points, counted from ``row`` and ``column``, and where that is reliable."""
        ...

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns the exact delta at a point as Σ c·√d: pairs (c, square-free d)."""
        ...
