"""Why a merged tensor is wrong: simple explanations, each tested against the data.

An explanation H of the difference D = M − W fits if the mean of (D − H)²/(u²/12), with u the spacing at M,
is about 1 or below, as rounding makes it. The one that fits best is told; where none does, that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.check_points import Product, RowCheck, spacing
from adapterhub_tools.engine.check_products import product_of
from adapterhub_tools.engine.check_tensor import Pair

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS = 1 << 22
_ROWS = 256
_FITS = 3.0
"""Two roundings, as of a delta that was added twice, give 2."""
_FEW = 0.001
_INNER = 256
"""The largest rank for which the factors are solved for."""


def diagnose(pair: Pair, found: RowCheck | None, others: Sequence[Pair] = ()) -> str:
    """Returns the explanation of a wrong tensor, in words.

    Args:
        pair: the tensors.
        found: what the comparison gave, where every row was compared.
        others: further wrong tensors, with which this one may have been swapped.
    """
    # All of a tensor that is small enough, else evenly spread rows.
    whole = pair.rows * pair.columns <= _ELEMENTS
    step = 1 if whole else max(1, pair.rows // _ROWS)
    rows = list(range(0, pair.rows, step))
    w, m = (
        pair.pick(item, rows) if not whole else pair.read(item, 0, pair.rows)
        for item in (pair.step.start, pair.merged)
    )
    base, merged = w.double(), m.double()
    if not bool(torch.isfinite(merged).all()):
        return "it holds NaN or infinity"
    index = torch.tensor(rows, dtype=torch.int64)
    products = pair.products or _products_without_magnitude(pair)
    delta = torch.zeros_like(base)
    for product in products:
        delta += product.rows(index, "cpu")
    # Small results of large numbers carry the rounding of those, and an explanation that was fitted carries
    # that of its neighbours.
    largest = torch.maximum(torch.maximum(base.abs(), merged.abs()), delta.abs())
    floor = 0.25 * merged.square().mean().sqrt()
    data = _Data(base, merged, delta, spacing(largest.clamp(min=float(floor)), pair.dtype))
    if torch.equal(base, merged):
        return "the adapter is not applied: it is the base's tensor"
    if not pair.products and products and data.misfit(delta) < _FITS:
        return "the magnitude is ignored: it is the base plus the low-rank delta"
    return (
        _few(pair, found)
        or _unmerged_rows(data, rows)
        or _scaled(data, pair)
        or _transposed(data, products, whole)
        or _swapped(pair, merged, rows, others)
        or _inside(data, products, index)
        or _permuted(data, products)
        or "its difference from the base is not this adapter's delta: another adapter, or another base"
    )


class _Data:
    def __init__(self, base: Tensor, merged: Tensor, delta: Tensor, unit: Tensor) -> None:
        self.base, self.merged, self.delta, self.unit = base, merged, delta, unit
        self.difference = merged - base

    def misfit(self, explanation: Tensor) -> float:
        return float(((self.difference - explanation) / self.unit).square().mean()) * 12


def _few(pair: Pair, found: RowCheck | None) -> str:
    if found is None or not 0 < found.wrong <= max(8, _FEW * pair.rows * pair.columns):
        return ""
    if len({wrong.row for wrong in found.first}) == 1 and found.wrong > max(8, pair.columns // 4):
        return ""  # rather a row
    parts = []
    for wrong in found.first[:3]:
        bits = [_bits(value, pair.dtype) for value in (wrong.found, wrong.expected)]
        flipped = " (one bit is flipped)" if bin(bits[0] ^ bits[1]).count("1") == 1 else ""
        parts.append(
            f"[{wrong.row}, {wrong.column}] is {wrong.found!r}, expected {wrong.expected!r}{flipped}"
        )
    return f"{found.wrong} single weights differ: {'; '.join(parts)}"


def _bits(value: float, dtype: str) -> int:
    name = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    held = torch.tensor([value], dtype=getattr(torch, name))
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
    return int(held.view(kind)[0]) & ((1 << (8 * held.element_size())) - 1)


def _unmerged_rows(data: _Data, rows: list[int]) -> str:
    same = (data.difference == 0).all(dim=1)
    # A row whose delta is below half a unit everywhere is right as it is.
    expected = (data.delta.abs() > data.unit).any(dim=1)
    missing = torch.nonzero(same & expected).reshape(-1).tolist()
    rest = ~(same & expected)
    if not missing or not bool(rest.any()):
        return ""
    misfit = ((data.difference - data.delta) / data.unit)[rest].square().mean() * 12
    if float(misfit) > _FITS:
        return ""
    shown = ", ".join(str(rows[i]) for i in missing[:5])
    return f"{len(missing)} rows are not merged: {shown}{' and more' if len(missing) > 5 else ''}"


def _scaled(data: _Data, pair: Pair) -> str:
    power = float((data.delta / data.unit).square().sum())
    if power == 0:
        return ""
    best = float((data.difference * data.delta / data.unit.square()).sum()) / power
    misfit = data.misfit(best * data.delta)
    error = 1 / sqrt(12 * power)
    if misfit > _FITS or abs(best - 1) <= 6 * error:
        return ""
    names = [(2.0, "the adapter is applied twice"), (-1.0, "the adapter is subtracted")]
    if len(pair.step.terms) == 1 and pair.step.terms[0].method == "lora":
        hparams = pair.step.terms[0].hparams
        rank, alpha = hparams["rank"], hparams["alpha"]
        plain = hparams.get("scaling", "alpha/rank") == "alpha/rank"
        if plain:
            names.append((sqrt(rank), "the scaling is alpha/√rank, expected alpha/rank"))
        else:
            names.append((1 / sqrt(rank), "the scaling is alpha/rank, expected alpha/√rank"))
        if alpha:
            names.append(((rank if plain else sqrt(rank)) / alpha, "alpha is ignored: the scaling is 1"))
    fitting = [text for factor, text in names if abs(best - factor) <= max(6 * error, 0.003 * abs(factor))]
    if fitting:
        return ", or ".join(fitting)
    return f"the scaling is wrong: the delta is multiplied by {best:.5g}"


def _transposed(data: _Data, products: tuple[Product, ...], whole: bool) -> str:
    if not whole or data.delta.shape[0] != data.delta.shape[1]:
        return ""
    if data.misfit(data.delta.t()) < _FITS:
        return "the delta is transposed"
    for product in products[:1]:
        left, right = product.left, product.right
        if left.shape[0] == left.shape[1] and data.misfit(product.scale * left.t() @ right) < _FITS:
            return "B is transposed"
    return ""


def _inside(data: _Data, products: tuple[Product, ...], index: Tensor) -> str:
    """Tests whether D = B·X·A for some small X, which then tells what happened to the factors."""
    if len(products) != 1 or len(products[0].right) > _INNER:
        return ""
    product = products[0]
    left, right = product.left[index], product.right
    core = torch.linalg.pinv(left) @ data.difference @ torch.linalg.pinv(right) / product.scale
    if data.misfit(product.scale * left @ core @ right) > _FITS:
        return ""
    rank = core.shape[0]
    peaks = core.abs().argmax(dim=1)
    picked = torch.zeros_like(core)
    picked[torch.arange(rank), peaks] = 1.0
    if len(set(peaks.tolist())) == rank and data.misfit(product.scale * left @ picked @ right) < _FITS:
        return "the factors are permuted: the rows of A do not belong to the columns of B"
    kept = core.diagonal().abs() > 0.5
    if 0 < int(kept.sum()) < rank:
        part = product.scale * (left * kept) @ right
        if data.misfit(part) < _FITS:
            return f"only {int(kept.sum())} of {rank} ranks are merged"
    return "the factors are mixed: the delta is made of A and B, but not as B·A"


def _permuted(data: _Data, products: tuple[Product, ...]) -> str:
    if not products:
        return ""
    everything = (
        sum(
            (product.rows(slice(None), "cpu") for product in products[1:]),
            products[0].rows(slice(None), "cpu"),
        )
        if products[0].left.shape[0] * products[0].right.shape[1] <= _ELEMENTS
        else None
    )
    for name, observed, wanted in (
        ("rows", data.difference, everything),
        ("columns", data.difference.t(), data.delta.t()),
    ):
        if wanted is None:
            continue
        strongest = observed.norm(dim=1).topk(min(16, len(observed))).indices
        lengths = wanted.norm(dim=1).clamp(min=1e-300)
        found = ((observed[strongest] @ wanted.t()) / lengths).argmax(dim=1)
        unit = data.unit if name == "rows" else data.unit.t()
        misfit = ((observed[strongest] - wanted[found]) / unit[strongest]).square().mean() * 12
        if float(misfit) < _FITS:
            return f"the {name} of the delta are permuted"
    return ""


def _swapped(pair: Pair, merged: Tensor, rows: list[int], others: Sequence[Pair]) -> str:
    for other in others:
        if other is pair or (other.rows, other.columns) != (pair.rows, pair.columns):
            continue
        expected = other.pick(other.step.start, rows).double()
        for product in other.products:
            expected = expected + product.rows(torch.tensor(rows), "cpu")
        error = ((merged - expected) / spacing(merged, pair.dtype)).square().mean() * 12
        if float(error) < _FITS:
            return f"it is swapped: it holds what {other.step.output.name} should"
    return ""


def _products_without_magnitude(pair: Pair) -> tuple[Product, ...]:
    """Returns the low-rank deltas of a method that has more than those, such as DoRA."""
    terms = pair.step.terms
    if any({"A", "B"} - set(term.factors) or "alpha" not in term.hparams for term in terms):
        return ()
    return tuple(product_of(term, pair.open_source) for term in terms)
