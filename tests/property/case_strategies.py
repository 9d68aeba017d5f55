"""Small merges that are hard to round: ties and what is near, cancellation, subnormals, overflow, zeros."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from tests.property.exact_oracle import FORMATS, Format, nearest_by_search
from tests.property.merge_cases import Case, Product


def any_pattern(r: random.Random, of: Format, *, zeros: bool = True) -> int:
    """A finite pattern, edges of the format more often than chance would give."""
    one = of.bias << of.fraction_bits
    normal = 1 << of.fraction_bits
    choices = [
        lambda: r.randrange(of.infinity),
        lambda: r.randrange(max(normal, one - 12 * normal), min(of.infinity, one + 12 * normal)),
        lambda: r.randrange(1, normal),
        lambda: of.infinity - 1 - r.randrange(3),
        lambda: normal + r.randrange(-2, 3),
        lambda: one + r.randrange(-2, 3),
        lambda: normal * r.randrange(1, of.infinity >> of.fraction_bits),
        lambda: 0 if zeros else 1,
    ]
    return r.choice(choices)() | (of.sign if r.random() < 0.5 else 0)


def moderate(r: random.Random, of: Format, spread: int) -> int:
    """A pattern of a number near 1, within 2^±spread."""
    one = of.bias << of.fraction_bits
    exponent = r.randrange(-spread, spread + 1)
    least = 1 - of.bias if of.name != "F16" else -14
    biased = max(min(exponent, of.bias), least) << of.fraction_bits
    return one + biased + r.randrange(1 << of.fraction_bits) | (of.sign if r.random() < 0.5 else 0)


def power(exponent: int, of: Format) -> int:
    """The pattern of 2^exponent, or of the nearest power that the format has."""
    exponent = max(of.quantum, min(exponent, of.bias))
    return nearest_by_search(Fraction(2) ** exponent, of)


_SCALES = (
    (1.0, 1, False, 1.0),
    (16.0, 12, False, 1.0),
    (16.0, 3, False, 1.0),
    (1.0, 3, False, 1.0),
    (0.1, 7, False, 1.0),
    (16.0, 8, False, 0.3),
    (float.fromhex("0x1.fffffffffffffp-3"), 13, False, float.fromhex("0x1.0000000000001p+1")),
    (2.0**-40, 5, False, 1.0),
    (2.0**40, 6, False, -1.0),
    (5e-324, 3, False, 1.0),
    (1e308, 3, False, 1.0),
    (1e308, 1, False, 1e10),
    (2.0**-310, 1, False, 1.0),
    (0.0, 4, False, 1.0),
    (16.0, 16, True, 1.0),
    (16.0, 8, True, 1.0),
    (32.0, 2, True, -0.7),
    (8.0, 12, True, 1.0),
    (1e-30, 7, True, 1.0),
    (2.0**300, 3, True, 1.0),
)
_MILD = [s for s in _SCALES if 1e-3 < abs(s[0] * s[3]) < 100]


def random_product(r: random.Random, of: Format, rows: int, columns: int, flavour: str) -> Product:
    """Any factors; ``flavour`` says whether they may be extreme."""
    k = r.randrange(0 if flavour == "wild" else 1, 4)
    row, column = r.choice((0, r.randrange(rows))), r.choice((0, r.randrange(columns)))
    shape = (r.randrange(1, rows - row + 1), r.randrange(1, columns - column + 1))

    def draw() -> int:
        if flavour == "wild":
            return any_pattern(r, of)
        return 0 if r.random() < 0.15 else moderate(r, of, r.choice((0, 3, 12)))

    left = np.array([[draw() for _ in range(k)] for _ in range(shape[0])], dtype=np.uint64)
    right = np.array([[draw() for _ in range(shape[1])] for _ in range(k)], dtype=np.uint64)
    alpha, rank, rooted, multiplier = r.choice(_SCALES if flavour == "wild" else _MILD)
    return Product(
        format=of,
        left=left.reshape(shape[0], k),
        right=right.reshape(k, shape[1]),
        alpha=alpha,
        rank=rank,
        rooted=rooted,
        multiplier=multiplier,
        row=row,
        column=column,
        transposed=r.random() < 0.4,
    )


def aimed_product(r: random.Random, case: Case, of: Format) -> Product:
    """Factors that take the first row to midpoints of the output format, or just beside them.

    The first rank carries the distance from W to a midpoint, the second a tail far below it, the third and
    fourth large terms that cancel.
    """
    to, start = case.to, case.start_format
    columns = case.start.shape[1]
    root = r.choice((1, 1, 1, 2, 3, 12))
    alpha, rank, rooted = float(r.choice((1, 2, 16, 0.25))), root, False
    if r.random() < 0.1:
        rank, rooted = r.choice((4, 16, 2)), True
    if to.name == "F64" and r.random() < 0.3:
        alpha = 2.0 ** r.randrange(-900, 0)
    scale = Fraction(alpha) / rank
    left = [power(r.randrange(-8, 3), of)]
    exponents = [r.randrange(-40, 0), r.randrange(0, 20)]
    left += [power(exponents[0], of), power(exponents[1], of), power(exponents[1], of) | of.sign]
    right = np.zeros((4, columns), dtype=np.uint64)
    centre = r.randrange(1, to.infinity)
    for j in range(columns):
        size = r.choice(
            (
                centre,
                centre ^ 1,
                r.randrange(to.infinity),
                r.randrange(1 << to.fraction_bits),
                (1 << to.fraction_bits) - 1,
                to.infinity - r.choice((1, 2, 2, 2, 2)),
                (to.bias << to.fraction_bits) + r.randrange(-1, 2),
            )
        )
        middle = (to.magnitude(size) + to.magnitude(size + 1)) / 2
        near = r.choice((to.magnitude(size), to.magnitude(size + 1), middle, middle * r.choice((0, 2, 3))))
        w = nearest_by_search(near, start)
        if w >= start.infinity:
            w = start.infinity - 1
        case.start[0, j] = w
        missing = (middle - start.value(w)) / scale / of.value(left[0])
        right[0, j] = nearest_by_search(missing, of)
        if right[0, j] & np.uint64(of.sign - 1) >= of.infinity:
            right[0, j] = 0
        if r.random() < 0.6:
            right[1, j] = power(r.randrange(-120, 0), of) | r.choice((0, of.sign))
        if r.random() < 0.3:
            right[2, j] = right[3, j] = moderate(r, of, 12)
        if r.random() < 0.5:
            case.start[0, j] ^= np.uint64(start.sign)
            right[0, j] ^= np.uint64(of.sign)
    return Product(
        format=of,
        left=np.array([left], dtype=np.uint64),
        right=right,
        alpha=alpha,
        rank=rank,
        rooted=rooted,
        multiplier=1.0,
        row=0,
        column=0,
        transposed=r.random() < 0.3,
    )


def tiny_product(r: random.Random, case: Case, of: Format) -> Product:
    """Factors whose products lie at and around multiples of half the smallest subnormal of the output."""
    to, columns = case.to, case.start.shape[1]
    left = [power(r.randrange(-10, 5), of), power(r.randrange(-10, 5), of)]
    rank = r.choice((1, 1, 3))
    # The scale does what the factors' own range cannot; 2^-1074 is the smallest alpha there is.
    middle = to.quantum - r.randrange(0, 9)
    alpha = 2.0 ** max(-1074, middle - r.randrange(-8, 9)) * rank
    right = np.zeros((2, columns), dtype=np.uint64)
    for j in range(columns):
        case.start[0, j] = r.choice((0, 0, 1, 2, 3)) if case.start_format is to else 0
        wanted = Fraction(r.randrange(0, 6), 2) if r.random() < 0.7 else Fraction(r.randrange(100), 64)
        wanted *= Fraction(2) ** to.quantum * rank / Fraction(alpha)
        right[0, j] = nearest_by_search(wanted / of.value(left[0]), of)
        if right[0, j] >= of.infinity:
            right[0, j] = 0
        if r.random() < 0.4:
            right[1, j] = power(r.randrange(-130, -10), of) | r.choice((0, of.sign))
        if r.random() < 0.5:
            right[:, j] ^= np.uint64(of.sign)
        if r.random() < 0.5:
            case.start[0, j] |= np.uint64(case.start_format.sign)
    return Product(
        format=of,
        left=np.array([left], dtype=np.uint64),
        right=right,
        alpha=alpha,
        rank=rank,
        rooted=False,
        multiplier=1.0,
        row=0,
        column=0,
        transposed=r.random() < 0.3,
    )


FLAVOURS = ("aimed", "aimed", "mild", "wild", "self-cancelling", "zeros", "tiny")


@st.composite
def cases(draw: st.DrawFn, to: str) -> Case:
    """Merges into one format; hypothesis shrinks the structure, a seed gives the bits."""
    flavour = draw(st.sampled_from(FLAVOURS))
    start = FORMATS[draw(st.sampled_from((to, to, "BF16", "F16", "F32", "F64")))]
    count = draw(st.integers(1, 3))
    factor_formats = [FORMATS[draw(st.sampled_from(("BF16", "F16", "F32", "F64")))] for _ in range(count)]
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    r = random.Random(draw(st.integers(0, 2**32)))
    mild = flavour in ("mild", "aimed")

    def value() -> int:
        return moderate(r, start, 3) if mild else any_pattern(r, start)

    patterns = np.array([[value() for _ in range(columns)] for _ in range(rows)], dtype=np.uint64)
    case = Case(start_format=start, to=FORMATS[to], start=patterns, products=[])
    if flavour == "aimed":
        case.products.append(aimed_product(r, case, factor_formats[0]))
        if count > 1 and r.random() < 0.3:
            case.products.append(random_product(r, factor_formats[1], rows, columns, "mild"))
        return case
    if flavour == "tiny":
        case.products.append(tiny_product(r, case, factor_formats[0]))
        return case
    for of in factor_formats:
        p = random_product(r, of, rows, columns, "wild" if flavour == "wild" else "mild")
        if flavour == "zeros":
            # B = 0, as an untrained adapter has it, or products that cancel; over signed zeros.
            case.start[r.randrange(rows), :] = r.choice((0, start.sign))
            if r.random() < 0.5:
                p.left[:] = r.choice((0, of.sign))
            else:
                p.left = np.concatenate([p.left, p.left], axis=1)
                p.right = np.concatenate([p.right, p.right ^ np.uint64(of.sign)], axis=0)
        case.products.append(p)
    if flavour == "self-cancelling":
        # W is nearly, or exactly, what the products take away.
        for (i, j), _ in np.ndenumerate(patterns):
            parts = [part for part in case.delta(i, j) if part.root == 1]
            near = nearest_by_search(-sum((part.coefficient for part in parts), Fraction(0)), start)
            if near & (start.sign - 1) < start.infinity:
                case.start[i, j] = near
    return case
