"""Several deltas of one weight that are combined with coefficients: the protocol, and inner products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.randomized_svd import RowBlocks


class CombinesFactors(Protocol):
    """A method whose result is Σ c_i·ΔW_i, so that products of two factors stay products.

    Attributes:
        kind: ``"factored"``.
        default_rank: ``"exact"``: all of the sum; ``"largest"``: that of the inputs.
        shares_factors: whether factors that inputs share bit for bit are stored once.
    """

    kind: ClassVar[str]
    default_rank: ClassVar[str]
    shares_factors: ClassVar[bool]

    def coefficients(self, weights: tuple[float, ...], inner: Callable[[], Tensor]) -> tuple[float, ...]:
        """Returns the c_i of one weight.

        Args:
            weights: one number for each input.
            inner: gives the inner products ⟨ΔW_i, ΔW_j⟩, float64, shape (n, n).
        """
        ...


def gram_of_rows(parts: Sequence[RowBlocks]) -> Tensor:
    """Returns the inner products of matrices that are read in the same blocks, float64, in one pass."""
    import torch

    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for group in zip(*(part.blocks() for part in parts), strict=True):
        flat = torch.stack([block.reshape(-1) for _, block in group])
        total += flat @ flat.t()
    return total
