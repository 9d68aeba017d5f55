"""The leading singular triplets of a large dense matrix that is read by row blocks, with a measured error.

Halko, Martinsson & Tropp 2011, arXiv:0909.4061: a Gaussian sketch, improved by power iterations (algorithm
4.4), spans the leading row space. Here each pass over the matrix D computes Z = Dᵀ·(D·G) for an orthonormal G
(columns, l), so a pass is half a power iteration more than theirs and the matrix need never be transposed or
held. Passes go on until the energy caught by the asked rank has settled. The last one takes Y = D·G, whose
SVD gives the triplets. ‖D‖² is summed on the way, so the truncation error √(‖D‖² − Σσ²) is known, not
estimated.

The blocks, their order and the seed decide the result; the number of workers does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Protocol

import torch

from adapterhub_tools.linalg.factored_svd import SVD, normalise_signs

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 10
"""Columns of the sketch beyond the rank; 5 to 10 suffice (arXiv:0909.4061, §1.3)."""
SETTLED = 4e-3
"""A pass that lowers the squared error by less than this share of it is the last."""
SINGLE_ABOVE = 1e-2
"""Where the last asked singular value is at least this part of the first, passes are in binary32."""
SINGLE_REST = 1e-4
"""... and the squared error is at least this share of ‖D‖²: the energy lost is then 10^-9 of it or less."""
MIN_PASSES = 2
MAX_PASSES = 8
"""Passes before the last; 2 are three half steps of a power iteration more than a plain sketch."""
DENSE_BELOW = 64
"""Matrices with a side no longer than this, or than the sketch, are decomposed whole."""


class RowBlocks(Protocol):
    """A matrix that can be read any number of times, block of rows by block of rows.

    Attributes:
        shape: (rows, columns).
    """

    @property
    def shape(self) -> tuple[int, int]:
        """See the class."""
        ...

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, block) in order, each float64 of shape (n, columns), together every row once.

        A block may be overwritten once the next one is asked for.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseRows:
    """A matrix in memory as RowBlocks.

    Attributes:
        matrix: shape (rows, columns), any float dtype.
        rows_per_block: how many rows are converted at a time.
    """

    matrix: Tensor
    rows_per_block: int = 1024

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return (int(self.matrix.shape[0]), int(self.matrix.shape[1]))

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows; see RowBlocks."""
        for first in range(0, int(self.matrix.shape[0]), self.rows_per_block):
            yield first, self.matrix[first : first + self.rows_per_block].double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """Leading triplets of a matrix D, and how far they are from it.

    Attributes:
        svd: the triplets.
        total: ‖D‖², the squared Frobenius norm.
        passes: how often D was read.
        sketch: the columns of the sketch, or the shorter side where D was decomposed whole.
    """

    svd: SVD
    total: float
    passes: int
    sketch: int

    @property
    def norm(self) -> float:
        """‖D‖."""
        return sqrt(self.total)

    @property
    def error(self) -> float:
        """‖D − U·S·Vt‖; below 10⁻⁸·‖D‖ only its order of magnitude is known (``residual_norm`` measures)."""
        return sqrt(max(0.0, self.total - float((self.svd.s**2).sum())))


def randomized_svd(
    source: RowBlocks,
    rank: int,
    *,
    seed: int = 0,
    oversampling: int = OVERSAMPLING,
    max_passes: int = MAX_PASSES,
) -> Approximation:
    """Returns the leading triplets of a matrix.

    Shapes: D (rows, columns) gives U (rows, k), S (k,), Vt (k, columns), k = min(rank, rows, columns).
    Dtype:  float64.
    Memory: 8·(rows + 3·columns)·(rank + oversampling) bytes and one block; a matrix whose shorter side is at
        most DENSE_BELOW or the sketch is held whole.
    Source: arXiv:0909.4061, algorithms 4.4 and 5.1.

    Args:
        source: the matrix.
        rank: how many triplets, at least 1.
        seed: of the Gaussian sketch.
        oversampling: columns of the sketch beyond the rank.
        max_passes: at most so many passes before the last.

    Raises:
        ValueError: the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1: {rank}")
    rows, columns = source.shape
    sketch = rank + oversampling
    if min(rows, columns) <= max(DENSE_BELOW, sketch):
        return dense_svd(source, rank)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns, sketch, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0]
    total, caught = squared_norm(source), -1.0
    passes, dtype = 0, torch.float64
    while passes < max_passes and total != 0.0:
        # Transposed: BLAS is twice as fast with the long side last.
        image_t = torch.zeros(sketch, columns, dtype=dtype)
        turned = basis.to(dtype)
        for _, block in source.blocks():
            part = block.to(dtype)
            image_t.addmm_((part @ turned).t(), part)
        passes += 1
        image = image_t.t().double()
        # The eigenvalues of GᵀDᵀDG are the squared singular values of D·G: what this basis has caught.
        gram = basis.t() @ image
        values = torch.linalg.eigvalsh((gram + gram.t()) / 2)[-rank:].clamp(min=0.0)
        now = float(values.sum())
        # Only directions are sought: binary32 finds them where none is much weaker than the first, and as
        # well as it matters where the rest of D is larger by far than its rounding.
        coarse = float(values[0]) > SINGLE_ABOVE**2 * float(values[-1]) and total - now > SINGLE_REST * total
        fine_enough = coarse or dtype == torch.float64
        dtype = torch.float32 if coarse else torch.float64
        basis = torch.linalg.qr(image)[0]
        if passes >= MIN_PASSES and fine_enough and now - caught <= SETTLED * max(total - now, 0.0):
            break
        caught = now
    projected = torch.empty(rows, sketch, dtype=torch.float64)
    for first, block in source.blocks():
        torch.mm(block, basis, out=projected[first : first + block.shape[0]])
    # QR first: its SVD is then of a small square, and the left vectors are orthonormal to rounding.
    q, r = torch.linalg.qr(projected)
    u, s, vt = torch.linalg.svd(r)
    kept = min(rank, rows, columns)
    svd = SVD(u=q @ u[:, :kept], s=s[:kept].clone(), vt=(vt[:kept] @ basis.t()).contiguous())
    return Approximation(svd=normalise_signs(svd), total=total, passes=passes + 1, sketch=sketch)


def dense_svd(source: RowBlocks, rank: int) -> Approximation:
    """Returns the leading triplets of a matrix that is held whole; see ``randomized_svd``."""
    rows, columns = source.shape
    whole = torch.empty(rows, columns, dtype=torch.float64)
    for first, block in source.blocks():
        whole[first : first + block.shape[0]] = block
    total = float(whole.square().sum())
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    svd = SVD(u=u[:, :rank].contiguous(), s=s[:rank].clone(), vt=vt[:rank].contiguous())
    return Approximation(svd=normalise_signs(svd), total=total, passes=1, sketch=min(rows, columns))


def residual_norm(source: RowBlocks, left: Tensor, right: Tensor) -> float:
    """Returns ‖D − L·R‖ in the Frobenius norm, measured in one pass over D.

    Args:
        source: D, (rows, columns).
        left: L, shape (rows, k); the factors as they are stored, so that their rounding is measured too.
        right: R, shape (k, columns).
    """
    left, right = left.double(), right.double()
    total = 0.0
    for first, block in source.blocks():
        difference = torch.addmm(block, left[first : first + block.shape[0]], right, alpha=-1.0)
        total += float(difference.square().sum())
    return sqrt(total)


def squared_norm(source: RowBlocks) -> float:
    """Returns ‖D‖² in one pass."""
    return sum(float(block.square().sum()) for _, block in source.blocks())
