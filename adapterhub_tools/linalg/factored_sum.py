"""Sums of products of two factors, Σ c_i·L_i·R_i, that stay products: nothing dense is formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.linalg.factored_svd import product_norm
from adapterhub_tools.linalg.surd import Surd

if TYPE_CHECKING:
    from torch import Tensor

_CANCELLED = 1e-6
"""Below this share of the terms' norms, a norm from Gram matrices has lost too many of its digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledProduct:
    """A product c·L·R.

    Attributes:
        left: L, shape (rows, k), any float.
        right: R, shape (k, columns), any float.
        scale: c, exactly.
    """

    left: Tensor
    right: Tensor
    scale: Surd

    @property
    def rank(self) -> int:
        """The number of columns of L."""
        return int(self.left.shape[1])


ONE = Surd(coefficient=Fraction(1))


def gram(terms: Sequence[ScaledProduct]) -> Tensor:
    """Returns the inner products of the terms, tr(R_iᵀ·L_iᵀ·L_j·R_j)·c_i·c_j, float64, shape (n, n).

    Each is off by about 10⁻¹⁶ of ‖L_i‖·‖R_i‖·‖L_j‖·‖R_j‖·c_i·c_j.
    """
    lefts = [term.left.double() for term in terms]
    rights = [term.right.double() for term in terms]
    scales = [float(term.scale) for term in terms]
    found = torch.empty(len(terms), len(terms), dtype=torch.float64)
    for i in range(len(terms)):
        for j in range(i + 1):
            inner = ((lefts[i].t() @ lefts[j]) * (rights[i] @ rights[j].t())).sum()
            found[i, j] = found[j, i] = float(inner) * scales[i] * scales[j]
    return found


def sum_norm(left: Tensor, right: Tensor, parts: float) -> float:
    """Returns ‖L·R‖ in the Frobenius norm, from Gram matrices, or from QR where the terms cancel.

    Args:
        left: L, shape (rows, k).
        right: R, shape (k, columns).
        parts: the sum of the norms of the terms that make up the product.
    """
    wide_left, wide_right = left.double(), right.double()
    square = float(((wide_left.t() @ wide_left) * (wide_right @ wide_right.t())).sum())
    norm = sqrt(max(0.0, square))
    return product_norm(wide_left, wide_right) if norm < _CANCELLED * parts else norm


def without_repeats(terms: Sequence[ScaledProduct]) -> list[ScaledProduct]:
    """Adds the partners of factors that are equal bit for bit, so that the rank does not grow.

    c_1·L_1·R + c_2·L_2·R = (c_1·L_1 + c_2·L_2)·R, and likewise for L. The partners are added in float64; one
    that becomes exactly zero takes its term away.
    """
    by_right = _grouped(terms, lambda one, other: _same(one.right, other.right))
    summed = [
        group[0]
        if len(group) == 1
        else ScaledProduct(left=_total(group, "left"), right=group[0].right, scale=ONE)
        for group in by_right
    ]
    by_left = _grouped(summed, lambda one, other: _same(one.left, other.left))
    summed = [
        group[0]
        if len(group) == 1
        else ScaledProduct(left=group[0].left, right=_total(group, "right"), scale=ONE)
        for group in by_left
    ]
    return [term for term in summed if bool(term.left.any()) and bool(term.right.any())]


def common_scale(terms: Sequence[ScaledProduct], allowed: Callable[[Surd], bool]) -> Surd:
    """Returns the scale s that leaves most columns as they are: those whose c/s is a power of two.

    Args:
        terms: at least one, none with a zero scale.
        allowed: whether a scale can be written; 1 is taken where none can.
    """
    best, most = ONE, 0
    for term in terms:
        candidate = Surd(coefficient=abs(term.scale.coefficient), radicand=term.scale.radicand)
        exact = sum(other.rank for other in terms if is_shift(ratio(other.scale, candidate)))
        if exact > most and allowed(candidate):
            best, most = candidate, exact
    return best


def ratio(scale: Surd, by: Surd) -> Surd:
    """Returns scale / by, exactly."""
    # 1/√d = √d/d, so c·√e / (b·√d) = c/(b·d) · √(e·d).
    return Surd.of(scale.coefficient / by.coefficient / by.radicand, scale.radicand * by.radicand)


def is_shift(value: Surd) -> bool:
    """Tells whether a number is plus or minus a power of two, so that multiplying by it rounds nothing."""
    top, bottom = abs(value.coefficient.numerator), value.coefficient.denominator
    return value.radicand == 1 and top > 0 and top & (top - 1) == 0 and bottom & (bottom - 1) == 0


def _grouped(
    terms: Sequence[ScaledProduct], same: Callable[[ScaledProduct, ScaledProduct], bool]
) -> list[list[ScaledProduct]]:
    groups: list[list[ScaledProduct]] = []
    for term in terms:
        home = next((group for group in groups if same(group[0], term)), None)
        if home is None:
            groups.append([term])
        else:
            home.append(term)
    return groups


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))


def _total(group: Sequence[ScaledProduct], side: str) -> Tensor:
    first = getattr(group[0], side)
    total = torch.zeros(first.shape, dtype=torch.float64)
    for term in group:
        total.add_(getattr(term, side).double(), alpha=float(term.scale))
    return total
