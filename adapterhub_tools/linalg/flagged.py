"""Finds where flags are set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from adapterhub_tools.linalg.expression import IntArray

_DENSE = 0.1
"""numpy looks for the next flag byte by byte up to this share, and writes without branches above it."""


def flagged(flags: npt.NDArray[np.bool_]) -> IntArray:
    """Returns where flags are set, in ascending order: the same as ``numpy.flatnonzero``, sooner.

    Eight flags are looked at together, as few are set.

    Args:
        flags: flat and contiguous.
    """
    whole = len(flags) // 8 * 8
    if np.count_nonzero(flags) > _DENSE * len(flags):
        return np.flatnonzero(flags)
    words = flags[:whole].view(np.uint64)
    found = np.flatnonzero(words != 0)
    within = np.flatnonzero(words.take(found).view(np.bool_))
    result: IntArray = found.take(within >> 3)
    result <<= 3
    within &= 7
    result += within
    if whole == len(flags):
        return result
    return np.concatenate((result, whole + np.flatnonzero(flags[whole:])))
