"""Weights built of one trained tile: added to every block of columns, or applied to each block."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_tools.linalg.computed import Computed
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.rotations import inverse_blocks
from adapterhub_tools.linalg.stored_term import TiledTerm
from adapterhub_tools.linalg.surd import Surd

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray
    from adapterhub_tools.linalg.weight import Weight


def tiled_sum(tile: Tensor, weight: Weight, multiplier: float) -> DeltaSum:
    """Returns W'[o, i] = W[o, i] + m·D[i mod r, o mod c]; exact.

    Args:
        tile: D, shape (r, c), c dividing the rows of the weight.
        weight: W, stored as (out, in).
        multiplier: m.
    """
    values = tile.double().t().contiguous()
    down, rank = (int(n) for n in values.shape)
    width = weight.columns
    repeats = -(-width // rank)

    def block(first: int, count: int) -> Tensor:
        rows = values[np.arange(first, first + count) % down]
        return rows.repeat(1, repeats)[:, :width]

    def place(rows: IntArray, columns: IntArray) -> IntArray:
        found: IntArray = (rows % down) * rank + columns % rank
        return found

    term = TiledTerm(
        values=values.flatten(),
        block=block,
        place=place,
        height=weight.rows,
        width=width,
        scale=Surd(coefficient=Fraction(multiplier)),
    )
    return DeltaSum((term,), weight.rows)


def block_affine(blocks: Tensor, weight: Weight, multiplier: float) -> Computed:
    """Returns W'ₐ = W ₐ + m·(Wₐ·Dₐ + Dₐ) for each r×r block of W, a being its block of rows.

    The error is at most (r + 3)·2⁻⁵³·(|W| + m·(|W|·|D| + |D|)) elementwise.

    Args:
        blocks: D, shape (out / r, r, r).
        weight: W, stored as (out, in), both multiples of r.
        multiplier: m.
    """
    tiles = blocks.double()
    rank = int(tiles.shape[-1])

    def compute(block: Tensor, row: int) -> Tensor:
        count = int(block.shape[0])
        at = 0
        while at < count:
            group, inside = divmod(row + at, rank)
            size = min(rank - inside, count - at)
            some = block[at : at + size].view(size, -1, rank)
            some += multiplier * (some @ tiles[group] + tiles[group][inside : inside + size, None, :])
            at += size
        return block

    return Computed(weight.rows, compute)


def block_affine_back(blocks: Tensor, weight: Weight, multiplier: float) -> Computed:
    """Returns W of ``block_affine`` from W': Wₐ = (W'ₐ − m·Dₐ)·(I + m·Dₐ)⁻¹.

    Args:
        blocks: D, shape (out / r, r, r).
        weight: W', stored as (out, in).
        multiplier: m.

    Raises:
        LossyError: I + m·D has no inverse that float64 can hold.
    """
    import torch

    tiles = blocks.double()
    rank = int(tiles.shape[-1])
    backwards = inverse_blocks(tiles + torch.eye(rank, dtype=tiles.dtype), multiplier)

    def compute(block: Tensor, row: int) -> Tensor:
        count = int(block.shape[0])
        at = 0
        while at < count:
            group, inside = divmod(row + at, rank)
            size = min(rank - inside, count - at)
            some = block[at : at + size].view(size, -1, rank)
            added = multiplier * tiles[group][inside : inside + size, None, :]
            some.copy_((some - added) @ backwards[group])
            at += size
        return block

    return Computed(weight.rows, compute)
