"""Blocks of ``w + Σ s·L·R`` rounded to 16 bits from binary32, with the points that it leaves open.

An interval [y − e, y + e] holds the exact value x, and rounding is monotone: where both ends round to the
same value of the format, so does x. (A boundary between two values of bfloat16 or float16 is a binary32
number; if an end, rounded to binary32, falls on one, the other end lies on the far side of it, since e is
at least half a unit of binary32 more than the error of y.) The others are evaluated in binary64 one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.flagged import flagged
from adapterhub_tools.linalg.formats import FloatFormat
from adapterhub_tools.linalg.point_rounder import PointRounder
from adapterhub_tools.linalg.single_back import BackPass, WayBack, bits16

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression, IntArray
    from adapterhub_tools.linalg.single import SingleSum

_OPEN_SHARE = 1 / 64
"""Above this share of open points the passes in binary64 cost less."""


class SingleBlock:
    """Rounds blocks of one sum of products.

    Attributes:
        points: decides what is left open.
        way_back: of the rows that were rounded last, where ``back`` is set and binary32 served.

    Args:
        expression: the sum.
        single: the same in binary32.
        rows: the most rows of a block.
        columns: the number of columns.
        to: the format of the result, of 16 bits.
        back: True where the way back is wanted too; w is in the same format then.
    """

    def __init__(
        self,
        expression: DeltaSum,
        single: SingleSum,
        rows: int,
        columns: int,
        to: FloatFormat,
        *,
        back: bool = False,
    ) -> None:
        """Allocates two buffers of a block in binary32."""
        self.way_back: WayBack | None = None
        self._back = BackPass(rows, columns, to) if back else None
        self.points: PointRounder = PointRounder(expression, to)
        self._single, self._to = single, to
        self._rows = rows
        self._dtype: torch.dtype = getattr(torch, to.torch_name)
        self._start = torch.empty((rows, columns), dtype=torch.float32)
        self._sum = torch.empty((rows, columns), dtype=torch.float32)
        self._upper = torch.empty((rows, columns), dtype=self._dtype)
        self._differ: npt.NDArray[np.bool_] = np.empty((0, columns), dtype=np.bool_)
        self._worth = True

    def round(self, start: Tensor, out: Tensor, row: int) -> IntArray | None:
        """Rounds some rows.

        Args:
            start: w, at most 24 significant bits, on the CPU.
            out: the result, same shape, in the format.
            row: the row of the matrix that the first row is.

        Returns:
            The places that are still open, counted along the rows; their values in ``out`` mean nothing. None
            where binary32 does not serve: too many open points, or values too large for it.
        """
        count = int(start.shape[0])
        self.way_back = None
        if not self._worth or (errors := self._single.interval(row, count, _peak(start), self._to)) is None:
            return None
        if self._differ.shape[0] < count:
            self._differ = np.empty(start.shape, dtype=np.bool_)
        ends = torch.from_numpy(np.nextafter(errors.astype(np.float32), np.float32(np.inf)))[:, None]
        back = self._back if self._back is not None and self._back.worth else None
        single, total, upper = self._start, self._sum, self._upper
        # Few and long calls: each gives the interpreter's lock back, and the threads meet at it.
        for first in range(0, count, self._rows):
            last = min(first + self._rows, count)
            if last - first < self._rows:
                single, total, upper = (held[: last - first] for held in (single, total, upper))
            error, lower = ends[first:last], out[first:last]
            single.copy_(start[first:last])
            self._single.delta(total, row + first)
            total.add_(single)
            torch.sub(total, error, out=single)
            lower.copy_(single)
            torch.add(total, error, out=single)
            upper.copy_(single)
            differ = self._differ[first:last]
            np.not_equal(bits16(lower), bits16(upper), out=differ)
            if back is not None:
                back.block(start[first:last], total, lower, differ, first * start.shape[1])
        index = flagged(self._differ[:count].reshape(-1))
        self._worth = len(index) <= start.numel() * _OPEN_SHARE
        return index

    def find_way_back(self, start: Tensor, out: Tensor, row: int, ties: IntArray) -> None:
        """Finds the way back of rows that were rounded, if it is wanted.

        Args:
            start: w.
            out: the result, decided but for ``ties``.
            row: the row of the matrix that the first row is.
            ties: the places that are still open, counted along the rows.
        """
        if self._back is not None and self._back.worth:
            error = self._single.product_error(row, int(start.shape[0]))
            self.way_back = self._back.finish(start, out, error, ties)


def _peak(start: Tensor) -> float:
    """Returns the largest magnitude of a block, NaN or infinity where one is not finite."""
    if start.dtype == torch.float32:
        low, high = torch.aminmax(start)
        return max(-float(low), float(high))
    # The bits of 16-bit floats grow with the magnitude; as signed numbers the positive ones are largest,
    # as unsigned ones the negative ones.
    bits = bits16(start)
    largest = max(int(bits.view(np.int16).max()), int(bits.max()) & 0x7FFF)
    return float(torch.tensor([largest], dtype=torch.int16).view(start.dtype).float())


def single_block(
    expression: Expression,
    rows: int,
    columns: int,
    *,
    start: FloatFormat,
    to: FloatFormat,
    device: str,
    back: bool = False,
) -> SingleBlock | None:
    """Returns what rounds blocks from binary32, or None where that cannot serve.

    Args:
        expression: the exact value of every element.
        rows: the most rows of a block.
        columns: the number of columns.
        start: the format of w.
        to: the format of the result.
        device: where blocks are evaluated.
        back: True where the way back is wanted too; there is one where both formats are the same.
    """
    if not isinstance(expression, DeltaSum) or to.bits != 16 or start.name == "F64" or device != "cpu":
        return None
    single = expression.single
    if single is None:
        return None
    back &= start.name == to.name
    # Twice as large with the way back: it makes many short calls.
    return SingleBlock(expression, single, 2 * rows if back else rows, columns, to, back=back)
