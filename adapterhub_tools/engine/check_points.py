"""The arithmetic of verify for sums of products: its own, so that an error in merge's would be seen.

Nothing here uses linalg/: a merged weight m is the correctly rounded value of x if x lies between the
midpoints to m's neighbours. That is decided in float64 with a bound on the error, and where the bound leaves
it open, in rational numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import inf, isqrt, sqrt
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

PRECISION = {"F64": 53, "F32": 24, "BF16": 8, "F16": 11}
LOWEST = {"F64": -1074, "F32": -149, "BF16": -133, "F16": -24}
HIGHEST = {"F64": 1024, "F32": 128, "BF16": 128, "F16": 16}
_ROOT_BITS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A delta ``coefficient · √radicand · left · right`` over a whole stored matrix.

    Attributes:
        left: shape (rows, k), float64.
        right: shape (k, columns), float64.
        coefficient: exact.
        radicand: exact.
    """

    left: Tensor
    right: Tensor
    coefficient: Fraction
    radicand: int = 1

    @property
    def scale(self) -> float:
        """The factor in binary64."""
        return float(self.coefficient) * sqrt(self.radicand)

    def rows(self, index: Tensor | slice, device: str) -> Tensor:
        """Returns some rows of the delta in float64."""
        return (self.left[index].to(device) * self.scale) @ self.right.to(device)

    def reach(self) -> Tensor:
        """Returns for each row a bound on Σ|terms|."""
        peaks = self.right.abs().amax(dim=1) if self.right.shape[1] else self.right.new_zeros(len(self.right))
        return (self.left.abs() @ peaks) * abs(self.scale) * (1 + 2.0**-40)

    def exactly(self, row: int, column: int) -> tuple[Fraction, bool]:
        """Returns the delta at a point, and whether it is exactly zero; a root to 2^-400."""
        total = sum(
            (Fraction(a) * Fraction(b) for a, b in zip(self._row(row), self._column(column), strict=True)),
            Fraction(0),
        )
        total *= self.coefficient
        root = isqrt(self.radicand)
        factor = Fraction(root)
        if root * root != self.radicand:
            factor = Fraction(isqrt(self.radicand << (2 * _ROOT_BITS)), 1 << _ROOT_BITS)
        return total * factor, total == 0

    def _row(self, row: int) -> list[float]:
        values: list[float] = self.left[row].tolist()
        return values

    def _column(self, column: int) -> list[float]:
        values: list[float] = self.right[:, column].tolist()
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A weight that is not the correctly rounded one.

    Attributes:
        row: its row.
        column: its column.
        found: the merged value.
        expected: the exact value, rounded.
    """

    row: int
    column: int
    found: float
    expected: float


@dataclass(slots=True, kw_only=True)
class RowCheck:
    """What the comparison of some rows gave.

    Attributes:
        wrong: how many weights are not correctly rounded.
        first: the first few of them.
        steps: the largest distance from the exact value, in units of the last place of the largest number
            that entered, beyond the half unit that rounding may take.
    """

    wrong: int
    first: list[Wrong]
    steps: float


def spacing(values: Tensor, dtype: str) -> Tensor:
    """Returns the distance from each value to the next larger magnitude in a dtype, in float64."""
    exponent = (values.abs().view(torch.int64) >> 52) - (PRECISION[dtype] - 1)
    lowest = LOWEST[dtype] + 1023
    if lowest >= 1:
        return (exponent.clamp(min=lowest) << 52).view(torch.float64)
    return torch.exp2((exponent.clamp(min=lowest) - 1023).double())


def check_rows(
    base: Tensor,
    merged: Tensor,
    products: tuple[Product, ...],
    reach: Tensor,
    index: Tensor | slice,
    *,
    rows: list[int],
    dtype: str,
    device: str,
    limit: int = 8,
) -> RowCheck:
    """Compares merged rows with the correctly rounded ``base + Σ products``.

    Args:
        base: w, as stored, shape (n, columns).
        merged: m, as stored in ``dtype``.
        products: the deltas.
        reach: for each row of the matrix a bound on Σ|terms|.
        index: which rows of the products these are.
        rows: the same as numbers.
        dtype: the safetensors dtype of ``merged``.
        device: where to compute.
        limit: how many wrong weights to describe.
    """
    w, m = base.to(device, torch.float64), merged.to(device, torch.float64)
    x = w.clone()
    for product in products:
        x += product.rows(index, device)
    bound = reach[index].to(device)[:, None]
    inner = sum(int(product.left.shape[1]) for product in products)
    error = (w.abs() + bound + m.abs()).mul_((inner + 8 * (len(products) + 1)) * 2.0**-53).add_(1e-300)
    unit = spacing(m, dtype)
    distance = x - m
    # Just below a power of two the spacing is half as wide.
    narrow = (m.view(torch.int64) & ((1 << 52) - 1)) == 0
    narrow &= unit > 2.0 ** LOWEST[dtype] if LOWEST[dtype] > -1074 else unit > 5e-324
    narrow &= (distance * m) < 0
    gap = torch.where(narrow, unit / 4, unit / 2)
    sure = (distance.abs() + error < gap) & torch.isfinite(m) & (m != 0)
    # Where every term of the delta is zero the base's bits stay, and so the sign of a zero.
    sure |= (bound == 0) & (m == w) & (torch.signbit(m) == torch.signbit(w))
    check = RowCheck(wrong=0, first=[], steps=0.0)
    certain = ~sure & (distance.abs() - error > gap)
    check.wrong = int(certain.sum())
    for row, column in torch.nonzero(~sure & ~certain).tolist():
        _decide(check, base, m, products, rows[row], (row, column), dtype, limit)
    for row, column in torch.nonzero(certain)[:limit].tolist():
        expected = exact_value(float(base[row, column]), products, rows[row], column, dtype)
        found = float(m[row, column])
        check.first.append(Wrong(row=rows[row], column=column, found=found, expected=expected))
    if check.wrong:
        largest = spacing(torch.maximum(torch.maximum(w.abs(), m.abs()), (x - w).abs()), dtype)
        steps = ((distance.abs() - error).clamp(min=0) / largest - 0.5).clamp(min=0)
        check.steps = float(steps.nan_to_num(nan=inf).max())
    return check


def _decide(
    check: RowCheck,
    base: Tensor,
    merged: Tensor,
    products: tuple[Product, ...],
    row: int,
    at: tuple[int, int],
    dtype: str,
    limit: int,
) -> None:
    expected = exact_value(float(base[at]), products, row, at[1], dtype)
    found = float(merged[at])
    if found == expected and str(found) == str(expected):  # the text tells the zeros apart
        return
    check.wrong += 1
    if len(check.first) < limit:
        check.first.append(Wrong(row=row, column=at[1], found=found, expected=expected))


def exact_value(start: float, products: tuple[Product, ...], row: int, column: int, dtype: str) -> float:
    """Returns the exact value at a point, rounded to nearest even; ±inf where it overflows.

    A delta of zero keeps the start value, the sign of a zero included; any other exact zero is +0, and what
    rounds to zero keeps its sign.
    """
    total, untouched = Fraction(start), True
    for product in products:
        delta, zero = product.exactly(row, column)
        total += delta
        untouched &= zero or delta == 0
    if untouched and start == 0:
        return start
    if total == 0:
        return 0.0
    rounded = round_exactly(total, dtype)
    return -0.0 if rounded == 0 and total < 0 else rounded


def round_exactly(value: Fraction, dtype: str) -> float:
    """Returns a rational number rounded to a dtype, to nearest, ties to even."""
    magnitude = abs(value)
    if magnitude == 0:
        return 0.0
    quantum = LOWEST[dtype]
    # The exponent of the leading bit, from the integer logarithm of numerator and denominator.
    lead = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** lead:
        lead -= 1
    quantum = max(quantum, lead - PRECISION[dtype] + 1)
    units = magnitude / Fraction(2) ** quantum
    whole = round(units)  # Python's round of a Fraction is to nearest, ties to even
    result = whole * Fraction(2) ** quantum
    if result >= Fraction(2) ** HIGHEST[dtype]:
        return inf if value > 0 else -inf
    return float(result) if value > 0 else -float(result)


def round_block(values: Tensor, dtype: str) -> Tensor:
    """Returns float64 values rounded once to a dtype, still in float64."""
    if dtype == "F64":
        return values
    unit = spacing(values, dtype)
    rounded = torch.round(values / unit) * unit
    limit = 2.0 ** HIGHEST[dtype]
    beyond = torch.copysign(torch.full_like(rounded, inf), values)
    return torch.where(rounded.abs() >= limit, beyond, rounded)


def delta_rounded_first(
    base: Tensor,
    merged: Tensor,
    products: tuple[Product, ...],
    reach: Tensor,
    index: Tensor | slice,
    *,
    dtype: str,
    device: str,
) -> bool:
    """Says whether rows are ``round(w + round(delta))``, the delta evaluated in float32, as PEFT does it."""
    w, m = base.to(device, torch.float64), merged.to(device, torch.float64)
    low, high = w.clone(), w.clone()
    inner = sum(int(product.left.shape[1]) for product in products)
    error = reach[index].to(device)[:, None] * ((inner + 4) * 2.0**-24)
    delta = torch.zeros_like(w)
    for product in products:
        delta += product.rows(index, device)
    low = round_block(w + round_block(delta - error, dtype), dtype)
    high = round_block(w + round_block(delta + error, dtype), dtype)
    return bool(((low <= m) & (m <= high)).all())
