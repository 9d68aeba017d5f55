"""Single merges that a plausible implementation gets wrong, each with the answer worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapterhub_tools.linalg.rounding import BLOCK_ELEMENTS
from tests.property.exact_oracle import FORMATS
from tests.property.merge_cases import Case, Product, through_rounder


def case(to, start, products, *, start_format=None):
    """A merge of one row; ``products`` are (format, B row, A, alpha, rank, rooted) in plain numbers."""
    start_format = FORMATS[start_format or to]
    return Case(
        start_format=start_format,
        to=FORMATS[to],
        start=encode([start], start_format),
        products=[
            Product(
                format=FORMATS[name],
                left=encode([b], FORMATS[name]),
                right=encode(a, FORMATS[name]),
                alpha=alpha,
                rank=rank,
                rooted=rooted,
                multiplier=1.0,
                row=0,
                column=0,
                transposed=False,
            )
            for name, b, a, alpha, rank, rooted in products
        ],
    )


def encode(rows, of):
    out = np.array([[_pattern(float(v), of) for v in row] for row in rows], dtype=np.uint64)
    return out.reshape(len(rows), -1)


def _pattern(value, of):
    sign = of.sign if math.copysign(1, value) < 0 else 0
    for size in _candidates(abs(value), of):
        if float(of.magnitude(size)) == abs(value):
            return sign | size
    raise ValueError(f"{value!r} is not a {of.name}")


def _candidates(size, of):
    if size == 0:
        return [0]
    exponent = max(math.frexp(size)[1] - 1, of.quantum + of.fraction_bits)
    whole = int(math.ldexp(size, -(exponent - of.fraction_bits)))
    return [whole + ((exponent - of.fraction_bits - of.quantum) << of.fraction_bits)]


def result(item):
    """The merged row as Python floats; also compares it with the oracle."""
    found, wrong = through_rounder(item)
    assert wrong is None
    assert (found == item.expected()).all()
    return [float(v) for v in item.to.tensor(found).double().reshape(-1)]


def same(found, expected):
    return [(v, math.copysign(1, v)) for v in found] == [(v, math.copysign(1, v)) for v in expected]


def test_a_tail_far_below_a_binary64_tie_counts():
    # 1 - 2^-54 is halfway between 1 - 2^-53 and 1; the tail 2^-200 is below what two doubles hold of it.
    item = case(
        "F64", [1.0], [("F32", [-(2.0**-27), -(2.0**-100)], [[2.0**-27], [2.0**-100]], 1.0, 1, False)]
    )
    assert result(item) == [1 - 2.0**-53]
    item = case("F64", [1.0], [("F32", [-(2.0**-27), 2.0**-100], [[2.0**-27], [2.0**-100]], 1.0, 1, False)])
    assert result(item) == [1.0]


@pytest.mark.parametrize(("tail", "expected"), [(2.0**-100, 1 + 2.0**-52), (0.0, 1.0), (-(2.0**-100), 1.0)])
def test_a_tail_far_above_a_binary64_tie_counts(tail, expected):
    item = case("F64", [1.0], [("F32", [2.0**-26, tail], [[2.0**-27], [2.0**-100]], 1.0, 1, False)])
    assert result(item) == [expected]


def test_a_third_makes_an_exact_tie():
    # s·B·A = (1/3)·(3·2^-9) is exactly half a unit, although no binary number is 1/3.
    for start, expected in ((1.0, 1.0), (1 + 2.0**-7, 1 + 2.0**-6)):
        item = case("BF16", [start], [("BF16", [3.0], [[2.0**-8]], 1.0, 3, False)])
        assert result(item) == [expected]


def test_rounding_through_float32_would_round_twice():
    item = case("BF16", [1.0], [("F32", [1.0, 1.0], [[2.0**-8], [2.0**-40]], 1.0, 1, False)])
    assert result(item) == [1 + 2.0**-7]
    item = case("F16", [2.0**-24], [("F32", [1.0, 1.0], [[-(2.0**-25)], [2.0**-60]], 1.0, 1, False)])
    assert result(item) == [2.0**-24]
    item = case("F16", [0.0], [("F32", [1.0], [[2.0**-25]], 1.0, 1, False)])
    assert result(item) == [0.0]


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_terms_beyond_the_format_may_cancel(name):
    # The bound on the terms exceeds the largest number of the format; the results are ordinary.
    big = 2.0**100
    item = case(
        name, [1.0, 0.5], [("F32", [big, -big, 1.0], [[big, 1.0], [big, 1.0], [0, 0.25]], 1.0, 1, False)]
    )
    assert result(item) == [1.0, 0.75]


def test_a_scaling_beyond_binary64_over_a_delta_of_zero():
    item = case("BF16", [1.0, -0.0], [("BF16", [0.0], [[1.0, 1.0]], 1e308, 1, False)])
    item.products[0].multiplier = 1e308
    assert same(result(item), [1.0, -0.0])


def test_a_scaling_beyond_binary64_overflows_where_it_acts():
    item = case("BF16", [1.0, 1.0], [("BF16", [1.0], [[0.0, 1.0]], 1e308, 1, False)])
    item.products[0].multiplier = 1e308
    assert through_rounder(item)[1] == (0, 1)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_delta_below_binary64_decides_the_sign_of_zero(name):
    tiny = 2.0**-120
    item = case(name, [-0.0, 0.0, -0.0, 0.0], [("BF16", [tiny], [[tiny, -tiny, 0, 0]], 5e-324, 3, False)])
    assert same(result(item), [0.0, -0.0, -0.0, 0.0])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_signed_zeros(name):
    item = case(
        name, [1.0, -0.0, 0.0, -0.0], [("F32", [1.0, 1.0], [[-1, 0, 0, 1], [0, 0, 0, -1]], 1.0, 1, False)]
    )
    # x - x is +0; a delta of exactly zero, also by cancellation, keeps the base.
    assert same(result(item), [0.0, -0.0, 0.0, -0.0])


@pytest.mark.parametrize("start", sorted(FORMATS))
@pytest.mark.parametrize("to", sorted(FORMATS))
def test_a_block_that_no_product_reaches_keeps_its_zeros(start, to):
    # Rows are long enough to be blocks of their own; only the second has a product.
    columns = BLOCK_ELEMENTS
    item = case(to, [-0.0], [("F32", [1.0], [[1.0]], 1.0, 1, False)], start_format=start)
    item.start = np.full((2, columns), item.start[0, 0])
    product = item.products[0]
    product.left = np.array([[0], product.left[0]], dtype=np.uint64)
    found, wrong = through_rounder(item)
    assert wrong is None
    assert (found[0] == item.to.sign).all()
    assert found[1, :2].tolist() == [encode([[1.0]], item.to)[0, 0], item.to.sign]


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("alpha", [1.0, 5e-324, 2.0**900])
def test_deltas_of_two_adapters_that_cancel_keep_the_base(name, alpha):
    one = ("F32", [1.0], [[1.0, 3.0]], alpha, 3, False)
    other = ("F32", [-1.0], [[1.0, 3.0]], alpha, 3, False)
    assert same(result(case(name, [-0.0, 1.0], [one, other])), [-0.0, 1.0])
    # All bits of a factor and of the scale in use: the parts of the sum are zero only together.
    full, alpha = 1 - 2.0**-24, 0.1 * alpha
    one, other = (("F32", [sign], [[full, 3.0]], alpha, 1, False) for sign in (1.0, -1.0))
    assert same(result(case(name, [-0.0, 1.0], [one, other])), [-0.0, 1.0])


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
def test_the_largest_number_and_the_first_beyond(name):
    of = FORMATS[name]
    largest = float(of.magnitude(of.infinity - 1))
    half = float((of.magnitude(of.infinity - 1) - of.magnitude(of.infinity - 2)) / 2)
    b, a = 2.0 ** (math.frexp(half)[1] // 2), half / 2.0 ** (math.frexp(half)[1] // 2)
    factor = "F64" if name == "F64" else "F32"
    tail = 2.0**-20
    item = case(name, [largest], [(factor, [b, 1.0], [[a], [-tail]], 1.0, 1, False)])
    assert result(item) == [largest]
    item = case(name, [largest], [(factor, [b], [[a]], 1.0, 1, False)])
    assert through_rounder(item)[1] == (0, 0)
