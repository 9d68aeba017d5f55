"""What a correctly rounded merge must give, from the definitions alone.

Nothing here comes from the package: IEEE 754 formats are decoded from their bits (§3.4), rounding to nearest
with ties to even follows §4.3.1 twice over (a search among the encoded numbers, and a quotient), and sums are
exact integers or intervals between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary interchange format: a sign, ``exponent_bits`` and ``fraction_bits``."""

    name: str
    exponent_bits: int
    fraction_bits: int
    torch: torch.dtype
    unsigned: np.dtype

    @property
    def width(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.fraction_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def quantum(self) -> int:
        """The exponent of the smallest subnormal number."""
        return 1 - self.bias - self.fraction_bits

    def magnitude(self, pattern: int) -> Fraction:
        """The value of a pattern without its sign; infinity reads as 2^(emax + 1), as §4.3.1 rounds."""
        pattern &= self.sign - 1
        biased, fraction = pattern >> self.fraction_bits, pattern & ((1 << self.fraction_bits) - 1)
        if biased == 0:
            return fraction * Fraction(2) ** self.quantum
        return ((1 << self.fraction_bits) + fraction) * Fraction(2) ** (biased - 1 + self.quantum)

    def value(self, pattern: int) -> Fraction:
        """The value of a finite pattern."""
        if pattern & (self.sign - 1) >= self.infinity:
            raise ValueError(f"{pattern:#x} is not a finite {self.name}")
        size = self.magnitude(pattern)
        return -size if pattern & self.sign else size

    def tensor(self, patterns: np.ndarray) -> torch.Tensor:
        """Patterns as a torch tensor of this format."""
        signed = {16: np.int16, 32: np.int32, 64: np.int64}[self.width]
        return torch.from_numpy(np.ascontiguousarray(patterns.astype(self.unsigned)).view(signed)).view(
            self.torch
        )

    def patterns(self, tensor: torch.Tensor) -> np.ndarray:
        """The patterns of a tensor of this format."""
        signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[self.width]
        return tensor.contiguous().view(signed).numpy().view(self.unsigned)


def _format(name, exponent_bits, fraction_bits, torch_dtype):
    width = 1 + exponent_bits + fraction_bits
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        fraction_bits=fraction_bits,
        torch=torch_dtype,
        unsigned=np.dtype(f"u{width // 8}"),
    )


FORMATS = {
    item.name: item
    for item in (
        _format("F64", 11, 52, torch.float64),
        _format("F32", 8, 23, torch.float32),
        _format("BF16", 8, 7, torch.bfloat16),
        _format("F16", 5, 10, torch.float16),
    )
}


def nearest_by_search(x: Fraction, to: Format) -> int:
    """The pattern nearest to x, of two equally near ones the even one; found among the encoded numbers.

    Magnitudes grow with their patterns, so the two neighbours of \\|x\\| are found by bisection.
    """
    size, sign = abs(x), to.sign if x < 0 else 0
    low, high = 0, to.infinity
    if size >= to.magnitude(high):
        return sign | high
    while high - low > 1:
        middle = (low + high) // 2
        if to.magnitude(middle) <= size:
            low = middle
        else:
            high = middle
    below, above = size - to.magnitude(low), to.magnitude(high) - size
    if below != above:
        return sign | (low if below < above else high)
    return sign | (low if low % 2 == 0 else high)


def nearest_by_quotient(numerator: int, denominator: int, to: Format) -> int:
    """The same pattern by integer division: x is rounded to a multiple of its last place."""
    if numerator == 0:
        return 0
    sign, size = (to.sign, -numerator) if numerator < 0 else (0, numerator)
    exponent = size.bit_length() - denominator.bit_length()
    if size << max(0, -exponent) < denominator << max(0, exponent):
        exponent -= 1
    place = max(exponent - to.fraction_bits, to.quantum)
    if place < 0:
        whole, rest = divmod(size << -place, denominator)
        twice = 2 * rest - denominator
    else:
        whole, rest = divmod(size, denominator << place)
        twice = 2 * rest - (denominator << place)
    if twice > 0 or (twice == 0 and whole % 2):
        whole += 1
    # Counting from the first pattern of the place: the hidden bit and a carry move to the exponent.
    pattern = whole + ((place - to.quantum) << to.fraction_bits)
    return sign | min(pattern, to.infinity)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The number coefficient·√root."""

    coefficient: Fraction
    root: int = 1


def combine(parts: Sequence[Part]) -> list[Part]:
    """Adds parts whose roots are commensurable (a·b is a square); what is left is zero only if empty.

    √a = √(a·b)/b · √b. Roots of pairwise incommensurable numbers are independent over the rationals.
    """
    sums: dict[int, Fraction] = {1: Fraction(0)}
    for part in parts:
        for other in sums:
            root = isqrt(part.root * other)
            if root * root == part.root * other:
                sums[other] += part.coefficient * Fraction(root, other)
                break
        else:
            sums[part.root] = part.coefficient
    return [Part(coefficient=c, root=r) for r, c in sums.items() if c]


def enclose(parts: Sequence[Part], bits: int) -> tuple[Fraction, Fraction]:
    """Bounds of the sum, each irrational root within 2^-bits."""
    low = high = Fraction(0)
    for part in parts:
        if part.root == 1:
            ends = (part.coefficient, part.coefficient)
        else:
            whole = isqrt(part.root << (2 * bits))
            ends = tuple(
                sorted((part.coefficient * whole / (1 << bits), part.coefficient * (whole + 1) / (1 << bits)))
            )
        low, high = low + ends[0], high + ends[1]
    return low, high


def merged(start: int, start_format: Format, delta: Sequence[Part], to: Format) -> tuple[int, Fraction]:
    """The pattern of one merged weight, and the exact value (to 2^-256 or better if irrational).

    A delta of exactly zero keeps the sign of a zero start; any other exact zero is +0; a result that rounds
    to zero keeps its sign; the infinity pattern stands for an overflow.
    """
    w = start_format.value(start)
    change = combine(delta)
    if not change:
        if w == 0:
            return (to.sign if start & start_format.sign else 0), w
        return nearest_by_search(w, to), w
    total = combine([Part(coefficient=w), *change])
    if not total:
        return 0, Fraction(0)
    bits = 256
    while True:
        low, high = enclose(total, bits)
        if low * high > 0:
            pattern = nearest_by_search(low, to)
            if low == high or pattern == nearest_by_search(high, to):
                return pattern, low
        bits *= 2


def integers(values: np.ndarray) -> tuple[list[list[int]], int]:
    """Finite float64 values as Python integers m and one exponent e: value = m·2^e, exactly."""
    mantissas, exponents = np.frexp(values)
    whole = (mantissas * 2.0**53).astype(np.int64)
    used = whole != 0
    least = int(exponents[used].min()) if used.any() else 0
    shifts = np.where(used, exponents - least, 0)
    rows = [
        [m << s for m, s in zip(ms, ss, strict=True)]
        for ms, ss in zip(whole.tolist(), shifts.tolist(), strict=True)
    ]
    return rows, least - 53


def product(left: np.ndarray, right: np.ndarray) -> tuple[list[list[int]], int]:
    """The exact matrix product as integers and one exponent.

    Each row of ``right`` is packed into one long integer with room for every sum (Kronecker substitution), so
    that a row of the product costs k multiplications of long integers.
    """
    a, a_exponent = integers(left)
    b, b_exponent = integers(right)
    largest = max((abs(m) for row in a for m in row), default=0) * max(
        (abs(m) for row in b for m in row), default=0
    )
    lane = ((largest * max(1, right.shape[0])).bit_length() + 2 + 7) // 8
    count, half = right.shape[1], 1 << (8 * lane - 1)
    offset = int.from_bytes(half.to_bytes(lane, "little") * count, "little")
    packed = []
    for row in b:
        positive = b"".join(m.to_bytes(lane, "little") if m > 0 else bytes(lane) for m in row)
        negative = b"".join((-m).to_bytes(lane, "little") if m < 0 else bytes(lane) for m in row)
        packed.append(int.from_bytes(positive, "little") - int.from_bytes(negative, "little"))
    out = []
    for row in a:
        total = offset
        for m, long in zip(row, packed, strict=True):
            if m:
                total += m * long
        data = total.to_bytes(lane * count, "little")
        out.append(
            [int.from_bytes(data[at : at + lane], "little") - half for at in range(0, lane * count, lane)]
        )
    return out, a_exponent + b_exponent


def merged_matrix(
    start: np.ndarray, left: np.ndarray, right: np.ndarray, scale: Part, to: Format
) -> np.ndarray:
    """The patterns of round(start + scale·left·right), every element exactly; all arguments are float64.

    No element may overflow or start at −0 (``merged`` covers both); irrational scales are enclosed to 2^-400.
    """
    w, w_exponent = integers(start)
    p, p_exponent = product(left, right)
    top, bottom = scale.coefficient.numerator, scale.coefficient.denominator
    root = isqrt(scale.root)
    ends = [top * root]
    if root * root != scale.root:
        root = isqrt(scale.root << 800)
        ends, bottom = [top * root, top * (root + 1)], bottom << 400
    w_shift, p_shift = max(0, w_exponent - p_exponent), max(0, p_exponent - w_exponent)
    denominator_shift = max(0, -min(w_exponent, p_exponent))
    up = max(0, min(w_exponent, p_exponent))
    denominator = bottom << denominator_shift
    out = np.empty(start.shape, dtype=to.unsigned)
    for i, (ws, ps) in enumerate(zip(w, p, strict=True)):
        fixed = [(m * bottom) << (w_shift + up) for m in ws]
        shift = p_shift + up
        patterns = [
            nearest_by_quotient(m + ((d * ends[0]) << shift), denominator, to)
            for m, d in zip(fixed, ps, strict=True)
        ]
        for end in ends[1:]:
            others = [
                nearest_by_quotient(m + ((d * end) << shift), denominator, to)
                for m, d in zip(fixed, ps, strict=True)
            ]
            if others != patterns:
                raise ArithmeticError("2^-400 does not decide this case")
        out[i] = patterns
    return out
