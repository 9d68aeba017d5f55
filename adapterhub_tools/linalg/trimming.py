"""Setting to zero what is small, what is large, or what chance picks; in place, in panels."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan, nextafter
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.linalg.counter_random import random_bits
from adapterhub_tools.linalg.order_statistics import magnitudes_at

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.panels import Panels

_SPAN = 2.0**32


def check_share(value: object, name: str, *, zero: bool = False) -> float:
    """Returns a share of all values.

    Raises:
        ValueError: it is no number in (0, 1], or [0, 1) with ``zero``.
    """
    share = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else nan
    if 0 <= share < 1 if zero else 0 < share <= 1:
        return share
    raise ValueError(f"{name} must be a number in {'[0, 1)' if zero else '(0, 1]'}, not {value!r}")


def kept_of(elements: int, density: float) -> int:
    """Returns how many of so many values a density keeps: ⌊density·elements⌋, but at least one."""
    return min(elements, max(1, int(density * elements)))


def thresholds(
    deltas: Sequence[Panels], density: float, largest: float = 0.0
) -> tuple[tuple[float, float], ...]:
    """Returns for each delta the smallest and the largest magnitude that stay.

    Of n magnitudes in descending order, the first ⌊largest·n⌋ go, and the ⌊density·n⌋ after them stay.

    Args:
        deltas: what is to be trimmed.
        density: the share that stays.
        largest: the share of the largest ones that go.
    """
    found = []
    for delta in deltas:
        elements = delta.shape[0] * delta.shape[1]
        top = int(largest * elements)
        lowest = max(0, elements - top - kept_of(elements, density))
        ranks = ([] if lowest == 0 else [lowest]) + ([] if top == 0 else [elements - top - 1])
        values = list(magnitudes_at(delta, ranks)) if ranks else []
        found.append((0.0 if lowest == 0 else values[0], inf if top == 0 else values[-1]))
    return tuple(found)


def keep_between(deltas: Sequence[Tensor], limits: Sequence[tuple[float, float]]) -> None:
    """Sets to zero, in place, every value whose magnitude is beyond the limits of its delta.

    Args:
        deltas: float64.
        limits: for each, the least magnitude that stays, and the largest; 0 and infinity keep all.
    """
    for delta, (low, high) in zip(deltas, limits, strict=True):
        if low > 0.0:
            # hardshrink keeps |x| > λ, in one pass.
            torch.ops.aten.hardshrink.out(delta, nextafter(low, 0.0), out=delta)
        if high < inf:
            values = delta.numpy()
            np.copyto(values, 0.0, where=np.abs(values) > high)


def keep_by_chance(delta: Tensor, probability: float | Tensor, key: int, first: int) -> None:
    """Keeps each value with a probability q, divided by q, and sets the others to zero, in place.

    The expected value of each element stays what it was.

    Args:
        delta: float64, shape (n, columns).
        probability: q, one for all, or one for each value; in (0, 1].
        key: of the random numbers, see linalg/counter_random.py.
        first: the row of the matrix that the first row is.
    """
    if isinstance(probability, float) and probability >= 1.0:
        return
    bits = random_bits(key, first * delta.shape[1], delta.numel())
    if isinstance(probability, float):
        kept = bits < np.uint32(min(probability * _SPAN, _SPAN - 1))
    else:
        kept = bits < probability.numpy().reshape(-1) * _SPAN
    values = delta.numpy()
    np.divide(values, probability if isinstance(probability, float) else probability.numpy(), out=values)
    np.multiply(values, kept.reshape(values.shape), out=values)
