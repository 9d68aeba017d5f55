"""The deltas of LoRA, LoHa and LoKr as one product L·R each, for verify; written from the papers anew.

LoHa's Hadamard product of two products is a product of their factors' row-wise and column-wise Kronecker
products; LoKr's C ⊗ (D₁·D₂) is (C ⊗ D₁)·(I ⊗ D₂). The entries of both are products of two stored numbers,
which float64 holds exactly where neither has more than 26 significant bits.

Sources: Hu et al. 2021, arXiv:2106.09685; Hyeon-Woo et al. 2022, arXiv:2108.06098, proposition 1 and
appendix; Yeh et al. 2024, arXiv:2309.14859, §3.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import load_whole
from adapterhub_tools.engine.check_points import Product

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import Term
    from adapterhub_tools.model.protocols import OpenSource

MAX_INNER = 1024
"""The largest k of L·R; above it the recomputation is cheaper."""


def can_multiply(term: Term) -> bool:
    """Says whether a term is a product that this module makes."""
    if term.method == "lora":
        return True
    shapes = {role: item.spec.shape for role, item in term.factors.items()}
    narrow = all(item.spec.dtype in ("F32", "BF16", "F16") for item in term.factors.values())
    flat = all(len(shape) == 2 for shape in shapes.values())
    if not (narrow and flat) or term.hparams.get("kind") not in ("linear", "conv2d"):
        return False
    if term.method == "loha":
        return set(shapes) == {"w1_a", "w1_b", "w2_a", "w2_b"} and _inner_of_loha(shapes) <= MAX_INNER
    if term.method == "lokr" and term.hparams["kind"] == "linear":
        return "w1" in shapes and "t2" not in shapes and _inner_of_lokr(shapes) <= MAX_INNER
    return False


def product_of(term: Term, open_source: Callable[[str], OpenSource]) -> Product:
    """Returns a term's delta in the stored layout.

    Args:
        term: one that ``can_multiply`` accepts, or one with the factors of LoRA beside others.
        open_source: uri -> the open file.
    """

    def load(role: str) -> Tensor:
        item = term.factors[role]
        return load_whole(open_source(item.uri), item).double()

    hparams = term.hparams
    rank, alpha = hparams.get("rank", 8), hparams.get("alpha", 8)
    coefficient = Fraction(alpha) * Fraction(hparams.get("multiplier", 1.0)) / rank
    # alpha/√r = (alpha/r)·√r
    radicand = rank if hparams.get("scaling") == "alpha/sqrt(rank)" else 1
    if term.method == "loha":
        left, right, radicand = *_loha(load), 1
    elif term.method == "lokr":
        left, right, radicand = *_lokr(load, set(term.factors)), 1
    elif hparams["kind"] == "bias":
        left = load("bias").reshape(-1, 1)
        right = torch.ones(1, 1, dtype=torch.float64)
    else:
        A, B = load("A").flatten(1), load("B").flatten(1)
        # Conv1D and embeddings are stored transposed.
        left, right = (A.t(), B.t()) if hparams["kind"] in ("conv1d", "embedding") else (B, A)
    return Product(
        left=left.contiguous(), right=right.contiguous(), coefficient=coefficient, radicand=radicand
    )


def _loha(load: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """(A₁·B₁) ⊙ (A₂·B₂): L[i, pq] = A₁[i, p]·A₂[i, q], R[pq, j] = B₁[p, j]·B₂[q, j]."""
    first, second = load("w1_a"), load("w2_a")
    left = (first[:, :, None] * second[:, None, :]).flatten(1)
    right = (load("w1_b")[:, None, :] * load("w2_b")[None, :, :]).flatten(0, 1)
    return left, right


def _lokr(load: Callable[[str], Tensor], roles: set[str]) -> tuple[Tensor, Tensor]:
    """C ⊗ (D₁·D₂) with D₁ = D and D₂ = I where D is stored whole."""
    outer = load("w1")
    if "w2" in roles:
        inner = load("w2")
        tail = torch.eye(inner.shape[1], dtype=torch.float64)
    else:
        inner, tail = load("w2_a"), load("w2_b")
    return torch.kron(outer, inner), torch.kron(torch.eye(outer.shape[1], dtype=torch.float64), tail)


def _inner_of_loha(shapes: dict[str, tuple[int, ...]]) -> int:
    return shapes["w1_b"][0] * shapes["w2_b"][0]


def _inner_of_lokr(shapes: dict[str, tuple[int, ...]]) -> int:
    return shapes["w1"][1] * (shapes["w2"][1] if "w2" in shapes else shapes["w2_b"][0])
