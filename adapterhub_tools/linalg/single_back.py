"""Takes the deltas off rounded results again in binary32: where that does not give the start back.

Let w be the start, d the sum of its deltas and w' = w + d + e the result in the same format, so that e is at
most half the spacing at w'. Then w' − d = w + e. Where the spacing at w' is not above the one at w (below w,
for a power of two), e is at most half of that as well, so w + e rounds to w, unless e is exactly half: then
w + d is a tie, which neither binary32 nor binary64 decides. So the way back is right but there and where ::

    exponent bits of w' >= bits of w without its sign

There w' − d is evaluated from the sum s ≈ w + d as w' − (s − w), which takes no products, and rounded with an
interval around it, as linalg/single_block.py does on the way there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from adapterhub_tools.linalg.flagged import flagged
from adapterhub_tools.linalg.formats import AnyArray, FloatFormat

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray

_OPEN_SHARE = 1 / 64
"""Above this share of undecided places whole rows are evaluated anew at less cost."""


_ROUNDINGS = 2.0**-22 * (1 + 2.0**-6)
"""Four roundings to binary32: 2^-24 of a value each, and a little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayBack:
    """Where taking the deltas off the results may not round to the start.

    Attributes:
        places: counted along the rows, ascending; everywhere else the way back is right.
        start: the bits of the start there.
        bits: what the way back gives there.
        undecided: indices into ``places`` where ``bits`` mean nothing.
    """

    places: IntArray
    start: AnyArray
    bits: AnyArray
    undecided: IntArray


class BackPass:
    """The way back of chunks of rows, block by block.

    Attributes:
        worth: False once a chunk has left too much undecided.

    Args:
        rows: the most rows of a block.
        columns: the number of columns.
        to: the format of start and result, of 16 bits.
    """

    def __init__(self, rows: int, columns: int, to: FloatFormat) -> None:
        """Allocates the buffers of a block."""
        self.worth: bool = True
        self._to = to
        self._exponents, self._magnitudes = np.empty((2, rows, columns), dtype=to.numpy_bits)
        self._flags: npt.NDArray[np.bool_] = np.empty((rows, columns), dtype=np.bool_)
        self._places: list[IntArray] = []
        self._sums: list[Tensor] = []

    def block(
        self, start: Tensor, sums: Tensor, result: Tensor, open_points: npt.NDArray[np.bool_], at: int
    ) -> None:
        """Finds the places of one block and keeps the sums there.

        Args:
            start: w.
            sums: about w + d, in binary32.
            result: w'; anything where that is open.
            open_points: where that is, same shape.
            at: the place in the chunk that the first value is.
        """
        count = int(start.shape[0])
        exponents, magnitudes, flags = (
            buffer[:count] for buffer in (self._exponents, self._magnitudes, self._flags)
        )
        np.bitwise_and(bits16(result), self._to.infinity, out=exponents)
        np.bitwise_and(bits16(start), (1 << (self._to.bits - 1)) - 1, out=magnitudes)
        np.greater_equal(exponents, magnitudes, out=flags)
        np.logical_or(flags, open_points, out=flags)
        places = flagged(flags.reshape(-1))
        self._sums.append(sums.reshape(-1).index_select(0, torch.from_numpy(places)))
        places += at
        self._places.append(places)

    def finish(self, start: Tensor, result: Tensor, error: float, ties: IntArray) -> WayBack | None:
        """Returns the way back of the blocks since the last call, or None if too much is undecided.

        Args:
            start: w of the chunk.
            result: w', decided but for ``ties``.
            error: at least how far the products in the sums may lie from d, and four roundings of |d|.
            ties: the places where binary64 left w' open.
        """
        places, delta = np.concatenate(self._places), torch.cat(self._sums)
        self._places, self._sums = [], []
        where = torch.from_numpy(places)
        base, back = (part.reshape(-1).index_select(0, where) for part in (start, result))
        delta.sub_(base.float())
        back = back.float()
        # Four roundings: of s, of s − w, of the difference and of the end. Each is of a number below
        # |w'| + |d|, but for roundings themselves.
        errors = back.abs().mul_(_ROUNDINGS).add_(error)
        back.sub_(delta)
        lower, upper = (bits16(end.to(base.dtype)) for end in (back - errors, back.add_(errors)))
        open_points = lower != upper
        open_points[np.searchsorted(places, ties)] = True
        undecided = np.flatnonzero(open_points)
        self.worth = bool(len(undecided) <= _OPEN_SHARE * start.numel())
        if not self.worth:
            return None
        return WayBack(places=places, start=bits16(base), bits=lower, undecided=undecided)


def bits16(block: Tensor) -> AnyArray:
    """Returns the bits of a CPU tensor of 16-bit values, as a view of the same memory."""
    view: AnyArray = block.view(torch.int16).numpy().view(np.uint16)
    return view
