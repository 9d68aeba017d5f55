"""Sixteen values for four bits: tables that turn packed bytes into values and values into codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 17
"""Values worked on at a time, so that scratch stays in the processor's cache."""

_CELLS = 1024
_TABLE = 2 * _CELLS + 2


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
    def _cells(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cell of a value -> the threshold in it, and how many thresholds lie in lower cells.

        A value's cell is floor(1024·v + 1024), computed in binary32, which grows with v. No cell holds two
        thresholds, so that a value's place among the thresholds takes one comparison, not fifteen.
        """
        ordered = self.table[torch.tensor(self.order)]
        thresholds = (ordered[:-1] + ordered[1:]) / 2
        at = torch.full((_TABLE,), float("inf"))
        below = torch.zeros(_TABLE, dtype=torch.uint8)
        for threshold, cell in zip(thresholds, self._cell(thresholds).tolist(), strict=True):
            at[cell] = threshold
            below[cell + 1 :] += 1
        identity = self.order == tuple(range(16))
        return at, below, None if identity else torch.tensor(self.order, dtype=torch.uint8)

    @staticmethod
    def _cell(values: Tensor) -> Tensor:
        return torch.mul(values, _CELLS).add_(_CELLS).to(torch.int64)

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
        at, below, order = self._cells
        cells = self._cell(scaled)
        above = scaled > torch.index_select(at, 0, cells)
        places = torch.index_select(below, 0, cells).add_(above.view(torch.uint8))
        return places if order is None else torch.index_select(order, 0, places.to(torch.int64))

    def values_of(self, codes: Tensor) -> Tensor:
        """Returns the values of codes, float32 (n,)."""
        return torch.index_select(self.table, 0, codes.to(torch.int64))


def pack(codes: Tensor) -> Tensor:
    """Returns two codes in each byte, the first in the high four bits.

    Args:
        codes: uint8 (n,), n even.

    Returns:
        uint8 (n / 2,).
    """
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def largest(blocks: Tensor) -> Tensor:
    """Returns the largest magnitude of each row as float32; a row with NaN gives NaN.

    Magnitudes of floating-point numbers are ordered as their bits are, without the sign.

    Args:
        blocks: bfloat16, float16 or float32 (n, size).
    """
    wide = blocks.dtype == torch.float32
    bits = blocks.view(torch.int32 if wide else torch.int16) & (0x7FFFFFFF if wide else 0x7FFF)
    return bits.amax(dim=1).view(blocks.dtype).to(torch.float32)
