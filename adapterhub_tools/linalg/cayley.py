"""Orthogonal matrices from skew-symmetric ones: Cayley's transform, and its series."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def skew_from_triangle(entries: Tensor, size: int) -> Tensor:
    """Returns the skew-symmetric matrices Q = U − Uᵀ of strict upper triangles U.

    Args:
        entries: U row by row, shape (n, size·(size − 1)/2).
        size: rows of a matrix.
    """
    rows, columns = torch.triu_indices(size, size, 1)
    matrices = entries.new_zeros(entries.shape[0], size, size)
    matrices[:, rows, columns] = entries
    return matrices - matrices.transpose(1, 2)


def cayley(skew: Tensor) -> Tensor:
    """Returns (I − Q)·(I + Q)⁻¹ for matrices Q of shape (n, b, b); I + Q is never singular.

    Its condition number is at most √(1 + ‖Q‖²), so the relative error is about b·√(1 + ‖Q‖²)·2⁻⁵³.
    """
    one = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    result: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
    return result


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """Returns I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹ with n = ``terms``, as PEFT has it since 0.18.

    Two terms are I + 2Q, one is I.

    Args:
        skew: Q, shape (n, b, b).
        terms: n, at least 1.
    """
    result = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(skew.shape[0], 1, 1)
    if terms < 2:
        return result
    result.add_(skew, alpha=2)
    if terms == 2:
        return result
    power = skew @ skew
    result.add_(power, alpha=2)
    for _ in range(3, terms - 1):
        power = power @ skew
        result.add_(power, alpha=2)
    return result.add_(power @ skew)
