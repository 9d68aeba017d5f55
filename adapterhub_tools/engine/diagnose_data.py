"""What the explanations of a wrong tensor are tested against.

An explanation H of the difference D = M − W fits if the mean of (D − H)²/(u²/12), with u the spacing at M,
is about 1 or below, as rounding makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.check_points import Product, Wrong, round_block, spacing
from adapterhub_tools.engine.step_rows import StepRows

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.engine.check_tensor import Pair

FITS = 4.0
"""Two roundings, as of a delta that was added twice, give 2, and more where the first one had the wider
spacing; what does not fit gives far more."""
ELEMENTS = 1 << 22
"""A tensor of at most so many elements is looked at whole."""
_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Rows of a wrong tensor in float64: all, or evenly spread ones of a large one.

    Attributes:
        rows: their numbers.
        whole: True for all.
        base: W, shape (len(rows), columns).
        merged: M.
        delta: what M − W should be.
        unit: the spacing to measure with.
    """

    rows: list[int]
    whole: bool
    base: Tensor
    merged: Tensor
    delta: Tensor
    unit: Tensor

    @property
    def difference(self) -> Tensor:
        """M − W."""
        return self.merged - self.base

    def misfit(self, explanation: Tensor) -> float:
        """Returns how badly something explains M − W: about 1 if it does, see FITS."""
        return float(((self.difference - explanation) / self.unit).square().mean()) * 12

    def fits(self, explanation: Tensor) -> bool:
        """Says whether something explains M − W."""
        return self.misfit(explanation) < FITS

    def single_weights(self, dtype: str, limit: int) -> tuple[int, list[Wrong]]:
        """Returns how many weights are not the rounded base plus delta, and the first few of them.

        Where the sum is within 2⁻¹⁶ of a spacing of halfway, either neighbour will do.
        """
        wide = self.base + self.delta
        slack = spacing(wide, dtype) * 2.0**-16
        low, high = (round_block(wide + sign * slack, dtype) for sign in (-1, 1))
        wrong = torch.nonzero(~((low <= self.merged) & (self.merged <= high)))
        first = [
            Wrong(
                row=self.rows[i],
                column=j,
                found=float(self.merged[i, j]),
                expected=float(round_block(wide[i : i + 1, j], dtype)),
            )
            for i, j in wrong[:limit].tolist()
        ]
        return len(wrong), first


def rows_to_look_at(pair: Pair) -> tuple[list[int], bool]:
    """Returns the numbers of the rows to look at, and whether they are all."""
    if pair.rows * pair.columns <= ELEMENTS:
        return list(range(pair.rows)), True
    return list(range(0, pair.rows, max(1, pair.rows // _ROWS))), False


def evidence(pair: Pair) -> Evidence:
    """Reads what the explanations are tested against."""
    rows, whole = rows_to_look_at(pair)
    base, merged = (
        (pair.read(item, 0, pair.rows) if whole else pair.pick(item, rows)).double()
        for item in (pair.step.start, pair.merged)
    )
    delta = expected_delta(pair, base, rows, whole=whole)
    return Evidence(
        rows=rows,
        whole=whole,
        base=base,
        merged=merged,
        delta=delta,
        unit=measure(base, merged, delta, pair.dtype),
    )


def measure(base: Tensor, merged: Tensor, delta: Tensor, dtype: str) -> Tensor:
    """Returns the spacing to measure differences with.

    Small results of large numbers carry the rounding of those, and an explanation that was fitted carries
    that of its neighbours.
    """
    largest = torch.maximum(torch.maximum(base.abs(), merged.abs()), delta.abs())
    floor = 0.25 * merged.square().mean().sqrt()
    return spacing(largest.clamp(min=float(floor)), dtype)


def expected_delta(pair: Pair, base: Tensor, rows: list[int], *, whole: bool) -> Tensor:
    """Returns what a merge should have changed in rows, in float64: by products, or as merge evaluates it."""
    if pair.products:
        return sum_of(pair.products, torch.tensor(rows, dtype=torch.int64), base)
    return reapplied(pair, base, rows, whole=whole) - base


def reapplied(pair: Pair, start: Tensor, rows: list[int], *, whole: bool) -> Tensor:
    """Returns what merge makes of rows that need not be the base's."""
    made = StepRows(pair.step, pair.open_source, "cpu")
    if whole:
        return made.exact(start, 0)
    return torch.cat([made.exact(start[i : i + 1], row) for i, row in enumerate(rows)])


def sum_of(products: tuple[Product, ...], index: Tensor | slice, like: Tensor) -> Tensor:
    """Returns rows of a sum of products."""
    delta = torch.zeros_like(like)
    for product in products:
        delta += product.rows(index, "cpu")
    return delta
