"""Why a tensor that DoRA or (IA)³ changed is wrong, see diagnose.py.

DoRA's merged row is m/‖a‖ times a = W + s·B·A. What it is outside the span of A's rows comes from W alone, so
that the factor between the two tells ‖a‖/m; multiplied with it, the row is that of a merge by plain LoRA,
whose explanations are then tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools.engine.buffers import load_whole
from adapterhub_tools.engine.check_points import Product
from adapterhub_tools.engine.check_products import product_of
from adapterhub_tools.engine.check_scaled import is_scaled, line_gains
from adapterhub_tools.engine.diagnose_data import FITS, Evidence, sum_of
from adapterhub_tools.engine.diagnose_factors import inside, permuted

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.engine.check_tensor import Pair

_SIGMA = 6.0


def dora_explained(pair: Pair, data: Evidence) -> str:
    """Returns the explanation of a wrong tensor of DoRA; empty if there is none, or it is not of DoRA."""
    if not is_scaled(pair.step) or pair.step.terms[0].method != "dora":
        return ""
    term = pair.step.terms[0]
    product = product_of(term, pair.open_source)
    item = term.factors["magnitude"]
    index = torch.tensor(data.rows, dtype=torch.int64)
    magnitudes = load_whole(pair.open_source(item.uri), item).double().reshape(-1, 1)[index]
    delta = sum_of((product,), index, data.base)

    def merged(weight: Tensor, change: Tensor) -> Tensor:
        sums = weight + change
        found: Tensor = magnitudes * sums / sums.norm(dim=1, keepdim=True)
        return found

    if data.fits(delta):
        return "the magnitude is ignored: it is the base plus the low-rank delta"
    for text, factor in _other_factors(term.hparams):
        if data.fits(merged(data.base, factor * delta) - data.base):
            return text
    if data.fits(merged(merged(data.base, delta), delta) - data.base):
        return "the adapter is applied twice"
    square = data.whole and delta.shape[0] == delta.shape[1]
    if square and data.fits(merged(data.base, delta.t()) - data.base):
        return "the delta is transposed"
    plain = _without_magnitude(data, product, delta)
    if plain is None:
        return ""
    power = float((delta / plain.unit).square().sum())
    best = float((plain.difference * delta / plain.unit.square()).sum()) / (power or 1.0)
    if plain.fits(best * delta) and abs(best - 1) > _SIGMA / sqrt(12 * power or 1.0):
        return f"the scaling is wrong: the delta inside the magnitude is multiplied by {best:.5g}"
    if plain.fits(delta):
        return "the magnitude is another: the rows have the directions that they should, and other lengths"
    return inside(plain, (product,)) or permuted(plain, (product,))


def ia3_explained(pair: Pair, data: Evidence) -> str:
    """Returns the explanation of a wrong tensor of (IA)³; empty if there is none, or it is not of (IA)³."""
    if not is_scaled(pair.step) or pair.step.terms[0].method != "ia3":
        return ""
    gains, by_column = line_gains(pair.step.terms[0], pair.open_source)
    here = gains if by_column else gains[torch.tensor(data.rows, dtype=torch.int64)]
    hypotheses = [
        ("the adapter is applied twice", here.square()),
        ("the weights are divided by the gains, not multiplied", 1 / here),
    ]
    if data.whole and data.base.shape[0] == data.base.shape[1]:
        right, wrong = ("columns", "rows") if by_column else ("rows", "columns")
        text = f"the gains are transposed: they are on the {wrong}, expected on the {right}"
        hypotheses.append((text, gains.t()))
    for text, others in hypotheses:
        if data.fits(data.base * others - data.base):
            return text
    return ""


def other_gains(pair: Pair, data: Evidence) -> str:
    """Returns what the rows or columns of a tensor of (IA)³ are multiplied with, if that explains it."""
    if not is_scaled(pair.step) or pair.step.terms[0].method != "ia3":
        return ""
    gains, by_column = line_gains(pair.step.terms[0], pair.open_source)
    axis, lines = (0, "columns") if by_column else (1, "rows")
    power = (data.base / data.unit).square().sum(dim=axis, keepdim=True)
    observed = (data.base * data.merged / data.unit.square()).sum(dim=axis, keepdim=True) / power
    observed = observed.nan_to_num(nan=1.0)
    if not data.fits(data.base * observed - data.base):
        return ""
    if by_column or data.whole:
        order = observed.reshape(-1).argsort()
        off = observed.reshape(-1)[order] - gains.reshape(-1).sort().values
        # Each is known to within the rounding errors of its line, which the same gain makes alike.
        if float((off.square() * power.reshape(-1)[order]).mean()) * 12 < 4 * FITS:
            return f"the gains are permuted: they are those of other {lines}"
    return f"its {lines} are multiplied by other gains than this adapter's: another adapter"


def _other_factors(hparams: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields what a known mistake about alpha, or the sign, multiplies the delta with."""
    rank, alpha = hparams["rank"], hparams["alpha"]
    plain = hparams.get("scaling", "alpha/rank") == "alpha/rank"
    if plain:
        yield "the scaling is alpha/√rank, expected alpha/rank", sqrt(rank)
    else:
        yield "the scaling is alpha/rank, expected alpha/√rank", 1 / sqrt(rank)
    if alpha:
        yield "alpha is ignored: the scaling is 1", (rank if plain else sqrt(rank)) / alpha
    yield "the adapter is subtracted", -1.0


def _without_magnitude(data: Evidence, product: Product, delta: Tensor) -> Evidence | None:
    """Returns the evidence with the rows as long as those of W + s·B·A; None where A spans everything."""
    if product.right.shape[0] >= product.right.shape[1]:
        return None
    basis = torch.linalg.qr(product.right.t()).Q
    base, merged = (block - (block @ basis) @ basis.t() for block in (data.base, data.merged))
    lengths = (base * merged).sum(dim=1, keepdim=True) / merged.square().sum(dim=1, keepdim=True)
    lengths = lengths.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    return replace(data, merged=data.merged * lengths, delta=delta, unit=data.unit * lengths.abs())
