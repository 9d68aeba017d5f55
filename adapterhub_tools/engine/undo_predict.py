"""Predicts the bits of a base tensor from the merged one, the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import torch_dtype
from adapterhub_tools.errors import FormatError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.line_gains import GAIN_BITS
from adapterhub_tools.linalg.rounding import BLOCK_ELEMENTS, BlockRounder

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.formats import AnyArray, F64Array
    from adapterhub_tools.linalg.line_gains import LineInverse


class Predictor:
    """Predicts the bits of a base tensor from rows of the merged one.

    Args:
        expression: what takes a merged value back.
        columns: the number of columns.
        merged: the dtype of the merged tensor.
        base: that of the base tensor.
        device: where products are evaluated.
    """

    def __init__(
        self, expression: Expression, *, columns: int, merged: str, base: str, device: str = "cpu"
    ) -> None:
        """Makes the rounder, with its buffers."""
        self._rounder = BlockRounder(
            expression,
            columns=columns,
            start=FORMATS[merged],
            to=FORMATS[base],
            device=device,
            keep_non_finite=True,
        )
        self._dtype = torch_dtype(base)
        self._out = torch.empty(0, dtype=self._dtype)
        self._bits = FORMATS[base].numpy_bits
        self._same = expression.identity and merged == base
        self._may_be_infinite = expression.identity

    def bits(self, rows: Tensor, first: int) -> AnyArray:
        """Returns the predicted bits, flat, valid until the next call.

        A merged value that is not finite predicts 0, and so does a whole chunk in which a prediction
        overflows: whether one does is decided exactly, so it is the same everywhere.

        Args:
            rows: merged values, shape (n, columns).
            first: the row of the matrix that their first row is.
        """
        if self._same:
            return as_bits(rows.clone(), self._bits)
        if self._may_be_infinite and not bool(torch.isfinite(rows).all()):
            rows = torch.where(torch.isfinite(rows), rows, torch.zeros((), dtype=rows.dtype))
        if self._out.numel() < rows.numel():
            self._out = torch.empty(rows.numel(), dtype=self._dtype)
        out = self._out[: rows.numel()].view(rows.shape)
        if self._rounder.round_rows(rows, out, first) is not None:
            out.zero_()
        return as_bits(out, self._bits)


class ScaledPredictor:
    """Predicts the bits of a base tensor from rows of the merged one, times a gain for each row or column.

    Args:
        inverse: whose the gains are, and the delta.
        rows: the number of rows.
        columns: the number of columns.
        base: the dtype of the base tensor; neither that nor the merged one may be float64.
        device: where products are evaluated.
    """

    def __init__(
        self, inverse: LineInverse, *, rows: int, columns: int, base: str, device: str = "cpu"
    ) -> None:
        """Makes the rounder, with its buffers."""
        self.by_row: bool = inverse.by_row
        # The product of a merged value and a gain is exact in binary64, so the sum starts from it.
        self._rounder = BlockRounder(
            DeltaSum(() if inverse.delta is None else (inverse.delta,), rows),
            columns=columns,
            start=FORMATS["F64"],
            to=FORMATS[base],
            device=device,
            keep_non_finite=True,
        )
        self._rows = max(1, BLOCK_ELEMENTS // max(1, columns))
        self._wide = torch.empty(self._rows, columns, dtype=torch.float64)
        self._dtype = torch_dtype(base)
        self._out = torch.empty(0, dtype=self._dtype)
        self._bits = FORMATS[base].numpy_bits

    def bits(self, rows: Tensor, first: int, gains: F64Array) -> AnyArray:
        """Returns the predicted bits, flat, valid until the next call.

        A whole chunk in which a prediction overflows predicts 0: that is decided exactly, and so the same
        everywhere.

        Args:
            rows: merged values, shape (n, columns).
            first: the row of the matrix that their first row is.
            gains: of these rows; of all columns.
        """
        if self._out.numel() < rows.numel():
            self._out = torch.empty(rows.numel(), dtype=self._dtype)
        out = self._out[: rows.numel()].view(rows.shape)
        scale = torch.from_numpy(gains)
        for begin in range(0, int(rows.shape[0]), self._rows):
            part = rows[begin : begin + self._rows]
            count = int(part.shape[0])
            wide = self._wide[:count]
            wide.copy_(part)
            wide.mul_(scale[begin : begin + count, None] if self.by_row else scale[None, :])
            if not bool(torch.isfinite(wide).all()):
                wide.nan_to_num_(0.0, 0.0, 0.0)
            if self._rounder.round_rows(wide, out[begin : begin + count], first + begin) is not None:
                out.zero_()
                break
        return as_bits(out, self._bits)


def gains_dtype(base: str) -> str:
    """Returns the numpy dtype in which the gains for a base tensor are kept."""
    return "<f4" if GAIN_BITS[base] == 24 else "<f8"


def pack_gains(gains: F64Array, base: str) -> tuple[F64Array, bytes]:
    """Returns gains as they will be read again, and their bytes.

    Args:
        gains: as LineInverse describes them.
        base: the dtype of the base tensor.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        held = gains.astype(gains_dtype(base))
    return held.astype(np.float64), held.tobytes()


def unpack_gains(data: bytes, base: str, lines: int, name: str) -> F64Array:
    """Reads what ``pack_gains`` gave.

    Raises:
        FormatError: they are not as many as there are lines, or not finite.
    """
    import numpy as np

    kind = np.dtype(gains_dtype(base))
    if len(data) != lines * kind.itemsize or not np.isfinite(held := np.frombuffer(data, kind)).all():
        raise FormatError.of(
            "undo-file",
            f"it does not hold {lines} finite gains.",
            file="merge.undo",
            loc=name,
            remedy="The file is damaged: get it again.",
        )
    return held.astype(np.float64)


def as_bits(values: Tensor, numpy_bits: str) -> AnyArray:
    """Returns the bits of a CPU tensor, flat, as a numpy view of the same memory."""
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits: AnyArray = values.view(signed).numpy().view(numpy_bits).reshape(-1)
    return bits


def plane_type(size: int) -> str:
    """Returns the element type whose byte planes are compressed: two bytes where they come out even."""
    return "u1" if size % 2 else "u2"
