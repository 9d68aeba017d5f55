"""The k-th magnitude of a matrix that is read in panels: exact, in bounded memory.

A few rows tell where it is likely to lie (Floyd & Rivest 1975, "Expected time bounds for selection": a
sample brackets the value). One pass then counts what lies below that bracket and keeps what lies in it,
which nearly always decides. Where it does not (rows unlike the sample, or too many equal values), passes
over the bits do: each counts the magnitudes of one bin by their next 16 bits, so that four of them know the
value, and a bin that has become small is kept and sorted earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.linalg.formats import AnyArray, F64Array
from adapterhub_tools.linalg.panels import panels_of, rows_of_panel

if TYPE_CHECKING:
    from adapterhub_tools.linalg.panels import Panels

SAMPLED_GROUPS = 64
SAMPLED_LINES = 32
"""The sample: so many groups, each of so many rows and columns and the values where they cross."""
KEPT_VALUES = 1 << 21
"""At most so many magnitudes are held: 16 MiB, and as much while they are sorted."""
_SHARE = 0.002
"""The bracket reaches at least so far in ranks to either side, as a share of all."""
_DEVIATIONS = 3.0
_GOLDEN = (sqrt(5.0) - 1) / 2
_THINNED = 8
"""One of so many values of the sample tells how much rows and columns differ."""
_DIGIT = 16


def magnitudes_at(source: Panels, ranks: Sequence[int]) -> tuple[float, ...]:
    """Returns magnitudes by their rank.

    Memory: KEPT_VALUES float64 values, and a panel.

    Args:
        source: the matrix, every value finite; it is read once, and a few times more where the sample
            misleads.
        ranks: for each result how many magnitudes come before it in ascending order, from 0.

    Raises:
        ValueError: a rank is not that of a value.
    """
    total = source.shape[0] * source.shape[1]
    if any(not 0 <= rank < total for rank in ranks):
        raise ValueError(f"the ranks {list(ranks)} are not all within {total} values")
    brackets = _brackets(source, ranks)
    magnitudes, flags, other = _buffers(source)
    for number in range(panels_of(source.shape)):
        panel = source.panel(number)
        size = panel.numel()
        values = torch.abs(panel, out=magnitudes[: panel.shape[0]]).numpy().reshape(-1)
        for bracket in brackets:
            bracket.take(values, flags[:size], other[:size])
    return tuple(
        bracket.found() if bracket.decides() else _by_bits(source, bracket.rank) for bracket in brackets
    )


@dataclass(slots=True)
class _Bracket:
    """One rank, the interval [low, high] in which its magnitude is expected, and what was seen of it."""

    rank: int
    low: float
    high: float
    below: int = 0
    kept: int = 0
    inside: list[F64Array] = field(default_factory=list)

    def take(self, values: F64Array, flags: AnyArray, other: AnyArray) -> None:
        np.greater_equal(values, self.low, out=flags)
        at_least = int(np.count_nonzero(flags))
        self.below += len(values) - at_least
        np.greater(values, self.high, out=other)
        np.bitwise_xor(flags, other, out=flags)
        within = np.flatnonzero(flags)
        self.kept += len(within)
        if self.kept <= KEPT_VALUES:
            self.inside.append(values[within])
        else:
            self.inside.clear()

    def decides(self) -> bool:
        return self.below <= self.rank < self.below + self.kept and self.kept <= KEPT_VALUES

    def found(self) -> float:
        at = self.rank - self.below
        return float(np.partition(np.concatenate(self.inside), at)[at])


def _brackets(source: Panels, ranks: Sequence[int]) -> list[_Bracket]:
    rows, columns = source.shape
    sample = source.points(_spread(rows), _spread(columns)).abs_()
    flat = sample.numpy().reshape(-1)
    brackets = []
    for rank in ranks:
        place = (rank + 0.5) / (rows * columns)
        few = flat[::_THINNED].copy()
        at = min(len(few) - 1, int(place * len(few)))
        below = (sample <= float(np.partition(few, at)[at])).double()
        # Rows differ in size, and columns do, so each is one observation of the share that lies below.
        spread = sum(_variance_of_mean(below.mean(dim=axis)) for axis in (1, 2))
        reach = max(_SHARE, _DEVIATIONS * sqrt(spread))
        first, last = int((place - reach) * len(flat)), ceil((place + reach) * len(flat))
        ordered = np.partition(flat, [max(first, 0), min(last, len(flat) - 1)])
        brackets.append(
            _Bracket(
                rank=rank,
                low=0.0 if first <= 0 else float(ordered[first]),
                high=inf if last >= len(flat) else float(ordered[last]),
            )
        )
    return brackets


def _variance_of_mean(shares: torch.Tensor) -> float:
    return float(shares.var()) / shares.numel() if shares.numel() > 1 else 0.25


def _spread(length: int) -> torch.Tensor:
    """Returns indices of a length, spread evenly, in SAMPLED_GROUPS groups of SAMPLED_LINES."""
    count = SAMPLED_GROUPS * SAMPLED_LINES
    # Multiples of the golden section have no period, such as that of attention heads.
    spread = (np.arange(count) * _GOLDEN % 1.0 * length).astype(np.int64)
    return torch.from_numpy(spread).view(SAMPLED_LINES, SAMPLED_GROUPS).t().contiguous()


def _by_bits(source: Panels, rank: int) -> float:
    """Finds a magnitude by its bits, 16 at a time from the top; the sign bit is 0."""
    known, shift, panels = 0, 64 - _DIGIT, panels_of(source.shape)
    magnitudes, flags, _ = _buffers(source)
    while True:
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        for number in range(panels):
            digits = _digits(source, number, magnitudes, flags, known, shift)
            counts += np.bincount(digits, minlength=1 << _DIGIT)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit] - counts[digit])
        known = (known << _DIGIT) | digit
        if shift == 0:
            return float(np.array([known], dtype=np.uint64).view(np.float64)[0])
        if counts[digit] <= KEPT_VALUES:
            parts = [
                _values(source, number, magnitudes, known, shift) for number in range(panels_of(source.shape))
            ]
            return float(np.partition(np.concatenate(parts), rank)[rank])
        shift -= _DIGIT


def _digits(
    source: Panels, number: int, magnitudes: torch.Tensor, flags: AnyArray, known: int, shift: int
) -> AnyArray:
    """Returns the next digit of the magnitudes of a panel whose digits before it are known."""
    bits = _bits(source, number, magnitudes)
    if shift + _DIGIT < 64:
        bits = bits[np.equal(bits >> np.uint64(shift + _DIGIT), np.uint64(known), out=flags[: len(bits)])]
    digits: AnyArray = ((bits >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)).astype(np.int64)
    return digits


def _values(source: Panels, number: int, magnitudes: torch.Tensor, known: int, shift: int) -> F64Array:
    bits = _bits(source, number, magnitudes)
    found: F64Array = bits[(bits >> np.uint64(shift)) == np.uint64(known)].view(np.float64)
    return found


def _bits(source: Panels, number: int, magnitudes: torch.Tensor) -> AnyArray:
    panel = source.panel(number)
    values = torch.abs(panel, out=magnitudes[: panel.shape[0]])
    bits: AnyArray = values.numpy().reshape(-1).view(np.uint64)
    return bits


def _buffers(source: Panels) -> tuple[torch.Tensor, AnyArray, AnyArray]:
    shape = (min(source.shape[0], rows_of_panel(source.shape[1])), source.shape[1])
    size = shape[0] * shape[1]
    return (
        torch.empty(shape, dtype=torch.float64),
        np.empty(size, dtype=np.bool_),
        np.empty(size, dtype=np.bool_),
    )
