"""From the two factors of an adapter to the low-rank delta of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


def low_rank(a: Tensor, b: Tensor, weight: Weight, scale: Surd) -> LowRankTerm:
    """Returns the delta s·B·A of a weight in its stored layout.

    Shapes: A (rank, in, …) and B (out, rank, …) give (out, in·…); for ``conv1d`` and ``embedding``, which
    are stored transposed, (in, out).

    Args:
        a: A, any float.
        b: B, any float.
        weight: the base weight.
        scale: s.
    """
    from adapterhub_tools.linalg.low_rank import LowRankTerm

    exact = all(tensor.element_size() <= 4 for tensor in (a, b))
    inward, outward = a.double().flatten(1), b.double().flatten(1)
    left, right = (inward.t(), outward.t()) if weight.transposed else (outward, inward)
    return LowRankTerm(
        left=left.contiguous(),
        right=right.contiguous(),
        scale=scale,
        exact_products=exact,
        row=weight.row,
        column=weight.column,
    )


def row_scaled(a: Tensor, b: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors whose product is B·diag(e)·A, without rounding error.

    The products e·A of values of 24 bits fit float64. What float64 values leave over is appended as further
    rows, with B repeated.

    Args:
        a: A, shape (rank, in).
        b: B, shape (out, rank).
        gains: e, shape (rank, 1).

    Raises:
        UnsupportedError: float64 values so large or small that a product loses bits.
    """
    import numpy as np
    import torch

    from adapterhub_tools.linalg.double_double import in_safe_range, two_product

    wide, factor = a.double(), gains.double()
    if max(a.element_size(), gains.element_size()) <= 4:
        return wide * factor, b.double()
    spread = np.broadcast_to(factor.numpy(), tuple(wide.shape))
    if not in_safe_range(wide.numpy(), spread).all():
        raise UnsupportedError.of(
            "range",
            "the factors A and E are float64 and hold values beyond 2^±300.",
            remedy="Save the adapter in float32; training does not reach such values.",
        )
    with np.errstate(all="ignore"):
        main, rest = two_product(wide.numpy(), spread)
    return torch.from_numpy(np.concatenate([main, rest])), torch.cat([b.double(), b.double()], dim=1)
