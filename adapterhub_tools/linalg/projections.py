"""Deltas of trained vectors between two random matrices that all modules of an adapter share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterhub_tools.linalg.low_rank import LowRankTerm
from adapterhub_tools.linalg.random_stream import kaiming_uniform, seeded

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.surd import Surd
    from adapterhub_tools.linalg.weight import Weight


def shared_matrices(extent: tuple[int, int], ranks: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Makes A and B from a seed: float32, uniform, A first.

    Args:
        extent: the largest out and in of the adapted modules.
        ranks: rows of A and columns of B.
        seed: of the CPU generator.
    """
    generator = seeded(seed)
    a = kaiming_uniform((ranks[0], extent[1]), generator)
    return {"shared_A": a, "shared_B": kaiming_uniform((extent[0], ranks[1]), generator)}


def vectors_term(
    factors: Mapping[str, Tensor], shared: Mapping[str, Tensor], weight: Weight, scale: Surd
) -> LowRankTerm:
    """Returns the delta s·(b ∘ B)·(d ∘ A) as a product in the stored layout.

    The rows of B and columns of A that the weight has count, from the first. Elementwise products of float32
    values are exact in float64, so for factors up to float32 the term is exact.

    Shapes: ``lambda_b`` b (out,), ``lambda_d`` d (r,), ``shared_A`` (r, at least in), ``shared_B`` (at least
    out, r).
    """
    b, d = factors["lambda_b"].double(), factors["lambda_d"].double()
    rank = int(d.shape[0])
    inner = weight.rows if weight.transposed else weight.columns
    left = b[:, None] * shared["shared_B"][: b.shape[0], :rank].double()
    right = d[:, None] * shared["shared_A"][:rank, :inner].double()
    if weight.transposed:
        left, right = right.t(), left.t()
    return LowRankTerm(
        left=left.contiguous(),
        right=right.contiguous(),
        scale=scale,
        exact_products=False,
        row=weight.row,
        column=weight.column,
    )
