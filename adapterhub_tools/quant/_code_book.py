"""Sixteen values for four bits: tables that turn packed bytes into values and values into codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.quant._bfloat16_codes import BitTable

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.formats import AnyArray

PIECE = 1 << 17
"""Values worked on at a time, so that scratch stays in the processor's cache."""

_CELLS = 1024
_TABLE = 2 * _CELLS + 2
_SPLIT = 255


@dataclass(frozen=True)
class CodeBook:
    """The values that four bits stand for.

    Attributes:
        values: by code, as binary32 numbers; the largest magnitude is 1.
        order: the codes in the order of their values.
    """

    values: tuple[float, ...]
    order: tuple[int, ...]

    @cached_property
    def table(self) -> Tensor:
        """The values as float32, shape (16,)."""
        return torch.tensor(self.values, dtype=torch.float32)

    @cached_property
    def _pairs(self) -> Tensor:
        """Byte -> its two values as one 64-bit item, the high four bits first."""
        byte = torch.arange(256)
        pairs = torch.stack([self.table[byte >> 4], self.table[byte & 15]], dim=1)
        return pairs.contiguous().view(torch.int64).reshape(-1)

    @cached_property
    def _cells(self) -> tuple[Tensor, Tensor]:
        """Cell of a value -> the threshold in it, and how many thresholds lie in lower cells.

        A value's cell is floor(1024·v + 1024), computed in binary32, which grows with v. No cell holds two
        thresholds, so that a value's place among the thresholds takes one comparison at most, not fifteen.
        """
        ordered = self.table[torch.tensor(self.order)]
        thresholds = (ordered[:-1] + ordered[1:]) / 2
        at = torch.full((_TABLE,), float("inf"))
        below = torch.zeros(_TABLE, dtype=torch.uint8)
        for threshold, cell in zip(thresholds, self._cell(thresholds).tolist(), strict=True):
            at[cell] = threshold
            below[cell + 1 :] += 1
        return at, below

    @cached_property
    def _by_place(self) -> Tensor:
        return torch.tensor(self.order, dtype=torch.uint8)

    @cached_property
    def _cell_codes(self) -> Tensor:
        """Cell -> its code, or _SPLIT where a threshold lies in it."""
        at, below = self._cells
        codes = self._by_place[below.to(torch.int64)]
        codes[torch.isfinite(at)] = _SPLIT
        return codes

    @cached_property
    def _cell_values(self) -> Tensor:
        """Cell -> its value, or NaN where a threshold lies in it."""
        codes = self._cell_codes.to(torch.int64)
        return torch.where(codes == _SPLIT, float("nan"), self.table[codes % 16])

    @staticmethod
    def _cell(values: Tensor) -> Tensor:
        # By way of int32, which is twice as fast.
        return torch.mul(values, _CELLS).add_(_CELLS).to(torch.int32).to(torch.int64)

    def _split(self, scaled: Tensor, cells: Tensor, where: AnyArray) -> AnyArray:
        """Returns the codes of the values at some indices, whose cells hold thresholds."""
        at, below = (table.numpy() for table in self._cells)
        chosen = cells.numpy()[where]
        above = scaled.numpy()[where] > at[chosen]
        codes: AnyArray = self._by_place.numpy()[below[chosen] + above]
        return codes

    @cached_property
    def by_bits(self) -> BitTable | None:
        """What the book makes of bfloat16 weights by their bits; None where that cannot be told."""
        return BitTable.of(self.codes, self.table)

    def unpack(self, data: Tensor, out: Tensor) -> None:
        """Writes the values of packed bytes.

        Args:
            data: uint8 (n,).
            out: float32 (2·n,), contiguous.
        """
        torch.index_select(self._pairs, 0, data.to(torch.int64), out=out.view(torch.int64))

    def codes(self, scaled: Tensor) -> Tensor:
        """Returns the code of the nearest value, for values divided by their block's scale.

        A value exactly between two goes to the lower one, as in bitsandbytes.

        Args:
            scaled: float32 (n,), in [-1, 1] up to rounding, no NaN.

        Returns:
            uint8 (n,).
        """
        cells = self._cell(scaled)
        codes = torch.index_select(self._cell_codes, 0, cells)
        array = codes.numpy()
        where = np.flatnonzero(array == _SPLIT)
        array[where] = self._split(scaled, cells, where)
        return codes

    def nearest(self, scaled: Tensor) -> Tensor:
        """Returns the values of ``codes(scaled)``, float32 (n,)."""
        cells = self._cell(scaled)
        values = torch.index_select(self._cell_values, 0, cells)
        array = values.numpy()
        where = np.flatnonzero(np.isnan(array))
        array[where] = self.table.numpy()[self._split(scaled, cells, where)]
        return values


def pack(codes: Tensor) -> Tensor:
    """Returns two codes in each byte, the first in the high four bits.

    Args:
        codes: uint8 (n,), n even.

    Returns:
        uint8 (n / 2,).
    """
    if sys.byteorder == "little":
        pairs = codes.view(torch.int16)  # the first in the low byte
        return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2]


def largest(blocks: Tensor) -> Tensor:
    """Returns the largest magnitude of each row as float32; a row with NaN gives NaN.

    Magnitudes of floating-point numbers are ordered as their bits are, without the sign.

    Args:
        blocks: bfloat16, float16 or float32 (n, size).
    """
    wide = blocks.dtype == torch.float32
    bits = blocks.view(torch.int32 if wide else torch.int16) & (0x7FFFFFFF if wide else 0x7FFF)
    return bits.amax(dim=1).view(blocks.dtype).to(torch.float32)
