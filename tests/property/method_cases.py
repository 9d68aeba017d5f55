"""Small merges by every exact method but LoRA: random weights and factors, and what must come out, exactly.

The formulas are written from the papers (each method's own page of ``methods/`` cites them) on Fractions; a
result is rounded by searching the encoded numbers, comparing squares where a root enters.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import torch

from adapterhub_tools import registry
from adapterhub_tools.errors import LossyError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.linalg.weight import Weight
from tests.property.case_strategies import any_pattern, moderate
from tests.property.exact_oracle import FORMATS, Format

Compare = Callable[[Fraction], int]
"""b -> the sign of x − b."""


@dataclass(kw_only=True)
class MethodCase:
    """One merge of a small matrix by one method.

    Attributes:
        method: the method's name.
        hparams: its hyperparameters.
        kind: the module's kind.
        factors: role -> tensor.
        start: W, as patterns of ``start_format``.
        shape: of the weight as stored.
        value: (row, column) -> how x compares with a number; None where the merge must be refused.
    """

    method: str
    hparams: dict
    kind: str
    factors: dict[str, torch.Tensor]
    start: np.ndarray
    start_format: Format
    to: Format
    shape: tuple[int, ...]
    value: Callable[[int, int], Compare]
    refused: bool = False


def of_rational(x: Fraction) -> Compare:
    """Compares a rational number."""
    return lambda b: (x > b) - (x < b)


def of_root(constant: Fraction, gain: Fraction, top: Fraction, square: Fraction) -> Compare:
    """Compares p + g·a/√q with b: the sign of g·a/√q − (b − p), by squares where both have one sign."""

    def compare(b: Fraction) -> int:
        left, right = gain * top, b - constant
        signs = (left > 0) - (left < 0), (right > 0) - (right < 0)
        if signs[0] != signs[1]:
            return 1 if signs[0] > signs[1] else -1
        squares = left * left, right * right * square
        return signs[0] * ((squares[0] > squares[1]) - (squares[0] < squares[1]))

    return compare


def of_interval(ends: Callable[[int], tuple[Fraction, Fraction]]) -> Compare:
    """Compares a number that is known to any precision and never equals what it is compared with."""

    def compare(b: Fraction) -> int:
        for bits in (400, 1600, 6400, 25600):
            low, high = ends(bits)
            if low > b or high < b:
                return 1 if low > b else -1
        raise ArithmeticError("2^-25600 does not decide this case")

    return compare


def nearest(compare: Compare, to: Format, *, zero: int) -> tuple[int, bool]:
    """The pattern nearest to x, ties to even, and whether x is a tie; ``zero`` is that of an exact 0."""
    sign = compare(Fraction(0))
    if sign == 0:
        return zero, False

    def size(b: Fraction) -> int:
        return sign * compare(sign * b)

    bit = to.sign if sign < 0 else 0
    low, high = 0, to.infinity
    if size(to.magnitude(high)) >= 0:
        return bit | high, False
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(to.magnitude(middle)) >= 0 else (low, middle)
    side = size((to.magnitude(low) + to.magnitude(high)) / 2)
    if side == 0:
        return bit | (low if low % 2 == 0 else high), True
    return bit | (high if side > 0 else low), False


def expected(case: MethodCase, kinds: Counter) -> np.ndarray:
    """The right patterns."""
    out = np.empty(case.start.shape, dtype=case.to.unsigned)
    for (i, j), pattern in np.ndenumerate(case.start):
        w = case.start_format.value(int(pattern))
        minus = w == 0 and int(pattern) & case.start_format.sign
        compare = case.value(i, j)
        bits, tie = nearest(compare, case.to, zero=case.to.sign if minus else 0)
        out[i, j] = bits
        size = bits & (case.to.sign - 1)
        kinds["elements"] += 1
        kinds["tie"] += tie
        kinds["overflow"] += size >= case.to.infinity
        kinds["minus zero"] += bits == case.to.sign
        kinds["exact zero"] += compare(Fraction(0)) == 0
        kinds["subnormal"] += 0 < size < 1 << case.to.fraction_bits
        kinds["non-zero to zero"] += size == 0 and compare(Fraction(0)) != 0
    return out


def expression_of(case: MethodCase, start: torch.Tensor) -> Any:
    """The expression that the case's method makes.

    Raises:
        LossyError: it cannot be.
    """
    weight = Weight(
        kind=case.kind,
        shape=case.shape,
        read_rows=lambda first, count: start[first : first + count].to(torch.float64, copy=True),
    )
    method = registry.load("methods", case.method).IMPLEMENTATION.from_hparams(case.hparams)
    if method.additive:
        return DeltaSum([method.delta(case.factors, weight)], case.start.shape[0])
    return method.expression(case.factors, weight)


def check_bounds(case: MethodCase) -> tuple[int, int]:
    """Evaluates a case in float64 and compares it with its bounds; returns how many were finite, and of all.

    A bound of infinity leaves a value to exact arithmetic, and so does a result that is no number.
    """
    start = case.start_format.tensor(case.start)
    expression = expression_of(case, start)
    block = start.to(torch.float64, copy=True)
    expression.evaluate(block, 0)
    finite = 0
    for (i, j), found in np.ndenumerate(block.numpy()):
        errors = [expression.unit * (abs(found) + 2 * expression.bounds[i])]
        if case.method == "dora":
            at = np.array([i]), np.array([j]), np.array([found])
            errors.append(float(expression._errors(*at)[0]))
        for error in errors:
            if np.isfinite(found) and np.isfinite(error):
                finite += 1
                compare, slack = case.value(i, j), Fraction(error) * (1 + Fraction(1, 2**20))
                inside = compare(Fraction(found) - slack) >= 0 >= compare(Fraction(found) + slack)
                assert inside, describe(case, block.numpy(), block.numpy(), np.array([(i, j)]))
    return finite, block.numel()


def run(case: MethodCase, kinds: Counter, device: str = "cpu") -> None:
    """Runs a case through its method and BlockRounder, and compares every bit."""
    start = case.start_format.tensor(case.start)
    out = case.to.tensor(np.full(case.start.shape, 0x5A5A))
    try:
        rounder = BlockRounder(
            expression_of(case, start),
            columns=case.start.shape[1],
            start=PACKAGE_FORMATS[case.start_format.name],
            to=PACKAGE_FORMATS[case.to.name],
            device=device,
        )
        wrong = rounder.round_rows(start, out, 0)
    except LossyError:
        if not case.refused:
            raise
        kinds["refused"] += 1
        return
    assert not case.refused
    right = expected(case, kinds)
    beyond = (right & (case.to.sign - 1)) >= case.to.infinity
    if beyond.any():
        assert wrong is not None
        assert beyond[wrong.row, wrong.column]
        return
    assert wrong is None
    found = case.to.patterns(out)
    bad = np.argwhere(found != right)
    assert not len(bad), describe(case, found, right, bad)


def describe(case: MethodCase, found: np.ndarray, right: np.ndarray, bad: np.ndarray) -> str:
    """What went in and what came out, in bits."""
    at = tuple(bad[0])
    factors = {role: (str(t.dtype), t.double().tolist()) for role, t in case.factors.items()}
    return (
        f"{case.method} {case.kind} {case.hparams} {case.start_format.name} -> {case.to.name} at {at}: "
        f"{found[at]!r}, right is {right[at]!r}; W = {case.start.tolist()}, {factors}"
    )


# What the cases are made of.


def pick_formats(r: random.Random) -> tuple[Format, Format, Format]:
    """Formats of W, of the output and of the factors."""
    start = r.choice(("BF16", "BF16", "F16", "F32", "F32", "F64"))
    to = start if r.random() < 0.6 else r.choice(("BF16", "F16", "F32", "F64"))
    return FORMATS[start], FORMATS[to], FORMATS[r.choice(("BF16", "F16", "F32", "F32", "F64"))]


def few_bits(r: random.Random, of: Format) -> int:
    """A pattern of a number with two or three significant bits near 1: sums and products of them tie."""
    one = of.bias << of.fraction_bits
    exponent = r.randrange(-3, 4) << of.fraction_bits
    fraction = r.randrange(8) << (of.fraction_bits - 3)
    return one + exponent + fraction | (of.sign if r.random() < 0.5 else 0)


def values(r: random.Random, of: Format, shape: tuple[int, ...], flavour: str) -> np.ndarray:
    """Patterns of a flavour: ``"round"`` (few bits), ``"mild"`` or ``"wild"``, zeros among them."""
    draw = {
        "round": lambda: few_bits(r, of),
        "mild": lambda: moderate(r, of, r.choice((0, 3, 10))),
        "wild": lambda: any_pattern(r, of),
    }[flavour]
    count = int(np.prod(shape))
    zero = (0, of.sign)
    flat = [r.choice(zero) if r.random() < 0.08 else draw() for _ in range(count)]
    return np.array(flat, dtype=np.uint64).reshape(shape)


def numbers(patterns: np.ndarray, of: Format) -> np.ndarray:
    """Patterns as exact numbers."""
    out = np.empty(patterns.shape, dtype=object)
    for index, pattern in np.ndenumerate(patterns):
        out[index] = of.value(int(pattern))
    return out


def enclosed_root(value: int, bits: int) -> tuple[Fraction, Fraction]:
    """Bounds of √value."""
    whole = isqrt(value << (2 * bits))
    return Fraction(whole, 1 << bits), Fraction(whole + 1, 1 << bits)
