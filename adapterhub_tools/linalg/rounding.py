"""Correctly rounded blocks: evaluate in float64, find what that cannot decide, decide those points exactly.

Rounding to a format d is monotone, so a binary64 result y with |y − x| <= E rounds like the exact x unless
a boundary of d lies within E of y. For bfloat16 and float16 the boundaries are binary32 numbers: if the
binary32 nearest to y is not one of them, y is at least half a binary32 unit away from every one, which is
far more than E unless y is small against the terms that cancelled in it. So two integer scans find every
suspect: the pattern of a tie in the low bits, and a magnitude below a threshold. For float32, y − E and
y + E are rounded and compared. Sums of products that end in bfloat16 or float16 are evaluated in binary32
first (linalg/single_block.py); only what that leaves open comes here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.linalg.formats import AnyArray, F64Array, FloatFormat, round_double
from adapterhub_tools.linalg.single_block import single_block

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression, IntArray
    from adapterhub_tools.linalg.single_back import WayBack

BLOCK_ELEMENTS = 1 << 18
"""Elements of one block: 2 MiB in float64, so that it stays in a core's cache between the passes."""

_RESOLVE_VALUES = 1 << 20
"""Factor values gathered at a time for exact evaluation: 8 MiB in each of about a dozen arrays."""

_TIE_SHIFT = {"BF16": 16, "F16": 19}
_MIN_INT32 = np.int32(-(2**31))


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """A result that is not finite.

    Attributes:
        row: its row.
        column: its column.
        start: the base value there.
    """

    row: int
    column: int
    start: float


@dataclass(slots=True)
class _Suspects:
    rows: list[IntArray] = field(default_factory=list)
    columns: list[IntArray] = field(default_factory=list)
    start: list[F64Array] = field(default_factory=list)
    computed: list[F64Array] = field(default_factory=list)


class BlockRounder:
    """Rounds ``expression`` over chunks of rows; buffers are made once and reused.

    Args:
        expression: the exact value of every element.
        columns: the number of columns of the matrix.
        start: the format of w.
        to: the format of the result.
        device: where blocks are evaluated.
        keep_non_finite: True where infinities and NaN of w are copied (a cast), False where they are errors.
        back: True where ``way_back`` is wanted.
    """

    def __init__(
        self,
        expression: Expression,
        *,
        columns: int,
        start: FloatFormat,
        to: FloatFormat,
        device: str = "cpu",
        keep_non_finite: bool = False,
        back: bool = False,
    ) -> None:
        """Allocates the buffers: about 2 + 1 + 1 + 0.25 MiB."""
        self._expression = expression
        self._columns = columns
        self._start = start
        self._to = to
        self._device = device
        self._keep = keep_non_finite
        self._rows = max(1, BLOCK_ELEMENTS // max(1, columns))
        shape = (self._rows, columns)
        self._wide = torch.empty(shape, dtype=torch.float64, device=device)
        self._single = torch.empty(shape, dtype=torch.float32, device=device)
        self._integers: npt.NDArray[np.int32] = np.empty(shape, dtype=np.int32)
        self._magnitudes: npt.NDArray[np.uint16] = np.empty(shape, dtype=np.uint16)
        self._flags: npt.NDArray[np.bool_] = np.empty(shape, dtype=np.bool_)
        self._small_flags: npt.NDArray[np.bool_] = np.empty(shape, dtype=np.bool_)
        self._first = single_block(
            expression, self._rows, columns, start=start, to=to, device=device, back=back
        )
        self.resolved: int = 0

    @property
    def way_back(self) -> WayBack | None:
        """The way back of the rows that were rounded last; None where binary32 did not serve."""
        return None if self._first is None else self._first.way_back

    def round_rows(self, start: Tensor, out: Tensor, row: int) -> NonFinite | None:
        """Rounds some rows.

        Args:
            start: w, shape (n, columns), in the start format; on the CPU.
            out: the result, same shape, in the target format; may not share memory with ``start``.
            row: the row of the matrix that their first row is.

        Returns:
            The first result that is not finite and must not be, or None.
        """
        suspects = _Suspects()
        n = int(start.shape[0])
        if self._first is not None and (open_points := self._first.round(start, out, row)) is not None:
            self._decide(open_points, start, out, row, suspects)
            return self._resolve(out, row, suspects)
        for first in range(0, n, self._rows):
            last = min(n, first + self._rows)
            self._round_block(start[first:last], out[first:last], row + first, first, suspects)
        return self._resolve(out, row, suspects)

    def _round_block(self, start: Tensor, out: Tensor, row: int, local: int, suspects: _Suspects) -> None:
        count = int(start.shape[0])
        bounds = self._expression.bounds[row : row + count]
        largest = float(bounds.max(initial=0.0))
        if largest == 0.0 and self._start.name == self._to.name:
            out.copy_(start)
            bits = _bits(out, self._to)
            self._note(suspects, np.flatnonzero((bits << 1) >= (self._to.infinity << 1)), start, start, local)
            return
        if self._to.name == "F64" and self._expression.exact and largest != 0.0:
            # Binary64 itself cannot say which of its results are right: every point is decided exactly.
            self._note(suspects, np.arange(start.numel(), dtype=np.int64), start, start, local)
            return
        wide = self._wide[:count]
        wide.copy_(start)
        if largest != 0.0:
            # Where it is 0, x is w, and a product of zero must not turn -0 into +0.
            self._expression.evaluate(wide, row)
            largest = float(bounds.max(initial=0.0))
        if self._to.name == "F64":
            out.copy_(wide)
            flags = ~np.isfinite(out.numpy())
        elif self._to.name == "F32":
            out.copy_(wide)
            flags = self._interval_flags(wide, out, bounds)
        else:
            single = self._single[:count]
            single.copy_(wide)
            out.copy_(single)
            flags = self._tie_flags(single, out, largest)
        self._note(suspects, np.flatnonzero(flags), start, wide, local)

    def _tie_flags(self, single: Tensor, out: Tensor, largest: float) -> AnyArray:
        """Flags ties of the format in the binary32 results, and results below the threshold or not finite."""
        count = int(single.shape[0])
        unit = self._expression.unit
        threshold = 2 * unit * largest / (2.0**-25 - unit) * (1 + 2.0**-20)
        small = int(round_double(np.array([threshold]), self._to)[0])
        integers, flags = self._integers[:count], self._flags[:count]
        if small >= self._to.infinity:
            # The bound is so large that float64 decides nothing; the comparison below would wrap around.
            flags.fill(True)
            return flags
        values = single.cpu().view(torch.int32).numpy()
        np.left_shift(values, _TIE_SHIFT[self._to.name], out=integers)
        np.equal(integers, _MIN_INT32, out=flags)
        if self._to.name == "F16":
            _flag_subnormal_ties(values, flags)
        # Twice the magnitude drops the sign; the unsigned wrap makes one comparison of "at most small or
        # not finite".
        magnitudes, small_flags = self._magnitudes[:count], self._small_flags[:count]
        np.left_shift(_bits(out, self._to), 1, out=magnitudes)
        offset = 2 * small + 1
        np.subtract(magnitudes, np.uint16(offset & 0xFFFF), out=magnitudes)
        np.greater_equal(magnitudes, np.uint16((2 * self._to.infinity - offset) & 0xFFFF), out=small_flags)
        return np.logical_or(flags, small_flags, out=flags)

    def _interval_flags(self, wide: Tensor, out: Tensor, bounds: F64Array) -> AnyArray:
        """Flags binary32 results whose neighbourhood [y − E, y + E] does not round to one value."""
        unit = self._expression.unit
        peaks = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
        error = (peaks * unit + torch.from_numpy(2 * unit * bounds).to(wide.device))[:, None] * (1 + 2.0**-20)
        if self._expression.identity:
            error.zero_()
        lower = (wide - error).to(torch.float32)
        upper = (wide + error).to(torch.float32)
        differ = (lower != upper) | ~torch.isfinite(lower)
        if not self._expression.identity:
            differ |= (out == 0).to(differ.device)
        flags: AnyArray = differ.cpu().numpy()
        return flags

    def _note(
        self, suspects: _Suspects, index: AnyArray, start: Tensor, computed: Tensor, local: int
    ) -> None:
        if not len(index):
            return
        rows, columns = np.divmod(index.astype(np.int64), self._columns)
        suspects.rows.append(rows + local)
        suspects.columns.append(columns)
        where = torch.from_numpy(index.astype(np.int64))
        for values, kept in ((start, suspects.start), (computed, suspects.computed)):
            kept.append(values.reshape(-1)[where.to(values.device)].to("cpu", torch.float64).numpy())

    def _decide(self, index: IntArray, start: Tensor, out: Tensor, row: int, suspects: _Suspects) -> None:
        """Decides in binary64 what binary32 left open, and adds the rest to the suspects."""
        if self._first is None:
            return
        rows, columns = np.divmod(index, self._columns)
        values = start.reshape(-1).index_select(0, torch.from_numpy(index)).double().numpy()
        bits, left = self._first.points.decide(rows + row, columns, values)
        _bits(out, self._to).reshape(-1)[index] = bits
        self._first.find_way_back(start, out, row, index[left])
        if len(left):
            suspects.rows.append(rows[left])
            suspects.columns.append(columns[left])
            suspects.start.append(values[left])
            suspects.computed.append(values[left])

    def _resolve(self, out: Tensor, row: int, suspects: _Suspects) -> NonFinite | None:
        if not suspects.rows:
            return None
        rows, columns = np.concatenate(suspects.rows), np.concatenate(suspects.columns)
        values, computed = np.concatenate(suspects.start), np.concatenate(suspects.computed)
        finite = np.isfinite(values)
        if not finite.all():
            if not self._keep:
                at = int(np.flatnonzero(~finite)[0])
                return NonFinite(row=row + int(rows[at]), column=int(columns[at]), start=float(values[at]))
            rows, columns, values, computed = rows[finite], columns[finite], values[finite], computed[finite]
        self.resolved += len(rows)
        target = _bits(out, self._to)
        size = max(1, min(BLOCK_ELEMENTS // 4, _RESOLVE_VALUES // self._expression.inner))
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            bits = self._expression.exact_bits(
                rows[part] + row, columns[part], values[part], computed[part], self._to
            )
            target[rows[part], columns[part]] = bits
            magnitudes = bits & bits.dtype.type((1 << (self._to.bits - 1)) - 1)
            beyond = np.flatnonzero(magnitudes >= bits.dtype.type(self._to.infinity))
            if len(beyond):
                at = int(beyond[0])
                return NonFinite(
                    row=row + int(rows[part][at]),
                    column=int(columns[part][at]),
                    start=float(values[part][at]),
                )
        return None


def _flag_subnormal_ties(values: AnyArray, flags: AnyArray) -> None:
    """Flags the ties of float16 below 2^-14, where its spacing stays 2^-24: odd multiples of 2^-25."""
    magnitudes = values & 0x7FFFFFFF
    index = np.flatnonzero(magnitudes < 0x38800000)
    if len(index):
        scaled = np.abs(values.reshape(-1)[index].view(np.float32)) * np.float32(2.0**25)
        whole = np.floor(scaled)
        flags.reshape(-1)[index] |= (whole == scaled) & (whole % 2 == 1)


def _bits(tensor: Tensor, of: FloatFormat) -> AnyArray:
    """Returns the bits of a CPU tensor as an unsigned numpy view of the same memory."""
    signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[of.bits]
    view: AnyArray = tensor.view(signed).numpy().view(of.numpy_bits)
    return view
