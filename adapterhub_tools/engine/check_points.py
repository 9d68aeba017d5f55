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
    check = RowCheck(wrong=0, first=[], steps=0.0)
    suspects = _suspects(base, merged, products, reach, index, dtype=dtype, device=device)
    numbers = torch.tensor(rows, dtype=torch.int64)
    if suspects is None:
        w = base.to(device, torch.float64)
        x = w.clone()
        for product in products:
            x += product.rows(index, device)
        places = torch.arange(w.numel())
        _examine(check, w.reshape(-1), merged, x.reshape(-1), places, numbers, reach, products, dtype, limit)
    elif len(suspects):
        local, columns = suspects // base.shape[1], suspects % base.shape[1]
        w = base.reshape(-1)[suspects].double()
        x = w.clone()
        for product in products:
            left, right = product.left[numbers[local]], product.right[:, columns].t()
            x += product.scale * (left * right).sum(dim=1)
        _examine(check, w, merged, x, suspects, numbers, reach, products, dtype, limit)
    return check


def _suspects(
    base: Tensor,
    merged: Tensor,
    products: tuple[Product, ...],
    reach: Tensor,
    index: Tensor | slice,
    *,
    dtype: str,
    device: str,
) -> Tensor | None:
    """Returns the flat places that float32 does not show to be right; None if it is not worth trying.

    Both ends of an interval around x that covers every error of float32 have to round to the merged value.
    """
    if dtype not in ("BF16", "F16") or base.dtype == torch.float64:
        return None
    kind = merged.dtype
    # A GPU may multiply float32 with fewer bits (TF32) if the process allows that; float64 it never does.
    wide = torch.float32 if device == "cpu" else torch.float64
    x = base.to(device, wide)
    for product in products:
        left = (product.left[index] * product.scale).to(device, wide)
        x = torch.addmm(x, left, product.right.to(device, wide))
    x = x.to(torch.float32)
    inner = sum(int(product.left.shape[1]) for product in products)
    bound = (reach[index] * ((inner + 8 * (len(products) + 1)) * 2.0**-23)).to(device, torch.float32)
    error = x.abs().mul_(2.0**-21).add_(bound[:, None])
    bits = merged.to(device).view(torch.int16)
    wrong = torch.sub(x, error).to(kind).view(torch.int16) != bits
    wrong |= error.add_(x).to(kind).view(torch.int16) != bits
    if not bool(torch.isfinite(x.sum())):
        return None
    found = torch.nonzero(wrong.reshape(-1)).reshape(-1).cpu()
    return None if len(found) > wrong.numel() // 8 else found


def _examine(
    check: RowCheck,
    w: Tensor,
    merged: Tensor,
    x: Tensor,
    places: Tensor,
    rows: Tensor,
    reach: Tensor,
    products: tuple[Product, ...],
    dtype: str,
    limit: int,
) -> None:
    """Decides single points, given as flat places, and adds what is wrong to the check.

    Args:
        check: what is added to.
        w: the base's values there, float64.
        merged: all merged values of these rows, as stored.
        x: the sums there, in float64.
        places: flat places in ``merged``.
        rows: the numbers of these rows in the matrix.
        reach: see ``check_rows``.
        products: the deltas.
        dtype: of the merged values.
        limit: how many wrong weights to describe.
    """
    width = max(1, int(merged.shape[1]))
    local, columns = places // width, places % width
    m = merged.reshape(-1)[places].to(w.device, torch.float64)
    bound = reach[rows[local]].to(w.device)
    inner = sum(int(product.left.shape[1]) for product in products)
    error = (w.abs() + bound + m.abs()).mul_((inner + 8 * (len(products) + 1)) * 2.0**-53).add_(1e-300)
    unit = spacing(m, dtype)
    distance = x - m
    # Just below a power of two the spacing is half as wide.
    narrow = (m.view(torch.int64) & ((1 << 52) - 1)) == 0
    narrow &= unit > (2.0 ** LOWEST[dtype] if LOWEST[dtype] > -1074 else 5e-324)
    narrow &= (distance * m) < 0
    gap = torch.where(narrow, unit / 4, unit / 2)
    sure = (distance.abs() + error < gap) & torch.isfinite(m) & (m != 0)
    # Where every term of the delta is zero the base's bits stay, and so the sign of a zero.
    sure |= (bound == 0) & (m == w) & (torch.signbit(m) == torch.signbit(w))
    certain = ~sure & (distance.abs() - error > gap)
    before = check.wrong
    for point in torch.nonzero(~sure & ~certain).reshape(-1).tolist():
        at = (int(rows[local[point]]), int(columns[point]))
        expected = exact_value(float(w[point]), products, *at, dtype)
        found = float(m[point])
        if found == expected and str(found) == str(expected):  # the text tells the zeros apart
            continue
        check.wrong += 1
        _describe(check, at, found, expected, limit)
    check.wrong += int(certain.sum())
    for point in torch.nonzero(certain).reshape(-1)[:limit].tolist():
        at = (int(rows[local[point]]), int(columns[point]))
        expected = exact_value(float(w[point]), products, *at, dtype)
        _describe(check, at, float(m[point]), expected, limit)
    if check.wrong > before:
        largest = spacing(torch.maximum(torch.maximum(w.abs(), m.abs()), (x - w).abs()), dtype)
        steps = ((distance.abs() - error).clamp(min=0) / largest - 0.5).clamp(min=0)
        check.steps = max(check.steps, float(steps.nan_to_num(nan=inf).max()))


def _describe(check: RowCheck, at: tuple[int, int], found: float, expected: float, limit: int) -> None:
    if len(check.first) < limit:
        check.first.append(Wrong(row=at[0], column=at[1], found=found, expected=expected))


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
