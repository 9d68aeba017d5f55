"""Several deltas of one weight, and what a combination of them is: protocols, and deltas as row blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A delta c·L·R.

    Attributes:
        left: L, shape (rows, k), any float.
        right: R, shape (k, columns), any float.
        scale: c.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of columns of L."""
        return int(self.left.shape[1])


class ProductRows:
    """A product c·L·R as RowBlocks: formed block by block, in float64.

    Args:
        product: the product, in the stored layout of the weight.
        rows_per_block: rows of a block.
    """

    def __init__(self, product: Product, rows_per_block: int) -> None:
        """Takes the factors to float64."""
        self._left = product.left.double() * product.scale
        self._right = product.right.double()
        self._size = rows_per_block
        self.shape: tuple[int, int] = (int(self._left.shape[0]), int(self._right.shape[1]))

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows in order; see RowBlocks."""
        for first in range(0, self.shape[0], self._size):
            yield first, self._left[first : first + self._size] @ self._right


class SumRows:
    """Σ c_i·D_i of matrices that are read in the same blocks, as RowBlocks.

    Args:
        parts: the matrices, all of one shape and with the same blocks.
        coefficients: one for each.
    """

    def __init__(self, parts: Sequence[RowBlocks], coefficients: Sequence[float]) -> None:
        """Keeps both."""
        self._parts, self._coefficients = list(parts), list(coefficients)
        self.shape: tuple[int, int] = parts[0].shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows in order; see RowBlocks."""
        for group in zip(*(part.blocks() for part in self._parts), strict=True):
            first, block = group[0]
            total = block * self._coefficients[0]
            for (_, other), c in zip(group[1:], self._coefficients[1:], strict=True):
                total.add_(other, alpha=c)
            yield first, total


def gram_of_products(products: Sequence[Product]) -> Tensor:
    """Returns ⟨ΔW_i, ΔW_j⟩ = tr(R_iᵀ·L_iᵀ·L_j·R_j)·c_i·c_j, float64, without forming a product.

    Cancellation costs an inner product 10⁻¹⁶ of ‖L_i‖·‖R_i‖·‖L_j‖·‖R_j‖.
    """
    import torch

    lefts = [product.left.double() * product.scale for product in products]
    rights = [product.right.double() for product in products]
    return torch.stack(
        [
            torch.stack([((li.t() @ lj) * (ri @ rj.t())).sum() for lj, rj in zip(lefts, rights, strict=True)])
            for li, ri in zip(lefts, rights, strict=True)
        ]
    )


def gram_of_rows(parts: Sequence[RowBlocks]) -> Tensor:
    """Returns the inner products of matrices that are read in the same blocks, float64, in one pass."""
    import torch

    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for group in zip(*(part.blocks() for part in parts), strict=True):
        flat = torch.stack([block.reshape(-1) for _, block in group])
        total += flat @ flat.t()
    return total
