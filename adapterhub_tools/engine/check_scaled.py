"""The arithmetic of verify for (IA)³ and DoRA: its own, on every row.

(IA)³ multiplies each weight by a stored number; both have at most 24 significant bits, so binary64 holds the
product and only the last rounding is left. DoRA's ``x = m·a/‖a‖`` with ``a = w + s·B·A`` is evaluated in
float64 with a bound on its error; what that leaves open is decided by comparing squares of rational numbers.

Sources: Liu et al. 2022, arXiv:2205.05638, §3.3; Liu et al. 2024, arXiv:2402.09353, eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import inf
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import load_whole, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.check_bytes import Difference
from adapterhub_tools.engine.check_points import LOWEST, Product, round_block, round_exactly, spacing
from adapterhub_tools.engine.check_products import product_of

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import ByteRange, Step, Term
    from adapterhub_tools.model.protocols import OpenSource

_BLOCK = 1 << 18
_NARROW = ("F32", "BF16", "F16")

Opener = Callable[[str], "OpenSource"]


def is_scaled(step: Step) -> bool:
    """Says whether a step is one of those that this module computes."""
    if (
        len(step.terms) != 1
        or step.patch is not None
        or step.combination is not None
        or step.start.spec.dtype not in _NARROW
    ):
        return False
    term = step.terms[0]
    place = term.placement
    if (place.rows, place.columns, place.expert) != (None, None, None):
        return False
    if term.hparams.get("multiplier", 1.0) != 1.0:
        return False
    if any(item.spec.dtype not in _NARROW for item in term.factors.values()):
        return False
    kinds = {"ia3": ("linear", "conv1d", "bias"), "dora": ("linear", "conv2d")}
    return term.hparams.get("kind") in kinds.get(term.method, ())


def scaled_differs(step: Step, merged: ByteRange, open_source: Opener, device: str) -> Difference | None:
    """Compares every row with the correctly rounded value; None if all are right.

    Args:
        step: one that ``is_scaled`` accepts.
        merged: where the merged tensor is.
        open_source: uri -> the open file.
        device: where to compute.

    Raises:
        FormatError: a factor is not finite.
    """
    term, dtype = step.terms[0], merged.spec.dtype
    made = _gain_check if term.method == "ia3" else _dora_check
    check = made(term, open_source, device)
    columns = matrix_shape(step.output.shape)[1]
    count, index, steps = 0, -1, 0.0
    for first, *stored in _blocks(step, merged, open_source):
        w, m = (block.to(device, torch.float64) for block in stored)
        right, x = check(w, m, first, dtype)
        wrong = torch.nonzero(~right.reshape(-1)).reshape(-1)
        if not len(wrong):
            continue
        index = first * columns + int(wrong[0]) if index < 0 else index
        count += len(wrong)
        entered = torch.maximum(torch.maximum(w.abs(), m.abs()), x.abs())
        off = (x - m).abs() / spacing(entered, dtype) - 0.5
        steps = max(steps, float(off.nan_to_num(nan=inf).max()))
    return None if index < 0 else Difference(count=count, index=index, largest=0, steps=steps)


Check = Callable[["Tensor", "Tensor", int, str], "tuple[Tensor, Tensor]"]
"""(w, m, first row, dtype) -> which are right, and x; all in float64."""


def _blocks(step: Step, merged: ByteRange, open_source: Opener) -> Iterator[tuple[int, Tensor, Tensor]]:
    rows, columns = matrix_shape(step.output.shape)
    size = max(1, _BLOCK // max(1, columns))
    for first in range(0, rows, size):
        number = min(size, rows - first)
        values = []
        for item in (step.start, merged):
            dtype = torch_dtype(item.spec.dtype)
            width = columns * dtype.itemsize
            raw = torch.empty(number * width, dtype=torch.uint8)
            if raw.numel():
                open_source(item.uri).read_into(memory_of(raw), item.offset + first * width)
            values.append(raw.view(dtype).view(number, columns))
        yield first, values[0], values[1]


def line_gains(term: Term, open_source: Opener) -> tuple[Tensor, bool]:
    """Returns the gains of (IA)³ as they lie on the stored matrix, and whether they are one for each column.

    Returns:
        float64, shape (1, columns) or (rows, 1).

    Raises:
        FormatError: one is not finite.
    """
    item = term.factors["l"]
    gains = load_whole(open_source(item.uri), item).double()
    shape, kind = tuple(gains.shape), term.hparams["kind"]
    feedforward = term.hparams.get("feedforward")
    on_inputs = shape[0] == 1 and gains.numel() > 1 if feedforward is None else bool(feedforward)
    by_column = kind != "bias" and (on_inputs != (kind == "conv1d"))
    return (gains.reshape(1, -1) if by_column else gains.reshape(-1, 1)), by_column


def _gain_check(term: Term, open_source: Opener, device: str) -> Check:
    gains, by_column = line_gains(term, open_source)
    gains = gains.to(device)

    def check(w: Tensor, m: Tensor, first: int, dtype: str) -> tuple[Tensor, Tensor]:
        own = gains if by_column else gains[first : first + len(w)]
        x = w * own
        expected = round_block(x, dtype)
        # A weight of zero keeps its bits; a gain of zero gives +0.
        expected = torch.where(w == 0, w, torch.where(own == 0, torch.zeros_like(x), expected))
        return (expected == m) & (torch.signbit(expected) == torch.signbit(m)), x

    return check


def _dora_check(term: Term, open_source: Opener, device: str) -> Check:
    product = product_of(term, open_source)
    item = term.factors["magnitude"]
    magnitudes = load_whole(open_source(item.uri), item).double().reshape(-1).to(device)
    reach = product.reach().to(device)
    inner = int(product.left.shape[1])

    def check(w: Tensor, m: Tensor, first: int, dtype: str) -> tuple[Tensor, Tensor]:
        rows = slice(first, first + len(w))
        a = w + product.rows(rows, device)
        norm = a.norm(dim=1, keepdim=True)
        ratio = magnitudes[rows, None] / norm
        x = a * ratio
        relative = (inner + 8) * 2.0**-53
        # The error of a, and that of the norm: the errors of its entries, and one rounding for each.
        bound = (w.abs() + reach[rows, None]) * relative
        of_norm = bound.norm(dim=1, keepdim=True) / norm + (w.shape[1] + 8) * 2.0**-53
        error = ratio.abs() * bound + x.abs() * of_norm + 1e-300
        unit = spacing(m, dtype)
        narrow = (m.view(torch.int64) & ((1 << 52) - 1)) == 0
        narrow &= (unit > 2.0 ** LOWEST[dtype]) & ((x - m) * m < 0)
        gap = torch.where(narrow, unit / 4, unit / 2)
        away = (x - m).abs()
        right = (away + error < gap) & torch.isfinite(m)
        undecided = ~right & ~(away - error > gap) & torch.isfinite(m) & torch.isfinite(x)
        for row, column in torch.nonzero(undecided).tolist():
            at = (row + first, column)
            right[row, column] = _exactly(
                w[row], float(m[row, column]), product, float(magnitudes[at[0]]), at, dtype
            )
        return right, x

    return check


def _exactly(
    w: Tensor, m: float, product: Product, magnitude: float, at: tuple[int, int], dtype: str
) -> bool:
    """Decides one weight of DoRA: |m·a| against the midpoints times ‖a‖, squared."""
    row = [Fraction(v) + product.exactly(at[0], j)[0] for j, v in enumerate(w.tolist())]
    a, square = row[at[1]], sum((v * v for v in row), Fraction(0))
    top = Fraction(magnitude) * a
    unit = Fraction(float(spacing(torch.tensor([m], dtype=torch.float64), dtype)[0]))
    size = abs(Fraction(m))
    if top != 0 and m != 0 and (top > 0) != (m > 0):
        return False
    power = size > 0 and size.numerator & (size.numerator - 1) == 0 and unit > Fraction(2) ** LOWEST[dtype]
    power = power and size.denominator & (size.denominator - 1) == 0
    low, high = size - unit / (4 if power else 2), size + unit / 2
    squared = top * top
    for middle, above in ((low, True), (high, False)):
        border = middle * middle * square if middle > 0 else Fraction(-1)
        if squared == border:
            return round_exactly(middle, dtype) == abs(m)
        if (squared > border) != above:
            return False
    return True
