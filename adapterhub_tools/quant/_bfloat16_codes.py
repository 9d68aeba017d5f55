"""Codes of bfloat16 weights by table: from their bits alone, without a division or a comparison.

What a value v of a block with the scale s gets is the code of fl(v · fl(1/s)), in binary32. Powers of two
fall out of it, so it depends on the fraction of s (7 bits), and on the sign of v, its fraction (7 bits) and
how many binades it lies below s. Below some number of binades all values have one code. That is a table of
2^18 codes, made once with the arithmetic that it stands for, and looked up in half of its time.

The powers of two fall out as long as 1/s is normal, and v is where its code depends on it; the few blocks
beyond that are left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_BINADES = 6
"""Values so many binades below their scale, or more, have one code."""
_EXPONENT = 0x7F80
_FRACTION = 0x7F
_SIDE = 1024
"""Table entries for one sign and one fraction of the scale: 8 binades of 128 values."""
_LEAST, _MOST = 8 << 7, 252 << 7
"""Exponents of scales of which powers of two fall out, as bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitTable:
    """What a code book makes of bfloat16 weights.

    Attributes:
        codes: uint8 (2^18,): the code by fraction of the scale, sign and value.
        values: float32 (2^18,): the value of that code.
    """

    codes: Tensor
    values: Tensor

    @classmethod
    def of(cls, codes: Callable[[Tensor], Tensor], values: Tensor) -> BitTable | None:
        """Makes the table of a code book; None if its codes near zero depend on the sign.

        Args:
            codes: from float32 values in units of their scale, in [-1, 1], to codes.
            values: of the codes, float32 (16,).
        """
        scales = _bfloat16((127 << 7) + torch.arange(128))
        side = torch.arange(_SIDE)
        magnitudes = _bfloat16((127 - _BINADES << 7) + side)
        magnitudes[side < 128] = 0.0
        signed = torch.cat([-magnitudes.flip(0), magnitudes])
        scaled = signed[None] * torch.div(torch.ones(()), scales)[:, None]
        found = codes(scaled.clamp_(-1, 1).view(-1))
        near = torch.tensor([-1.0, 0.0, 1.0]) * 2.0 ** (1 - _BINADES)
        if len(set(codes(near).tolist())) > 1:
            return None
        return cls(codes=found, values=values[found.to(torch.int64)])

    def places(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Returns where the table has what each value of full blocks becomes.

        Args:
            blocks: bfloat16 (n, size), finite.
            scales: float32 (n,), the largest magnitude of each block.

        Returns:
            int32 (n · size,), and bool (n,): the blocks whose places mean nothing.
        """
        bits = blocks.view(torch.int16)
        largest = scales.to(torch.bfloat16).view(torch.int16)
        exponents = largest & _EXPONENT
        # A value's place on its side; at the bottom is all that lies far below the scale.
        place = (bits & 0x7FFF).sub_((exponents - (_BINADES << 7))[:, None]).clamp_(min=0)
        place ^= bits >> 15  # -1 - place for negative values
        start = (largest & _FRACTION).to(torch.int32).mul_(2 * _SIDE).add_(_SIDE)
        beyond = (exponents < _LEAST) | (exponents > _MOST)
        return place.to(torch.int32).add_(start[:, None]).view(-1), beyond


def _bfloat16(bits: Tensor) -> Tensor:
    """Returns the float32 values of bfloat16 bits."""
    return bits.to(torch.int16).view(torch.bfloat16).to(torch.float32)
