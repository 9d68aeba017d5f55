"""The formulas of the exact methods on Fractions, and random cases of each."""

from __future__ import annotations

import random
from fractions import Fraction
from math import isqrt

import numpy as np
import torch

from tests.property.exact_oracle import Format
from tests.property.method_cases import (
    Compare,
    MethodCase,
    enclosed_root,
    numbers,
    of_interval,
    of_rational,
    of_root,
    pick_formats,
    values,
)

MULTIPLIERS = (1.0, 1.0, 1.0, 0.5, -1.0, 0.3, 2.0**-40)


def _flavour(r: random.Random) -> str:
    return r.choice(("round", "round", "mild", "wild"))


def _draw(r: random.Random, of: Format, shapes: dict[str, tuple[int, ...]], flavour: str):
    patterns = {role: values(r, of, shape, flavour) for role, shape in shapes.items()}
    tensors = {role: of.tensor(p) for role, p in patterns.items()}
    return tensors, {role: numbers(p, of) for role, p in patterns.items()}


def _case(r, method, kind, hparams, tensors, start_format, to, delta_or_gain, shape, flavour) -> MethodCase:
    """A case whose value is rational: ``delta_or_gain`` takes (row, column, w) to it."""
    flat = (shape[0], int(np.prod(shape[1:])))
    start = values(r, start_format, flat, flavour)
    w = numbers(start, start_format)
    return MethodCase(
        method=method,
        hparams=hparams,
        kind=kind,
        factors=tensors,
        start=start,
        start_format=start_format,
        to=to,
        shape=shape,
        value=lambda i, j: of_rational(delta_or_gain(i, j, w[i, j])),
    )


def ia3(r: random.Random) -> MethodCase:
    start_format, to, of = pick_formats(r)
    kind = r.choice(("linear", "linear", "conv1d", "conv2d", "bias"))
    feedforward = kind != "bias" and r.random() < 0.5
    rows, columns, groups = r.randrange(1, 5), r.randrange(1, 5), 1
    shape = (rows, columns)
    if kind == "conv2d":
        groups = r.choice((1, 1, 2)) if rows % 2 == 0 else 1
        shape = (rows, columns, 2, 1)
    elif kind == "bias":
        shape = (rows,)
    on_rows = feedforward == (kind == "conv1d")
    count = rows if on_rows else columns * groups
    stored = {True: (1, count), False: (count, 1)}[feedforward]
    if kind == "conv2d":
        stored = (1, count, 1, 1)
    multiplier = r.choice(MULTIPLIERS)
    flavour = _flavour(r)
    tensors, exact = _draw(r, of, {"l": stored}, flavour)
    gains = exact["l"].reshape(-1)

    def value(i: int, j: int, w: Fraction) -> Fraction:
        gain = gains[i] if on_rows else gains[i // (rows // groups) * columns + j // int(np.prod(shape[2:]))]
        return w + Fraction(multiplier) * (w * gain - w)

    hparams = {"feedforward": feedforward, "multiplier": multiplier}
    return _case(r, "ia3", kind, hparams, tensors, start_format, to, value, shape, flavour)


def _low_rank(r, kind: str, rank: int):
    """Shapes of A and B and of the weight, and (row, column) of the weight -> (row of B, column of A)."""
    out, inner = r.randrange(1, 5), r.randrange(1, 5)
    if kind in ("conv1d", "embedding"):
        return (rank, inner), (out, rank), (inner, out), lambda i, j: (j, i)
    if kind == "conv2d":
        return (rank, inner, 2, 1), (out, rank, 1, 1), (out, inner, 2, 1), lambda i, j: (i, j)
    return (rank, inner), (out, rank), (out, inner), lambda i, j: (i, j)


def hira(r: random.Random) -> MethodCase:
    start_format, to, of = pick_formats(r)
    kind, rank = r.choice(("linear", "conv1d", "embedding", "conv2d")), r.randrange(1, 4)
    a_shape, b_shape, shape, at = _low_rank(r, kind, rank)
    multiplier, flavour = r.choice(MULTIPLIERS), _flavour(r)
    tensors, exact = _draw(r, of, {"A": a_shape, "B": b_shape}, flavour)
    a, b = exact["A"].reshape(rank, -1), exact["B"].reshape(-1, rank)

    def value(i: int, j: int, w: Fraction) -> Fraction:
        row, column = at(i, j)
        return w + Fraction(multiplier) * w * sum(b[row, k] * a[k, column] for k in range(rank))

    hparams = {"rank": rank, "multiplier": multiplier}
    return _case(r, "hira", kind, hparams, tensors, start_format, to, value, shape, flavour)


def adalora(r: random.Random) -> MethodCase:
    start_format, to, of = pick_formats(r)
    kind, rank = r.choice(("linear", "conv1d", "conv2d")), r.randrange(4)
    out, inner = r.randrange(1, 5), r.randrange(1, 5)
    shape = {"linear": (out, inner), "conv1d": (inner, out), "conv2d": (out, inner, 1, 2)}[kind]
    width = inner * 2 if kind == "conv2d" else inner
    multiplier, flavour = r.choice(MULTIPLIERS), _flavour(r)
    if of.name == "F64" and flavour == "wild":
        flavour = "mild"  # the products of A and E may leave the range of float64; that is refused
    tensors, exact = _draw(r, of, {"A": (rank, width), "B": (out, rank), "E": (rank, 1)}, flavour)
    alpha, initial = r.choice((8, 32, 1.5, -1)), r.randrange(1, 13)
    scale = Fraction(multiplier) * Fraction(alpha if alpha > 0 else initial) / (initial + Fraction(1e-5))

    def value(i: int, j: int, w: Fraction) -> Fraction:
        row, column = (j, i) if kind == "conv1d" else (i, j)
        terms = (exact["B"][row, k] * exact["E"][k, 0] * exact["A"][k, column] for k in range(rank))
        return w + scale * sum(terms, Fraction(0))

    hparams = {"alpha": alpha, "init_r": initial, "multiplier": multiplier}
    return _case(r, "adalora", kind, hparams, tensors, start_format, to, value, shape, flavour)


def _kernel(r, kind: str) -> tuple[int, ...]:
    return {"linear": (), "conv2d": (2, 1), "convnd": (2,)}[kind]


def _tucker(t, outer, inward, row: int, column: int, kernel: int) -> Fraction:
    channel, at = divmod(column, kernel)
    core = t.reshape(t.shape[0], t.shape[1], kernel)
    pairs = ((i, j) for i in range(t.shape[0]) for j in range(t.shape[1]))
    terms = (outer[i, row] * core[i, j, at] * inward[j, channel] for i, j in pairs)
    return sum(terms, Fraction(0))


def loha(r: random.Random) -> MethodCase:
    start_format, to, of = pick_formats(r)
    kind, rank = r.choice(("linear", "conv2d", "convnd")), r.randrange(1, 4)
    kernel = _kernel(r, kind)
    out, inner, taps = r.randrange(1, 4), r.randrange(1, 4), int(np.prod(kernel))
    tucker = bool(kernel) and r.random() < 0.6
    shapes = {}
    for n in "12":
        a, b = ((rank, out), (rank, inner)) if tucker else ((out, rank), (rank, inner * taps))
        shapes |= {f"w{n}_a": a, f"w{n}_b": b}
        if tucker:
            shapes[f"t{n}"] = (rank, rank, *kernel, *((1,) if kind == "convnd" else ()))
    multiplier, flavour, alpha = r.choice(MULTIPLIERS), _flavour(r), r.choice((1, 8, 0.3))
    tensors, exact = _draw(r, of, shapes, flavour)
    scale = Fraction(multiplier) * Fraction(alpha) / rank

    def part(n: str, i: int, j: int) -> Fraction:
        a, b = exact[f"w{n}_a"], exact[f"w{n}_b"]
        if tucker:
            return _tucker(exact[f"t{n}"], a, b, i, j, taps)
        return sum((a[i, k] * b[k, j] for k in range(rank)), Fraction(0))

    def value(i: int, j: int, w: Fraction) -> Fraction:
        return w + scale * part("1", i, j) * part("2", i, j)

    hparams = {"rank": rank, "alpha": alpha, "multiplier": multiplier}
    shape = (out, inner, *kernel)
    return _case(r, "loha", kind, hparams, tensors, start_format, to, value, shape, flavour)


def lokr(r: random.Random) -> MethodCase:
    """The delta is built as an array, as ``torch.kron`` and a reshape would, on exact numbers."""
    start_format, to, of = pick_formats(r)
    kind, rank = r.choice(("linear", "conv2d", "convnd")), r.randrange(1, 3)
    kernel = _kernel(r, kind)
    taps = int(np.prod(kernel))
    (a, b), (c, d) = ((r.randrange(1, 3), r.randrange(1, 3)) for _ in range(2))
    first = {"w1": (a, c)} if r.random() < 0.5 else {"w1_a": (a, rank), "w1_b": (rank, c)}
    form = r.choice(("whole", "product", "tucker")[: 3 if kernel else 2])
    second = {
        "whole": {"w2": (b, d, *kernel)},
        "product": {"w2_a": (b, rank), "w2_b": (rank, d * taps)},
        "tucker": {
            "w2_a": (rank, b),
            "w2_b": (rank, d),
            "t2": (rank, rank, *kernel, *((1,) * (len(kernel) == 1))),
        },
    }[form]
    multiplier, flavour, alpha = r.choice(MULTIPLIERS), _flavour(r), r.choice((1, 8, 0.3))
    tensors, exact = _draw(r, of, first | second, flavour)
    w1 = exact["w1"] if "w1" in exact else exact["w1_a"].dot(exact["w1_b"])
    if form == "whole":
        w2 = exact["w2"]
    elif form == "product":
        w2 = exact["w2_a"].dot(exact["w2_b"])
    else:
        grid = [
            [_tucker(exact["t2"], exact["w2_a"], exact["w2_b"], i, j, taps) for j in range(d * taps)]
            for i in range(b)
        ]
        w2 = np.array(grid, dtype=object).reshape(
            exact["w2_a"].shape[1], d, *kernel, *((1,) * (len(kernel) == 1))
        )
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    delta = np.kron(w1, w2).reshape(a * b, c * d * taps)
    scale = Fraction(multiplier) * Fraction(alpha) / rank
    hparams = {"rank": rank, "alpha": alpha, "multiplier": multiplier}
    shape = (a * b, c * d, *kernel)

    def value(i: int, j: int, w: Fraction) -> Fraction:
        return w + scale * delta[i, j]

    return _case(r, "lokr", kind, hparams, tensors, start_format, to, value, shape, flavour)


def merged_linear(r: random.Random) -> MethodCase:
    start_format, to, of = pick_formats(r)
    kind, rank = r.choice(("linear", "conv1d")), r.randrange(1, 3)
    enabled = [r.random() < 0.6 for _ in range(r.randrange(1, 4))]
    enabled[r.randrange(len(enabled))] = True
    width, inner = r.randrange(1, 3), r.randrange(1, 4)
    groups = sum(enabled)
    multiplier, flavour, alpha = r.choice(MULTIPLIERS), _flavour(r), r.choice((1, 16, 0.3))
    tensors, exact = _draw(r, of, {"A": (rank * groups, inner), "B": (width * groups, rank, 1)}, flavour)
    scale = Fraction(multiplier) * Fraction(alpha) / rank

    def value(i: int, j: int, w: Fraction) -> Fraction:
        out, column = (j, i) if kind == "conv1d" else (i, j)
        slice_, inside = divmod(out, width)
        if not enabled[slice_]:
            return w
        group = sum(enabled[:slice_])
        b, a = exact["B"][group * width + inside, :, 0], exact["A"][group * rank : (group + 1) * rank, column]
        return w + scale * b.dot(a)

    out = width * len(enabled)
    shape = (inner, out) if kind == "conv1d" else (out, inner)
    hparams = {"rank": rank, "alpha": alpha, "enable_lora": enabled, "multiplier": multiplier}
    return _case(r, "lora_merged_linear", kind, hparams, tensors, start_format, to, value, shape, flavour)


def dora(r: random.Random) -> MethodCase:
    start_format, to, of = pick_formats(r)
    kind, rank = r.choice(("linear", "linear", "conv1d", "embedding", "conv2d")), r.randrange(1, 3)
    a_shape, b_shape, shape, at = _low_rank(r, kind, rank)
    multiplier, flavour = r.choice(MULTIPLIERS), _flavour(r)
    rooted = r.random() < 0.25
    out = b_shape[0]
    magnitude_shape = (1, out, 1, 1) if kind == "conv2d" else (out,)
    tensors, exact = _draw(r, of, {"A": a_shape, "B": b_shape, "magnitude": magnitude_shape}, flavour)
    if r.random() < 0.4:
        tensors["B"].zero_()
        exact["B"][...] = Fraction(0)
    alpha = r.choice((1, 2, 16, 0.3))
    flat = (shape[0], int(np.prod(shape[1:])))
    start = values(r, start_format, flat, flavour)
    if r.random() < 0.35:
        # Lines whose norm is rational: 3·4·12 → 13, or one weight alone; then ties are possible.
        _pythagorean(r, start, start_format, by_row=kind in ("linear", "conv2d"))
    w = numbers(start, start_format)
    a, b, m = exact["A"].reshape(rank, -1), exact["B"].reshape(-1, rank), exact["magnitude"].reshape(-1)
    product = np.empty(flat, dtype=object)
    for (i, j), _ in np.ndenumerate(w):
        row, column = at(i, j)
        product[i, j] = (
            sum((b[row, k] * a[k, column] for k in range(rank)), Fraction(0)) * Fraction(alpha) / rank
        )
    axis = 1 if kind in ("linear", "conv2d") else 0
    irrational = rooted and rank == 2
    if not irrational:
        total = w + product
        squares = (total * total).sum(axis=axis)
        refused = any(q == 0 for q in squares)
    else:
        lines = [
            (w[i] if axis else w[:, i], product[i] if axis else product[:, i]) for i in range(flat[1 - axis])
        ]
        refused = any(all(x == 0 for x in part) and all(x == 0 for x in other) for part, other in lines)

    def value(i: int, j: int) -> Compare:
        line = i if axis else j
        gain = Fraction(multiplier) * m[line]
        constant = (1 - Fraction(multiplier)) * w[i, j]
        if not irrational:
            return of_root(constant, gain, total[i, j], squares[line])
        if gain == 0 or (w[i, j] == 0 and product[i, j] == 0):
            return of_rational(constant)
        own, others = (w[line], product[line]) if axis else (w[:, line], product[:, line])
        if not any(others):
            return of_root(constant, gain, w[i, j], sum(x * x for x in own))
        k = next(at for at, x in enumerate(others) if x)
        if all(x * others[k] == own[k] * y for x, y in zip(own, others, strict=True)):
            # All weights are multiples of t + √2, which cancels but for its sign; a tie is possible then.
            sign = 1 if own[k] / others[k] + enclosed_root(2, 4000)[0] > 0 else -1
            return of_root(constant, gain * sign, product[i, j], sum(x * x for x in others))
        return of_interval(lambda bits: _enclosed(constant, gain, own, others, w[i, j], product[i, j], bits))

    return MethodCase(
        method="dora",
        hparams={
            "rank": rank,
            "alpha": alpha,
            "scaling": "alpha/sqrt(rank)" if rooted else "alpha/rank",
            "multiplier": multiplier,
        },
        kind=kind,
        factors=tensors,
        start=start,
        start_format=start_format,
        to=to,
        shape=shape,
        value=value,
        refused=refused,
    )


def _enclosed(constant, gain, own, others, w, product, bits):
    """Bounds of p + g·(w + √2·δ)/√Σ(wᵢ + √2·δᵢ)²."""
    root = enclosed_root(2, bits)

    def element(x, y):
        ends = (x + y * root[0], x + y * root[1])
        return min(ends), max(ends)

    squares = [
        sorted((low * low, high * high))
        for low, high in (element(x, y) for x, y in zip(own, others, strict=True))
    ]
    q = (sum(s[0] for s in squares), sum(s[1] for s in squares))
    scale = 1 << (2 * bits)
    lower = Fraction(_isqrt_of(q[0], scale, up=False), 1 << bits)
    upper = Fraction(_isqrt_of(q[1], scale, up=True), 1 << bits)
    top = element(w, product)
    ends = [gain * t / n for t in top for n in (lower, upper) if n]
    return constant + min(ends), constant + max(ends)


def _isqrt_of(value: Fraction, scale: int, *, up: bool) -> int:
    scaled = value * scale
    whole = scaled.numerator // scaled.denominator
    return isqrt(whole + 1) + 1 if up else isqrt(whole)


def _pythagorean(r: random.Random, start: np.ndarray, of: Format, *, by_row: bool) -> None:
    triples = ([3, 4, 12], [3, 4, 0], [1, 0, 0], [0, 0, 2], [2, 2, 1], [1, 4, 8])
    lines = start if by_row else start.T
    for line in lines:
        choice = r.choice(triples)
        exponent = r.randrange(-3, 3)
        for j in range(len(line)):
            number = choice[j % 3] if j < 3 else 0
            line[j] = _pattern(number * 2.0**exponent * r.choice((-1, 1)), of)


def _pattern(value: float, of: Format) -> int:
    return int(of.patterns(torch.tensor([value], dtype=torch.float64).to(of.torch))[0])


CASES = {
    "ia3": ia3,
    "hira": hira,
    "adalora": adalora,
    "loha": loha,
    "lokr": lokr,
    "lora_merged_linear": merged_linear,
    "dora": dora,
}
