"""The order of each row of a matrix by magnitude: exact, by counting sorts and not by comparisons.

Magnitudes are mapped to 32 bits, linearly up to the largest of the row, and sorted by these, 16 bits at a
time from the low end (a radix sort; numpy sorts 16-bit integers by counting). What came out is then compared
with the magnitudes themselves, so that the 32 bits need not tell all: rows where two values share them in
the wrong order, few but for extreme distributions, are sorted once more, from an order that is nearly right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS = float(2**32 - 1)


def ascending(magnitudes: Tensor) -> Tensor:
    """Returns the columns of each row in ascending order of their values; equal ones in the order of columns.

    Shapes: (n, columns) gives (n, columns), int64.
    Memory: 40 bytes for each value, the result included.

    Args:
        magnitudes: float64, finite, at least 0, on the CPU.
    """
    rows, columns = magnitudes.shape
    if columns == 0:
        return torch.empty(rows, 0, dtype=torch.int64)
    largest = magnitudes.amax(dim=1, keepdim=True)
    levels = magnitudes / largest.where(largest > 0, largest.new_ones(()))
    keys = levels.mul_(_LEVELS).numpy().astype("<u4").view("<u2").reshape(rows, columns, 2)
    low = torch.from_numpy(np.argsort(keys[:, :, 0], axis=1, kind="stable"))
    high = torch.from_numpy(keys[:, :, 1].astype(np.int16, order="C")).gather(1, low).numpy()
    order = low.gather(1, torch.from_numpy(np.argsort(high.view(np.uint16), axis=1, kind="stable")))
    ordered = torch.gather(magnitudes, 1, order, out=levels)
    wrong = (ordered[:, 1:] < ordered[:, :-1]).any(dim=1).nonzero()[:, 0]
    if len(wrong):
        again = torch.from_numpy(np.argsort(ordered[wrong].numpy(), axis=1, kind="stable"))
        order[wrong] = order[wrong].gather(1, again)
    return order
