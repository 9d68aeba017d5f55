"""The singular value decomposition of a product L·R of low rank, without forming the product.

With L = Q₁·C₁ and Rᵀ = Q₂·C₂ (QR), L·R = Q₁·(C₁·C₂ᵀ)·Q₂ᵀ, so the SVD of the small core C₁·C₂ᵀ gives that of
the product. QR, not Gram matrices: those square the condition number and lose singular values below 10⁻⁸ of
the largest. Q₁ and Q₂ stay products of Householder reflections (Golub & Van Loan, Matrix Computations, 4th
ed., §5.1.6 and §5.2.2) and are applied only to the columns that are kept.

Everything is float64. The results are the same bytes for the same machine, versions and number of threads;
workers use one BLAS thread each (``one_thread``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SVD:
    """Leading singular triplets of a matrix D (rows, columns): D ≈ U·diag(S)·Vt.

    Attributes:
        u: U, shape (rows, k), orthonormal columns; of each, the largest value in size is positive.
        s: S, shape (k,), descending, not negative.
        vt: Vt, shape (k, columns), orthonormal rows.
    """

    u: Tensor
    s: Tensor
    vt: Tensor

    @property
    def rank(self) -> int:
        """How many triplets there are."""
        return int(self.s.shape[0])

    def leading(self, rank: int) -> SVD:
        """Returns the first triplets: the best approximation of that rank in the Frobenius norm.

        Source: Eckart & Young 1936, doi:10.1007/BF02288367.
        """
        return SVD(u=self.u[:, :rank], s=self.s[:rank], vt=self.vt[:rank])

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Returns (B, A) with B·A = U·diag(S)·Vt and ‖column j of B‖ = ‖row j of A‖ = √S_j.

        Shapes: (rows, k) and (k, columns), both contiguous.
        """
        root = self.s.sqrt()
        return (self.u * root).contiguous(), (root[:, None] * self.vt).contiguous()


class FactoredSVD:
    """The SVD of L·R; singular values at once, vectors for as many as are asked for.

    Args:
        left: L, shape (rows, k), any float dtype.
        right: R, shape (k, columns).

    Attributes:
        values: all min(rows, columns, k) singular values, descending; the other ones of L·R are zero.

    Memory: 8·(rows + columns)·k bytes beside the factors.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Factorises both sides and the core."""
        self._left = torch.geqrf(left.double())
        self._right = torch.geqrf(right.t().double())
        core = _triangle(self._left[0]) @ _triangle(self._right[0]).t()
        self._u, values, self._vt = torch.linalg.svd(core, full_matrices=False)
        self.values: Tensor = values

    def leading(self, rank: int) -> SVD:
        """Returns the first ``rank`` triplets, or all there are if fewer.

        Raises:
            ValueError: the rank is negative.
        """
        if rank < 0:
            raise ValueError(f"the rank must not be negative: {rank}")
        count = min(rank, int(self.values.shape[0]))
        u = _apply(self._left, self._u[:, :count])
        v = _apply(self._right, self._vt[:count].t())
        return normalise_signs(SVD(u=u, s=self.values[:count].clone(), vt=v.t().contiguous()))


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Returns the singular values of L·R, descending; see FactoredSVD."""
    left_core = _triangle(torch.geqrf(left.double())[0])
    right_core = _triangle(torch.geqrf(right.t().double())[0])
    values: Tensor = torch.linalg.svdvals(left_core @ right_core.t())
    return values


def product_norm(left: Tensor, right: Tensor) -> float:
    """Returns the Frobenius norm of L·R without forming it: that of the core of two QR factorisations."""
    left_core = _triangle(torch.geqrf(left.double())[0])
    right_core = _triangle(torch.geqrf(right.t().double())[0])
    return float((left_core @ right_core.t()).norm())


def product_distance(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> float:
    """Returns ‖L·R − L'·R'‖ in the Frobenius norm, from the factors alone.

    The difference is the product [L, L']·[R; −R'], so nothing dense is formed; what is left after
    cancellation is right to about 10⁻¹⁶ of ‖L‖·‖R‖.
    """
    both_left = torch.cat((left.double(), other_left.double()), dim=1)
    both_right = torch.cat((right.double(), -other_right.double()), dim=0)
    return product_norm(both_left, both_right)


def normalise_signs(svd: SVD) -> SVD:
    """Returns the same decomposition with the largest value of each left vector positive.

    The first of several of the same size counts, so that the signs do not depend on the LAPACK in use.
    """
    if not svd.rank or not svd.u.shape[0]:
        return svd
    at = svd.u.abs().argmax(dim=0)
    sign = torch.where(svd.u.gather(0, at[None])[0] < 0, -1.0, 1.0).to(svd.u.dtype)
    return SVD(u=svd.u * sign, s=svd.s, vt=svd.vt * sign[:, None])


def rank_for_energy(values: Tensor, share: float, *, total: float | None = None) -> int:
    """Returns the smallest rank whose squared singular values are at least a share of all.

    Args:
        values: singular values, descending.
        share: between 0 and 1.
        total: the sum of all squares, if ``values`` are not all; else theirs.

    Returns:
        at least 1 where there is a value; all of them if the share is not reached. A tail below 2^-53 of the
        total is never needed.
    """
    squares = values.double() ** 2
    whole = float(squares.sum()) if total is None else total
    if not int(values.shape[0]) or whole <= 0:
        return min(1, int(values.shape[0]))
    reached = torch.cumsum(squares, dim=0) >= share * whole * (1 - 2.0**-53)
    hits = torch.nonzero(reached)
    return int(hits[0]) + 1 if hits.numel() else int(values.shape[0])


def rank_for_error(values: Tensor, error: float, *, total: float | None = None) -> int:
    """Returns the smallest rank whose truncation error is at most ``error`` times the Frobenius norm.

    ‖D − D_k‖² = Σ_{j>k} σ_j² (Eckart & Young 1936). The tails are summed from the smallest value on, so that
    errors far below 10⁻⁸ are told apart.

    Args:
        values: singular values, descending.
        error: relative, not negative.
        total: the squared norm of D, if ``values`` are not all.
    """
    count = int(values.shape[0])
    squares = values.double() ** 2
    own = float(squares.sum())
    whole = own if total is None else total
    if not count or whole <= 0:
        return min(1, count)
    beyond = max(0.0, whole - own) if total is not None else 0.0
    tails = torch.flip(torch.cumsum(torch.flip(squares, (0,)), dim=0), (0,)) + beyond
    allowed = error * error * whole
    # tails[k] is the squared error of rank k; rank 0 is not an adapter.
    small = torch.nonzero(tails[1:] <= allowed)
    return int(small[0]) + 1 if small.numel() else count


def tail_norm(values: Tensor, rank: int, *, total: float | None = None) -> float:
    """Returns the Frobenius norm of what truncation to a rank leaves out: √Σ_{j>rank} σ_j².

    Args:
        values: singular values, descending.
        rank: how many are kept.
        total: the squared norm of the matrix, if ``values`` are not all of them.
    """
    squares = values.double() ** 2
    tail = float(torch.flip(squares[rank:], (0,)).sum())
    beyond = 0.0 if total is None else max(0.0, total - float(squares.sum()))
    return sqrt(tail + beyond)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch's kernels of this thread with one BLAS thread; more are slower on matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _triangle(reflections: Tensor) -> Tensor:
    """Returns the upper triangle R of what geqrf gives, shape (min(m, k), k)."""
    return reflections[: min(reflections.shape)].triu()


def _apply(factored: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """Returns Q·C for the Q of geqrf: C (min(m, k), c) is padded to (m, c), then reflected."""
    reflections, tau = factored
    padded = columns.new_zeros(reflections.shape[0], columns.shape[1])
    padded[: columns.shape[0]] = columns
    if not columns.shape[1]:
        return padded
    # geqrf gives columns one after another, as ormqr wants them; a copy by rows would cost more than both.
    return torch.ormqr(reflections[:, : tau.shape[0]], tau, padded)
