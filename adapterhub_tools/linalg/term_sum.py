"""Several deltas of one module as one: a product and single values, for example."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adapterhub_tools.linalg.double_double import Accumulator

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import DeltaTerm, IntArray
    from adapterhub_tools.linalg.formats import F64Array


class TermSum:
    """The sum of deltas that cover the same rows and columns; a DeltaTerm.

    Args:
        terms: at least one.
    """

    def __init__(self, terms: Sequence[DeltaTerm]) -> None:
        """Keeps the terms."""
        self._terms = tuple(terms)
        first = self._terms[0]
        self.row: int = first.row
        self.row_end: int = first.row_end
        self.column: int = first.column
        self.column_end: int = first.column_end

    @property
    def inner(self) -> int:
        """How many values a point needs: those of all terms."""
        return sum(term.inner for term in self._terms)

    @property
    def roundings(self) -> int:
        """Those of all terms, and of adding them."""
        return sum(term.roundings for term in self._terms) + len(self._terms)

    def bounds(self) -> F64Array:
        """Returns the sum of the terms' bounds; see DeltaTerm."""
        return np.asarray(sum(term.bounds() for term in self._terms), dtype=np.float64)

    def add_to(self, part: Tensor, first: int) -> None:
        """Adds rows of every term to a float64 block, in place; see DeltaTerm."""
        for term in self._terms:
            term.add_to(part, first)

    def at_points(self, rows: IntArray, columns: IntArray) -> tuple[Accumulator, npt.NDArray[np.bool_]]:
        """Returns the sum at points, and where it is reliable; see DeltaTerm."""
        total, safe = self._terms[0].at_points(rows, columns)
        for term in self._terms[1:]:
            own, fine = term.at_points(rows, columns)
            safe = safe & fine
            with np.errstate(all="ignore"):
                total.add(own.high)
                total.add(own.low)
                total.widen(own.missing)
        return total, safe

    def exact_parts(self, row: int, column: int) -> list[tuple[Fraction, int]]:
        """Returns the exact sum at a point; see DeltaTerm."""
        return [part for term in self._terms for part in term.exact_parts(row, column)]
