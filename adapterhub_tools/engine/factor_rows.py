"""A factor too large to hold: its rows, read when they are needed, always into the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.row_blocks import non_finite

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import ByteRange
    from adapterhub_tools.model.protocols import OpenSource


class FactorRows:
    """A stored factor as a matrix of its first axis by all others.

    Args:
        source: the open file.
        item: where the factor is.
    """

    def __init__(self, source: OpenSource, item: ByteRange) -> None:
        """Reads nothing yet."""
        self._source, self._item = source, item
        self._dtype = torch_dtype(item.spec.dtype)
        self.shape: tuple[int, int] = matrix_shape(item.spec.shape)
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._wide = torch.empty(0, dtype=torch.float64)

    def read(self, first: int, count: int) -> Tensor:
        """Returns rows in float64, shape (count, columns), in memory that the next call overwrites.

        Raises:
            FormatError: a value is NaN or infinite.
            StoreError: the file cannot be read.
        """
        columns = self.shape[1]
        size = columns * self._dtype.itemsize
        if self._raw.numel() < count * size:
            self._raw = torch.empty(count * size, dtype=torch.uint8)
            self._wide = torch.empty(count * columns, dtype=torch.float64)
        raw = self._raw[: count * size]
        if raw.numel():
            self._source.read_into(memory_of(raw), self._item.offset + first * size)
        block = self._wide[: count * columns].view(count, columns)
        block.copy_(raw.view(self._dtype).view(count, columns))
        # A sum is finite if all values are, for anything short of 10^300.
        if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
            raise non_finite(block, first, self._source.name, self._item.spec.name)
        return block
