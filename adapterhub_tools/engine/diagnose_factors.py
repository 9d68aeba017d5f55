"""What became of the factors of a low-rank delta: permuted, mixed, or only some of them."""

from __future__ import annotations

import torch

from adapterhub_tools.engine.check_points import Product
from adapterhub_tools.engine.diagnose_data import ELEMENTS, FITS, Evidence, sum_of

_INNER = 256
"""The largest rank for which the factors are solved for."""


def inside(data: Evidence, products: tuple[Product, ...]) -> str:
    """Tests whether D = B·X·A for some small X, which then tells what happened to the factors."""
    if len(products) != 1 or len(products[0].right) > _INNER:
        return ""
    product, index = products[0], torch.tensor(data.rows)
    left, right = product.left[index], product.right
    core = torch.linalg.pinv(left) @ data.difference @ torch.linalg.pinv(right) / product.scale
    if not data.fits(product.scale * left @ core @ right):
        return ""
    rank = core.shape[0]
    peaks = core.abs().argmax(dim=1)
    picked = torch.zeros_like(core)
    picked[torch.arange(rank), peaks] = 1.0
    if len(set(peaks.tolist())) == rank and data.fits(product.scale * left @ picked @ right):
        return "the factors are permuted: the rows of A do not belong to the columns of B"
    kept = core.diagonal().abs() > 0.5
    if 0 < int(kept.sum()) < rank:
        part = product.scale * (left * kept) @ right
        if data.fits(part):
            return f"only {int(kept.sum())} of {rank} ranks are merged"
    return "the factors are mixed: the delta is made of A and B, but not as B·A"


def permuted(data: Evidence, products: tuple[Product, ...]) -> str:
    """Tests whether the strongest rows, or columns, of D are others of the delta."""
    rows = data.delta if data.whole else None
    if rows is None and products and products[0].left.shape[0] * products[0].right.shape[1] <= ELEMENTS:
        every = slice(None)
        like = products[0].left.new_zeros(products[0].left.shape[0], products[0].right.shape[1])
        rows = sum_of(products, every, like)
    for name, observed, wanted, unit in (
        ("rows", data.difference, rows, data.unit),
        ("columns", data.difference.t(), data.delta.t(), data.unit.t()),
    ):
        if wanted is None:
            continue
        strongest = observed.norm(dim=1).topk(min(16, len(observed))).indices
        lengths = wanted.norm(dim=1).clamp(min=1e-300)
        found = ((observed[strongest] @ wanted.t()) / lengths).argmax(dim=1)
        misfit = ((observed[strongest] - wanted[found]) / unit[strongest]).square().mean() * 12
        if float(misfit) < FITS:
            return f"the {name} of the delta are permuted"
    return ""
