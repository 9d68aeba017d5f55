"""Arithmetic on factors as PEFT's ``add_weighted_adapter`` does it, for comparison; float32 like PEFT.

Formulas: peft 0.21, ``peft/utils/merge_utils.py`` and ``LoraModel.add_weighted_adapter``. On factors they are
not what their names say: (Σ √w_i·B_i)·(Σ √w_i·A_i) has the cross terms √(w_i·w_j)·B_i·A_j, which no delta
has. ``combine/`` has the methods on deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""PEFT's types that treat A and B one after the other."""
ON_DELTAS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""PEFT's types that form the delta, and take it apart by a dense SVD."""
TYPES = (*ON_FACTORS, *ON_DELTAS, "cat")


def arithmetic(
    name: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    majority_sign: str,
    generator: torch.Generator,
) -> Tensor:
    """Returns tensors of one shape combined element by element.

    Args:
        name: a type without ``_svd``, or ``"svd"``.
        tensors: float32, all of one shape.
        weights: one for each.
        density: the share of values that stay, at least 0; from 1 on all stay.
        majority_sign: ``"total"`` or ``"frequency"``.
        generator: of the random masks; advanced as PEFT advances the global one.
    """
    if name.startswith("dare"):
        tensors = [_dropped(tensor, density, generator) for tensor in tensors]
    elif name in ("ties", "magnitude_prune"):
        tensors = [_trimmed(tensor, density) for tensor in tensors]
    stack = torch.stack(list(tensors))
    scaled = stack * torch.tensor(weights, dtype=torch.float32).view(-1, *(1 for _ in stack.shape[1:]))
    if name not in ("ties", "dare_ties"):
        return scaled.sum(dim=0)
    votes = stack.sum(dim=0) if majority_sign == "total" else stack.sign().sum(dim=0)
    agrees = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (scaled * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def factor_weights(weights: Sequence[float], scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns what each A and each B is multiplied by: √|w·s|, with the sign on A."""
    roots = [sqrt(abs(w * s)) for w, s in zip(weights, scales, strict=True)]
    signed = [root if w * s >= 0 else -root for root, w, s in zip(roots, weights, scales, strict=True)]
    return signed, roots


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns (B, A) = (U·S, Vt) of the leading triplets of a dense matrix."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def _trimmed(tensor: Tensor, density: float) -> Tensor:
    """Keeps the largest int(density·n) values; of equal ones those that torch's topk takes, as PEFT does."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    largest = flat.abs().topk(int(density * flat.numel())).indices
    kept = torch.zeros_like(flat)
    kept[largest] = flat[largest]
    return kept.reshape(tensor.shape)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each value with probability ``density`` and divides it by that."""
    if density >= 1:
        return tensor
    kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * kept / density
