"""The weight that a method changes, as far as a method may know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TRANSPOSED = ("conv1d", "embedding")
"""Kinds whose weight is stored as (in, out), so that a delta of shape (out, in) is added transposed."""


def _unreadable(first: int, count: int) -> Tensor:
    raise ValueError(f"rows {first} to {first + count} were asked of a weight that was not given")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A base weight during a merge, seen as a matrix of its first axis by all others; a vector is a column.

    Attributes:
        kind: the module's kind, see model/adapter.py; ``"vector"`` for a norm's weight, ``"bias"``
            for a module's bias.
        shape: as stored.
        read_rows: (first row, count) -> the stored values in float64, shape (count, columns), on the CPU, in
            memory that the caller may change. For methods that need the whole weight before they can change
            any of it.
        row: the first row of the part that the module is (fused projections); 0 for the whole.
        column: the first column of it.
    """

    kind: str
    shape: tuple[int, ...]
    read_rows: Callable[[int, int], Tensor] = _unreadable
    row: int = 0
    column: int = 0

    @property
    def rows(self) -> int:
        """The rows of the matrix."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """The columns of the matrix."""
        return prod(self.shape[1:])

    @property
    def transposed(self) -> bool:
        """True if the weight is stored as (in, out)."""
        return self.kind in TRANSPOSED
