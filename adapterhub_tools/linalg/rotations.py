"""Weights that are rotated block by block along their columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapterhub_tools.errors import LossyError
from adapterhub_tools.linalg.computed import Computed

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.weight import Weight


_WORST_CONDITION = 1e9
"""Beyond it, a float32 weight cannot be computed back to its own precision in float64."""


def inverse_blocks(blocks: Tensor, multiplier: float) -> Tensor:
    """Returns the inverses of (1 − m)·I + m·R for blocks R.

    Args:
        blocks: float64, shape (k, b, b).
        multiplier: m.

    Raises:
        LossyError: one has no inverse, or one that would lose what a float32 holds.
    """
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    whole = (1 - multiplier) * one + multiplier * blocks
    inverse, info = torch.linalg.inv_ex(whole)
    # The sum has an error of order 2^-53 of its parts, however small it is itself.
    condition = whole.flatten(1).norm(dim=1).clamp(min=1) * inverse.flatten(1).norm(dim=1)
    worst = float(condition.max())
    if bool(info.any()) or not worst <= _WORST_CONDITION:
        raise LossyError.of(
            "singular",
            f"a block of the adapter has the condition number {worst:.1g}, so the weights that it mixed "
            "cannot be computed back.",
            remedy="Use the base itself.",
        )
    result: Tensor = inverse
    return result


def rotate_columns(block: Tensor, rotations: Tensor) -> Tensor:
    """Returns the block times a block-diagonal matrix, from the right.

    Args:
        block: shape (n, k·b).
        rotations: shape (k, b, b), or (1, b, b) for the same one k times.
    """
    size = int(rotations.shape[-1])
    parts = block.reshape(block.shape[0], -1, size)
    if rotations.shape[0] == 1:
        return (parts @ rotations[0]).reshape(block.shape)
    return (parts.transpose(0, 1) @ rotations).transpose(0, 1).reshape(block.shape)


def rotated_inputs(rotations: Tensor, weight: Weight, multiplier: float) -> Computed:
    """Returns W·Rᵀ for a weight stored as (out, in…), R block-diagonal.

    The error of an element is at most (b + 2)·2⁻⁵³·|W|·|R|ᵀ. Any rows can be taken alone.

    Args:
        rotations: the blocks of R, float64, shape (k, b, b), or (1, b, b) for the same one everywhere.
        weight: W.
        multiplier: of W' − W.
    """
    turned = rotations.transpose(1, 2).contiguous()
    return Computed(weight.rows, lambda block, _: rotate_columns(block, turned), multiplier)


def rotated_outputs(rotations: Tensor, weight: Weight, multiplier: float) -> Computed:
    """Returns the rows of W, stored as (rows, width), each times a block-diagonal matrix R.

    Args:
        rotations: the blocks of R, float64, shape (k, b, b), or (1, b, b) for the same one everywhere.
        weight: W, an embedding.
        multiplier: of W' − W.
    """
    return Computed(weight.rows, lambda block, _: rotate_columns(block, rotations), multiplier)
