"""Large matrices as blocks of float64 rows: a stored weight, what an adapter makes of it, and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import matrix_shape, memory_of, torch_dtype
from adapterhub_tools.errors import FormatError
from adapterhub_tools.linalg.randomized_svd import DenseRows, RowBlocks

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.model.plan import ByteRange
    from adapterhub_tools.model.protocols import OpenSource

BLOCK_ELEMENTS = 1 << 19
"""Values of a block: 4 MiB in float64, which stays in the cache of a core while it is used."""
HELD_BYTES = 192 << 20
"""Differences are computed once and held, not once for every pass, as far as all threads share so much."""


class StoredRows:
    """A stored tensor as a matrix of its first axis by all others; RowBlocks of linalg/randomized_svd.py.

    Args:
        source: the open file.
        item: where the tensor is.
        advance: told the bytes read.
        rows: how many rows of it count; all if not given.
    """

    def __init__(
        self,
        source: OpenSource,
        item: ByteRange,
        *,
        advance: Callable[[int], None] | None = None,
        rows: int | None = None,
    ) -> None:
        """Checks the dtype."""
        self._source, self._item, self._advance = source, item, advance
        all_rows, columns = matrix_shape(item.spec.shape)
        self._dtype = torch_dtype(item.spec.dtype)
        self.shape: tuple[int, int] = (all_rows if rows is None else rows, columns)

    @property
    def nbytes(self) -> int:
        """The bytes of one pass over the rows."""
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """Returns rows in float64, shape (count, columns).

        Raises:
            FormatError: a value is NaN or infinite.
            StoreError: the file cannot be read.
        """
        columns = self.shape[1]
        size = columns * self._dtype.itemsize
        raw = torch.empty(count * size, dtype=torch.uint8)
        if raw.numel():
            self._source.read_into(memory_of(raw), self._item.offset + first * size)
        block = raw.view(self._dtype).view(count, columns).double()
        # A sum is finite if all values are, for anything short of 10^300.
        if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
            raise non_finite(block, first, self._source.name, self._item.spec.name)
        if self._advance is not None:
            self._advance(raw.numel())
        return block

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows in order; see RowBlocks."""
        for first, count in _pieces(self.shape):
            yield first, self.read(first, count)


class Effect:
    """What an adapter changes in a weight: x − w in float64, with x by its formula.

    Args:
        weight: w.
        expression: x as a function of w, see engine/formula.py.
    """

    def __init__(self, weight: StoredRows, expression: Expression) -> None:
        """Keeps both."""
        self._weight, self._expression = weight, expression
        self.shape: tuple[int, int] = weight.shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows in order; see RowBlocks."""
        for first, block in self._weight.blocks():
            changed = block.clone()
            self._expression.evaluate(changed, first)
            yield first, changed.sub_(block)


class Difference:
    """The difference of two matrices, tuned − base.

    Args:
        tuned: the one.
        base: the other, with as many columns; further rows of ``tuned`` do not count.
    """

    def __init__(self, tuned: StoredRows, base: StoredRows) -> None:
        """Keeps both."""
        self._tuned, self._base = tuned, base
        self.shape: tuple[int, int] = base.shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows in order; see RowBlocks."""
        for first, count in _pieces(self.shape):
            yield first, self._tuned.read(first, count).sub_(self._base.read(first, count))


def held(source: RowBlocks, threads: int) -> RowBlocks:
    """Returns the same rows in the same blocks, in memory where a thread's share of HELD_BYTES holds them."""
    rows, columns = source.shape
    if rows * columns * 8 > HELD_BYTES // threads:
        return source
    whole = torch.empty(rows, columns, dtype=torch.float64)
    for first, block in source.blocks():
        whole[first : first + block.shape[0]] = block
    return DenseRows(matrix=whole, rows_per_block=max(1, BLOCK_ELEMENTS // max(1, columns)))


def _pieces(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    rows, columns = shape
    size = max(1, BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, rows, size):
        yield first, min(size, rows - first)


def non_finite(block: Tensor, first: int, file: str, name: str) -> FormatError:
    """Returns the error for the first value of some rows that is NaN or infinite.

    Args:
        block: the rows, of which one value is not finite.
        first: the row that the first of them is.
        file: the file that they are from.
        name: the tensor.
    """
    row, column = (int(i) for i in torch.nonzero(~torch.isfinite(block))[0])
    return FormatError.of(
        "non-finite",
        f"the value at row {first + row}, column {column} is {float(block[row, column])}; expected finite "
        "values.",
        file=file,
        loc=name,
        remedy="The file is damaged or was saved from a diverged run: get it again.",
    )
