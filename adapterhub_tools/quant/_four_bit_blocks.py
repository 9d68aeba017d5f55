"""Blocks of a weight on their way to four bits: their scales and their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapterhub_tools.quant._code_book import CodeBook, largest

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-38
"""What bitsandbytes divides by where a block's largest magnitude is less."""


def block_scales(blocks: Tensor, *, short: bool = False) -> Tensor:
    """Returns the scale of each block: its largest magnitude, float32 (n,).

    Args:
        blocks: bfloat16, float16 or float32 (n, size).
        short: the weight's last block, which is not full; its scale is never below SMALLEST.
    """
    scales = largest(blocks)
    return scales.clamp_(min=SMALLEST) if short else scales


def block_codes(book: CodeBook, blocks: Tensor, scales: Tensor, *, short: bool = False) -> Tensor:
    """Returns the codes of values divided by their block's scale.

    bitsandbytes multiplies full blocks with the reciprocal and divides the last one where it is short, both
    in binary32; the two can differ in the last bit, and then in the code.

    Args:
        book: the values.
        blocks: bfloat16, float16 or float32 (n, size).
        scales: float32 (n,).
        short: the weight's last block, which is not full.

    Returns:
        uint8 (n * size,).
    """
    if short:
        scaled = blocks.to(torch.float32) / scales[:, None]
    else:
        scaled = blocks * torch.reciprocal(scales.clamp(min=SMALLEST))[:, None]
    return book.codes(scaled.view(-1))
